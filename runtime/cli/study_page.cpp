#include "runtime/cli/study_page.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <utility>

#include "runtime/cli/run_directory.hpp"
#include "runtime/report_plots.hpp"
#include "runtime/safetensors.hpp"

namespace orthrus::cli {

using nlohmann::ordered_json;
using runtime::report::card;
using runtime::report::Curve;
using runtime::report::escape;
using runtime::report::format_number;
using runtime::report::HeatMap;
using runtime::report::Measured;
using runtime::report::Plot;
using runtime::report::Scale;
using runtime::report::Stroke;
using studies::Cell;
using studies::RateMetric;

namespace {

constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();

/// "sgd, width=64" as a part of a file's name.
std::string file_part(const std::string& series) {
  std::string out;
  for (const char c : series) {
    const bool plain = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                       c == '_' || c == '.';
    if (plain)
      out += c;
    else if (!out.empty() && out.back() != '-')
      out += '-';
  }
  return out;
}

std::string equation(const studies::StepsFit& fit) {
  const std::vector<double>& p = fit.parameters;
  switch (fit.model) {
    case studies::StepsModel::hyper:
      return fmt::format("S = {:.4g} + {:.4g}/B", p[0], p[1]);
    case studies::StepsModel::hyper_alpha:
      return fmt::format("S = {:.4g} + {:.4g}/B^{:.3g}", p[0], p[1], p[2]);
    case studies::StepsModel::three_term_inv:
      return fmt::format("S = {:.4g} (1 - {:.4g}/B^{:.3g})^(-1/{:.3g})", p[0], p[1], p[2], p[3]);
  }
  return {};
}

/// The index of a series is its colour in every figure.
int color_of(const StudyAnalysis& analysis, const std::string& series) {
  return static_cast<int>(std::find(analysis.series.begin(), analysis.series.end(), series) -
                          analysis.series.begin());
}

/// A law of steps in three views: `view` maps batch and steps to the plane.
template <class View>
void add_steps(Plot& plot, const StudyAnalysis& analysis, const SeriesSteps& fit, View view) {
  const int color = color_of(analysis, fit.series);
  Curve measured{fit.series, color, Stroke::plain, {}, false, true};
  for (std::size_t i = 0; i < fit.study.batches.size(); ++i) {
    Measured p = view(fit.study.batches[i], fit.study.steps[i]);
    if (const studies::Interval in = fit.study.steps_intervals[i]; in.lo > 0) {
      p.lo = view(fit.study.batches[i], in.lo).y;
      p.hi = view(fit.study.batches[i], in.hi).y;
    }
    measured.points.push_back(p);
  }
  plot.curves.push_back(std::move(measured));
  auto [lo, hi] = std::pair(fit.study.batches.front(), fit.study.batches.back());
  for (const studies::StepsAbove& above : fit.study.above) {
    lo = std::min(lo, above.batch);
    hi = std::max(hi, above.batch);
  }
  const auto on_law = [&](double b) { return view(b, fit.study.fit.steps(b)); };
  plot.curves.push_back({fmt::format("{}: {}", fit.series, equation(fit.study.fit)), color,
                         Stroke::faint, along(lo, hi, on_law)});
}

/// The first law of every series: one item is shown, all are in the table.
std::vector<const SeriesSteps*> shown_laws(const StudyAnalysis& analysis) {
  std::vector<const SeriesSteps*> out;
  for (const std::string& series : analysis.series) {
    const auto found = std::find_if(analysis.steps.begin(), analysis.steps.end(),
                                    [&](const SeriesSteps& f) { return f.series == series; });
    if (found != analysis.steps.end()) out.push_back(&*found);
  }
  return out;
}

void add_steps_figures(std::vector<StudyFigure>& out, const StudyAnalysis& analysis) {
  const std::vector<const SeriesSteps*> laws = shown_laws(analysis);
  if (laws.empty()) return;
  Plot steps{"steps",
             "Steps to the target",
             "Perfect scaling halves the steps when the batch doubles (dashed, from the smallest "
             "batch). Vertical lines: critical batch sizes by definition, with their intervals.",
             "batch size",
             "steps to the target",
             Scale::log2,
             Scale::log2,
             {},
             {}};
  Plot examples{"examples",
                "Examples to the target",
                "Relative to the least: flat while scaling is perfect, twice at the critical batch "
                "of McCandlish.",
                "batch size",
                "examples / least examples",
                Scale::log2,
                Scale::linear,
                {},
                {}};
  Plot trade{"tradeoff",
             "Steps against examples",
             "What a target costs in steps and in examples; a hyperbola where S = a + b/B.",
             "examples",
             "steps",
             Scale::log10,
             Scale::log10,
             {},
             {}};
  Plot residuals{"residuals",
                 "Residuals",
                 "ln of measured over fitted steps: a law that fits "
                 "leaves no bend.",
                 "batch size",
                 "ln error",
                 Scale::log2,
                 Scale::linear,
                 {},
                 {}};
  for (const SeriesSteps* fit : laws) {
    const int color = color_of(analysis, fit->series);
    add_steps(steps, analysis, *fit, [](double b, double s) { return Measured{b, s}; });
    const double b0 = fit->study.batches.front(), s0 = fit->study.steps.front();
    steps.curves.push_back(
        {"",
         color,
         Stroke::dashed,
         {{b0, s0}, {fit->study.batches.back(), s0 * b0 / fit->study.batches.back()}}});
    for (const studies::CbsEstimate& cbs : fit->study.critical) {
      const bool known = fit->study.kind != studies::IntervalKind::none;
      steps.marks.push_back({fmt::format("{}, {}", fit->series, studies::name_of(cbs.definition)),
                             color, cbs.value, known ? cbs.interval.lo : nan_value,
                             known ? cbs.interval.hi : nan_value});
    }
    Curve above{fit->series + ", not reached by then", color, Stroke::plain, {}, false, true, "↑"};
    for (const studies::StepsAbove& a : fit->study.above)
      above.points.push_back({a.batch, a.steps});
    if (!above.points.empty()) steps.curves.push_back(std::move(above));
    double least = s0 * b0;
    for (std::size_t i = 0; i < fit->study.batches.size(); ++i) {
      least = std::min(least, fit->study.batches[i] * fit->study.steps[i]);
    }
    add_steps(examples, analysis, *fit, [least](double b, double s) {
      return Measured{b, s * b / least};
    });
    add_steps(trade, analysis, *fit, [](double b, double s) { return Measured{s * b, s}; });
    Curve errors{fit->series, color, Stroke::plain, {}, true, true};
    for (std::size_t i = 0; i < fit->study.batches.size(); ++i) {
      errors.points.push_back({fit->study.batches[i], fit->study.fit.log_residuals[i]});
    }
    residuals.curves.push_back(std::move(errors));
  }
  // Bars of intervals belong to steps: in the trade-off both coordinates move.
  for (Curve& curve : trade.curves) {
    for (Measured& p : curve.points) p.lo = p.hi = nan_value;
  }
  for (const Plot* plot : {&steps, &examples, &trade}) out.push_back(figure(*plot));
  out.push_back(figure(residuals));
}

/// How often resamples came to which critical batch.
void add_bootstrap(std::vector<StudyFigure>& out, const StudyAnalysis& analysis) {
  Plot plot{"bootstrap",
            "Resamples",
            "Share of resamples per bin of the first definition; its spread is the interval.",
            "critical batch size",
            "share of resamples",
            Scale::log2,
            Scale::linear,
            {},
            {}};
  constexpr int bins = 40;
  for (const SeriesSteps* fit : shown_laws(analysis)) {
    if (fit->study.critical_draws.empty() || fit->study.critical_draws[0].size() < 50) continue;
    const std::vector<double>& draws = fit->study.critical_draws[0];
    // The outer hundredths are tails that would flatten the rest.
    const studies::Interval shown = studies::percentile_interval(draws, 0.99);
    if (!(shown.lo > 0 && shown.hi > shown.lo && std::isfinite(shown.hi))) continue;
    Curve stairs{fit->series, color_of(analysis, fit->series), Stroke::plain, {}};
    for (int i = 0; i < bins; ++i) {
      const auto edge = [&](int k) {
        return shown.lo * std::pow(shown.hi / shown.lo, static_cast<double>(k) / bins);
      };
      const auto count = std::count_if(draws.begin(), draws.end(),
                                       [&](double d) { return d >= edge(i) && d < edge(i + 1); });
      const double share = static_cast<double>(count) / static_cast<double>(draws.size());
      stairs.points.push_back({edge(i), share});
      stairs.points.push_back({edge(i + 1), share});
    }
    plot.curves.push_back(std::move(stairs));
  }
  if (!plot.curves.empty()) out.push_back(figure(plot));
}

/// The part of a curve from `lo` to `hi`, its ends on straight lines in ln x.
std::vector<Measured> between(const std::vector<Measured>& curve, double lo, double hi) {
  std::vector<Measured> out;
  for (std::size_t i = 0; i < curve.size(); ++i) {
    const Measured& b = curve[i];
    if (i > 0 && std::isfinite(curve[i - 1].y) && std::isfinite(b.y)) {
      const Measured& a = curve[i - 1];
      for (const double end : {lo, hi}) {
        if (!(end > a.x && end < b.x)) continue;
        out.push_back({end, a.y + (b.y - a.y) * std::log(end / a.x) / std::log(b.x / a.x)});
      }
    }
    if (b.x >= lo && b.x <= hi && std::isfinite(b.y)) out.push_back(b);
  }
  return out;
}

void add_tuning(std::vector<StudyFigure>& out, const StudyAnalysis& analysis) {
  const bool steps = analysis.metric == RateMetric::steps_to_target;
  for (const std::string& series : analysis.series) {
    const std::string part = file_part(series);
    Plot curves{"tuning-" + part,
                series + ": tuning curves",
                fmt::format("Means over the tuning seeds, a curve per batch size; shaded: rates "
                            "within {} of the best.",
                            steps ? "10 % of the least steps" : "1 % of the least loss"),
                "learning rate",
                analysis.value_name(),
                Scale::log10,
                steps ? Scale::log10 : Scale::linear,
                {},
                {}};
    HeatMap map{"map-" + part,
                series + ": batch size and learning rate",
                "Darker is nearer to the row's best; a ring is the chosen rate, × did not come to "
                "a value.",
                "learning rate",
                "batch size",
                {}};
    int color = 0;
    for (const Cell& cell : analysis.of(series)) {
      Curve curve{"batch " + format_number(cell.batch), color, Stroke::plain, {}, true, true};
      HeatMap::Row row{format_number(cell.batch), {}, nan_value};
      for (const studies::CellRate& rate : cell.rates) {
        if (rate.tuning.empty()) continue;
        const studies::RateOutcome outcome{rate.lr, [&] {
                                             std::vector<double> values;
                                             for (const studies::SeedValue& seed : rate.tuning)
                                               values.push_back(seed.value);
                                             return values;
                                           }()};
        // A choice among one is its mean.
        const double mean = studies::choose_rate({&outcome, 1}, cell.metric).value;
        curve.points.push_back({rate.lr, mean});
        row.values.push_back({rate.lr, mean});
      }
      if (!cell.choice.censored) {
        row.best = cell.choice.lr;
        if (cell.choice.plateau_octaves > 0) {
          const double half = std::exp2(cell.choice.plateau_octaves / 2);
          curves.curves.push_back(
              {"", color, Stroke::wide,
               between(curve.points, cell.choice.fitted_lr / half, cell.choice.fitted_lr * half)});
        }
      }
      curves.curves.push_back(std::move(curve));
      map.rows.push_back(std::move(row));
      ++color;
    }
    out.push_back(figure(curves));
    out.push_back(figure(map));
  }
}

void add_rates(std::vector<StudyFigure>& out, const StudyAnalysis& analysis) {
  Plot plot{"learning-rates",
            "Best learning rate against batch size",
            "Vertices of the tuning curves; the line is the fitted power.",
            "batch size",
            "learning rate",
            Scale::log2,
            Scale::log10,
            {},
            {}};
  for (const SeriesRates& rates : analysis.rates) {
    const int color = color_of(analysis, rates.series);
    Curve measured{rates.series, color, Stroke::plain, {}, false, true};
    for (std::size_t i = 0; i < rates.study.batches.size(); ++i) {
      Measured p{rates.study.batches[i], rates.study.lrs[i]};
      if (const studies::Interval in = rates.study.lr_intervals[i]; in.lo > 0) {
        p.lo = in.lo;
        p.hi = in.hi;
      }
      measured.points.push_back(p);
    }
    plot.curves.push_back(std::move(measured));
    const double knee = rates.study.bent && rates.study.bent->preferred
                            ? rates.study.bent->knee
                            : std::numeric_limits<double>::infinity();
    const auto& law = rates.study.law;
    const std::string constant =
        std::isfinite(knee) ? fmt::format(", constant from {:.4g}", knee) : "";
    plot.curves.push_back(
        {fmt::format("{}: {:.3g} B^{:.3g}{}", rates.series, law.factor, law.exponent, constant),
         color, Stroke::faint,
         along(rates.study.batches.front(), rates.study.batches.back(), [&](double b) {
           return Measured{b, law(std::min(b, knee))};
         })});
  }
  if (!plot.curves.empty()) out.push_back(figure(plot));
}

void add_ratios(std::vector<StudyFigure>& out, const StudyAnalysis& analysis) {
  Plot plot{"token-ratio",
            "Token ratio",
            "Examples of the first over examples of the second to the same target; above one the "
            "second needs fewer.",
            "batch size",
            "ratio",
            Scale::log2,
            Scale::linear,
            {},
            {}};
  int color = 0;
  for (const SeriesRatios& pair : analysis.ratios) {
    Curve curve{
        pair.numerator + " over " + pair.denominator, color++, Stroke::plain, {}, true, true};
    for (const studies::TokenRatio& r : pair.ratios) {
      const bool known = r.pairs >= 2;
      curve.points.push_back(
          {r.batch, r.ratio, known ? r.interval.lo : nan_value, known ? r.interval.hi : nan_value});
    }
    if (!curve.points.empty()) plot.curves.push_back(std::move(curve));
  }
  if (!plot.curves.empty()) out.push_back(figure(plot));
}

/// Contours of a law of the loss over batch and steps, what was measured, and the best batch.
void add_contours(std::vector<StudyFigure>& out, const StudyAnalysis& analysis) {
  for (const SeriesLaw& fit : analysis.laws) {
    const studies::LossLaw& law = fit.law;
    const auto [fewest, most] =
        std::minmax_element(fit.cells.begin(), fit.cells.end(),
                            [](const auto& a, const auto& b) { return a.steps < b.steps; });
    // A little beyond what was measured, where the best batch may lie.
    const double left = fit.least_batch / 2, right = fit.largest_batch * 2;
    const double low = fewest->steps / 1.5, high = most->steps * 1.5;
    const auto inside = [&](double batch, double steps) {
      return batch >= left && batch <= right && steps >= low && steps <= high;
    };
    Plot plot{"law-" + file_part(fit.series),
              fit.series + ": law of the loss",
              fmt::format("L = {:.4g} + {:.4g}/M^{:.3g} + {:.4g}/K^{:.3g}: contours of equal loss; "
                          "circles: the evaluations it was fitted to; dashed: equal examples; "
                          "thick: M*, the batch of least loss at equal examples.",
                          law.irreducible, law.batch_factor, law.batch_exponent, law.steps_factor,
                          law.steps_exponent),
              "batch size M",
              "steps K",
              Scale::log2,
              Scale::log10,
              {},
              {},
              420};
    Curve measured{"evaluations", 6, Stroke::plain, {}, false, true};
    for (const studies::LossCell& cell : fit.cells) {
      measured.points.push_back({cell.batch, cell.steps});
    }
    // Levels evenly in ln(L - E), so that neighbours are equally far apart in steps.
    const auto [best, worst] =
        std::minmax_element(fit.cells.begin(), fit.cells.end(),
                            [](const auto& a, const auto& b) { return a.loss < b.loss; });
    constexpr int levels = 7;
    for (int i = 0; i < levels; ++i) {
      const double above = std::max(best->loss - law.irreducible, 1e-3 * best->loss);
      const double level =
          law.irreducible +
          above * std::pow((worst->loss - law.irreducible) / above, (i + 0.25) / levels);
      Curve contour{"", 0, Stroke::plain, {}};
      contour.note = fmt::format("{:.4g}", level);
      for (const Measured& p : along(left, right, [&](double batch) {
             const double rest =
                 level - law.irreducible - law.batch_factor / std::pow(batch, law.batch_exponent);
             return Measured{batch, rest > 0
                                        ? std::pow(law.steps_factor / rest, 1 / law.steps_exponent)
                                        : nan_value};
           })) {
        if (inside(p.x, p.y)) contour.points.push_back(p);
      }
      if (contour.points.size() < 2) continue;
      if (plot.curves.empty()) contour.label = "equal loss";
      plot.curves.push_back(std::move(contour));
    }
    for (const double share : {1.0, 0.25, 1.0 / 16}) {
      const double examples = share * fit.examples;
      Curve equal{"", 6, Stroke::dashed, {}};
      for (const Measured& p : along(left, right, [&](double batch) {
             return Measured{batch, examples / batch};
           })) {
        if (inside(p.x, p.y)) equal.points.push_back(p);
      }
      if (equal.points.size() < 2) continue;
      if (share == 1) {
        equal.label = fmt::format("{} examples, a quarter, a sixteenth", format_number(examples));
      }
      plot.curves.push_back(std::move(equal));
    }
    Curve ridge{"M*", 1, Stroke::thick, {}};
    for (const Measured& p : along(fit.examples / 1e3, 4 * fit.examples, [&](double examples) {
           const double batch = law.best_batch(examples);
           return Measured{batch, examples / batch};
         })) {
      if (inside(p.x, p.y)) ridge.points.push_back(p);
    }
    plot.curves.push_back(std::move(ridge));
    plot.curves.push_back(std::move(measured));
    if (fit.best_batch >= left && fit.best_batch <= right) {
      plot.marks.push_back({fmt::format("M* at {} examples", format_number(fit.examples)), 1,
                            fit.best_batch, fit.best ? fit.best->lo : nan_value,
                            fit.best ? fit.best->hi : nan_value});
    }
    out.push_back(figure(plot));
  }
}

/// What branches of larger batches lose to their base run.
void add_branches(std::vector<StudyFigure>& out, const StudyAnalysis& analysis) {
  for (const SeriesBranches& fit : analysis.branches) {
    const int color = color_of(analysis, fit.series);
    Plot plot{"branches-" + file_part(fit.series),
              fit.series + ": branches",
              fmt::format("Loss after as many examples from step {:.0f} on, means and ranges over "
                          "seeds; dashed: epsilon above the least of the smaller ones; the line "
                          "is k*, the largest that recovers.",
                          fit.fork_steps),
              fmt::format("k: batch size over {}", format_number(fit.fork_batch)),
              "loss",
              Scale::log2,
              Scale::linear,
              {},
              {}};
    Curve losses{fit.series, color, Stroke::plain, {}, true, true};
    Curve granted{"least smaller one + epsilon", 6, Stroke::dashed, {}};
    double least = std::numeric_limits<double>::infinity();
    for (std::size_t k = 0; k < fit.branches.size(); ++k) {
      const double times = fit.branches[k].batch / fit.fork_batch;
      Measured point{times, fit.local.losses[k]};
      if (fit.branches[k].losses.size() > 1) {
        const auto [lo, hi] =
            std::minmax_element(fit.branches[k].losses.begin(), fit.branches[k].losses.end(),
                                [](const auto& a, const auto& b) { return a.value < b.value; });
        point.lo = lo->value;
        point.hi = hi->value;
      }
      losses.points.push_back(point);
      if (std::isfinite(least)) granted.points.push_back({times, least + fit.local.epsilons[k]});
      least = std::min(least, point.y);
    }
    plot.curves.push_back(std::move(losses));
    plot.curves.push_back(std::move(granted));
    plot.marks.push_back({fmt::format("k* (batch {})", format_number(fit.local.batch)), color,
                          fit.local.batch / fit.fork_batch});
    out.push_back(figure(plot));
  }
}

/// Noise scales against examples, a curve per optimizer and geometry, and what branches say there.
void add_noise(std::vector<StudyFigure>& out, const StudyAnalysis& analysis) {
  Plot plot{"noise-scale",
            "Gradient noise scale",
            "Of the reported runs, half an octave of examples at a time, with intervals; what is "
            "below two standard errors is left out. Thin: l2; dashed: l1; thick: nuc, both of the "
            "largest batch. Branches: the local critical batch, up to the next that was tried.",
            "examples",
            "noise scale, examples",
            Scale::log10,
            Scale::log10,
            {},
            {}};
  for (const SeriesNoise& noise : analysis.noise) {
    Curve curve{fmt::format("{}, {}", noise.series, noise.geometry),
                color_of(analysis, noise.series),
                noise.geometry == "l2"   ? Stroke::plain
                : noise.geometry == "l1" ? Stroke::dashed
                                         : Stroke::thick,
                {},
                true,
                true};
    for (const SeriesNoise::Bin& bin : noise.bins) {
      if (bin.value.unresolved || !std::isfinite(bin.value.scale)) continue;
      const bool known = bin.value.interval.lo > 0 && std::isfinite(bin.value.interval.hi);
      curve.points.push_back({bin.examples, bin.value.scale,
                              known ? bin.value.interval.lo : nan_value,
                              known ? bin.value.interval.hi : nan_value});
    }
    if (!curve.points.empty()) plot.curves.push_back(std::move(curve));
  }
  if (plot.curves.empty()) return;
  for (const SeriesBranches& fit : analysis.branches) {
    const bool bounded = std::isfinite(fit.local.next);
    plot.curves.push_back(
        {fit.series + ", branches",
         color_of(analysis, fit.series),
         Stroke::plain,
         {{fit.fork_steps * fit.fork_batch, fit.local.batch, bounded ? fit.local.batch : nan_value,
           bounded ? fit.local.next : nan_value}},
         false,
         true,
         "branches"});
  }
  out.push_back(figure(plot));
}

/// A link that carries the file in itself.
std::string data_link(const std::string& name, const std::string& csv) {
  std::string encoded;
  for (const char c : csv) {
    const auto byte = static_cast<unsigned char>(c);
    const bool plain = (byte >= '0' && byte <= '9') || (byte >= 'a' && byte <= 'z') ||
                       (byte >= 'A' && byte <= 'Z') || c == '.' || c == '-' || c == '_';
    encoded += plain ? std::string(1, c) : fmt::format("%{:02X}", byte);
  }
  return fmt::format(
      "<p class=\"note\"><a download=\"{0}.csv\" href=\"data:text/csv;charset=utf-8,{1}\">data "
      "(CSV)</a></p>\n",
      escape(name), encoded);
}

std::string table_html(const StudyTable& table) {
  std::string out = "<div class=\"scroll\"><table><thead><tr>";
  for (const std::string& column : table.columns) out += "<th>" + escape(column) + "</th>";
  out += "</tr></thead><tbody>\n";
  for (const auto& row : table.rows) {
    out += "<tr>";
    for (const ordered_json& cell : row) {
      out += fmt::format("<td{}>{}</td>", cell.is_number() ? " class=\"num\"" : "",
                         escape(shown(cell)));
    }
    out += "</tr>\n";
  }
  return out + "</tbody></table></div>\n" + data_link(table.name, table_csv(table));
}

std::string folded(const std::string& title, const std::string& content) {
  return fmt::format(
      "<section class=\"card\"><details><summary>{}</summary>\n{}</details></section>\n",
      escape(title), content);
}

}  // namespace

std::vector<StudyFigure> study_figures(const StudyAnalysis& analysis) {
  std::vector<StudyFigure> out;
  add_steps_figures(out, analysis);
  add_rates(out, analysis);
  add_ratios(out, analysis);
  add_bootstrap(out, analysis);
  add_tuning(out, analysis);
  add_branches(out, analysis);
  add_contours(out, analysis);
  add_noise(out, analysis);
  for (std::vector<StudyFigure> more :
       {class_figures(analysis.classes, analysis.series), scaling_figures(analysis.scaling),
        message_figures(analysis.messages)}) {
    std::move(more.begin(), more.end(), std::back_inserter(out));
  }
  return out;
}

std::string study_page(const StudyResults& study, const StudyAnalysis& analysis,
                       const std::vector<StudyFigure>& figures) {
  std::string body = fmt::format(
      "<h1>{}</h1>\n<p class=\"sub\">{} finished trials, {} cells{}</p>\n", escape(study.name),
      study.trials.size(), analysis.cells.size(),
      std::isnan(analysis.target) ? ""
                                  : fmt::format(", target {} {}", escape(analysis.metric_name),
                                                format_number(analysis.target)));
  if (analysis.verdicts.empty()) {
    body +=
        card("Verdict", "", "<p class=\"none\">None yet: the warnings say what is missing.</p>");
  }
  for (const StudyTable& table : analysis.verdicts) {
    body += card(table.title, table.why, table_html(table));
  }
  std::string warnings;
  for (const StudyWarning& warning : analysis.warnings) {
    warnings +=
        fmt::format("<li><code>{}</code> {}</li>\n", escape(warning.kind), escape(warning.text));
  }
  body +=
      card("Warnings", "What stands between these numbers and a conclusion.",
           warnings.empty() ? "<p class=\"none\">None.</p>\n" : "<ul>\n" + warnings + "</ul>\n");
  for (const StudyFigure& f : figures) {
    body += card(f.title, f.why, f.html + data_link(f.name, f.csv));
  }
  if (!analysis.cell_table.rows.empty())
    body +=
        card(analysis.cell_table.title, analysis.cell_table.why, table_html(analysis.cell_table));
  body += folded(
      "The study as it was resolved",
      "<pre>" + escape(study.resolved.dump(2, ' ', false, ordered_json::error_handler_t::replace)) +
          "</pre>\n");
  body += folded("All trials", table_html(analysis.trial_table));
  return runtime::report::page(study.name + " - Orthrus study", body, /*wide=*/true);
}

void write_analysis(const StudyResults& study, const StudyAnalysis& analysis) {
  const std::filesystem::path directory = study.directory / "analysis";
  make_directories(directory);
  const ordered_json document = analysis_json(study, analysis);
  for (const char* part : {"fits", "cells", "warnings"}) {
    runtime::write_file_atomically(
        directory / (std::string(part) + ".json"),
        document[part].dump(2, ' ', false, ordered_json::error_handler_t::replace) + "\n");
  }
}

std::filesystem::path write_report(const StudyResults& study, const StudyAnalysis& analysis,
                                   const ReportParts& parts) {
  const std::filesystem::path directory = study.directory / "report";
  make_directories(directory / "figures");
  make_directories(directory / "tables");
  std::vector<StudyFigure> figures;
  if (parts.figures) figures = study_figures(analysis);
  for (const StudyFigure& f : figures) {
    const std::string svg = runtime::report::standalone_svg(f.html);
    if (!svg.empty()) {
      runtime::write_file_atomically(directory / "figures" / (f.name + ".svg"), svg);
    }
    if (!parts.tables) continue;
    runtime::write_file_atomically(directory / "tables" / ("figure-" + f.name + ".csv"), f.csv);
  }
  std::vector<StudyTable> tables;
  if (parts.tables) {
    tables = analysis.verdicts;
    tables.push_back(analysis.cell_table);
    tables.push_back(analysis.trial_table);
  }
  for (const StudyTable& table : tables) {
    runtime::write_file_atomically(directory / "tables" / (table.name + ".csv"), table_csv(table));
  }
  std::filesystem::path page = directory / "index.html";
  if (parts.page) runtime::write_file_atomically(page, study_page(study, analysis, figures));
  return page;
}

}  // namespace orthrus::cli
