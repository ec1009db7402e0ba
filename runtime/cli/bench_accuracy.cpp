// orthrus bench accuracy: how far from 1 every table and every rational function leaves singular
// values, in f32 and bf16. The table in kernels/README.md is its output.
#include <algorithm>
#include <charconv>
#include <cstdio>
#include <orthrus/error.hpp>
#include <string>
#include <utility>
#include <vector>

#include "kernels/backend.hpp"
#include "runtime/cli/accuracy.hpp"
#include "runtime/cli/bench.hpp"

namespace orthrus::cli {
namespace {

/// "256x1024".
std::pair<Index, Index> parse_shape(const std::string& text) {
  Index m = 0;
  Index n = 0;
  const char* const end = text.data() + text.size();
  const auto [x, first] = std::from_chars(text.data(), end, m);
  if (first == std::errc() && x != end && *x == 'x') {
    const auto [rest, second] = std::from_chars(x + 1, end, n);
    if (second == std::errc() && rest == end && 0 < m && m <= n && n <= 1 << 16) return {m, n};
  }
  throw ConfigError("--shape '" + text + "' is not MxN with 0 < M <= N <= 65536");
}

std::vector<SignMethod> chosen(const std::vector<std::string>& tables) {
  std::vector<SignMethod> methods = sign_methods();
  for (const std::string& table : tables) {
    const bool known = std::any_of(methods.begin(), methods.end(),
                                   [&](const SignMethod& m) { return m.name == table; });
    if (!known) {
      throw ConfigError("--tables '" + table +
                        "' is neither a table of coefficients (orthrus info) nor rational");
    }
  }
  if (tables.empty()) return methods;
  std::erase_if(methods, [&](const SignMethod& m) {
    return std::find(tables.begin(), tables.end(), m.name) == tables.end();
  });
  return methods;
}

}  // namespace

void bench_accuracy(const BenchOptions& options, bool json, bool prints) {
  const auto [m, n] = parse_shape(options.shape);
  const std::vector<SignMethod> methods = chosen(options.tables);
  if (!prints) return;
  const auto backend = kernels::open_backend("cpu");
  const Factors factors(m, n);
  if (!json) {
    std::string head = "| coefficients | steps |";
    std::string rule = "|---|---|";
    for (const Spectrum& s : spectra()) {
      head += fmt::format(" {} |", s.name);
      rule += "---|";
    }
    std::printf("%s largest σ |\n%s---|\n", head.c_str(), rule.c_str());
  }
  for (const SignMethod& method : methods) {
    std::string line = fmt::format("| `{}` | {} |", method.name, method.steps);
    double largest[] = {0, 0};
    for (const Spectrum& spectrum : spectra()) {
      const std::vector<double> sigma = spectrum.values(m);
      const std::vector<float> x = factors.matrix(sigma, *backend);
      for (const char* dtype : {"f32", "bf16"}) {
        const bool narrow = dtype == std::string("bf16");
        if (narrow && !method.in_bf16) continue;
        LmoConfig config = method.config;
        config.dtype = dtype;
        const SignError e = factors.error(run_sign(config, x, m, n, *backend), sigma, *backend);
        largest[narrow ? 1 : 0] = std::max(largest[narrow ? 1 : 0], e.largest);
        if (json) {
          const nlohmann::ordered_json row{
              {"name", "accuracy"},        {"coefficients", method.name},
              {"steps", method.steps},     {"dtype", dtype},
              {"shape", options.shape},    {"spectrum", spectrum.name},
              {"error_1e-2", e.above_1e2}, {"error_5e-3", e.above_5e3},
              {"error_2e-3", e.above_2e3}, {"largest", e.largest}};
          std::printf("%s\n", row.dump().c_str());
        } else {
          line += (narrow ? " / " : " ") + error_text(e.above_5e3);
        }
      }
      line += " |";
    }
    if (!json) {
      line += fmt::format(" {:.2f}", largest[0]);
      if (method.in_bf16) line += fmt::format(" / {:.2f}", largest[1]);
      std::printf("%s |\n", line.c_str());
    }
    std::fflush(stdout);
  }
}

}  // namespace orthrus::cli
