// orthrus ckpt: what checkpoints hold, and whether they are whole.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>
#include <numeric>
#include <orthrus/error.hpp>
#include <set>

#include "runtime/checkpoint.hpp"
#include "runtime/cli/command.hpp"
#include "runtime/safetensors.hpp"

namespace orthrus::cli {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;
using runtime::Manifest;

struct Options {
  std::string directory, other, out;
};

std::int64_t bytes_of(const Manifest& m) {
  std::int64_t sum = 0;
  for (const auto& f : m.files) sum += f.bytes;
  return sum;
}

/// `directory` is a checkpoint, or holds some.
std::vector<fs::path> checkpoints_in(const fs::path& directory) {
  if (fs::exists(directory / "manifest.json")) return {directory};
  if (!fs::is_directory(directory)) throw ConfigError(directory.string() + ": no such directory");
  auto found = runtime::list_checkpoints(directory);
  if (found.empty()) found = runtime::list_checkpoints(directory / "checkpoints");
  return found;
}

int list(const Options& o, Context& context) {
  ordered_json rows = ordered_json::array();
  for (const fs::path& path : checkpoints_in(o.directory)) {
    const Manifest m = runtime::read_manifest(path);
    rows.push_back({{"path", path.string()},
                    {"step", m.step},
                    {"ranks", m.ranks},
                    {"files", m.files.size()},
                    {"bytes", bytes_of(m)},
                    {"parameters", m.parameters.size()},
                    {"plan_hash", m.plan_hash}});
  }
  if (context.json) {
    std::printf("%s\n", rows.dump().c_str());
    return 0;
  }
  std::printf("%10s %6s %6s %14s %11s  %s\n", "step", "ranks", "files", "bytes", "parameters",
              "path");
  for (const auto& r : rows) {
    std::printf("%10lld %6lld %6lld %14lld %11lld  %s\n", r["step"].get<long long>(),
                r["ranks"].get<long long>(), r["files"].get<long long>(),
                r["bytes"].get<long long>(), r["parameters"].get<long long>(),
                r["path"].get<std::string>().c_str());
  }
  if (rows.empty()) std::printf("no checkpoints in %s\n", o.directory.c_str());
  return 0;
}

int verify(const Options& o, Context& context) {
  runtime::verify_checkpoint(o.directory);
  const Manifest m = runtime::read_manifest(o.directory);
  if (context.json) {
    std::printf("%s\n", ordered_json{{"path", o.directory},
                                     {"step", m.step},
                                     {"ok", true},
                                     {"tensors", m.pieces.size()},
                                     {"bytes", bytes_of(m)}}
                            .dump()
                            .c_str());
  } else {
    std::printf("%s: step %lld, %zu tensors in %zu files, %lld bytes: whole\n", o.directory.c_str(),
                static_cast<long long>(m.step), m.pieces.size(), m.files.size(),
                static_cast<long long>(bytes_of(m)));
  }
  return 0;
}

/// Every tensor of a checkpoint in full: "name" for weights, "state/name/key" for the rest.
std::map<std::string, std::pair<std::vector<Index>, std::vector<float>>> assemble(
    const fs::path& path) {
  const Manifest m = runtime::read_manifest(path);
  std::map<std::string, std::vector<Index>> shapes;
  for (const auto& p : m.parameters) shapes[p.name] = p.shape;
  std::map<std::string, std::pair<std::vector<Index>, std::vector<float>>> all;
  std::vector<std::unique_ptr<runtime::SafetensorsReader>> files;
  for (const auto& f : m.files) {
    files.push_back(std::make_unique<runtime::SafetensorsReader>(path / f.name));
  }
  const auto lines_of = [&](const std::string& parameter, const std::string& key) {
    Index lines = 0;
    for (const auto& p : m.parameters) {
      for (std::size_t k = 0; p.name == parameter && k < p.keys.size(); ++k) {
        if (p.keys[k] == key)
          lines = std::accumulate(p.lines[k].begin(), p.lines[k].end(), Index{0});
      }
    }
    return lines;
  };
  std::map<std::string, const runtime::CheckpointParameter*> parameters;
  for (const auto& p : m.parameters) parameters[p.name] = &p;
  const auto find = [&](const runtime::CheckpointPiece& p) -> const runtime::TensorInfo& {
    const auto& reader = *files[static_cast<std::size_t>(p.file)];
    const runtime::TensorInfo* info = reader.find(p.tensor);
    if (info == nullptr || info->elements() != p.rows * p.cols) {
      throw DataError(reader.file().string() + ": tensor '" + p.tensor +
                      "' is not what the manifest says");
    }
    return *info;
  };
  /// What the int8 codes of a momentum stand for.
  const auto read_momentum = [&](const runtime::CheckpointPiece& p, const Grid& grid) {
    const auto& reader = *files[static_cast<std::size_t>(p.file)];
    const runtime::TensorInfo& info = find(p);
    std::vector<std::int8_t> codes(static_cast<std::size_t>(p.rows * p.cols));
    reader.read(info, 0, std::ssize(codes), codes.data());
    const std::string beside =
        runtime::scales_of_momentum + p.tensor.substr(std::min(p.key.size(), p.tensor.size()));
    const auto scales =
        std::find_if(m.pieces.begin(), m.pieces.end(), [&](const runtime::CheckpointPiece& q) {
          return q.key == runtime::scales_of_momentum && q.file == p.file && q.tensor == beside;
        });
    if (scales == m.pieces.end() || scales->rows != p.rows ||
        scales->cols != scale_cols(grid, p.cols)) {
      throw DataError(reader.file().string() + ": tensor '" + p.tensor + "' has no scales");
    }
    const std::vector<float> factors = reader.read_f32(find(*scales));
    std::vector<float> values(codes.size());
    for (Index r = 0; r < p.rows; ++r) {
      for (Index c = 0; c < p.cols; ++c) {
        const auto at = static_cast<std::size_t>(r * p.cols + c);
        values[at] = static_cast<float>(codes[at]) *
                     factors[static_cast<std::size_t>(r * scales->cols + c / grid.block)];
      }
    }
    return values;
  };
  for (const auto& p : m.pieces) {
    if (p.key == runtime::scales_of_momentum) continue;  // part of what they are scales of
    const runtime::TensorInfo& info = find(p);
    auto& [shape, values] =
        all[p.key == "weights" ? p.parameter : "state/" + p.parameter + "/" + p.key];
    if (values.empty()) {
      shape = shapes[p.parameter];
      Index size = 1;
      for (const Index n : shape) size *= n;
      // State with one number per line has a shape of its own.
      if (const Index lines = lines_of(p.parameter, p.key); lines > 0) {
        shape = {lines};
        size = lines;
      }
      values.resize(static_cast<std::size_t>(size));
    }
    const auto format = runtime::format_of(*parameters.at(p.parameter), p.key);
    const std::vector<float> piece = p.key == "momentum" && format->quantized()
                                         ? read_momentum(p, *format->grid)
                                         : files[static_cast<std::size_t>(p.file)]->read_f32(info);
    for (Index r = 0; r < p.rows; ++r) {
      std::copy_n(piece.begin() + r * p.cols, p.cols, values.begin() + p.first + r * p.distance);
    }
  }
  return all;
}

int export_(const Options& o, Context& context) {
  runtime::verify_checkpoint(o.directory);
  const auto all = assemble(o.directory);
  std::vector<runtime::SafetensorsWriter::Tensor> tensors;
  for (const auto& [name, t] : all) tensors.push_back({name, "F32", t.first});
  runtime::SafetensorsWriter writer(o.out, tensors, {{"format", "pt"}});
  for (const auto& [name, t] : all) {
    writer.write(t.second.data(), static_cast<std::int64_t>(t.second.size() * sizeof(float)));
  }
  writer.finish();
  if (context.json) {
    std::printf("%s\n", ordered_json{{"out", o.out}, {"tensors", tensors.size()}}.dump().c_str());
  } else {
    std::printf("wrote %zu tensors to %s\n", tensors.size(), o.out.c_str());
  }
  return 0;
}

int diff(const Options& o, Context& context) {
  const auto a = assemble(o.directory);
  const auto b = assemble(o.other);
  ordered_json rows = ordered_json::array();
  std::set<std::string> names;
  for (const auto& [name, t] : a) names.insert(name);
  for (const auto& [name, t] : b) names.insert(name);
  for (const std::string& name : names) {
    if (!a.contains(name) || !b.contains(name)) {
      rows.push_back({{"tensor", name}, {"only_in", a.contains(name) ? o.directory : o.other}});
      continue;
    }
    const auto& x = a.at(name).second;
    const auto& y = b.at(name).second;
    if (a.at(name).first != b.at(name).first) {
      rows.push_back({{"tensor", name}, {"shapes_differ", true}});
      continue;
    }
    double largest = 0;
    std::int64_t count = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      if (std::memcmp(&x[i], &y[i], sizeof(float)) == 0) continue;
      ++count;
      largest = std::max(largest, std::abs(static_cast<double>(x[i]) - static_cast<double>(y[i])));
    }
    if (count > 0) rows.push_back({{"tensor", name}, {"elements", count}, {"max_abs", largest}});
  }
  if (context.json) {
    std::printf("%s\n", rows.dump().c_str());
  } else {
    for (const auto& r : rows) std::printf("%s\n", r.dump().c_str());
    std::printf("%zu of %zu tensors differ\n", rows.size(), names.size());
  }
  return rows.empty() ? 0 : 1;
}

}  // namespace

Run add_ckpt(CLI::App& app) {
  auto options = std::make_shared<Options>();
  app.require_subcommand(1);
  CLI::App* ls = app.add_subcommand("ls", "Checkpoints in a directory, newest first");
  ls->add_option("DIRECTORY", options->directory, "Run, checkpoint, or directory of checkpoints")
      ->required();
  CLI::App* check = app.add_subcommand("verify", "Read every byte and compare digests");
  check->add_option("CHECKPOINT", options->directory)->required();
  CLI::App* write = app.add_subcommand("export", "All weights and state as one safetensors file");
  write->add_option("CHECKPOINT", options->directory)->required();
  write->add_option("--out", options->out, "File to create")->required();
  CLI::App* compare = app.add_subcommand("diff", "Tensors that differ (exit 1 when some do)");
  compare->add_option("A", options->directory)->required();
  compare->add_option("B", options->other)->required();
  return [=](Context& context) {
    if (context.rank() != 0) return 0;
    if (ls->parsed()) return list(*options, context);
    if (check->parsed()) return verify(*options, context);
    if (write->parsed()) return export_(*options, context);
    return diff(*options, context);
  };
}

}  // namespace orthrus::cli
