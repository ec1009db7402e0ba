#include "runtime/runner/reported.hpp"

#include <fmt/format.h>

#include <fstream>
#include <optional>
#include <orthrus/error.hpp>
#include <regex>
#include <utility>

namespace orthrus::runner {
namespace {

Json parse(const std::string& line) {
  Json value = Json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!value.is_discarded()) return value;
  static const std::regex bare(R"(([:,\[]\s*)(NaN|-?Infinity|-?inf|nan)\b)");
  return Json::parse(std::regex_replace(line, bare, "$1\"$2\""), nullptr, false);
}

/// Of a key that may be missing, or no number; "NaN" and infinities are numbers.
std::optional<double> number_at(const Json& line, const std::string& key) {
  const auto found = line.find(key);
  if (found == line.end() || found->is_null()) return {};
  if (found->is_number()) return found->get<double>();
  if (!found->is_string()) return {};
  const auto& text = found->get_ref<const std::string&>();
  const double infinity = std::numeric_limits<double>::infinity();
  if (text == "NaN" || text == "nan") return std::nan("");
  if (text == "inf" || text == "Infinity") return infinity;
  if (text == "-inf" || text == "-Infinity") return -infinity;
  return {};
}

bool holds(const Expression& diverged, double loss, double first, double step) {
  return diverged.truth([&](const std::string& name) -> std::optional<Value> {
    if (name == "loss") return loss;
    if (name == "loss0") return first;
    if (name == "step") return step;
    return {};
  });
}

}  // namespace

Json summary(const Trial& trial, int attempt, const std::string& state, const std::string& message,
             const Score* score, const Progress& progress) {
  Json out{{"t", "summary"}, {"trial", trial.id},      {"index", trial.index},
           {"state", state}, {"params", trial.params}, {"role", trial.role}};
  for (const char* const key :
       {"steps", "examples", "tokens", "wall_s", "final_val", "best_val", "steps_to_target",
        "steps_to_target_lo", "steps_to_target_hi", "train_loss"})
    out[key] = nullptr;
  if (score != nullptr) {
    out["steps"] = progress.steps;
    out["examples"] = progress.examples;
    if (progress.tokens >= 0) out["tokens"] = progress.tokens;
    if (progress.wall_s >= 0) out["wall_s"] = progress.wall_s;
    out["final_val"] = number(score->value());
    out["best_val"] = number(score->best());
    if (progress.steps > 0) out["train_loss"] = number(progress.train_loss);
  }
  if (score != nullptr && score->reached()) {
    out["steps_to_target"] = score->steps_to_target();
    out["steps_to_target_lo"] = score->low();
    out["steps_to_target_hi"] = score->high();
  }
  out["message"] = message;
  out["attempt"] = attempt;
  return out;
}

std::vector<Json> read_evaluations(const std::filesystem::path& file) {
  std::vector<Json> out;
  std::ifstream in(file, std::ios::binary);
  std::int64_t number = 0;
  for (std::string text; std::getline(in, text);) {
    ++number;
    Json line = parse(text);
    if (!line.is_object() || line.value("t", Json()) != "eval") continue;
    const auto step = line.find("step");
    if (step == line.end() || !step->is_number_integer()) {
      throw DataError(fmt::format("{}:{}: step: an eval line has the number of steps done",
                                  file.string(), number));
    }
    while (!out.empty() && out.back()["step"].get<std::int64_t>() >= step->get<std::int64_t>())
      out.pop_back();
    out.push_back(std::move(line));
  }
  return out;
}

Reported judge(const Study& study, const Trial& trial, const std::vector<Json>& evaluations) {
  Reported out{"", "", false, Score(study), {0, 0, std::nan("")}};
  const Expression diverged(study.diverged);
  double first_loss = std::nan("");
  const auto decide = [&](const char* state, const std::string& message) {
    out.decided = true;
    out.state = state;
    out.message = message;
  };
  for (const Json& line : evaluations) {
    const auto step = line["step"].get<std::int64_t>();
    if (trial.steps > 0 && step > trial.steps) {
      out.decided = true;
      break;
    }
    out.progress.steps = step;
    out.progress.examples = static_cast<std::int64_t>(
        number_at(line, "examples").value_or(static_cast<double>(step * trial.batch)));
    if (const auto tokens = number_at(line, "tokens"); tokens && std::isfinite(*tokens))
      out.progress.tokens = static_cast<std::int64_t>(*tokens);
    std::optional<double> loss = number_at(line, "train_loss");
    if (loss) out.progress.train_loss = *loss;
    if (!loss) loss = number_at(line, "val_loss");
    if (loss && std::isnan(first_loss)) first_loss = *loss;
    const std::optional<double> value = number_at(line, study.metric);
    if (value) out.score.add(step, *value);
    if (value && !std::isfinite(*value)) {
      decide("diverged", study.metric + " is not finite");
    } else if (loss && holds(diverged, *loss, first_loss, static_cast<double>(step))) {
      decide("diverged", "stop.diverged: " + study.diverged);
    } else if (value && step <= 0 && out.score.meets(*value)) {
      decide("failed", "search.metric.target: reached before the first step");
    } else if (out.score.reached() && study.stop_on_target) {
      decide("complete", "");
    }
    if (out.decided) return out;
  }
  if (!std::isnan(out.score.value()))
    out.state = study.has_target() && !out.score.reached() ? "censored" : "complete";
  return out;
}

}  // namespace orthrus::runner
