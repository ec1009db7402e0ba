// orthrus replay: the optimizer alone, on recorded weights and gradients. The way to check a
// migration from another framework, and to compare layouts: contributions are dealt to ranks as
// virtual shards are.
#include <unistd.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <orthrus/error.hpp>
#include <orthrus/orthrus.hpp>

#include "runtime/agree.hpp"
#include "runtime/cli/command.hpp"
#include "runtime/cli/shared_config.hpp"
#include "runtime/safetensors.hpp"
#include "runtime/tree.hpp"

namespace orthrus::cli {
namespace {

namespace fs = std::filesystem;
using runtime::SafetensorsReader;
using runtime::SafetensorsWriter;
using runtime::TensorInfo;

struct Options {
  std::string config, params, grads, out;
  std::vector<std::string> set;
};

/// A tensor of the model, with its buffers.
struct Tensor {
  std::string name;
  std::vector<Index> shape;
  std::vector<float> weights, gradient;
};

std::string step_name(std::int64_t step) {
  char text[40];
  std::snprintf(text, sizeof text, "step-%06lld.safetensors", static_cast<long long>(step));
  return text;
}

std::vector<fs::path> step_files(const std::string& directory) {
  if (!fs::is_directory(directory)) {
    throw ConfigError(directory +
                      ": not a directory (--grads is one with step-000001.safetensors, …)");
  }
  std::vector<fs::path> files;
  while (fs::exists(fs::path(directory) / step_name(std::ssize(files) + 1))) {
    files.push_back(fs::path(directory) / step_name(std::ssize(files) + 1));
  }
  if (files.empty()) throw ConfigError(directory + ": there is no " + step_name(1));
  for (const auto& entry : fs::directory_iterator(directory)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("step-") && name.ends_with(".safetensors") &&
        name > step_name(std::ssize(files))) {
      throw ConfigError(directory + ": there is " + name + ", but no " +
                        step_name(std::ssize(files) + 1));
    }
  }
  return files;
}

/// "name@3" → ("name", 3); "name" → ("name", -1).
std::pair<std::string, Index> contribution(const std::string& tensor) {
  const std::size_t at = tensor.rfind('@');
  if (at == std::string::npos || at + 1 == tensor.size() || tensor.size() - at > 10 ||
      !std::all_of(tensor.begin() + static_cast<std::ptrdiff_t>(at) + 1, tensor.end(),
                   [](unsigned char c) { return std::isdigit(c) != 0; })) {
    return {tensor, -1};
  }
  return {tensor.substr(0, at), std::stoll(tensor.substr(at + 1))};
}

/// How many contributions every gradient of the file is made of: the same for all, 1 for plain
/// names.
Index contributions(const SafetensorsReader& file, const std::vector<Tensor>& model) {
  std::map<std::string, Index> most;
  std::map<std::string, Index> count;
  std::map<std::string, const Tensor*> named;
  for (const Tensor& t : model) named[t.name] = &t;
  for (const TensorInfo& t : file.tensors()) {
    const auto [name, k] = contribution(t.name);
    const auto shape = t.shape.empty() ? std::vector<Index>{1} : t.shape;
    if (named.contains(name) && named[name]->shape != shape) {
      throw DataError(file.file().string() + ": '" + t.name +
                      "' has another shape than its parameter");
    }
    most[name] = std::max(most.contains(name) ? most[name] : -1, k);
    ++count[name];
  }
  Index all = -1;
  for (const Tensor& t : model) {
    if (!count.contains(t.name)) {
      throw DataError(file.file().string() + ": no gradient of '" + t.name + "'");
    }
    const Index k = std::max<Index>(most[t.name] + 1, 1);
    if (count[t.name] != k) {
      throw DataError(file.file().string() + ": '" + t.name + "' has contributions up to @" +
                      std::to_string(most[t.name]) + ", but " + std::to_string(count[t.name]) +
                      " tensors");
    }
    if (all >= 0 && k != all) {
      throw DataError(file.file().string() + ": '" + t.name + "' has " + std::to_string(k) +
                      " contributions, others have " + std::to_string(all));
    }
    all = k;
    count.erase(t.name);
  }
  if (!count.empty()) {
    throw DataError(file.file().string() + ": '" + count.begin()->first +
                    "' is a gradient of no parameter");
  }
  return all;
}

/// Contribution k of `tensor`, as f32.
std::vector<float> read_contribution(const SafetensorsReader& file, const Tensor& tensor, Index k) {
  const TensorInfo* info = file.find(tensor.name + "@" + std::to_string(k));
  if (info == nullptr) info = file.find(tensor.name);
  if (info == nullptr) {
    throw DataError(file.file().string() + ": '" + tensor.name + "@" + std::to_string(k) +
                    "' is missing");
  }
  return file.read_f32(*info);
}

/// Writes what remains: weights, codes, state, and what it took.
void write_result(const fs::path& out, const std::vector<Tensor>& model,
                  const std::map<std::string, ShardedOptimizer::CodesTensor>& codes,
                  const std::map<std::string, ShardedOptimizer::StateTensor>& state,
                  const std::map<std::string, std::string>& metadata) {
  std::vector<SafetensorsWriter::Tensor> tensors;
  std::vector<std::pair<const void*, std::size_t>> data;
  const auto add = [&](const std::string& name, const std::string& dtype, std::vector<Index> shape,
                       const auto& values) {
    tensors.push_back({name, dtype, std::move(shape)});
    data.emplace_back(values.data(), values.size() * sizeof values[0]);
  };
  for (const Tensor& t : model) add(t.name, "F32", t.shape, t.weights);
  for (const auto& [name, t] : codes) {
    add(name + ".codes", runtime::safetensors_name(t.grid.format),
        {t.rows, code_pitch(t.grid.format, t.cols)}, t.codes);
    const Index rows = scale_rows(t.grid, t.rows);
    const Index cols = scale_cols(t.grid, t.cols);
    const bool blocks = t.grid.extent == Grid::Extent::block;
    add(name + ".scales", "F32", blocks ? std::vector{rows, cols} : std::vector{rows}, t.scales);
  }
  for (const auto& [name, t] : state) add(name, "F32", t.shape, t.values);
  const fs::path temporary = out.string() + ".tmp-" + std::to_string(::getpid());
  {
    SafetensorsWriter writer(temporary, tensors, metadata);
    for (const auto& [bytes, size] : data) writer.write(bytes, static_cast<std::int64_t>(size));
    writer.finish();
  }
  std::error_code error;
  fs::rename(temporary, out, error);
  if (error) {
    fs::remove(temporary);
    throw IoError(out.string() + ": cannot write: " + error.message());
  }
}

int replay(const Options& options, Context& context) {
  Communicator world = context.world(60);
  Config config = shared_config(options.config, options.set, world);
  config.train.micro_batches = 1;
  const int ranks = world.size();
  const int rank = world.rank();

  std::vector<Tensor> model;
  std::vector<fs::path> files;
  Index count = 1;
  runtime::agree(world, [&] {
    files = step_files(options.grads);
    const SafetensorsReader params(options.params);
    for (const TensorInfo& t : params.tensors()) {
      const auto shape = t.shape.empty() ? std::vector<Index>{1} : t.shape;
      model.push_back({t.name, shape, params.read_f32(t), {}});
      model.back().gradient.resize(model.back().weights.size());
    }
    for (const fs::path& file : files) {
      const Index k = contributions(SafetensorsReader(file), model);
      if (&file != &files.front() && k != count) {
        throw DataError(file.string() + ": " + std::to_string(k) +
                        " contributions, the steps before have " + std::to_string(count));
      }
      count = k;
    }
    if (config.virtual_shards > 0 && count != config.virtual_shards) {
      throw ConfigError("reproducible.virtual_shards is " + std::to_string(config.virtual_shards) +
                        ", but the gradients in " + options.grads + " are " +
                        std::to_string(count) + " contributions each");
    }
    const fs::path folder = fs::absolute(options.out).parent_path();
    if (!fs::is_directory(folder)) {
      throw IoError(folder.string() + ": no such directory (--out)", ExitCode::cannot_create);
    }
    if (fs::is_directory(options.out)) {
      throw IoError(options.out + ": is a directory (--out)", ExitCode::cannot_create);
    }
    if (::access(folder.c_str(), W_OK) != 0) {
      throw IoError(folder.string() + ": not writable (--out)", ExitCode::permission);
    }
  });

  std::vector<Parameter> parameters;
  for (Tensor& t : model) {
    Parameter p;
    p.name = t.name;
    p.shape = t.shape;
    p.weights = t.weights.data();
    p.gradient = t.gradient.data();
    parameters.push_back(std::move(p));
  }
  Communicator control = world.duplicate("replay");
  ShardedOptimizer optimizer{config, std::move(world), parameters};

  std::vector<int> ids(model.size());
  std::iota(ids.begin(), ids.end(), 0);

  // Leaves are fed one by one; without them this rank's mean counts as 1 of `ranks`.
  const runtime::Leaves mine = runtime::leaf_run(count, ranks, rank);
  const bool leaves = config.virtual_shards > 0;
  const float weight = static_cast<float>(ranks) / static_cast<float>(count);
  std::array<std::int64_t, 3> totals{};  // bytes, messages, skipped
  StepTimes times;
  for (const fs::path& path : files) {
    std::unique_ptr<SafetensorsReader> file;
    runtime::agree(control, [&] { file = std::make_unique<SafetensorsReader>(path); });
    for (Index k = mine.begin; k < mine.end; ++k) {
      // Only this rank reads these; that they are there and fit was checked on all ranks.
      std::vector<std::vector<float>> values;
      for (const Tensor& t : model) values.push_back(read_contribution(*file, t, k));
      if (leaves && k > mine.begin) optimizer.micro_batch(k - mine.begin);
      for (std::size_t i = 0; i < model.size(); ++i) {
        if (leaves) {
          std::copy(values[i].begin(), values[i].end(), model[i].gradient.begin());
        } else {
          // The trainer of this rank averages its own micro-batches.
          for (std::size_t e = 0; e < values[i].size(); ++e) {
            const float scaled = values[i][e] * weight;
            model[i].gradient[e] = k == mine.begin ? scaled : model[i].gradient[e] + scaled;
          }
        }
      }
      if (leaves) {
        for (std::size_t i = 0; i < model.size(); ++i)
          optimizer.gradient_ready(static_cast<int>(i));
      }
    }
    if (mine.size() == 0) {
      for (Tensor& t : model) std::fill(t.gradient.begin(), t.gradient.end(), 0.0F);
    }
    // As often as the plan assumes of a trainer.
    for (std::int64_t k = 0; k < config.gathers && config.zero_stage == 3; ++k) {
      optimizer.gather(ids);
      optimizer.release(ids);
    }
    const StepReport& report = optimizer.step();
    totals[0] += report.bytes_sent;
    totals[1] += report.messages;
    totals[2] += report.skipped ? 1 : 0;
    if (report.skipped && rank == 0) {
      std::fprintf(stderr, "orthrus: %s: skipped: %s\n", path.c_str(), report.skip_reason.c_str());
    }
    times.total += report.ms.total;
    times.lmo += report.ms.lmo;
  }
  control.all_reduce(std::span<std::int64_t>(totals.data(), 2), ReduceOp::sum);
  for (int id = 0; id < std::ssize(model) && config.zero_stage == 3; ++id) {
    Tensor& t = model[static_cast<std::size_t>(id)];
    optimizer.gather({&id, 1});
    optimizer.copy_weights(id, t.weights.data());
    optimizer.release({&id, 1});
  }
  const auto state = optimizer.gather_state();
  const auto codes = optimizer.gather_codes();
  const nlohmann::ordered_json summary = {{"schema", 1},
                                          {"steps", files.size()},
                                          {"ranks", ranks},
                                          {"contributions", count},
                                          {"config_hash", config_hash(config)},
                                          {"plan_hash", optimizer.plan_hash()},
                                          {"skipped", totals[2]},
                                          {"bytes_sent", totals[0]},
                                          {"messages", totals[1]},
                                          {"optimizer_ms", times.total},
                                          {"lmo_ms", times.lmo},
                                          {"out", options.out}};
  runtime::agree(control, [&] {
    if (rank != 0) return;
    write_result(options.out, model, codes, state,
                 {{"config_hash", summary["config_hash"]},
                  {"plan_hash", summary["plan_hash"]},
                  {"ranks", std::to_string(ranks)},
                  {"steps", std::to_string(files.size())},
                  {"bytes_sent", std::to_string(totals[0])},
                  {"messages", std::to_string(totals[1])}});
  });
  if (rank == 0) {
    if (context.json) {
      std::printf("%s\n", summary.dump().c_str());
    } else {
      std::printf(
          "%zu steps on %d ranks: %lld bytes in %lld messages, optimizer %.1f ms; wrote %s\n",
          files.size(), ranks, static_cast<long long>(totals[0]), static_cast<long long>(totals[1]),
          times.total, options.out.c_str());
    }
  }
  return 0;
}

}  // namespace

Run add_replay(CLI::App& app) {
  auto options = std::make_shared<Options>();
  app.add_option("CONFIG", options->config, "Configuration (YAML): schema and groups suffice")
      ->required();
  app.add_option("--params", options->params, "Initial weights (safetensors)")->required();
  app.add_option("--grads", options->grads, "Directory of step-000001.safetensors, …")->required();
  app.add_option("--out", options->out, "Where weights and state go (safetensors)")->required();
  app.add_option("--set", options->set, "key.path=value, over the file")->allow_extra_args(false);
  return [options](Context& context) { return replay(*options, context); };
}

}  // namespace orthrus::cli
