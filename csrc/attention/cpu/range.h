// Scores whose products pass float32's largest number on the way, where the scores may not.
//
// A sum that reaches -inf there would leave its key out of the softmax without a word: 2^-inf is 0.
// So where the largest numbers of a tile's queries and of its keys allow it, and only there, each
// query is taken times a power of two that keeps every sum below it, and its scores times the
// inverse. Neither rounds. A score that is past float32 then is so by itself: as -inf it has no
// weight beside any finite one, and without one, or as +inf, its query's result is NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "attention/cpu/width.h"
#include "common/cpu/vector.h"

namespace attention {
namespace {  // included by cpu.cpp alone
namespace cpu {

// The largest magnitude among numbers, as its bits: they are in the order of magnitudes, with
// infinity past all numbers and NaN past infinity.
KERNELS_VECTOR inline int32_t largest_bits(const float* values, int64_t count) {
  int32_t largest = 0;
  for (int64_t j = 0; j < count; ++j) {
    int32_t bits;
    __builtin_memcpy(&bits, values + j, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

inline bool is_finite(int32_t bits) { return bits < 0x7f800000; }

inline float magnitude(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Whether a sum of `dim` products of a query and a key may pass float32. Keys that are not finite
// may lie beside keys that are large.
inline bool may_pass(int32_t queries, int32_t keys, int dim) {
  constexpr float kMost = std::numeric_limits<float>::max();
  if (!is_finite(queries)) return true;
  const float key = is_finite(keys) ? magnitude(keys) : kMost;
  return static_cast<double>(magnitude(queries)) * key * dim > kMost;
}

// A power of two as two factors, each of which float32 holds.
struct Power {
  float first, second;
};

// Takes rows of `dim` <= 128 elements times powers of two, so that the largest number of each is
// below 2^-7; `powers`: their inverses. A row of zeros, or one that is not finite, stays.
inline void shrink_rows(float* rows, int count, int dim, int stride, Power* powers) {
  for (int i = 0; i < count; ++i, rows += stride) {
    const int32_t bits = largest_bits(rows, dim);
    powers[i] = {1.f, 1.f};
    if (bits == 0 || !is_finite(bits)) continue;
    const int exponent = std::ilogb(magnitude(bits)) + 8;
    for (int j = 0; j < dim; ++j) rows[j] = std::ldexp(rows[j], -exponent);
    powers[i] = {std::ldexp(1.f, exponent / 2), std::ldexp(1.f, exponent - exponent / 2)};
  }
}

inline void grow_scores(float* scores, int count, Power power) {
  for (int j = 0; j < count; ++j) scores[j] = scores[j] * power.first * power.second;
}

}  // namespace cpu
}  // namespace
}  // namespace attention
