#pragma once
/// @file
/// Student's t distribution.

namespace orthrus::studies {

/// t below 100 with P(T ≤ t) = probability ≥ ½; at least one degree of freedom.
double student_quantile(double probability, double freedom);

}  // namespace orthrus::studies
