#pragma once
/// @file
/// A sweep of Weights & Biases as a study.

#include <string>

namespace orthrus::runner {

/// A study file of what `text` sweeps: `method: grid` or `random`, `metric`, `parameters` (also
/// nested ones) with `value`, `values`, `min` and `max`, and the distributions constant,
/// categorical, int_uniform, uniform, log_uniform and log_uniform_values; `run_cap`, `program` and
/// `command`. What a study has not is left out, with a line that says so.
/// @param source  stands for the file in messages
/// @param base    a configuration that the parameters are of; empty: the sweep's program is run
/// @throws ConfigError  naming the key: `method: bayes`, a distribution that a study cannot draw.
[[nodiscard]] std::string study_of_sweep(const std::string& text, const std::string& source,
                                         const std::string& base);

}  // namespace orthrus::runner
