// The per-element maths of adaptive layer norm, written once for the CPU, CUDA and emulator builds.
//
// n = (x - mean) rstd is a token's layer norm over its D elements, out = n (1 + scale) + shift. With g
// the gradient of out, s = g (1 + scale) and the token's means a of s and b of s n, the gradients are
//
//   x: rstd (s - a - b n)      shift: the sum of g over the frame's tokens      scale: that of g n
//
// and of out = x + gate y they are g, gate g and the sum of g y. F is float, or a vector of floats.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/inline.h"

namespace adaln {

// Elements of a token that the CUDA kernels keep in registers; as in contract.py.
constexpr int64_t kLongest = 4096;

// NaN where float32 does not hold the squares, and not 0, which would leave `shift` alone: infinity
// less itself is NaN.
KERNELS_ALWAYS_INLINE float rstd_of(double scatter, double inverse_dim, float eps) {
  const float variance = static_cast<float>(scatter * inverse_dim);
  return 1.f / sqrtf(variance + eps) + (variance - variance);
}

template <typename F>
KERNELS_ALWAYS_INLINE F normed(const F& x, float mean, float rstd) {
  return (x - mean) * rstd;
}

template <typename F>
KERNELS_ALWAYS_INLINE F modulated(const F& n, const F& scale, const F& shift) {
  return n * (1.f + scale) + shift;
}

template <typename F>
KERNELS_ALWAYS_INLINE F scaled(const F& g, const F& scale) {
  return g * (1.f + scale);
}

template <typename F>
KERNELS_ALWAYS_INLINE F norm_slope(const F& s, const F& n, float a, float b, float rstd) {
  return rstd * (s - a - b * n);
}

template <typename F>
KERNELS_ALWAYS_INLINE F gated(const F& x, const F& gate, const F& y) {
  return x + gate * y;
}

}  // namespace adaln
