// One token of adaptive layer norm on the CPU: D float32 elements, which stay in the L1 cache.
#pragma once

#include <cstring>

#include "adaln/formula.h"
#include "common/cpu/lanes.h"

namespace adaln {
namespace cpu {

using namespace common::lanes;

KERNELS_ALWAYS_INLINE void put(const Vector& value, float* to) {
  std::memcpy(to, &value, sizeof value);
}

KERNELS_ALWAYS_INLINE void add(const Vector& value, float* to) { put(load(to) + value, to); }

KERNELS_VECTOR inline void modulate_row(const float* x, const float* shift, const float* scale,
                                        float mean, float rstd, int64_t count, float* out) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    put(modulated(normed(load(x + j), mean, rstd), load(scale + j), load(shift + j)), out + j);
  }
  for (; j < count; ++j) out[j] = modulated(normed(x[j], mean, rstd), scale[j], shift[j]);
}

// A token of the backward. a, b: the sums of s and s n.
struct Token {
  const float *g, *x, *scale;
  int64_t count;
  float mean, rstd;
  double a, b;
};

// Fills in a and b where `sums`, and adds to the frame's gradients of shift and scale where `vectors`.
template <bool sums, bool vectors>
KERNELS_ALWAYS_INLINE void read_token(Token& token, float* shift, float* scale) {
  Vector a = {}, b = {};
  int64_t j = 0;
  for (; j + kLanes <= token.count; j += kLanes) {
    const Vector g = load(token.g + j), n = normed(load(token.x + j), token.mean, token.rstd);
    if constexpr (sums) {
      const Vector s = scaled(g, load(token.scale + j));
      a += s;
      b += s * n;
    }
    if constexpr (vectors) {
      add(g, shift + j);
      add(g * n, scale + j);
    }
  }
  const int64_t rest = token.count - j;
  if (rest > 0) {
    const Vector g = load_rest(token.g + j, rest, 0.f);
    const Vector n = normed(load_rest(token.x + j, rest, token.mean), token.mean, token.rstd);
    if constexpr (sums) {
      const Vector s = scaled(g, load_rest(token.scale + j, rest, 0.f));
      a += s;
      b += s * n;
    }
    if constexpr (vectors) {
      for (int64_t i = 0; i < rest; ++i) {
        shift[j + i] += g[i];
        scale[j + i] += g[i] * n[i];
      }
    }
  }
  token.a = lane_sum(a);
  token.b = lane_sum(b);
}

KERNELS_VECTOR inline void read_row(Token& token, bool sums, float* shift, float* scale) {
  if (shift == nullptr) {
    read_token<true, false>(token, shift, scale);
  } else if (sums) {
    read_token<true, true>(token, shift, scale);
  } else {
    read_token<false, true>(token, shift, scale);
  }
}

KERNELS_VECTOR inline void slope_row(const Token& token, float* out) {
  const float a = static_cast<float>(token.a / static_cast<double>(token.count));
  const float b = static_cast<float>(token.b / static_cast<double>(token.count));
  int64_t j = 0;
  for (; j + kLanes <= token.count; j += kLanes) {
    const Vector s = scaled(load(token.g + j), load(token.scale + j));
    const Vector n = normed(load(token.x + j), token.mean, token.rstd);
    put(norm_slope(s, n, a, b, token.rstd), out + j);
  }
  for (; j < token.count; ++j) {
    const float n = normed(token.x[j], token.mean, token.rstd);
    out[j] = norm_slope(scaled(token.g[j], token.scale[j]), n, a, b, token.rstd);
  }
}

KERNELS_VECTOR inline void gate_row(const float* x, const float* gate, const float* y,
                                    int64_t count, float* out) {
  for (int64_t j = 0; j < count; ++j) out[j] = gated(x[j], gate[j], y[j]);
}

KERNELS_VECTOR inline void multiply_row(const float* g, const float* gate, int64_t count,
                                        float* out) {
  for (int64_t j = 0; j < count; ++j) out[j] = g[j] * gate[j];
}

KERNELS_VECTOR inline void add_products(const float* g, const float* y, int64_t count, float* sum) {
  for (int64_t j = 0; j < count; ++j) sum[j] += g[j] * y[j];
}

KERNELS_VECTOR inline void add_row(const float* row, int64_t count, float* sum) {
  for (int64_t j = 0; j < count; ++j) sum[j] += row[j];
}

}  // namespace cpu
}  // namespace adaln
