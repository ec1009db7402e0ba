#pragma once
/// @file
/// The CPU's loops over codes, on runs of a row. Which scale belongs to a run, pieces and checks
/// are the backend's.

#include <cstdint>
#include <orthrus/quantized.hpp>

#include "kernels/adamw_constants.hpp"
#include "kernels/bf16.hpp"

namespace orthrus::kernels::cpu {

/// All words of `random_words(…, step, call)` for the given `calls`, first to last.
void random_run(std::uint32_t* words, Index calls, std::uint64_t key, std::uint64_t step,
                std::uint64_t first_call);

/// Codes, one per byte (int4 too), and residuals of n entries with one scale; `words`, one per
/// entry, are read when the rounding is stochastic.
void quantize(CodeFormat format, bool stochastic, float* w, float scale, std::uint8_t* codes,
              const std::uint32_t* words, Index n);
void quantize(CodeFormat format, bool stochastic, double* w, float scale, std::uint8_t* codes,
              const std::uint32_t* words, Index n);
/// to ← code·scale, codes one per byte (int4: sign extended).
void dequantize(CodeFormat format, const std::uint8_t* codes, float scale, float* to, Index n);
void dequantize(CodeFormat format, const std::uint8_t* codes, float scale, BFloat16* to, Index n);
void dequantize(CodeFormat format, const std::uint8_t* codes, float scale, double* to, Index n);

/// `count` codes of int4 into ⌈count/2⌉ bytes, and back.
void pack_nibbles(const std::uint8_t* codes, Index count, std::uint8_t* packed);
void unpack_nibbles(const std::uint8_t* packed, Index count, std::uint8_t* codes);

/// How many |w| are larger.
Index count_larger(const float* w, double limit, Index n);
Index count_larger(const double* w, double limit, Index n);
Index count_larger(const BFloat16* w, double limit, Index n);

/// m ← m + (factor·D)⊙e.
void adamw_pull_back(const AdamWConstants& s, float factor, const float* v, const float* e,
                     float* m, Index n);

void split(const float* w, BFloat16* high, BFloat16* low, Index n);
void merge(const BFloat16* high, const BFloat16* low, float* w, Index n);

}  // namespace orthrus::kernels::cpu
