#include "optim/eco.hpp"

#include <algorithm>

namespace orthrus::optim {

double kappa(Kappa kind, const MomentumGain& gain, double lr, double weight_decay) {
  const double rho = 1 - lr * weight_decay;
  switch (kind) {
    case Kappa::blog:
      return -rho * (1 - gain.decay) / (lr * gain.first);
    case Kappa::paper:
      return -(1 - gain.decay) / (lr * gain.first);
    default:
      return -(rho - gain.decay) / (lr * gain.first);
  }
}

std::vector<double> schedule_kappas(const MomentumGain& gain, double weight_decay,
                                    std::int64_t steps,
                                    const std::function<double(std::int64_t)>& lr) {
  const double last = lr(steps);
  double s = gain.first * last / (1 - last * weight_decay - gain.decay);  // s_{T+1} for ever
  std::vector<double> kappas(static_cast<std::size_t>(std::max<std::int64_t>(steps, 0)), 0.0);
  for (std::int64_t t = steps; t >= 1; --t) {
    if (s > 0) kappas[static_cast<std::size_t>(t - 1)] = -1 / s;
    const double eta = lr(t);
    s = (gain.first * eta + gain.decay * s) / (1 - eta * weight_decay);
  }
  return kappas;
}

}  // namespace orthrus::optim
