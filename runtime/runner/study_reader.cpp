#include "runtime/runner/study_reader.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <orthrus/error.hpp>
#include <stdexcept>
#include <utility>
#include <variant>

#include "runtime/config_scalar.hpp"
#include "runtime/config_tree.hpp"
#include "runtime/runner/study_conflicts.hpp"
#include "runtime/runner/study_keys.hpp"

namespace orthrus::runner {
namespace {

using runtime::Origin;
using runtime::YamlNode;
using runtime::config_file::join;
using runtime::config_file::Overloaded;
using runtime::config_file::Parsed;
using runtime::config_file::shortest;
using Kind = YamlNode::Kind;

class Reader {
 public:
  explicit Reader(const YamlNode& root) : root_(root) {}

  Study read(const std::string& source) {
    study_.source = source;
    if (root_.find("orthrus_study") == nullptr) {
      error(root_.origin, "orthrus_study",
            root_.find("schema") != nullptr ? "is required; this is a configuration, not a study"
                                            : "is required: orthrus_study: 1");
      finish();
    }
    read_map(root_, "");
    if (study_.name.empty() && root_.find("name") == nullptr)
      error(root_.origin, "name", "is required");
    if (errors_.empty()) errors_ = conflicts_of(study_, kept_, root_);
    finish();
    return std::move(study_);
  }

 private:
  void error(const Origin& at, const std::string& path, const std::string& what) {
    errors_.push_back(at.str() + ": " + (path.empty() ? "" : path + ": ") + what);
  }
  void finish() const {
    if (errors_.empty()) return;
    std::string message;
    for (const std::string& e : errors_) message += (message.empty() ? "" : "\n") + e;
    throw ConfigError(message);
  }
  void unknown(const Origin& at, const std::string& path, const std::string& key,
               const Words& known) {
    error(at, path, "unknown key; known: " + join(known) + runtime::nearest_hint(key, known));
  }
  bool expect(const YamlNode& node, Kind kind, const std::string& path, const std::string& what) {
    if (node.kind == kind) return true;
    error(node.origin, path, "expects " + what + ", found " + node.describe());
    return false;
  }

  void read_map(const YamlNode& map, const std::string& section) {
    if (!expect(map, Kind::map, section, "a mapping with " + join(children(section)))) return;
    for (std::size_t i = 0; i < map.keys.size(); ++i) {
      const std::string path = section.empty() ? map.keys[i] : section + "." + map.keys[i];
      const YamlNode& node = map.items[i];
      const auto row =
          std::find_if(rows().begin(), rows().end(), [&](const Row& r) { return r.path == path; });
      if (row != rows().end()) {
        read_row(*row, node);
      } else if (std::any_of(specials().begin(), specials().end(),
                             [&](const Special& s) { return s.path == path; })) {
        read_special(path, node);
      } else if (!children(path).empty()) {
        read_map(node, path);
      } else {
        unknown(map.key_origins[i], path, map.keys[i], children(section));
      }
    }
  }

  void read_row(const Row& row, const YamlNode& node) {
    const std::string path(row.path);
    std::visit(
        Overloaded{[&](bool Study::*flag) {
                     if (node.text == "true" || node.text == "false") {
                       study_.*flag = node.text == "true";
                     } else {
                       error(node.origin, path, "expects true or false, found " + node.describe());
                     }
                   },
                   [&](std::int64_t Study::*whole) {
                     if (!row.none.empty() && node.text == row.none) {
                       study_.*whole = 0;
                     } else if (const auto x = read_number(node, path, row.min, row.max, true)) {
                       study_.*whole = static_cast<std::int64_t>(*x);
                     }
                   },
                   [&](double Study::*real) {
                     if (!row.none.empty() && (node.text == row.none || node.kind == Kind::null)) {
                       study_.*real = std::numeric_limits<double>::quiet_NaN();
                     } else if (const auto x = read_number(node, path, row.min, row.max, false)) {
                       study_.*real = *x;
                     }
                   },
                   [&](std::string Study::*text) {
                     if (expect(node, Kind::scalar, path, "a text") && check_word(row, node))
                       study_.*text = node.text;
                   },
                   [&](std::vector<std::int64_t> Study::*list) {
                     if (!expect(node, Kind::list, path, "a list")) return;
                     (study_.*list).clear();
                     for (const YamlNode& item : node.items) {
                       if (const auto x = read_number(item, path, row.min, row.max, true))
                         (study_.*list).push_back(static_cast<std::int64_t>(*x));
                     }
                   },
                   [&](std::vector<std::string> Study::*list) {
                     if (!expect(node, Kind::list, path, "a list")) return;
                     (study_.*list).clear();
                     for (const YamlNode& item : node.items) {
                       if (expect(item, Kind::scalar, path, "a text") && check_word(row, item))
                         (study_.*list).push_back(item.text);
                     }
                   }},
        row.slot);
  }

  bool check_word(const Row& row, const YamlNode& node) {
    const Words known = words_of(row);
    if (known.empty() || std::find(known.begin(), known.end(), node.text) != known.end())
      return true;
    error(node.origin, std::string(row.path),
          node.describe() + " is not known; known: " + join(known) +
              runtime::nearest_hint(node.text, known));
    return false;
  }

  std::optional<double> read_number(const YamlNode& node, const std::string& path, double min,
                                    double max, bool whole) {
    double x = 0;
    const bool plain = node.kind == Kind::scalar && !node.quoted &&
                       runtime::config_file::parse_real(node.text, x) == Parsed::ok;
    const bool any = min == 0 && max == 0;
    if (plain && (any || (x >= min && x <= max)) && (!whole || x == std::floor(x))) return x;
    error(node.origin, path,
          std::string("expects a ") + (whole ? "whole number" : "number") +
              (any           ? ""
               : max >= many ? " from " + shortest(min)
                             : " from " + shortest(min) + " to " + shortest(max)) +
              ", found " + node.describe());
    return {};
  }

  // ---- values with a form of their own ----------------------------------------------------------

  void read_special(const std::string& path, const YamlNode& node) {
    if (path == "task") {
      if (!expect(node, Kind::map, path, "{builtin: NAME, …}")) return;
      study_.task = to_json(node);
      if (const YamlNode* const command = node.find("command")) {
        read_command(node, *command);
      } else if (node.find("builtin") == nullptr) {
        unknown(node.origin, path, node.keys.empty() ? "" : node.keys.front(),
                {"builtin", "command"});
      }
    } else if (path == "bases") {
      if (!expect(node, Kind::map, path, "a file for each word of `optimizer`")) return;
      for (std::size_t i = 0; i < node.keys.size(); ++i) {
        if (expect(node.items[i], Kind::scalar, path + "." + node.keys[i], "a file"))
          study_.bases[node.keys[i]] = node.items[i].text;
      }
    } else if (path == "search.parameters") {
      if (!expect(node, Kind::map, path, "a mapping")) return;
      for (std::size_t i = 0; i < node.keys.size(); ++i) {
        ParameterSpec spec;
        spec.name = node.keys[i];
        spec.origin = node.key_origins[i];
        read_parameter(node.items[i], path + "." + spec.name, spec);
        study_.parameters.push_back(std::move(spec));
      }
    } else if (path == "search.points") {
      if (!expect(node, Kind::list, path, "a list of mappings")) return;
      for (const YamlNode& item : node.items) {
        if (expect(item, Kind::map, path, "{NAME: scalar, …}"))
          study_.points.push_back(to_json(item));
      }
    } else if (path == "search.telescope") {
      read_telescope(node, path);
    } else if (path == "search.zip") {
      if (!expect(node, Kind::list, path, "a list of lists of names")) return;
      for (const YamlNode& item : node.items) {
        if (!expect(item, Kind::list, path, "a list of names")) continue;
        std::vector<std::string> names;
        for (const YamlNode& name : item.items) names.push_back(name.text);
        study_.zip.push_back(std::move(names));
      }
    } else if (path == "search.exclude") {
      if (!expect(node, Kind::list, path, "a list of expressions")) return;
      for (const YamlNode& item : node.items) {
        if (auto e = read_expression(item, path)) study_.exclude.push_back(std::move(*e));
      }
    } else if (path == "search.keep") {
      read_keep(node, path);
    } else if (path == "search.derive") {
      if (!expect(node, Kind::map, path, "{NAME: expression}")) return;
      for (std::size_t i = 0; i < node.keys.size(); ++i) {
        if (auto e = read_expression(node.items[i], path + "." + node.keys[i]))
          study_.derive.emplace_back(node.keys[i], std::move(*e));
      }
    } else if (path == "analysis.items") {
      static const Words known{"fit",      "compare",   "per",  "definitions", "b_ref",
                               "group",    "epsilon",   "loss", "numerator",   "denominator",
                               "censored", "reference", "over"};
      if (!expect(node, Kind::list, path, "a list of mappings")) return;
      for (const YamlNode& item : node.items) {
        if (!expect(item, Kind::map, path, "{fit: NAME, …} or {compare: NAME, …}")) continue;
        for (std::size_t i = 0; i < item.keys.size(); ++i) {
          if (std::find(known.begin(), known.end(), item.keys[i]) == known.end())
            unknown(item.key_origins[i], path, item.keys[i], known);
        }
      }
      study_.analysis_items = to_json(node);
    }
  }

  void read_command(const YamlNode& task, const YamlNode& command) {
    const std::string path = "task.command";
    if (task.keys.size() > 1)
      error(task.origin, "task", "a command has no sizes; its arguments do: {NAME} of a parameter");
    if (!expect(command, Kind::list, path, "[PROGRAM, ARGUMENT, …]")) return;
    for (const YamlNode& word : command.items) {
      if (expect(word, Kind::scalar, path, "a text")) study_.command.push_back(word.text);
    }
    if (study_.command.empty()) error(command.origin, path, "expects [PROGRAM, ARGUMENT, …]");
  }

  void read_telescope(const YamlNode& node, const std::string& path) {
    static const Words known{"over", "of", "points", "carry"};
    if (!expect(node, Kind::map, path, "a mapping with " + join(known))) return;
    Telescope& telescope = study_.telescope;
    for (std::size_t i = 0; i < node.keys.size(); ++i) {
      const YamlNode& value = node.items[i];
      const std::string at = path + "." + node.keys[i];
      if (node.keys[i] == "over") {
        if (expect(value, Kind::scalar, at, "a parameter")) telescope.over = value.text;
      } else if (node.keys[i] == "of") {
        telescope.of.clear();
        if (!expect(value, Kind::list, at, "a list of parameters")) continue;
        for (const YamlNode& item : value.items) telescope.of.push_back(item.text);
      } else if (node.keys[i] == "points") {
        telescope.points.clear();
        if (!expect(value, Kind::list, at, "a list of numbers of points")) continue;
        for (const YamlNode& item : value.items) {
          if (const auto x = read_number(item, at, 1, 1000, true))
            telescope.points.push_back(static_cast<std::int64_t>(*x));
        }
        if (value.items.empty()) error(value.origin, at, "expects a number of points at least");
      } else if (node.keys[i] == "carry") {
        if (!expect(value, Kind::map, at, "{NAME: exponent}")) continue;
        for (std::size_t k = 0; k < value.keys.size(); ++k) {
          if (const auto x = read_number(value.items[k], at, -10, 10, false))
            telescope.carry[value.keys[k]] = *x;
        }
      } else {
        unknown(node.key_origins[i], path, node.keys[i], known);
      }
    }
  }

  /// What stays as it is from batch to batch, as expressions of `derive`.
  void read_keep(const YamlNode& node, const std::string& path) {
    static const Words known{"tau", "lambda_eta", "momentum", "beta2"};
    if (!expect(node, Kind::map, path, "a mapping with " + join(known))) return;
    for (std::size_t i = 0; i < node.keys.size(); ++i) {
      const std::string& key = node.keys[i];
      const YamlNode& value = node.items[i];
      const std::string at = path + "." + key;
      if (key == "tau" || key == "lambda_eta") {
        const auto x = read_number(value, at, 0, 1e6, false);
        if (!x) continue;
        const std::string number = runtime::config_file::shortest(*x);
        if (key == "tau" && !(*x > 0)) error(value.origin, at, "expects a number above 0");
        keep(node.key_origins[i], "weight_decay",
             key == "tau" ? "batch_size/(lr*" + number + "*max_examples)" : number + "/lr");
      } else if (key == "momentum" || key == "beta2") {
        if (!expect(value, Kind::map, at, "{value: BETA, at: {batch_size: N}}")) continue;
        std::optional<double> beta, batch;
        for (std::size_t k = 0; k < value.keys.size(); ++k) {
          const YamlNode* const size =
              value.keys[k] == "at" ? value.items[k].find("batch_size") : nullptr;
          if (value.keys[k] == "value") {
            beta = read_number(value.items[k], at + ".value", 0, 1, false);
          } else if (size != nullptr) {
            batch = read_number(*size, at + ".at.batch_size", 1, many, true);
          } else {
            unknown(value.key_origins[k], at, value.keys[k], {"value", "at"});
          }
        }
        if (!beta || !batch) {
          error(value.origin, at, "expects {value: BETA, at: {batch_size: N}}");
          continue;
        }
        keep(node.key_origins[i], key,
             runtime::config_file::shortest(*beta) + "^(batch_size/" +
                 runtime::config_file::shortest(*batch) + ")");
      } else {
        unknown(node.key_origins[i], path, key, known);
      }
    }
  }
  void keep(const runtime::Origin& origin, const std::string& name, const std::string& text) {
    kept_.emplace_back(origin, name);
    study_.derive.emplace(study_.derive.begin(), name, Expression(text));
  }

  std::optional<Expression> read_expression(const YamlNode& node, const std::string& path) {
    if (!expect(node, Kind::scalar, path, "an expression")) return {};
    try {
      return Expression(node.text);
    } catch (const std::invalid_argument& wrong) {
      error(node.origin, path, wrong.what());
      return {};
    }
  }

  void read_parameter(const YamlNode& node, const std::string& path, ParameterSpec& spec) {
    if (node.kind == Kind::scalar) {
      spec.values = {to_json(node)};
      return;
    }
    if (!expect(node, Kind::map, path, "a scalar or one of values, log2, range, distribution"))
      return;
    Words known{"values", "log2", "range", "distribution", "min", "max"};
    if (spec.name == "lr") known.insert(known.end(), {"center", "multipliers", "extend_on_edge"});
    if (spec.name == "seed") known.insert(known.end(), {"tune", "report"});
    int forms = 0;
    for (std::size_t i = 0; i < node.keys.size(); ++i) {
      const std::string& key = node.keys[i];
      const YamlNode& value = node.items[i];
      const std::string at = path + "." + key;
      if (std::find(known.begin(), known.end(), key) == known.end()) {
        unknown(node.key_origins[i], path, key, known);
      } else if (key == "values") {
        ++forms;
        if (!expect(value, Kind::list, at, "a list")) continue;
        for (const YamlNode& item : value.items) {
          if (expect(item, Kind::scalar, at, "a scalar")) spec.values.push_back(to_json(item));
        }
      } else if (key == "log2" || key == "range") {
        ++forms;
        for (const double x : read_range(value, at)) {
          const double y = key == "log2" ? std::exp2(x) : x;
          // A batch of 16 is a whole number.
          spec.values.push_back(y == std::floor(y) && std::abs(y) < many
                                    ? Json(static_cast<std::int64_t>(y))
                                    : Json(y));
        }
      } else if (key == "distribution") {
        ++forms;
        static const Words kinds{"uniform", "log_uniform"};
        spec.distribution = value.text;
        if (std::find(kinds.begin(), kinds.end(), value.text) == kinds.end()) {
          error(value.origin, at,
                value.describe() + " is not known; known: " + join(kinds) +
                    runtime::nearest_hint(value.text, kinds));
        }
      } else if (key == "min" || key == "max") {
        if (const auto x = read_number(value, at, 0, 0, false))
          (key == "min" ? spec.min : spec.max) = *x;
      } else if (key == "tune" || key == "report") {
        if (key == "tune") ++forms;
        if (!expect(value, Kind::list, at, "a list of seeds")) continue;
        for (const YamlNode& item : value.items) {
          if (const auto x = read_number(item, at, 0, many, true))
            (key == "tune" ? spec.tune : spec.report).push_back(static_cast<std::int64_t>(*x));
        }
      } else if (key == "center") {
        ++forms;
        if (!spec.center) spec.center.emplace();
        read_center(value, at, *spec.center);
      } else if (key == "multipliers") {
        if (!spec.center) spec.center.emplace();
        read_multipliers(value, at, *spec.center);
      } else if (key == "extend_on_edge") {
        if (const auto x = read_number(value, at, 0, 20, true))
          spec.extend_on_edge = static_cast<std::int64_t>(*x);
      }
    }
    if (forms != 1) {
      error(node.origin, path,
            "says how its values come about " + std::to_string(forms) + " times; once is needed");
    }
    if (node.find("multipliers") != nullptr && node.find("center") == nullptr)
      error(node.origin, path, "multipliers are of a center");
    if (spec.center && spec.center->step == 0) spec.center->step = 1;
    std::vector<Json> seen;
    for (const Json& value : spec.values) {
      if (std::find(seen.begin(), seen.end(), value) != seen.end())
        error(node.origin, path, value.dump() + " is there twice");
      seen.push_back(value);
    }
    if (!spec.distribution.empty() &&
        !(spec.min < spec.max && (spec.distribution == "uniform" || spec.min > 0))) {
      error(
          node.origin, path,
          "needs min < max" + std::string(spec.distribution == "uniform" ? "" : ", both above 0"));
    }
  }

  /// lo, lo + step, … up to hi. @param step  where the list has no third entry
  std::vector<double> read_range(const YamlNode& node, const std::string& path, double step = 1) {
    if (!expect(node, Kind::list, path, "[lo, hi] or [lo, hi, step]")) return {};
    std::vector<double> x;
    for (const YamlNode& item : node.items) {
      if (const auto number = read_number(item, path, 0, 0, false)) x.push_back(*number);
    }
    if (x.size() == 3) step = x[2];
    if ((x.size() != 2 && x.size() != 3) || !(step > 0) || x[1] < x[0] ||
        (x[1] - x[0]) / step > 1e4) {
      error(node.origin, path, "expects [lo, hi] or [lo, hi, step], with lo <= hi and step > 0");
      return {};
    }
    std::vector<double> out;
    // Multiples of the step, not sums: 0.1 ten times is not 1.
    for (int i = 0; x[0] + i * step <= x[1] + 1e-9 * step; ++i) out.push_back(x[0] + i * step);
    return out;
  }

  void read_center(const YamlNode& node, const std::string& path, Center& center) {
    static const Words known{"rule", "at", "noise_scale", "per", "value"};
    static const Words rules{"sqrt", "linear", "surge", "constant"};
    if (!expect(node, Kind::map, path, "a mapping with " + join(known))) return;
    for (std::size_t i = 0; i < node.keys.size(); ++i) {
      const YamlNode& value = node.items[i];
      const std::string at = path + "." + node.keys[i];
      if (node.keys[i] == "rule") {
        center.rule = value.text;
        if (std::find(rules.begin(), rules.end(), value.text) == rules.end())
          error(value.origin, at,
                value.describe() + " is not a rule; known: " + join(rules) +
                    runtime::nearest_hint(value.text, rules));
      } else if (node.keys[i] == "at") {
        const YamlNode* const batch = value.find("batch_size");
        if (batch == nullptr || value.keys.size() != 1) {
          error(value.origin, at, "expects {batch_size: N}");
        } else if (const auto x = read_number(*batch, at + ".batch_size", 1, many, true)) {
          center.reference_batch = *x;
        }
      } else if (node.keys[i] == "noise_scale") {
        if (const auto x = read_number(value, at, 1, many, false)) center.noise_scale = *x;
      } else if (node.keys[i] == "per") {
        center.per = value.text;
      } else if (node.keys[i] == "value") {
        const auto take = [&](const std::string& word, const YamlNode& number) {
          const auto x = read_number(number, at, 0, 0, false);
          if (x && !(*x > 0)) error(number.origin, at, "expects a number above 0");
          if (x) center.values[word] = *x;
        };
        if (value.kind == Kind::map) {
          for (std::size_t k = 0; k < value.keys.size(); ++k) take(value.keys[k], value.items[k]);
        } else {
          take("", value);
        }
      } else {
        unknown(node.key_origins[i], path, node.keys[i], known);
      }
    }
    if (center.values.empty()) error(node.origin, path, "value is required");
    if (center.rule != "constant" && center.reference_batch == 0)
      error(node.origin, path, "rule " + center.rule + " needs at: {batch_size: N}");
    if ((center.rule == "surge") != (center.noise_scale > 0))
      error(node.origin, path,
            "rule surge and noise_scale, the batch of the largest rate, come together");
    if (center.per.empty() != (center.values.count("") == 1))
      error(node.origin, path, "value is a number, or with `per` a number for each word");
  }

  /// Halves of an octave (sqrt2), or octaves (log2).
  void read_multipliers(const YamlNode& node, const std::string& path, Center& center) {
    static const Words known{"sqrt2", "log2"};
    if (!expect(node, Kind::map, path, "{sqrt2: [lo, hi]}")) return;
    if (node.keys.size() != 1 ||
        std::find(known.begin(), known.end(), node.keys[0]) == known.end()) {
      unknown(node.origin, path, node.keys.empty() ? "" : node.keys[0], known);
      return;
    }
    const double unit = node.keys[0] == "sqrt2" ? 0.5 : 1;
    const std::vector<double> e = read_range(node.items[0], path + "." + node.keys[0]);
    if (e.empty()) return;
    center.first = unit * e.front();
    center.last = unit * e.back();
    center.step = unit * (e.size() > 1 ? e[1] - e[0] : 1);
  }

  const YamlNode& root_;
  Kept kept_;  // what `search.keep` derives
  Study study_;
  std::vector<std::string> errors_;
};

}  // namespace

Study read_study(const YamlNode& root, const std::string& source) {
  return Reader(root).read(source);
}

}  // namespace orthrus::runner
