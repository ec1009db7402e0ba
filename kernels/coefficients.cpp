#include "kernels/coefficients.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <orthrus/error.hpp>
#include <utility>

namespace orthrus::kernels {
namespace {

/// The limit of the optimal polynomial as [l, u] shrinks to 1: Padé's, cubic convergence.
constexpr Quintic converged{1.875, -1.25, 0.375};

constexpr std::array jordan{Quintic{3.4445, -4.7750, 2.0315}};

constexpr std::array you5{
    Quintic{4.0848, -6.8946, 2.9270}, Quintic{3.9505, -6.3029, 2.6377},
    Quintic{3.7418, -5.5913, 2.3037}, Quintic{2.8769, -3.1427, 1.2046},
    Quintic{2.8366, -3.0525, 1.2012},
};

constexpr std::array polar_express{
    Quintic{8.28721201814563, -23.595886519098837, 17.300387312530933},
    Quintic{4.107059111542203, -2.9478499167379106, 0.5448431082926601},
    Quintic{3.9486908534822946, -2.908902115962949, 0.5518191394370137},
    Quintic{3.3184196573706015, -2.488488024314874, 0.51004894012372},
    Quintic{2.300652019954817, -1.6689039845747493, 0.4188073119525673},
    Quintic{1.891301407787398, -1.2679958271945868, 0.37680408948524835},
    Quintic{1.8750014808534479, -1.2500016453999487, 0.3750001645474248},
    converged,
};

constexpr std::array polar_express_101{
    Quintic{8.20516041400557, -22.901934987056, 16.4607249101803},
    Quintic{4.06639515994277, -2.86115408675514, 0.518399522669474},
    Quintic{3.90959490443792, -2.82335173503952, 0.525036976939003},
    Quintic{3.28556401719862, -2.41530195963594, 0.485294065527909},
    Quintic{2.27787328708398, -1.61982176526544, 0.398480787041684},
    Quintic{1.87257565127465, -1.23070425748843, 0.358516162095117},
    Quintic{1.85643710975589, -1.21323928191854, 0.356799789413759},
    converged,
};

constexpr std::array polar_express_105{
    Quintic{7.89258287442441, -20.3830139458796, 13.5553061494069},
    Quintic{3.91148486813543, -2.54646359290609, 0.426898831967307},
    Quintic{3.76065795569742, -2.51281901821656, 0.432364734907007},
    Quintic{3.16039967368629, -2.1496495188985, 0.399636690766439},
    Quintic{2.19109716186173, -1.44166201021466, 0.328146487623155},
};

constexpr std::array dion_pe102{
    Quintic{8.156554524902461, -22.48329292557795, 15.878769915207462},
    Quintic{4.042929935166739, -2.808917465908714, 0.5000178451051316},
    Quintic{3.8916678022926607, -2.772484153217685, 0.5060648178503393},
    Quintic{3.285753657755655, -2.3681294933425376, 0.46449024233003106},
    Quintic{2.3465413258596377, -1.7097828382687081, 0.42323551169305323},
};

constexpr std::array torch_pe10{
    Quintic{8.237312, -23.157747, 16.680568}, Quintic{4.082442, -2.893048, 0.525285},
    Quintic{3.926348, -2.854747, 0.531802},   Quintic{3.298219, -2.424542, 0.486320},
    Quintic{2.297037, -1.636626, 0.400263},   Quintic{1.876381, -1.234790, 0.358919},
    Quintic{1.856442, -1.213245, 0.356800},   Quintic{1.856435, -1.213237, 0.356799},
    Quintic{1.856431, -1.213229, 0.356795},   Quintic{1.874995, -1.249991, 0.374995},
};

constexpr std::array cans{
    Quintic{8.47032880384807, -25.108074706661874, 18.629275599118014},
    Quintic{4.182834183293938, -3.1087011098892385, 0.5806066813500486},
    Quintic{3.9618572789615993, -2.9540637463593793, 0.5629761179538966},
    Quintic{3.2865862170279607, -2.464720134531282, 0.5073576938614548},
    Quintic{2.2737499944340396, -1.6446603679080694, 0.4161909274978861},
    Quintic{1.8887161973518283, -1.2651572253385992, 0.3765189255574897},
    converged,
};

constexpr std::array eco8{
    Quintic{7.2086, -15.5131, 9.0178}, Quintic{3.9623, -2.5813, 0.4542},
    Quintic{3.9466, -2.5765, 0.4544},  Quintic{3.8991, -2.5671, 0.4566},
    Quintic{3.7186, -2.5308, 0.4653},  Quintic{3.1390, -2.3073, 0.4733},
    Quintic{2.1715, -1.5246, 0.3885},  Quintic{1.8648, -1.2224, 0.3577},
};

constexpr std::array cubic5{
    Quintic{3.3656576, -3.3420992, 0}, Quintic{2.5744352, -1.4957376, 0},
    Quintic{2.5368962, -1.4312570, 0}, Quintic{2.4418906, -1.2764040, 0},
    Quintic{2.2230472, -0.9630650, 0},
};

constexpr std::array dsv4_10{
    jordan[0],
    jordan[0],
    jordan[0],
    jordan[0],
    jordan[0],
    jordan[0],
    jordan[0],
    jordan[0],
    Quintic{2, -1.5, 0.5},
    Quintic{2, -1.5, 0.5},
};

constexpr std::array pade5{converged};
constexpr std::array pade3{Quintic{1.5, -0.5, 0}};
constexpr std::array modula{Quintic{3, -16.0 / 5, 6.0 / 5}};

constexpr std::array tables{
    CoefficientTable{"jordan", jordan, 1, "Keller Jordan, Muon, 2024"},
    CoefficientTable{"you5", you5, 1, "You Jiacheng, 2025; tuned, not optimal"},
    CoefficientTable{"polar_express", polar_express, 1, "arXiv:2505.16932, no safety factor"},
    CoefficientTable{"polar_express_101", polar_express_101, 1.01, "arXiv:2505.16932, as released"},
    CoefficientTable{"polar_express_105", polar_express_105, 1, "Gram Newton-Schulz, as released"},
    CoefficientTable{"dion_pe102", dion_pe102, 1.02, "microsoft/dion"},
    // torch feeds X/‖X‖: its factor 1.01 is inside the polynomials only.
    CoefficientTable{"torch_pe10", torch_pe10, 1, "torch.optim.Muon"},
    CoefficientTable{"cans", cans, 1, "arXiv:2506.10935, exactly optimal for l = 1e-3"},
    CoefficientTable{"eco8", eco8, 1, "ECO experiment scripts; needs all eight entries"},
    CoefficientTable{"cubic5", cubic5, 1, "arXiv:2606.00371, degree 3"},
    CoefficientTable{"dsv4_10", dsv4_10, 1, "eight jordan, then two flattening entries"},
    CoefficientTable{"pade5", pade5, 1, "Newton-Schulz of degree 5"},
    CoefficientTable{"pade3", pade3, 1, "Newton-Schulz of degree 3"},
    CoefficientTable{"modula", modula, 1, "modula"},
};

/// Below this distance the four points of the Remez system coincide in double.
constexpr double narrow = 1 - 5e-6;

bool is_narrow(double l, double u) { return l / u >= narrow; }

/// (a, b, c, E) with p(x₀)+E = p(x₁)−E = p(x₂)+E = p(x₃)−E = 1. Gaussian elimination with row
/// pivoting; the columns x, x³, x⁵ of the smallest points differ by orders of magnitude, hence long
/// double.
std::array<long double, 4> alternate(const std::array<long double, 4>& points) {
  std::array<std::array<long double, 5>, 4> rows{};
  for (std::size_t i = 0; i < 4; ++i) {
    const long double x = points[i];
    rows[i] = {x, x * x * x, x * x * x * x * x, i % 2 == 0 ? 1.0L : -1.0L, 1.0L};
  }
  for (std::size_t k = 0; k < 4; ++k) {
    std::size_t pivot = k;
    for (std::size_t i = k + 1; i < 4; ++i) {
      if (std::abs(rows[i][k]) > std::abs(rows[pivot][k])) pivot = i;
    }
    std::swap(rows[k], rows[pivot]);
    for (std::size_t i = k + 1; i < 4; ++i) {
      const long double factor = rows[i][k] / rows[k][k];
      for (std::size_t j = k; j < 5; ++j) rows[i][j] -= factor * rows[k][j];
    }
  }
  std::array<long double, 4> solution{};
  for (std::size_t k = 4; k-- > 0;) {
    long double rest = rows[k][4];
    for (std::size_t j = k + 1; j < 4; ++j) rest -= rows[k][j] * solution[j];
    solution[k] = rest / rows[k][k];
  }
  return solution;
}

void check_interval(double l, double u) {
  expects<ConfigError>(0 < l && l <= u && std::isfinite(u), "needs an interval with 0 < l <= u");
}

/// One step of the optimal composition on [l, u]: the polynomial, recentred so that p(l) + p(u)
/// = 2.
Quintic recentred(double l, double u, double cushion) {
  const Quintic p = optimal_quintic(std::max(l, cushion * u), u);
  const double z = 2 / (p(l) + p(u));
  return {p.a * z, p.b * z, p.c * z};
}

/// Where p sends l; the next interval is [this, 2 − this]. Rounding may lift a converged l above 1.
double lifted(const Quintic& p, double l) { return std::min(p(l), 1.0); }

}  // namespace

std::span<const CoefficientTable> coefficient_tables() { return tables; }

const CoefficientTable* find_coefficients(std::string_view name) {
  const auto* found = std::find_if(tables.begin(), tables.end(),
                                   [&](const CoefficientTable& t) { return t.name == name; });
  return found == tables.end() ? nullptr : found;
}

std::vector<Quintic> first_iterations(const CoefficientTable& table, int count) {
  expects<ConfigError>(count >= 1 && !table.iterations.empty(), "needs at least one iteration");
  std::vector<Quintic> result;
  const auto all = static_cast<std::ptrdiff_t>(table.iterations.size());
  for (std::ptrdiff_t i = 0; i < count; ++i) {
    result.push_back(table.iterations[static_cast<std::size_t>(std::min(i, all - 1))]);
  }
  return result;
}

Quintic optimal_quintic(double l, double u) {
  check_interval(l, u);
  if (is_narrow(l, u)) {
    const double u3 = u * u * u;
    return {15 / (8 * u), -10 / (8 * u3), 3 / (8 * u3 * u * u)};
  }
  // Remez: p alternates around 1 at l, its two extrema q < r, and u; the extrema move until they
  // stay.
  long double q = (3.0L * l + u) / 4;
  long double r = (l + 3.0L * u) / 4;
  std::array<long double, 4> p{};
  long double error = 0;
  for (int i = 0; i < 200; ++i) {
    p = alternate({l, q, r, u});
    const auto [a, b, c, e] = p;
    const long double root = std::sqrt(9 * b * b - 20 * a * c);
    q = std::sqrt((-3 * b - root) / (10 * c));
    r = std::sqrt((-3 * b + root) / (10 * c));
    if (std::abs(e - error) <= 1e-15L) break;
    error = e;
  }
  return {static_cast<double>(p[0]), static_cast<double>(p[1]), static_cast<double>(p[2])};
}

Quintic optimal_cubic(double l, double u) {
  check_interval(l, u);
  const double e = std::sqrt((l * l + l * u + u * u) / 3);
  const double k = 2 / (2 * e * e * e + l * l * u + l * u * u);
  return {k * 3 * e * e, -k, 0};
}

std::vector<Quintic> optimal_composition(double l, int count, double cushion, double safety) {
  check_interval(l, 1);
  expects<ConfigError>(count >= 1, "needs at least one iteration");
  expects<ConfigError>(0 <= cushion && cushion < 1 && safety >= 1,
                       "needs 0 <= cushion < 1 and safety >= 1");
  std::vector<Quintic> result;
  double u = 1;
  for (int i = 0; i < count; ++i) {
    const Quintic p = recentred(l, u, cushion);
    // Once the interval has shrunk to 1, dividing would only move the limit away from it.
    const double s = is_narrow(std::max(l, cushion * u), u) ? 1 : safety;
    result.push_back({p.a / s, p.b / (s * s * s), p.c / (s * s * s * s * s)});
    l = lifted(p, l);
    u = 2 - l;
  }
  return result;
}

int iterations_for(double l, double tolerance) {
  check_interval(l, 1);
  double u = 1;
  for (int count = 1; count < 64; ++count) {
    const Quintic p = recentred(l, u, 0);
    l = lifted(p, l);
    u = 2 - l;
    if (1 - l <= tolerance) return count;
  }
  return 64;
}

}  // namespace orthrus::kernels
