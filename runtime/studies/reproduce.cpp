#include "runtime/studies/reproduce.hpp"

#include <array>

namespace orthrus::studies {

std::span<const Experiment> experiments() {
  static constexpr std::array<Experiment, 21> all{{
      {"closed-forms", "bounds of steepest descent under a norm, and what minimizes them",
       "steepest-descent-lean (github.com/leloykun), figures 1 and weight decay; closed forms",
       closed_forms},
      {"published-critical-batches", "critical batch sizes of 85 M to 1.2 B models",
       "H. Zhang et al., arXiv 2410.21676, steps to target of the Chinchilla setting",
       published_critical_batches},
      {"fit-recovery", "fits find the laws that made the data", "simulated", fit_recovery},
      {"message-cost", "latency, bandwidth and breakpoint of message times", "simulated",
       message_cost},
      {"study-statistics", "from trials of a known law to intervals of its critical batch",
       "simulated", study_statistics},
      {"noisy-quadratic", "critical batch size of a noisy quadratic, without noise of its own",
       "model of G. Zhang et al., NeurIPS 2019; exact second moments", noisy_quadratic},
      {"matrix-least-squares", "SGD and Muon on online matrix least squares", "simulated",
       matrix_least_squares},
      {"distributed-noise-scale", "gradient noise from the ranks' squared norms",
       "S. McCandlish et al., arXiv 1812.06162, appendix A; closed form", distributed_noise_scale},
      {"dual-norm-noise", "how noise of rank one falls in the nuclear norm", "simulated",
       dual_norm_noise},
      {"random-features", "gradient and spectral descent on ReLU features",
       "D. Davis, D. Drusvyatskiy, arXiv 2512.04299, figure 3", random_features},
      {"gated-features", "where spectral descent loses: gated features",
       "arXiv 2512.04299, figure 11", gated_features},
      {"nuclear-rank-growth", "the gradient's nuclear rank grows with dimension",
       "arXiv 2512.04299, figure 15", nuclear_rank_growth},
      {"one-step", "one spectral step against one gradient step", "arXiv 2512.04299; a theorem",
       one_step},
      {"matrix-sensing", "Muon's interpolant has not the least nuclear norm",
       "P. Beneventano, M. Abdelmoneum, T. Poggio, arXiv 2606.08388: 1.29 to 2.02 times",
       matrix_sensing},
      {"self-polar-flow", "singular values and entropy along the projected self-polar flow",
       "arXiv 2606.08388; derivatives", self_polar_flow},
      {"imbalanced-mixture", "rare classes under gradient, normalized and spectral descent",
       "B. Vasudeva et al., arXiv 2510.22980, core claim", imbalanced_mixture},
      {"polar-noise", "how the polar factor answers to noise", "closed form and simulation",
       polar_noise},
      {"stable-rank-constants", "stable rank of activations at initialization",
       "arXiv 2512.04299, figure 12", stable_rank_constants},
      {"metric-inequalities", "ranks and entropies of spectra, whole and from shards",
       "Renyi entropies; closed forms", metric_inequalities},
      {"sparse-regression", "a product of three inputs, learnt by four layers of 256",
       "arXiv 2512.04299, figures 1 and 4, at half the size", sparse_regression_small, true},
      {"sparse-regression-full", "the same by four layers of 512, as published",
       "arXiv 2512.04299, figures 1 and 4", sparse_regression_full, true},
  }};
  return all;
}

}  // namespace orthrus::studies
