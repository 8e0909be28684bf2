// The per-element maths of the prediction loss, written once for the CPU, CUDA and emulator builds.
//
// p is a predicted row, t a teacher row, z = (t - mean) rstd its affine-free layer norm (z = t where
// it is not normalised), n elements each, d = p - z. The loss is a mean over rows and elements, but
// for the cosine kind, whose mean of 1 - cos(p, z) is over rows.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/inline.h"

namespace tokens {

enum Kind : int { kSmoothL1 = 0, kL1 = 1, kMse = 2, kCosine = 3 };

// Norms are kept from 0 by this much, as in torch's cosine_similarity.
constexpr float kLeastNorm = 1e-8f;

// Floats saved for a row: mean and rstd, and for the cosine kind the factors of z and p.
KERNELS_ALWAYS_INLINE constexpr int64_t saved_floats(int64_t kind) {
  return kind == kCosine ? 4 : 2;
}

// F is float, or a vector of floats in the CPU's clones. A NaN passes every branch.
template <int kind, typename F>
KERNELS_ALWAYS_INLINE F element_loss(const F& d, float beta, float inverse_beta) {
  if constexpr (kind == kMse) return d * d;
  const F size = d < 0.f ? -d : d;
  if constexpr (kind == kL1) return size;
  const F square = d * d * (0.5f * inverse_beta), line = size - 0.5f * beta;
  return size < beta ? square : line;
}

// d loss / d p; 0 for a NaN of the L1 kind, as torch's l1_loss. inverse_beta is 0 for beta = 0, where
// the smooth kind is L1.
template <int kind, typename F>
KERNELS_ALWAYS_INLINE F element_slope(const F& d, float beta, float inverse_beta) {
  const F one = F{} + 1.f;
  if constexpr (kind == kMse) return d + d;
  if constexpr (kind == kL1) {
    const F up = d > 0.f ? one : F{};
    return d < 0.f ? F(-one) : up;
  }
  const F inner = d * inverse_beta;
  const F up = d > beta ? one : inner;
  return d < -beta ? F(-one) : up;
}

// 1 over the root of a row's variance + eps. Where squares pass float32, or are below its normal
// numbers, they do not give the layer norm, which would be 0 or a wrong number: then NaN.
template <typename F>
KERNELS_ALWAYS_INLINE F inverse_deviation(F square) {
  constexpr F kLeast = static_cast<F>(1.17549435e-38);
  return square < kLeast ? static_cast<F>(NAN) : F(1) / std::sqrt(square) + (square - square);
}

// NaN where a row's numbers are finite and their layer norm is not known (inverse_deviation);
// else 0. (L1's slope is a sign, 0 for NaN, and would hide it.)
KERNELS_ALWAYS_INLINE float unknown(float mean, float rstd) {
  return mean - mean == 0.f ? rstd - rstd : 0.f;
}

// What the cosine kind saves: d(1 - cos)/dp = toward z + along p.
struct Cosine {
  float loss, toward, along;
};

KERNELS_ALWAYS_INLINE Cosine cosine(float pp, float zz, float pz) {
  const float p_norm = std::sqrt(pp), z_norm = std::sqrt(zz);
  // Infinity less itself is NaN: of squares past float32 the cosine is unknown, and not 0.
  const float p_safe = (p_norm < kLeastNorm ? kLeastNorm : p_norm) + (p_norm - p_norm);
  const float z_safe = (z_norm < kLeastNorm ? kLeastNorm : z_norm) + (z_norm - z_norm);
  const float cos = pz / p_safe / z_safe;
  const float along = p_norm < kLeastNorm ? 0.f : cos / p_safe / p_safe;
  return {1.f - cos, -1.f / p_safe / z_safe, along};
}

}  // namespace tokens
