// The page of one run.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "runtime/report.hpp"
#include "runtime/report_charts.hpp"
#include "runtime/report_data.hpp"
#include "runtime/report_page.hpp"

namespace orthrus::runtime {
namespace {

using namespace report;

class Tiles {
 public:
  void add(std::string_view name, const std::string& value) {
    if (value.empty() || value == "-") return;
    items_ += fmt::format("<div class=\"tile\"><dt>{}</dt><dd>{}</dd></div>\n", escape(name),
                          escape(value));
  }
  [[nodiscard]] std::string html() const {
    return items_.empty() ? items_ : "<dl class=\"tiles\">\n" + items_ + "</dl>\n";
  }

 private:
  std::string items_;
};

class Pairs {
 public:
  void add(std::string_view name, const std::string& value, bool code = false) {
    if (value.empty() || value == "-") return;
    rows_ += fmt::format("<tr><th scope=\"row\">{}</th><td>{}{}{}</td></tr>\n", escape(name),
                         code ? "<code>" : "", escape(value), code ? "</code>" : "");
  }
  [[nodiscard]] bool empty() const { return rows_.empty(); }
  [[nodiscard]] std::string html() const {
    return "<table class=\"pairs\"><tbody>\n" + rows_ + "</tbody></table>\n";
  }

 private:
  std::string rows_;
};

std::string validation_label(const std::string& key) {
  std::string out = "validation " + key.substr(4);
  std::replace(out.begin(), out.end(), '_', ' ');
  return out;
}

std::string final_figures(const json& summary) {
  Pairs figures;
  const json final = child(summary, "final");
  figures.add("training loss, last step", format_number(number(final, "loss")));
  for (const auto& [key, value] : final.items()) {
    if (key.starts_with("val_") && value.is_number()) {
      figures.add(validation_label(key), format_number(value.get<double>()));
    }
  }
  figures.add("steps", format_count(number(summary, "steps")));
  figures.add("steps skipped", format_count(number(summary, "skipped")));
  figures.add("wall time of this launch", format_seconds(number(summary, "seconds")));
  figures.add("items per second, median", format_number(number(summary, "items_per_s")));
  figures.add("bytes per step, all ranks", format_count(number(summary, "bytes_per_step")));
  figures.add("bytes per step, busiest rank", format_count(number(summary, "bytes_per_step_max")));
  figures.add("messages per step, all ranks", format_count(number(summary, "messages_per_step")));
  figures.add("matrices orthogonalized per step",
              format_count(number(summary, "matrices_per_step")));
  figures.add("optimizer state per rank, most", format_bytes(state_bytes(summary)));
  figures.add("weights hash", text(summary, "weights_hash"), true);
  figures.add("plan hash", text(summary, "plan_hash"), true);
  figures.add("config hash", text(summary, "config_hash"), true);
  return figures.html();
}

std::string configuration(const json& summary) {
  Pairs pairs;
  pairs.add("workload", text(summary, "workload"));
  pairs.add("configuration", text(summary, "config"));
  pairs.add("run directory", text(summary, "run_dir"));
  pairs.add("ranks", format_count(number(summary, "ranks")));
  pairs.add("virtual shards", format_count(number(summary, "virtual_shards")));
  pairs.add("ZeRO stage", format_count(number(summary, "zero_stage")));
  pairs.add("batch per step", format_count(number(summary, "batch")));
  pairs.add("micro-batches per rank", format_count(number(summary, "micro_batches")));
  pairs.add("parameters", format_count(number(summary, "parameters")));
  pairs.add("tensors", format_count(number(summary, "tensors")));
  pairs.add("seed", text(summary, "seed"));
  if (const auto groups = summary.find("groups"); groups != summary.end() && groups->is_array()) {
    std::size_t index = 0;
    for (const json& group : *groups) {
      if (!group.is_object()) continue;
      std::string line = text(group, "rule");
      for (const char* key : {"lr", "norm", "weights", "schedule", "parameters"}) {
        const std::string value = text(group, key);
        if (!value.empty()) line += fmt::format(", {} {}", key, value);
      }
      pairs.add(fmt::format("group {}: {}", index, text(group, "match")), line);
      ++index;
    }
  }
  pairs.add("Orthrus", text(summary, "version"));
  pairs.add("started", text(summary, "started"));
  pairs.add("resumed from step",
            number(summary, "first_step") > 0 ? format_count(number(summary, "first_step")) : "");
  pairs.add("error", text(summary, "error"));
  return pairs.empty() ? std::string{} : pairs.html();
}

std::string median_step(const json& summary) {
  const json optimizer = child(summary, "optimizer_ms");
  struct Part {
    std::string label, doc;
    double ms;
    int color;
  };
  std::vector<Part> parts;
  const double gradient = number(summary, "gradient_ms");
  if (std::isfinite(gradient)) {
    parts.push_back({"gradient", "forward and backward, not the optimizer's", gradient, 7});
  }
  double named = 0;
  for (std::size_t p = 0; p + 1 < phases.size(); ++p) {
    double ms = number(optimizer, phases[p].key);
    if (!std::isfinite(ms)) continue;
    // `update` holds `lmo`; the table shows each millisecond once.
    if (const double lmo = number(optimizer, "lmo"); p == 4 && std::isfinite(lmo))
      ms = std::max(0.0, ms - lmo);
    named += ms;
    parts.push_back({phases[p].label, phases[p].doc, ms, static_cast<int>(p)});
  }
  const double total = number(optimizer, "total");
  if (std::isfinite(total) && total > named) {
    parts.push_back({phases.back().label, phases.back().doc, total - named, 6});
  }
  double sum = 0;
  for (const Part& part : parts) sum += part.ms;
  if (!(sum > 0)) return {};
  std::string out =
      "<table><thead><tr><th>phase</th><th>what happens</th><th class=\"num\">median</th><th "
      "class=\"num\">share</th><th></th></tr></thead><tbody>\n";
  for (const Part& part : parts) {
    const double share = 100 * part.ms / sum;
    out += fmt::format(
        "<tr><th scope=\"row\">{}</th><td>{}</td><td class=\"num\">{}</td><td class=\"num\">{:.1f} "
        "%</td>"
        "<td class=\"share\"><span class=\"f{}\" style=\"width:{:.2f}%\"></span></td></tr>\n",
        escape(part.label), escape(part.doc), format_ms(part.ms), share, part.color, share);
  }
  return "<div class=\"scroll\">" + out + "</tbody></table></div>\n";
}

/// "layers.3.attn.q.weight" → "layers.*.attn.q.weight": what a network has many of is one curve.
std::string kind_of(const std::string& name) {
  std::string out;
  for (const char c : name) {
    const bool digit = c >= '0' && c <= '9';
    const bool counts = out.empty() || out.back() == '.' || out.back() == '*';
    if (!(digit && counts)) {
      out += c;
    } else if (out.empty() || out.back() != '*') {
      out += '*';
    }
  }
  return out;
}

/// A curve per kind of matrix or group, the geometric mean of its layers.
std::vector<Line> diagnostic_lines(const std::vector<Row>& rows, const std::string& key) {
  std::map<std::string, std::vector<Point>> kinds;
  for (const Row& row : rows) {
    const auto found = row.diagnostics.find(key);
    if (found == row.diagnostics.end()) continue;
    std::map<std::string, std::pair<double, double>> sums;  // of logarithms, and how many
    for (const auto& [name, value] : found->second) {
      if (!(value > 0)) continue;
      auto& [sum, count] = sums[kind_of(name)];
      sum += std::log(value);
      ++count;
    }
    for (const auto& [kind, of] : sums) {
      kinds[kind].push_back({row.step, std::exp(of.first / of.second)});
    }
  }
  std::vector<Line> lines;
  for (const auto& [kind, points] : kinds) {
    const auto index = static_cast<int>(lines.size());
    lines.push_back(
        {kind, index, (index / palette) % 2 == 0 ? Stroke::plain : Stroke::dashed, points, true});
  }
  return lines;
}

std::string noise_card(const std::vector<Row>& rows) {
  std::vector<Line> lines;
  for (const auto& [key, norm] :
       {std::pair("gns_l2", "l2"), std::pair("gns_l1", "l1"), std::pair("gns_nuc", "nuclear")}) {
    for (Line& line : diagnostic_lines(rows, key)) {
      const bool whole = line.label == "all";
      // In dual norms groups are of one norm each: the whole is said.
      if (std::string_view(norm) != "l2" && !whole) continue;
      line.label = fmt::format("{}, {}", whole ? "model" : line.label, norm);
      line.color = static_cast<int>(lines.size());
      lines.push_back(std::move(line));
    }
  }
  for (Line& line : diagnostic_lines(rows, "gns_l2_unresolved")) {
    if (line.label != "all") continue;
    lines.push_back({"model, l2, unresolved", 6, Stroke::faint, std::move(line.points), false});
  }
  if (lines.empty()) return {};
  return card(
      "Gradient noise scale",
      "The batch, in examples, at which chance and signal in the gradient are equal. "
      "Unresolved: the signal is below two standard errors, the scale a guess.",
      line_chart("Gradient noise scale per step", lines, {false, true, format_number, 220}));
}

/// Of the last look that says it: of how much of the parameters a plain spectral step promises
/// more.
std::string spectral_share(const std::vector<Row>& rows) {
  const auto look = std::find_if(rows.rbegin(), rows.rend(), [](const Row& row) {
    return row.diagnostics.contains("spec_ratio") && row.diagnostics.contains("elements");
  });
  if (look == rows.rend()) return {};
  const auto& sizes = look->diagnostics.at("elements");
  double above = 0, all = 0;
  for (const auto& [name, ratio] : look->diagnostics.at("spec_ratio")) {
    const auto size = sizes.find(name);
    if (size == sizes.end()) continue;
    all += size->second;
    if (ratio > 1) above += size->second;
  }
  if (all == 0) return {};
  return fmt::format(" Above one in step {}: {:.0f} % of the parameters it is known of.",
                     look->step, 100 * above / all);
}

std::string spectra_cards(const std::vector<Row>& rows) {
  std::string out;
  for (const auto& [key, title, why] :
       {std::tuple("nr_grad", "Nuclear rank of the gradient",
                   "(sum of singular values)² / sum of squares, by kind of matrix: of how many "
                   "directions a gradient is made. Layers are averaged."),
        std::tuple("st_grad", "Stable rank of the gradient",
                   "Sum of squared singular values over the largest: how many directions are as "
                   "strong as the strongest."),
        std::tuple("spec_ratio", "Spectral or Euclidean",
                   "Nuclear rank of the gradient over stable rank of the activations. Above one "
                   "(dashed) a plain spectral step promises more than a plain gradient step; it "
                   "says nothing of AdamW, momentum, many steps.")}) {
    std::vector<Line> lines = diagnostic_lines(rows, key);
    if (lines.empty()) continue;
    if (std::string_view(key) == "spec_ratio") {
      double first = INFINITY, last = -INFINITY;
      for (const Line& line : lines) {
        first = std::min(first, line.points.front().x);
        last = std::max(last, line.points.back().x);
      }
      lines.push_back({"", 6, Stroke::dashed, {{first, 1}, {last, 1}}, false});
    }
    const std::string more =
        std::string_view(key) == "spec_ratio" ? spectral_share(rows) : std::string();
    out += card(title, why + more, line_chart(title, lines, {false, true, format_number, 220}));
  }
  return out;
}

}  // namespace

std::string run_report(const std::string& summary_json, const std::string& metrics_jsonl,
                       const std::string& config_yaml) {
  const std::vector<Row> rows = read_rows(metrics_jsonl);
  const json summary = complete_summary(summary_json, rows);
  const json final = child(summary, "final");

  std::string name = text(summary, "name");
  if (name.empty()) name = "run";
  const std::string status = text(summary, "status");
  std::string sub;
  const auto say = [&](const std::string& what) {
    if (!what.empty()) sub += (sub.empty() ? "" : " · ") + what;
  };
  say(text(summary, "workload"));
  say(rules_of(summary));
  if (const double ranks = number(summary, "ranks"); std::isfinite(ranks)) {
    say(fmt::format("{:.0f} rank{}", ranks, ranks == 1 ? "" : "s"));
  }
  const double steps = number(summary, "steps");
  if (std::isfinite(steps)) say(format_count(steps) + (steps == 1 ? " step" : " steps"));
  if (const double seconds = number(summary, "seconds"); std::isfinite(seconds))
    say(format_seconds(seconds));

  std::string body = fmt::format(
      "<h1>{}<span class=\"status {}\">{}</span></h1>\n<p class=\"sub\">{}</p>\n", escape(name),
      status == "finished" ? "finished" : (status == "stopped" ? "stopped" : "open"),
      escape(status), escape(sub));

  Tiles tiles;
  const double val_loss = number(final, "val_loss");
  tiles.add("validation loss", format_number(val_loss));
  tiles.add("training loss", format_number(number(final, "loss")));
  if (const double accuracy = number(final, "val_accuracy"); std::isfinite(accuracy)) {
    tiles.add("validation accuracy", fmt::format("{:.2f} %", 100 * accuracy));
  }
  tiles.add("optimizer per step", format_ms(number(child(summary, "optimizer_ms"), "total")));
  tiles.add("sent per step", format_bytes(number(summary, "bytes_per_step")));
  tiles.add("state per rank", format_bytes(state_bytes(summary)));
  body += tiles.html();

  if (!rows.empty()) {
    std::vector<Line> loss;
    add_train_loss(loss, rows, "training", 0, true);
    const std::vector<Point> validation = validation_series(rows, "val_loss");
    loss.push_back({"validation", 1, Stroke::plain, validation, true});
    body += card("Loss",
                 loss.front().stroke == Stroke::faint
                     ? "Per step; training as it was (faint) and smoothed."
                     : "Per step.",
                 line_chart("Loss per step", loss, {false, true, format_number, 290}));
    std::vector<std::string> others;
    for (const Row& row : rows) {
      for (const auto& [key, value] : row.validation) {
        if (key != "val_loss" && std::find(others.begin(), others.end(), key) == others.end()) {
          others.push_back(key);
        }
      }
    }
    for (const std::string& key : others) {
      body += card(validation_label(key), "On held-out data.",
                   line_chart(validation_label(key),
                              {{key, 2, Stroke::plain, validation_series(rows, key), true}},
                              {false, false, format_number, 200}));
    }
  }
  if (const std::string table = median_step(summary); !table.empty()) {
    body += card(
        "A step, by phase",
        "Medians of rank 0. reduce and gather count only waiting that computation did not hide.",
        table);
  }
  if (!rows.empty()) {
    body += card("The optimizer over the run",
                 "Milliseconds per step on rank 0, without the gradient.", phase_chart(rows));
    std::vector<Line> bytes;
    bytes.push_back({"sent, all ranks", 0, Stroke::plain,
                     series(rows, [](const Row& r) { return r.bytes; }), false});
    bytes.push_back({"busiest rank", 4, Stroke::plain,
                     series(rows, [](const Row& r) { return r.bytes_max; }), false});
    const double planned = number(summary, "planned_bytes_per_step");
    if (std::isfinite(planned)) {
      bytes.push_back({"plan, all ranks",
                       1,
                       Stroke::dashed,
                       {{rows.front().step, planned}, {rows.back().step, planned}},
                       false});
    }
    body +=
        card("Bytes sent per step", "Counted where they are sent; the plan is made before step 1.",
             line_chart("Bytes sent per step", bytes, {true, false, format_bytes, 180}));
  }
  if (const auto memory = summary.find("memory"); memory != summary.end() && memory->is_array()) {
    if (const std::string chart = memory_chart(*memory); !chart.empty()) {
      body += card("Memory per rank",
                   "As planned and allocated before step 1; the trainer's activations are its own.",
                   chart);
    }
  }
  if (!rows.empty()) {
    std::size_t groups = 0;
    for (const Row& row : rows) groups = std::max(groups, row.update_rms.size());
    const auto names = summary.find("groups");
    const auto label_of = [&](std::size_t g) {
      std::string label = fmt::format("group {}", g);
      if (names != summary.end() && names->is_array() && g < names->size() &&
          names->at(g).is_object()) {
        label += fmt::format(": {}, {}", text(names->at(g), "rule"), text(names->at(g), "match"));
      }
      return label;
    };
    std::vector<Line> rms;
    for (std::size_t g = 0; g < groups; ++g) {
      rms.push_back({label_of(g), static_cast<int>(g), Stroke::plain,
                     series(rows,
                            [g](const Row& r) {
                              return g < r.update_rms.size() ? r.update_rms[g] : nan_value;
                            }),
                     false});
    }
    if (groups > 0) {
      body += card("Update RMS",
                   "Root mean square of the update of each group, before the learning rate.",
                   line_chart("Update RMS per step", rms, {true, true, format_number, 200}));
    }
  }
  for (const auto& [index, title, why] :
       {std::tuple{
            std::size_t{0}, "Step over grid",
            "The step's size / the distance of two neighbouring codes. Far below 1 a rounded "
            "weight moves only now and then."},
        std::tuple{std::size_t{1}, "Correction over momentum",
                   "What rounding took from the weights, as it is put into the momentum (ECO), "
                   "before its guard / the momentum."}}) {
    std::vector<Line> lines;
    std::size_t groups = 0;
    for (const Row& row : rows) groups = std::max(groups, row.rounding.size());
    for (std::size_t g = 0; g < groups; ++g) {
      const auto value = [&, i = index](const Row& r) {
        return g < r.rounding.size() && r.rounding[g][i] > 0 ? r.rounding[g][i] : nan_value;
      };
      const auto of = series(rows, value);
      if (!of.empty()) {
        lines.push_back(
            {fmt::format("group {}", g), static_cast<int>(g), Stroke::plain, of, false});
      }
    }
    if (!lines.empty()) {
      body += card(title, why, line_chart(title, lines, {true, true, format_number, 180}));
    }
  }
  body += noise_card(rows) + spectra_cards(rows);
  body += card("Final figures", "Medians leave out the first step.", final_figures(summary));
  if (const std::string table = configuration(summary); !table.empty()) {
    body += card("Configuration", "What ran.", table);
  }
  if (!config_yaml.empty()) {
    body += fmt::format(
        "<details class=\"card\">\n<summary>The resolved "
        "configuration</summary>\n<pre><code>{}</code></pre>\n</details>\n",
        escape(config_yaml));
  }
  return page(name + " - Orthrus", body);
}

}  // namespace orthrus::runtime
