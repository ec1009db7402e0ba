#pragma once
/// @file
/// MachineProfile: what a machine does per second, and what the work of a step costs on it.
///
/// Measured by `orthrus bench --profile`, or taken from a file in configs/profiles. Predictions are
/// pure functions of the profile: equal profiles give equal plans.

#include <array>
#include <cstdint>
#include <map>
#include <orthrus/dtype.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace orthrus::runtime {

/// A rate per second that was seen at a size.
struct RatePoint {
  double size = 0, rate = 0;
  friend bool operator==(const RatePoint&, const RatePoint&) = default;
};
/// Ascending in size, at least one point.
using RateTable = std::vector<RatePoint>;
/// A power law between two points (so that what takes the same time at both takes it between them,
/// too), constant beyond the first and the last.
double rate_at(const RateTable& table, double size);

/// Flops per second of the products of one element type, by the smallest dimension of the product.
/// A gemm is 2·m·n·k flops, a syrk n²·k wherever it runs: where a device multiplies the whole
/// square, its syrk has half the rate of its gemm.
struct ProductRates {
  RateTable gemm, syrk;
  friend bool operator==(const ProductRates&, const ProductRates&) = default;
};

/// What ranks do together.
enum class Collective : std::uint8_t {
  reduce_scatter,
  all_gather,
  all_to_all,
  all_reduce,
  broadcast,
  reduce,
  send
};
inline constexpr std::array collectives{Collective::reduce_scatter,
                                        Collective::all_gather,
                                        Collective::all_to_all,
                                        Collective::all_reduce,
                                        Collective::broadcast,
                                        Collective::reduce,
                                        Collective::send};
constexpr std::string_view name_of(Collective kind) noexcept {
  constexpr std::array<std::string_view, collectives.size()> names{
      "reduce_scatter", "all_gather", "all_to_all", "all_reduce", "broadcast", "reduce", "send"};
  return names[static_cast<std::size_t>(kind)];
}

/// A message of so many bytes: latency_s + bytes / rate at them.
struct LinkRate {
  double latency_s = 0;
  /// Per rank and direction, while all ranks send; by the bytes a rank sends in one call. One
  /// number in a file is a table of one point, at 1.
  RateTable bytes_per_s;
  [[nodiscard]] double seconds(double bytes) const { return bytes / rate_at(bytes_per_s, bytes); }
  friend bool operator==(const LinkRate&, const LinkRate&) = default;
};

/// One level of the network.
struct Link {
  LinkRate any;
  std::map<Collective, LinkRate> special;  ///< calls that were found to differ from `any`

  [[nodiscard]] const LinkRate& of(Collective kind) const {
    const auto found = special.find(kind);
    return found == special.end() ? any : found->second;
  }
  friend bool operator==(const Link&, const Link&) = default;
};

/// One rank's machine. The defaults are those of configs/profiles/default-cpu.yaml: one core of a
/// current server, and all ranks on one node.
struct MachineProfile {
  MachineProfile();

  std::string name = "default-cpu";
  std::string description;  ///< where the numbers come from; one line
  ProductRates f32{{{64, 6e10}, {256, 9e10}, {1024, 1e11}},
                   {{64, 3.5e10}, {256, 7e10}, {1024, 9e10}}};
  ProductRates bf16{{{64, 8e10}, {256, 1.9e11}, {1024, 2.1e11}},
                    {{64, 4e10}, {256, 9.5e10}, {1024, 1.05e11}}};
  ProductRates f64{{{64, 3e10}, {1024, 5e10}}, {{64, 1.8e10}, {1024, 4.5e10}}};
  /// Bytes an element-wise pass reads and writes per second, by the bytes of the pass: what fits in
  /// a cache and was just there is faster.
  RateTable pass{{4e6, 2.4e10}, {6.4e7, 8e9}};
  Link node{{2e-6, {{1, 5e9}}}, {}};        ///< between ranks of one node
  Link network{{1e-5, {{1, 1.25e9}}}, {}};  ///< between nodes
  int ranks_per_node = 0;                   ///< 0: all ranks are on one node

  /// @pre f32, bf16 or f64
  [[nodiscard]] const ProductRates& products(DType dtype) const;
  friend bool operator==(const MachineProfile&, const MachineProfile&) = default;
};

// ---- predictions, in seconds on one rank --------------------------------------------------------

/// C ← A·B, m×k times k×n: 2·m·n·k / gemm rate at min(m, n, k).
double gemm_seconds(const MachineProfile& profile, DType dtype, Index m, Index n, Index k);
/// C ← A·Aᵀ of an n×k matrix, written whole: n²·k / syrk rate at min(n, k).
double syrk_seconds(const MachineProfile& profile, DType dtype, Index n, Index k);
/// One element-wise pass that reads and writes `bytes`. A small one is taken for one of several
/// over what a cache holds, as inside msign.
double pass_seconds(const MachineProfile& profile, double bytes);
/// `kernels::msign` of an m×n f32 matrix iterated in `dtype` of b bytes; s the shorter side, l the
/// longer. Before: max and norm, 4·s·l bytes each, and the cast, (4+b)·s·l. Per iteration syrk(s,
/// l)
/// + syrk(s, s) + gemm(s, l, s) and two copies, 2b·s² and 2b·s·l. Or, of T iterations by G products
/// (`kernels::msign_gram_products`, 0 for none), G times syrk(s, l), gemm(s, l, s) and a copy of Q,
/// (4+b)·s², and 4T − 3G products of `gram_polynomial_seconds`.
double msign_seconds(const MachineProfile& profile, Index m, Index n, Index iterations, DType dtype,
                     Index gram_products = 0);
/// One term of `kernels::rational_gram` of an m×m matrix: an inverse, m³ flops at 0.65 of the gemm
/// rate at m (measured: its products are 48 deep), and 16·m² bytes to shift, scale and pack.
double inverse_seconds(const MachineProfile& profile, Index m);
/// `kernels::rational_msign` of an m×n f32 matrix with `terms` terms: max and cast as `msign`,
/// syrk(s, l) in `dtype`, twelve products with R, the inverses, gemm(s, l, s) in f32 and a copy.
double rational_msign_seconds(const MachineProfile& profile, Index m, Index n, int terms,
                              DType dtype);
/// `kernels::gram_polynomial` of an m×m matrix: T iterations are 4T − 3 products, of which one
/// triangle is computed in panels of p rows and mirrored: (1 + p/m)·m³ flops / gemm rate at m, and
/// 16·m² bytes of copies. 3F products, of the first F iterations, sum in f64: 30·m² bytes, and
/// 6·(m/p + 1)·m² as the other factor is widened for every panel.
/// @param f64_iterations  F, `kernels::gram_f64_iterations`; below T.
double gram_polynomial_seconds(const MachineProfile& profile, Index m, Index iterations,
                               Index f64_iterations = 0);

/// Seconds until a collective of `ranks` ranks is over.
///
/// On one level P ranks take messages·(α·f(P) + β(b)·b), b = bytes/messages, with the level's α =
/// latency_s and 1/β = bytes_per_s; f, the messages one after another, is ⌈log₂P⌉, twice that in
/// all_reduce, P − 1 in all_to_all and 1 in send. Ranks are numbered along nodes, L on each of K =
/// ⌈P/L⌉. Where K > 1, latencies of the two levels add up, f(L) in the node and f(K) across (P − L
/// peers in all_to_all), and the levels move bytes at the same time: the slower one counts, of (1 −
/// x)·b in the node and x·b across. Of the P − 1 equal shares a rank sends, x leave the node: (K −
/// 1)/(P − 1) in reduce_scatter, all_gather and all_reduce, which libraries that know the nodes do
/// node by node (NCCL with one adapter per rank, hierarchical MPI); (P − L)/(P − 1) in all_to_all;
/// all of broadcast, reduce and send.
///
/// @param bytes     the most that one rank sends, as comm/cost.hpp counts them.
/// @param messages  calls, `Traffic::messages`. 0: no latency, as if `bytes` were part of one call.
/// @param per_node  L; 0: as many as the profile says. Ranks that lie s apart: at least 1,
///                  ranks_per_node / s.
double collective_seconds(const MachineProfile& profile, Collective kind, double bytes,
                          double messages, int ranks, int per_node = 0);
/// f above: messages one after another in a call of P ranks on one level; 0 for one rank.
double collective_steps(Collective kind, int ranks);

// ---- files --------------------------------------------------------------------------------------

/// A file of configs/profiles, as it was when Orthrus was built.
struct ShippedProfile {
  std::string_view name, text;
};
std::span<const ShippedProfile> shipped_profiles();

/// @param source  stands for the file in messages.
/// @throws ConfigError `source:line:column: key.path: what`: unknown or missing keys, rates that
///         are not positive, sizes that do not ascend.
MachineProfile parse_profile(const std::string& text, const std::string& source);
/// A shipped profile by name, or a file.
/// @throws ConfigError  listing the known names; or as `parse_profile`.
MachineProfile load_profile(const std::string& name_or_file);
/// The text that `parse_profile` reads back as an equal profile.
std::string to_yaml(const MachineProfile& profile);

}  // namespace orthrus::runtime
