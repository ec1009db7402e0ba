#pragma once
/// @file
/// ECO: what rounding takes from the weights goes into the momentum, and the next steps bring it
/// back (arXiv:2601.22101). W̃ = ρŴ − ηU(M), Ŵ ← q(W̃), E = W̃ − Ŵ, M ← M + κ·P⁻¹E, where
/// U(M) = P·M: no master copy.
///
/// With U linear in M and P at rest, Φ = Ŵ − s·M (s = −1/κ) moves as it would without rounding,
/// whatever the quantizer. Where U is scale-invariant (sign, msign) nothing can be exact: the
/// correction only turns the step, and a guard keeps it small.

#include <cstdint>
#include <functional>
#include <vector>

namespace orthrus::optim {

/// How what is added to M now comes back: the next X has `first` of it, and M keeps `decay` of
/// itself from step to step. M ← βM + …: first = β (β² with Nesterov), decay = β.
struct MomentumGain {
  double first = 0, decay = 0;
};

/// Which κ (`weights.eco.kappa`).
enum class Kappa : std::uint8_t {
  exact,          ///< −(ρ − decay)/(η·first)
  blog,           ///< −ρ(1 − decay)/(η·first): short by λ·E in every step
  paper,          ///< −(1 − decay)/(η·first): without weight decay
  exact_schedule  ///< from every η to come
};

/// κ of a step, from the rate and decay of the next one. @pre lr > 0
double kappa(Kappa kind, const MomentumGain& gain, double lr, double weight_decay);

/// −1/s_{t+1} of every step t = 1 … T, where s_t = (first·η_t + decay·s_{t+1})/ρ_t is what one unit
/// of momentum takes from the weights from step t on; after T everything stays as it is there.
/// Steps from which nothing comes back have κ = 0.
/// @param lr  η_t, t from 1.
std::vector<double> schedule_kappas(const MomentumGain& gain, double weight_decay,
                                    std::int64_t steps,
                                    const std::function<double(std::int64_t)>& lr);

}  // namespace orthrus::optim
