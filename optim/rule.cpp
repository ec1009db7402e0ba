#include "optim/rule.hpp"

#include "kernels/backend.hpp"

namespace orthrus::optim {

double MatrixRule::apply(const Piece& p, double scale, const StepScalars& s,
                         kernels::Backend& backend) const {
  return scale * scale *
         backend.decay_step(1 - s.lr * s.weight_decay, s.lr * scale, p.gradient, p.weights);
}

}  // namespace orthrus::optim
