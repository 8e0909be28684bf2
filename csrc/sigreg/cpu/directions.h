// Random unit directions on the CPU: sixteen columns at a time, a lane each.
#pragma once

#include "common/cpu/vector.h"
#include "sigreg/cpu/vector.h"

namespace sigreg {

// Four rows of normals from four rows of words: two pairs of Box-Muller.
KERNELS_ALWAYS_INLINE void normals(const Words (&words)[4], Vector (&out)[4]) {
  for (int pair = 0; pair < 2; ++pair) {
    Vector u[2];
    for (int i = 0; i < 2; ++i) {
      u[i] = __builtin_convertvector(words[2 * pair + i], Vector) * kWordScale + kHalfWord;
      u[i] = u[i] < kBelowOne ? u[i] : Vector{} + kBelowOne;
    }
    Vector r = -2.f * logarithm(u[0]);
    for (int i = 0; i < kLanes; ++i) r[i] = std::sqrt(r[i]);
    const Unit<Vector> angle = unit(u[1] * 6.283185307f);
    out[2 * pair] = r * angle.c;
    out[2 * pair + 1] = r * angle.s;
  }
}

// Columns [first, first + count), count <= kLanes, of out [dim, slices].
KERNELS_VECTOR inline void draw_columns(uint64_t step, uint64_t seed, int64_t dim, int64_t slices,
                                       int64_t first, int64_t count, float* out) {
  Indices group;
  for (int i = 0; i < kLanes; ++i) group[i] = (first + i) * groups_of(dim);
  const auto low = [](uint64_t value) { return static_cast<uint32_t>(value); };
  Doubles square = {};
  for (int64_t d = 0; d < dim; d += 4, group += 1) {
    Words words[4] = {__builtin_convertvector(group, Words),
                      __builtin_convertvector(group >> 32, Words), Words{} + low(step),
                      Words{} + low(step >> 32)};
    philox(words, low(seed), low(seed >> 32), WideProducts{});
    Vector rows[4];
    normals(words, rows);
    for (int64_t i = 0; i < 4 && d + i < dim; ++i) {
      const Doubles wide = __builtin_convertvector(rows[i], Doubles);
      square += wide * wide;
      store_some(out + (d + i) * slices + first, rows[i], count);
    }
  }
  for (int i = 0; i < kLanes; ++i) square[i] = 1.0 / std::sqrt(square[i]);
  const Vector scale = __builtin_convertvector(square, Vector);
  for (int64_t d = 0; d < dim; ++d) {
    float* row = out + d * slices + first;
    store_some(row, load_some(row, count) * scale, count);
  }
}

}  // namespace sigreg
