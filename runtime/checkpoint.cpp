#include "runtime/checkpoint.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <orthrus/error.hpp>
#include <random>
#include <set>
#include <span>

#include "kernels/bf16.hpp"
#include "kernels/device_memory.hpp"
#include "runtime/agree.hpp"
#include "runtime/engine.hpp"
#include "runtime/safetensors.hpp"

namespace orthrus::runtime {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr const char* kFormat = "orthrus-checkpoint";

/// File names in a manifest are ours: nothing in them leads anywhere else.
bool is_plain_name(const std::string& name) {
  return !name.empty() && name.size() < 128 && name.front() != '.' &&
         std::all_of(name.begin(), name.end(), [](unsigned char c) {
           return std::isalnum(c) != 0 || c == '.' || c == '_' || c == '-';
         });
}

/// a·b + c of sizes, or -1 when that leaves 62 bits.
Index checked_fused(Index a, Index b, Index c) {
  Index product = 0;
  Index sum = 0;
  if (a < 0 || b < 0 || c < 0 || __builtin_mul_overflow(a, b, &product) ||
      __builtin_add_overflow(product, c, &sum) || sum > (Index{1} << 62)) {
    return -1;
  }
  return sum;
}

/// Elements of state `key` (or the weights) of a parameter; -1 when the numbers do not fit.
Index extent_of(const CheckpointParameter& p, const std::string& key) {
  for (std::size_t k = 0; k < p.keys.size() && k < p.lines.size(); ++k) {
    if (p.keys[k] != key || p.lines[k].empty()) continue;
    Index sum = 0;
    for (const Index n : p.lines[k]) sum = sum < 0 ? -1 : checked_fused(1, n, sum);
    return sum;
  }
  Index size = 1;
  for (const Index n : p.shape) size = size < 0 ? -1 : checked_fused(size, n, 0);
  return size;
}

std::string dtype_text(DType dtype) {
  if (dtype == DType::u8) return safetensors_name(CodeFormat::int8);  // of a momentum
  return dtype == DType::bf16 ? "BF16" : "F32";
}
std::string dtype_text(const WeightFormat& format) {
  return format.quantized() ? safetensors_name(format.grid->format) : dtype_text(format.dtype);
}
/// Of a piece of `key`; empty when the parameter's format is none of ours.
std::string dtype_of(const CheckpointParameter& p, const std::string& key) {
  if (key == "mantissa") return dtype_text(DType::bf16);
  const auto format = format_of(p, key);
  return format ? dtype_text(*format) : "";
}

bool are_scales(const std::string& key) { return key == "scales" || key == scales_of_momentum; }

void check_scales(const std::filesystem::path& file, const std::string& parameter,
                  std::span<const std::byte> bytes) {
  for (std::size_t at = 0; at + sizeof(float) <= bytes.size(); at += sizeof(float)) {
    float scale = 0;
    std::memcpy(&scale, bytes.data() + at, sizeof scale);
    if (std::isfinite(scale) && scale > 0) continue;
    throw DataError(file.string() + ": a scale of '" + parameter + "' is " + std::to_string(scale) +
                    ", not a positive number");
  }
}

/// A manifest may be anybody's: every piece lies inside its tensor, and no tensor is larger than
/// the files.
void check_regions(const Manifest& m, const std::filesystem::path& file) {
  Index bytes = 0;
  for (const CheckpointFile& f : m.files) bytes = std::max<Index>(bytes, 0) + f.bytes;
  std::map<std::string, const CheckpointParameter*> named;
  for (const CheckpointParameter& p : m.parameters) {
    const Index size = extent_of(p, "weights");
    if (p.lines.size() != p.keys.size() || size < 0 || size > bytes) {
      throw DataError(file.string() + ": parameter '" + p.name + "' is larger than the files");
    }
    named[p.name] = &p;
  }
  for (const CheckpointPiece& p : m.pieces) {
    const auto it = named.find(p.parameter);
    const Index extent = it == named.end() ? -1 : extent_of(*it->second, p.key);
    const std::string dtype = it == named.end() ? "" : dtype_of(*it->second, p.key);
    // The element after the last one.
    const Index end =
        p.rows < 1 ? p.first
                   : checked_fused(p.rows - 1, p.distance, checked_fused(1, p.first, p.cols));
    if (p.file < 0 || static_cast<std::size_t>(p.file) >= m.files.size() || p.rows < 0 ||
        p.cols < 0 || p.first < 0 || (p.rows > 1 && p.distance < p.cols) || end < 0 ||
        end > extent || dtype.empty() || p.dtype != dtype) {
      throw DataError(file.string() + ": piece '" + p.tensor + "' does not fit its parameter");
    }
  }
}

}  // namespace

std::optional<WeightFormat> format_of(const CheckpointParameter& p, const std::string& key) {
  if (key == "weights") return WeightFormat::named(p.format);
  if (key != "momentum") return WeightFormat{};
  const auto format = WeightFormat::named(p.momentum);
  return format && is_of_momentum(*format) ? format : std::nullopt;
}

std::string manifest_text(const Manifest& m) {
  Json doc;
  doc["format"] = kFormat;
  doc["version"] = Manifest::version;
  doc["ranks"] = m.ranks;
  doc["step"] = m.step;
  doc["updates"] = m.updates;
  doc["lr_multiplier"] = m.lr_multiplier;
  doc["plan_hash"] = m.plan_hash;
  doc["config_hash"] = m.config_hash;
  doc["user"] = m.user;
  for (const CheckpointFile& f : m.files)
    doc["files"].push_back({{"name", f.name}, {"bytes", f.bytes}});
  for (const CheckpointParameter& p : m.parameters) {
    doc["parameters"].push_back({{"name", p.name},
                                 {"shape", p.shape},
                                 {"format", p.format},
                                 {"rule", p.rule},
                                 {"keys", p.keys},
                                 {"lines", p.lines}});
    if (p.momentum != "f32") doc["parameters"].back()["momentum"] = p.momentum;
  }
  for (const CheckpointPiece& p : m.pieces) {
    doc["pieces"].push_back({{"parameter", p.parameter},
                             {"key", p.key},
                             {"region", {p.first, p.rows, p.cols, p.distance}},
                             {"file", p.file},
                             {"tensor", p.tensor},
                             {"dtype", p.dtype},
                             {"xxh3", p.xxh3}});
  }
  if (!m.parameter_noise.empty()) {
    doc["noise"] = {
        {"parameters", m.parameter_noise}, {"groups", m.group_noise}, {"model", m.model_noise}};
  }
  for (const auto& [name, g] : m.geometry) {
    const auto& a = g.advisor;
    doc["geometry"][name] = {
        {"euclidean", g.euclidean},
        {"advisor", {a.log_ratio, a.weight, a.above, a.below, static_cast<int>(a.advice)}}};
  }
  if (m.next_look > 0) doc["next_look"] = m.next_look;
  if (!m.activations.empty()) doc["activations"] = m.activations;
  const std::string body = doc.dump();
  doc["sha256"] = sha256_hex(body.data(), body.size());
  return doc.dump();
}

Manifest read_manifest(const fs::path& directory) {
  const fs::path file = directory / "manifest.json";
  const std::string text = read_file(file, std::int64_t{1} << 30);
  Manifest m;
  try {
    Json doc = Json::parse(text);
    if (!doc.is_object() || doc.value("format", "") != kFormat) {
      throw DataError(file.string() + ": not an Orthrus checkpoint");
    }
    const int version = doc.at("version").get<int>();
    if (version != Manifest::version) {
      throw DataError(file.string() + ": format version " + std::to_string(version) +
                      "; this build reads version " + std::to_string(Manifest::version));
    }
    const std::string digest = doc.at("sha256").get<std::string>();
    doc.erase("sha256");
    const std::string body = doc.dump();
    if (digest != sha256_hex(body.data(), body.size())) {
      throw DataError(file.string() + ": its SHA-256 does not match: the manifest is damaged");
    }
    m.ranks = doc.at("ranks").get<std::int64_t>();
    m.step = doc.at("step").get<std::int64_t>();
    m.updates = doc.at("updates").get<std::int64_t>();
    m.lr_multiplier = doc.at("lr_multiplier").get<double>();
    m.plan_hash = doc.at("plan_hash").get<std::string>();
    m.config_hash = doc.at("config_hash").get<std::string>();
    m.user = doc.at("user").get<std::map<std::string, std::string>>();
    for (const Json& f : doc.at("files")) {
      m.files.push_back({f.at("name").get<std::string>(), f.at("bytes").get<std::int64_t>()});
    }
    for (const Json& p : doc.at("parameters")) {
      m.parameters.push_back(
          {p.at("name").get<std::string>(), p.at("shape").get<std::vector<Index>>(),
           p.at("format").get<std::string>(), p.at("rule").get<std::string>(),
           p.at("keys").get<std::vector<std::string>>(),
           p.at("lines").get<std::vector<std::vector<Index>>>(), p.value("momentum", "f32")});
    }
    if (const auto noise = doc.find("noise"); noise != doc.end()) {
      m.parameter_noise =
          noise->at("parameters").get<std::map<std::string, Manifest::NoiseTrend>>();
      m.group_noise = noise->at("groups").get<std::vector<Manifest::NoiseTrend>>();
      m.model_noise = noise->at("model").get<Manifest::NoiseTrend>();
    }
    if (const auto geometry = doc.find("geometry"); geometry != doc.end()) {
      for (const auto& [name, g] : geometry->items()) {
        const Json& a = g.at("advisor");
        const double euclidean = g.at("euclidean").get<double>();
        const int advice = a.at(4).get<int>();
        if (!(euclidean >= 0) || advice < 0 || advice > 2) {
          throw DataError(file.string() + ": geometry of '" + name + "' is none");
        }
        m.geometry[name] = {
            euclidean,
            {a.at(0).get<double>(), a.at(1).get<double>(), a.at(2).get<int>(), a.at(3).get<int>(),
             static_cast<studies::GeometryAdvisor::Advice>(advice)}};
      }
    }
    m.next_look = doc.value("next_look", std::int64_t{0});
    if (const auto list = doc.find("activations"); list != doc.end()) {
      m.activations = list->get<std::map<std::string, std::vector<float>>>();
    }
    for (const Json& p : doc.at("pieces")) {
      const auto region = p.at("region").get<std::array<Index, 4>>();
      m.pieces.push_back({p.at("parameter").get<std::string>(), p.at("key").get<std::string>(),
                          region[0], region[1], region[2], region[3], p.at("file").get<int>(),
                          p.at("tensor").get<std::string>(), p.at("dtype").get<std::string>(),
                          p.at("xxh3").get<std::string>()});
    }
  } catch (const nlohmann::json::exception& e) {
    throw DataError(file.string() + ": " + e.what());
  }
  for (const CheckpointFile& f : m.files) {
    if (!is_plain_name(f.name))
      throw DataError(file.string() + ": '" + f.name + "' is no file name");
    const fs::path path = directory / f.name;
    std::error_code error;
    const auto status = fs::symlink_status(path, error);
    if (!fs::is_regular_file(status)) {
      throw DataError(path.string() +
                      ": the manifest names it, but it is not there as a regular file");
    }
    const auto bytes = fs::file_size(path, error);
    if (error || static_cast<std::int64_t>(bytes) != f.bytes) {
      throw DataError(path.string() + ": " + std::to_string(bytes) + " bytes, the manifest says " +
                      std::to_string(f.bytes));
    }
  }
  check_regions(m, file);
  return m;
}

void verify_checkpoint(const fs::path& directory) {
  const Manifest m = read_manifest(directory);
  std::vector<std::unique_ptr<SafetensorsReader>> files;
  for (const CheckpointFile& f : m.files) {
    files.push_back(std::make_unique<SafetensorsReader>(directory / f.name));
  }
  std::vector<std::byte> bytes;
  for (const CheckpointPiece& p : m.pieces) {
    const SafetensorsReader& reader = *files[static_cast<std::size_t>(p.file)];
    const TensorInfo* info = reader.find(p.tensor);
    if (info == nullptr)
      throw DataError(reader.file().string() + ": tensor '" + p.tensor + "' is missing");
    bytes.resize(static_cast<std::size_t>(info->end - info->begin));
    reader.read(*info, 0, info->end - info->begin, bytes.data());
    if (xxh3_hex(bytes.data(), bytes.size()) != p.xxh3) {
      throw DataError(reader.file().string() + ": tensor '" + p.tensor +
                      "' is damaged (its digest differs)");
    }
    if (are_scales(p.key)) check_scales(reader.file(), p.parameter, bytes);
  }
}

std::vector<fs::path> list_checkpoints(const fs::path& directory) {
  std::vector<std::pair<std::int64_t, fs::path>> found;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(directory, error)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with("step-") || name.find(".tmp-") != std::string::npos) continue;
    try {
      found.emplace_back(read_manifest(entry.path()).step, entry.path());
    } catch (const Error&) {
      continue;  // `verify` says what is wrong with it
    }
  }
  std::sort(found.begin(), found.end(), std::greater<>());
  std::vector<fs::path> paths;
  for (auto& [step, path] : found) paths.push_back(std::move(path));
  return paths;
}

}  // namespace orthrus::runtime

namespace orthrus {
namespace {

namespace fs = std::filesystem;
using runtime::CheckpointPiece;

/// What one segment keeps, piece by piece: f(key, region in the parameter's tensor, view). What
/// several ranks keep alike is `to_save` on one of them.
template <class F>
void for_each_state(const runtime::Plan& plan, const runtime::OwnSegment& own, bool to_save,
                    F&& f) {
  const runtime::Group& g = plan.groups[static_cast<std::size_t>(own.group)];
  const auto specs = g.rule->state();
  for (std::size_t k = 0; k < specs.size(); ++k) {
    const optim::StateSpec& spec = specs[k];
    const MatrixView& view = own.state[k];
    if (k == 0 && g.momentum.quantized() && own.size() > 0) {  // before its codes
      const QuantizedView codes = g.momentum.view(view.data, own.rows, own.cols);
      const Index line = plan.row_length[static_cast<std::size_t>(own.segment.parameter)];
      f(std::string(runtime::scales_of_momentum), g.momentum.scale_region(own.region(), line),
        runtime::scales_of(codes, *g.momentum.grid));
    }
    if (!spec.of_matrix() || own.segment.matrix < 0) {
      if (own.size() > 0) f(std::string(spec.name), own.region(), view);
    } else if (view.size() > 0 && (!to_save || runtime::saves_state(plan, own, spec))) {
      f(std::string(spec.name), runtime::lines_region(plan, own, spec), view);
    }
  }
  if (g.master && own.size() > 0) f("master", own.region(), own.master);
  if (own.low.data != nullptr) f("mantissa", own.region(), own.low);
}

/// The scales of a segment among those of its parameter.
Region scale_region(const runtime::Plan& plan, const runtime::Segment& s) {
  const auto i = static_cast<std::size_t>(s.parameter);
  return plan.group(s.parameter).format.scale_region(s.region, plan.row_length[i]);
}

std::vector<runtime::CheckpointParameter> parameters_of(const runtime::Plan& plan) {
  std::vector<runtime::CheckpointParameter> list;
  for (std::size_t i = 0; i < plan.parameters.size(); ++i) {
    const runtime::Group& g = plan.groups[static_cast<std::size_t>(plan.group_of[i])];
    runtime::CheckpointParameter p{plan.parameters[i].name,
                                   plan.parameters[i].shape,
                                   g.format.name(),
                                   g.config->rule.name,
                                   {},
                                   {},
                                   g.momentum.name()};
    for (const optim::StateSpec& s : g.rule->state()) {
      p.keys.emplace_back(s.name);
      p.lines.emplace_back();
      if (s.extent == optim::StateSpec::Extent::elements) continue;
      for (const runtime::MatrixPlan& m : plan.matrices) {
        if (m.parameter == static_cast<int>(i)) p.lines.back().push_back(s.rows(m.rows, m.cols));
      }
    }
    if (g.master) {
      p.keys.emplace_back("master");
      p.lines.emplace_back();
    }
    if (g.residual == runtime::Residual::mantissa) {
      p.keys.emplace_back("mantissa");
      p.lines.emplace_back();
    }
    const Index line = plan.row_length[i];
    const auto add_scales = [&](const char* key, const runtime::WeightFormat& format) {
      if (!format.quantized()) return;
      p.keys.emplace_back(key);
      p.lines.push_back({format.scale_count(plan.parameters[i].size() / line, line)});
    };
    add_scales("scales", g.format);
    add_scales(runtime::scales_of_momentum, g.momentum);
    list.push_back(std::move(p));
  }
  return list;
}

/// What is kept beside rounded weights, and not by the rule.
bool lies_beside(const std::string& key) {
  return key == "master" || key == "mantissa" || key == "scales";
}

/// Has the rule the same state in both, line for line?
bool same_state(const runtime::CheckpointParameter& a, const runtime::CheckpointParameter& b) {
  const auto of_rule = [](const runtime::CheckpointParameter& p) {
    std::map<std::string, std::vector<Index>> state;
    for (std::size_t k = 0; k < p.keys.size(); ++k) {
      if (!lies_beside(p.keys[k]) && p.keys[k] != runtime::scales_of_momentum) {
        state[p.keys[k]] = p.lines[k];
      }
    }
    return state;
  };
  return a.shape == b.shape && of_rule(a) == of_rule(b);
}

/// All but what depends on how the momentum rests.
runtime::CheckpointParameter without_momentum(runtime::CheckpointParameter p) {
  p.momentum.clear();
  const auto at = std::find(p.keys.begin(), p.keys.end(), runtime::scales_of_momentum);
  if (at == p.keys.end()) return p;
  p.lines.erase(p.lines.begin() + (at - p.keys.begin()));
  p.keys.erase(at);
  return p;
}

std::string random_suffix() {
  std::random_device device;
  char text[17];
  std::snprintf(text, sizeof text, "%08x%08x", device(), device());
  return text;
}

/// Rows of `wanted` that lie in `piece`: copy(offset in wanted, offset in piece, count), both
/// dense.
template <class Copy>
Index intersect(const Region& wanted, const Region& piece, Copy&& copy) {
  Index copied = 0;
  for (Index r = 0; r < wanted.rows; ++r) {
    const Index begin = wanted.first + r * wanted.distance;
    const Index end = begin + wanted.cols;
    // Rows of the piece that may touch [begin, end).
    Index from = 0;
    Index to = piece.rows;
    if (piece.distance > 0) {
      from = std::clamp<Index>((begin - piece.first - piece.cols) / piece.distance, 0, piece.rows);
      to = std::clamp<Index>((end - piece.first) / piece.distance + 1, 0, piece.rows);
    }
    for (Index q = from; q < to; ++q) {
      const Index start = piece.first + q * piece.distance;
      const Index lo = std::max(begin, start);
      const Index hi = std::min(end, start + piece.cols);
      if (lo >= hi) continue;
      copy(r * wanted.cols + (lo - begin), q * piece.cols + (lo - start), hi - lo);
      copied += hi - lo;
    }
  }
  return copied;
}

}  // namespace

void ShardedOptimizer::Impl::save(const std::string& directory,
                                  const std::map<std::string, std::string>& user) {
  check_between_steps("save");
  Communicator& world = setup_;
  fs::path target = fs::path(directory).lexically_normal();
  if (!target.has_filename()) target = target.parent_path();  // a trailing slash
  std::string temporary;
  runtime::agree(world, [&] {
    if (world.rank() != 0) return;
    if (target.empty()) throw ConfigError("save: the directory has no name");
    std::error_code ignored;
    if (fs::exists(fs::symlink_status(target, ignored))) {
      throw IoError(target.string() + ": exists already", ExitCode::cannot_create);
    }
    temporary = target.string() + ".tmp-" + random_suffix();
    if (target.has_parent_path()) {
      std::error_code error;
      fs::create_directories(target.parent_path(), error);
    }
    if (::mkdir(temporary.c_str(), 0700) != 0) {
      const int e = errno;
      throw IoError(
          temporary + ": cannot create: " + std::strerror(e),
          e == EACCES || e == EPERM || e == EROFS ? ExitCode::permission : ExitCode::cannot_create);
    }
  });
  world.broadcast(temporary, 0);

  // Each rank writes its segments; what every replica holds, the first does.
  const auto writes = [this](const runtime::OwnSegment& own) {
    return own.size() > 0 && counts(own);
  };
  const std::string file = "rank-" + std::to_string(mesh_.world.rank()) + ".safetensors";
  nlohmann::json mine = nlohmann::json::array();
  std::int64_t bytes = 0;
  const auto clean_up = [&] {
    if (world.rank() == 0) {
      std::error_code error;
      fs::remove_all(temporary, error);
    }
  };
  try {
    runtime::agree(world, [&] {
      std::vector<runtime::SafetensorsWriter::Tensor> tensors;
      std::vector<CheckpointPiece> pieces;
      std::vector<ConstMatrixView> data;
      const auto add = [&](const runtime::OwnSegment& own, const std::string& key,
                           const Region& region, ConstMatrixView view, const std::string& dtype) {
        CheckpointPiece piece;
        piece.parameter = plan_.parameters[static_cast<std::size_t>(own.segment.parameter)].name;
        piece.key = key;
        piece.first = region.first;
        piece.rows = region.rows;
        piece.cols = region.cols;
        piece.distance = region.distance;
        // Pieces that share a scale have one each.
        const Index first = runtime::are_scales(key) ? own.region().first : region.first;
        piece.tensor = key + "/" + piece.parameter + "/" + std::to_string(first);
        piece.dtype = dtype;
        tensors.push_back({piece.tensor, dtype, {region.rows, region.cols}});
        data.push_back(view);
        pieces.push_back(std::move(piece));
      };
      for (const runtime::OwnSegment& own : own_) {
        const runtime::WeightFormat& format = plan_.buckets[own.bucket].weights;
        if (writes(own)) {
          const std::string dtype = runtime::dtype_text(format);
          add(own, "weights", own.region(), {}, dtype);
          if (format.quantized()) {
            tensors.back().shape = {own.rows, code_pitch(format.grid->format, own.cols)};
            add(own, "scales", scale_region(plan_, own.segment), {}, "F32");
          }
        }
        if (!counts(own)) continue;
        for_each_state(plan_, own, /*to_save=*/true,
                       [&](const std::string& key, const Region& region, MatrixView view) {
                         add(own, key, region, view, runtime::dtype_text(view.dtype));
                       });
      }
      runtime::SafetensorsWriter writer(
          fs::path(temporary) / file, tensors,
          {{"step", std::to_string(steps_)}, {"plan_hash", plan_.hash}});
      std::vector<std::byte> dense;
      std::size_t next = 0;
      for (const runtime::OwnSegment& own : own_) {
        if (!counts(own)) continue;
        if (writes(own)) {
          const runtime::WeightFormat& format = plan_.buckets[own.bucket].weights;
          dense.resize(format.bytes(own.rows, own.cols));
          if (backend_->reaches(dense.data())) {
            write_piece(own, dense.data());
          } else {
            const kernels::DeviceBuffer weights(*backend_, dense.size());
            write_piece(own, weights.data());
            backend_->copy(weights.data(), dense.data(), dense.size());
          }
          backend_->wait();
          if (!format.quantized()) {
            writer.write(dense.data(), std::ssize(dense));
          } else {
            const QuantizedView codes = format.view(dense.data(), own.rows, own.cols);
            writer.write(codes.codes, own.rows * codes.pitch);
            writer.write(codes.scales, runtime::scales_of(codes, *format.grid).size() *
                                           static_cast<Index>(sizeof(float)));
            ++next;
          }
          ++next;
        }
        for (; next < data.size() && data[next].data != nullptr; ++next) {
          const std::size_t n =
              static_cast<std::size_t>(data[next].size()) * bytes_of(data[next].dtype);
          kernels::OnHost<const std::byte> state(*backend_,
                                                 static_cast<const std::byte*>(data[next].data), n);
          writer.write(state.data(), static_cast<std::int64_t>(n));
        }
      }
      const auto digests = writer.finish();
      bytes = writer.file_bytes();
      for (std::size_t i = 0; i < pieces.size(); ++i) {
        const CheckpointPiece& p = pieces[i];
        mine.push_back({p.parameter, p.key, p.first, p.rows, p.cols, p.distance, p.tensor, p.dtype,
                        digests[i]});
      }
    });
    const std::string told = nlohmann::json{{"bytes", bytes}, {"pieces", mine}}.dump();
    const auto all = world.all_gather_strings(told);
    runtime::agree(world, [&] {
      if (world.rank() != 0) return;
      runtime::Manifest m;
      m.ranks = plan_.ranks;
      m.step = steps_;
      m.updates = updates_;
      m.lr_multiplier = lr_multiplier_;
      m.plan_hash = plan_.hash;
      m.config_hash = config_hash(config_);
      m.user = user;
      m.parameters = parameters_of(plan_);
      save_noise(m);
      save_geometry(m);
      for (std::size_t r = 0; r < all.size(); ++r) {
        if (all[r].empty()) continue;
        const auto doc = nlohmann::json::parse(all[r]);
        const int index = static_cast<int>(m.files.size());
        m.files.push_back(
            {"rank-" + std::to_string(r) + ".safetensors", doc["bytes"].get<std::int64_t>()});
        for (const auto& p : doc["pieces"]) {
          m.pieces.push_back({p[0], p[1], p[2], p[3], p[4], p[5], index, p[6], p[7], p[8]});
        }
      }
      runtime::write_file_atomically(fs::path(temporary) / "manifest.json",
                                     runtime::manifest_text(m));
      runtime::sync_directory(temporary);
      std::error_code error;
      fs::rename(temporary, target, error);
      if (error) {
        throw IoError(temporary + ": cannot rename to " + target.string() + ": " + error.message());
      }
      runtime::sync_directory(target.has_parent_path() ? target.parent_path() : fs::path("."));
    });
  } catch (...) {
    clean_up();
    throw;
  }
}

std::map<std::string, std::string> ShardedOptimizer::Impl::load(const std::string& directory,
                                                                bool convert) {
  check_between_steps("load");
  Communicator& world = setup_;
  runtime::Manifest m;
  std::vector<bool> converted(parameters_.size(), false);
  std::vector<bool> momentum_converted(parameters_.size(), false);
  std::map<std::string, const runtime::CheckpointParameter*> saved_as;
  runtime::agree(world, [&] {
    m = runtime::read_manifest(directory);
    for (const auto& p : m.parameters) saved_as[p.name] = &p;
    // All differences at once, not only the first.
    std::string differences;
    const auto differs = [&](const std::string& what) { differences += "\n  " + what; };
    const auto here = parameters_of(plan_);
    auto saved = saved_as;
    for (std::size_t i = 0; i < here.size(); ++i) {
      const runtime::CheckpointParameter p = without_momentum(here[i]);
      const auto it = saved.find(p.name);
      if (it == saved.end()) {
        differs("'" + p.name + "' is not in the checkpoint");
        continue;
      }
      const runtime::CheckpointParameter s = without_momentum(*it->second);
      momentum_converted[i] = it->second->momentum != here[i].momentum;
      if (momentum_converted[i] && !convert) {
        differs("'" + p.name + "' has a momentum of " + it->second->momentum +
                " in the checkpoint, of " + here[i].momentum + " here (load can convert it)");
      }
      if (s.shape != p.shape) differs("'" + p.name + "' has another shape in the checkpoint");
      const bool is_other = s.format != p.format || s.keys != p.keys;
      if (convert && is_other && s.rule == p.rule && same_state(s, p)) {
        if (plan_.parameters[i].held()) {
          differs("'" + p.name + "' rests in the trainer's shards, which are not converted");
        }
        converted[i] = true;
        saved.erase(it);
        continue;
      }
      if (s.format != p.format) {
        differs("'" + p.name + "' is " + s.format + " in the checkpoint, " + p.format +
                " here (load can convert it)");
      }
      if (s.rule != p.rule || s.keys != p.keys) {
        differs("'" + p.name + "' was updated by " + s.rule + " in the checkpoint, by " + p.rule +
                " here (or with other state)");
      } else if (s.lines != p.lines) {
        differs("'" + p.name + "' was split into other matrices in the checkpoint");
      }
      saved.erase(it);
    }
    for (const auto& [name, p] : saved) differs("'" + name + "' is in the checkpoint only");
    if (!differences.empty()) {
      throw ConfigError(directory + ": the checkpoint is of another model:" + differences);
    }
  });

  // Nothing is changed before everything has been read.
  std::vector<std::vector<float>> weights(parameters_.size());
  struct Shard {
    std::size_t bucket;
    const runtime::Segment* segment;
    std::vector<float> values, scales;
  };
  std::vector<Shard> shards;  // ZeRO-3
  struct Codes {
    std::vector<std::byte> codes;
    std::vector<float> scales;
  };
  std::vector<Codes> codes_of_trainer(parameters_.size());
  std::vector<std::vector<float>> scales(own_.size());
  const auto is_new = [&](std::size_t own) {
    return converted[static_cast<std::size_t>(own_[own].segment.parameter)];
  };
  const auto has_new_momentum = [&](std::size_t own) {
    return momentum_converted[static_cast<std::size_t>(own_[own].segment.parameter)];
  };
  std::vector<std::vector<std::vector<float>>> states(own_.size());
  runtime::agree(world, [&] {
    std::vector<std::unique_ptr<runtime::SafetensorsReader>> files(m.files.size());
    std::map<std::pair<std::string, std::string>, std::vector<const CheckpointPiece*>> pieces;
    for (const CheckpointPiece& p : m.pieces) pieces[{p.parameter, p.key}].push_back(&p);
    std::vector<float> values;
    std::vector<std::byte> bytes;
    const auto file_of = [&](const CheckpointPiece& p) -> const runtime::SafetensorsReader& {
      auto& reader = files[static_cast<std::size_t>(p.file)];
      if (reader == nullptr) {
        reader = std::make_unique<runtime::SafetensorsReader>(
            fs::path(directory) / m.files[static_cast<std::size_t>(p.file)].name);
      }
      return *reader;
    };
    /// bytes ← those of a piece, `width` a row.
    const auto read_bytes = [&](const CheckpointPiece& p, Index width) {
      const runtime::SafetensorsReader& reader = file_of(p);
      const runtime::TensorInfo* info = reader.find(p.tensor);
      if (info == nullptr || info->dtype != p.dtype || info->end - info->begin != p.rows * width) {
        throw DataError(reader.file().string() + ": tensor '" + p.tensor +
                        "' is not what the manifest says");
      }
      bytes.resize(static_cast<std::size_t>(info->end - info->begin));
      reader.read(*info, 0, info->end - info->begin, bytes.data());
      if (runtime::xxh3_hex(bytes.data(), bytes.size()) != p.xxh3) {
        throw DataError(reader.file().string() + ": tensor '" + p.tensor +
                        "' is damaged (its digest differs)");
      }
    };
    const auto host = kernels::open_backend("reference");
    std::vector<float> factors;
    /// f(codes and scales of a piece, their grid).
    const auto read_codes = [&](const CheckpointPiece& p, auto&& f) {
      const bool of_weights = p.key == "weights";
      const auto id = static_cast<std::size_t>(
          std::find_if(parameters_.begin(), parameters_.end(),
                       [&](const Parameter& q) { return q.name == p.parameter; }) -
          parameters_.begin());
      const auto format = *runtime::format_of(*saved_as.at(p.parameter), p.key);
      const Region region{p.first, p.rows, p.cols, p.distance};
      const Region wanted = format.scale_region(region, plan_.row_length[id]);
      const auto& candidates =
          pieces[{p.parameter, of_weights ? "scales" : runtime::scales_of_momentum}];
      const auto of = std::find_if(candidates.begin(), candidates.end(), [&](const auto* q) {
        return q->file == p.file && Region{q->first, q->rows, q->cols, q->distance} == wanted;
      });
      if (p.dtype != runtime::safetensors_name(format.grid->format) || of == candidates.end()) {
        throw DataError(file_of(p).file().string() + ": tensor '" + p.tensor +
                        "' is not what the manifest says, or has no scales");
      }
      read_bytes(**of, wanted.cols * static_cast<Index>(sizeof(float)));
      factors.resize(static_cast<std::size_t>(wanted.size()));
      std::memcpy(factors.data(), bytes.data(), bytes.size());
      runtime::check_scales(file_of(p).file(), p.parameter, bytes);
      const Index pitch = code_pitch(format.grid->format, p.cols);
      read_bytes(p, pitch);
      const bool shared = format.grid->extent == Grid::Extent::tensor;
      f(ConstQuantizedView{bytes.data(), pitch, factors.data(), shared ? 0 : wanted.cols, p.rows,
                           p.cols},
        *format.grid);
    };
    const auto read = [&](const CheckpointPiece& p) {
      if (p.dtype != "F32" && p.dtype != "BF16") {
        values.resize(static_cast<std::size_t>(p.rows * p.cols));
        return read_codes(p, [&](const ConstQuantizedView& codes, const Grid& grid) {
          host->dequantize(codes, grid, matrix_view(values.data(), p.rows, p.cols));
        });
      }
      const DType dtype = p.dtype == "BF16" ? DType::bf16 : DType::f32;
      read_bytes(p, p.cols * static_cast<Index>(bytes_of(dtype)));
      values.resize(static_cast<std::size_t>(p.rows * p.cols));
      if (dtype == DType::f32) {
        std::memcpy(values.data(), bytes.data(), bytes.size());
      } else {
        const auto* const narrow = reinterpret_cast<const BFloat16*>(bytes.data());
        std::transform(narrow, narrow + values.size(), values.begin(), kernels::to_float);
      }
    };
    const auto fetch = [&](const std::string& parameter, const std::string& key,
                           const Region& wanted, float* out) {
      Index copied = 0;
      // Pieces that share scales have them all.
      std::vector<bool> has(key == "scales" ? static_cast<std::size_t>(wanted.size()) : 0);
      for (const CheckpointPiece* p : pieces[{parameter, key}]) {
        const Region region{p->first, p->rows, p->cols, p->distance};
        bool needed = false;
        intersect(wanted, region, [&](Index, Index, Index) { needed = true; });
        if (!needed) continue;
        read(*p);
        copied += intersect(wanted, region, [&](Index to, Index from, Index count) {
          std::copy_n(values.begin() + from, count, out + to);
          const auto first = has.begin() + (has.empty() ? 0 : to);
          copied -= std::count(first, first + (has.empty() ? 0 : count), true);
          std::fill_n(first, has.empty() ? 0 : count, true);
        });
      }
      if (copied != wanted.size()) {
        throw DataError(directory + ": " + key + " of '" + parameter +
                        "' is incomplete: " + std::to_string(copied) + " of " +
                        std::to_string(wanted.size()) + " elements");
      }
    };
    /// Bit for bit, without their values in between.
    const auto fetch_codes = [&](std::size_t i, Codes& to) {
      const QuantizedView here = trainers_codes(i);
      const std::string& name = parameters_[i].name;
      const Grid& format = *plan_.group(static_cast<int>(i)).format.grid;
      to.codes.resize(static_cast<std::size_t>(here.rows * here.pitch));
      to.scales.resize(static_cast<std::size_t>(runtime::scales_of(here, format).size()));
      const QuantizedView whole = plan_.whole_codes(i, to.codes.data(), to.scales.data());
      Index copied = 0;
      for (const CheckpointPiece* p : pieces[{name, "weights"}]) {
        const Region region{p->first, p->rows, p->cols, p->distance};
        if (region.size() == 0) continue;
        if (!runtime::is_block(format, whole, region)) {
          throw DataError(file_of(*p).file().string() + ": tensor '" + p->tensor +
                          "' cuts weights that share a scale");
        }
        read_codes(*p, [&](const ConstQuantizedView& codes, const Grid& grid) {
          // Shards of a trainer may begin in the middle of a byte.
          runtime::put_piece(codes, grid, region, whole);
        });
        copied += region.size();
      }
      if (copied != whole.rows * whole.cols) {
        throw DataError(directory + ": weights of '" + name +
                        "' are incomplete: " + std::to_string(copied) + " of " +
                        std::to_string(whole.rows * whole.cols) + " codes");
      }
    };
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      if (plan_.weights_sharded() && !plan_.parameters[i].held()) continue;
      if (plan_.parameters[i].as_codes) {
        if (!converted[i]) fetch_codes(i, codes_of_trainer[i]);
        continue;
      }
      const Region wanted = region_here(i);
      weights[i].resize(static_cast<std::size_t>(wanted.size()));
      if (wanted.size() > 0) fetch(parameters_[i].name, "weights", wanted, weights[i].data());
    }
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      if (!converted[i]) continue;
      const auto& keys = saved_as.at(parameters_[i].name)->keys;
      const auto has = [&](const char* key) {
        return std::find(keys.begin(), keys.end(), key) != keys.end();
      };
      const Region whole{0, 1, plan_.parameters[i].size(), plan_.parameters[i].size()};
      weights[i].resize(static_cast<std::size_t>(whole.size()));
      fetch(parameters_[i].name, has("master") ? "master" : "weights", whole, weights[i].data());
      if (!has("mantissa")) continue;
      std::vector<float> low(weights[i].size());
      fetch(parameters_[i].name, "mantissa", whole, low.data());
      for (std::size_t e = 0; e < low.size(); ++e) {
        const auto bits = [](float v) { return std::bit_cast<std::uint32_t>(v); };
        const auto missing = static_cast<std::int16_t>(bits(low[e]) >> 16);
        weights[i][e] =
            std::bit_cast<float>(bits(weights[i][e]) + static_cast<std::uint32_t>(missing));
      }
    }
    for (std::size_t b = 0; b < plan_.buckets.size() && plan_.weights_sharded(); ++b) {
      const runtime::Bucket& bucket = plan_.buckets[b];
      for (const runtime::Segment& piece : bucket.segments) {
        if (bucket.held || piece.size() == 0 || piece.rank % plan_.shard != mesh_.shard.rank() ||
            converted[static_cast<std::size_t>(piece.parameter)]) {
          continue;
        }
        auto& shard = shards.emplace_back(Shard{b, &piece, {}, {}});
        shard.values.resize(static_cast<std::size_t>(piece.size()));
        const auto& name = plan_.parameters[static_cast<std::size_t>(piece.parameter)].name;
        fetch(name, "weights", piece.region, shard.values.data());
        if (!bucket.weights.quantized()) continue;
        const Region of = scale_region(plan_, piece);
        shard.scales.resize(static_cast<std::size_t>(of.size()));
        fetch(name, "scales", of, shard.scales.data());
      }
    }
    for (std::size_t i = 0; i < own_.size(); ++i) {
      const auto& name = plan_.parameters[static_cast<std::size_t>(own_[i].segment.parameter)].name;
      for_each_state(plan_, own_[i], /*to_save=*/false,
                     [&](const std::string& key, const Region& region, MatrixView view) {
                       states[i].emplace_back(static_cast<std::size_t>(view.size()));
                       if (is_new(i) && lies_beside(key)) return;
                       if (key == runtime::scales_of_momentum && has_new_momentum(i)) return;
                       fetch(name, key, region, states[i].back().data());
                     });
      if (own_[i].scales.data == nullptr || own_[i].size() == 0 || is_new(i)) continue;
      const Region of = scale_region(plan_, own_[i].segment);
      scales[i].resize(static_cast<std::size_t>(of.size()));
      fetch(name, "scales", of, scales[i].data());
    }
  });
  // Now it goes to the device, by way of a buffer there if it must.
  const auto put = [this](std::vector<float>& values, auto&& take) {
    if (backend_->reaches(values.data())) {
      return take(Span{values.data(), std::ssize(values), DType::f32});
    }
    const kernels::DeviceBuffer there(*backend_, values.size() * sizeof(float));
    backend_->copy(values.data(), there.data(), there.bytes());
    take(Span{there.data(), std::ssize(values), DType::f32});
    backend_->wait();
  };
  for (Shard& shard : shards) {
    const runtime::WeightFormat& format = plan_.buckets[shard.bucket].weights;
    std::byte* const piece = working_set_->piece(shard.bucket, *shard.segment);
    put(shard.values, [&](Span there) {
      if (!format.quantized()) {
        return backend_->convert(runtime::row(there.data, there.count), 1,
                                 runtime::row(piece, there.count, format.dtype));
      }
      const Region& r = shard.segment->region;
      const QuantizedView codes = format.view(piece, r.rows, r.cols);
      backend_->copy(shard.scales.data(), codes.scales, shard.scales.size() * sizeof(float));
      backend_->quantize(matrix_view(static_cast<float*>(there.data), r.rows, r.cols), *format.grid,
                         {}, codes);
      backend_->wait();
    });
  }
  if (working_set_) working_set_->release_all();
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    if (converted[i]) {
      put(weights[i], [&](Span there) { adopt_weights(i, there.data); });
      continue;
    }
    if (plan_.weights_sharded() && !plan_.parameters[i].held()) continue;
    const Parameter& p = parameters_[i];
    if (plan_.parameters[i].as_codes) {
      const Codes& from = codes_of_trainer[i];
      backend_->copy(from.codes.data(), p.codes, from.codes.size());
      backend_->copy(from.scales.data(), p.scales, from.scales.size() * sizeof(float));
      continue;
    }
    put(weights[i], [&](Span there) {
      if (plan_.parameters[i].held()) {
        backend_->convert(runtime::row(there.data, there.count), 1,
                          runtime::row(p.weights, there.count, p.dtype));
      } else {
        runtime::unpack(there, plan_.parameters[i], p.weights, p.dtype,
                        {0, 1, there.count, there.count}, *backend_);
      }
    });
  }
  mirrors_->deliver_weights();
  for (std::size_t i = 0; i < own_.size(); ++i) {
    std::size_t k = 0;
    for_each_state(
        plan_, own_[i], /*to_save=*/false,
        [&](const std::string& key, const Region&, MatrixView view) {
          std::vector<float>& values = states[i][k++];
          if (is_new(i) && lies_beside(key)) return;
          if (key == runtime::scales_of_momentum && has_new_momentum(i)) return;
          if (key == "momentum" && view.dtype != DType::f32) {
            return put(values, [&](Span there) {
              restore_momentum(
                  own_[i], matrix_view(static_cast<float*>(there.data), own_[i].rows, own_[i].cols),
                  /*with_scales=*/!has_new_momentum(i));
            });
          }
          if (view.dtype == DType::f32) {
            return backend_->copy(values.data(), view.data, values.size() * sizeof(float));
          }
          // 16 bits as they are, whatever number they would be.
          std::vector<std::uint16_t> bits;
          for (const float v : values) {
            bits.push_back(static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(v) >> 16));
          }
          backend_->copy(bits.data(), view.data, bits.size() * sizeof bits[0]);
          backend_->wait();
        });
    if (!scales[i].empty()) {
      backend_->copy(scales[i].data(), own_[i].scales.data, scales[i].size() * sizeof(float));
    }
  }
  backend_->wait();
  find_bounds();
  steps_ = m.step;
  updates_ = m.updates;
  lr_multiplier_ = m.lr_multiplier;
  skipped_in_a_row_ = 0;
  load_noise(m);
  load_geometry(m);
  gradients_->reset();
  return m.user;
}

}  // namespace orthrus
