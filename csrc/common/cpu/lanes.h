// Sums over a row of float32 that do not depend on the machine's width.
//
// Vectors of 16 floats are one AVX-512 register and two or four of the narrower clones; a sum has
// 2 x 16 lanes, which are added up in float64.
#pragma once

#include <cstdint>

#include "common/cpu/vector.h"

namespace common {
namespace lanes {

constexpr int64_t kLanes = 16;
using Vector = float __attribute__((vector_size(64)));

KERNELS_ALWAYS_INLINE Vector load(const float* from) { return common::load<Vector>(from); }

// The last count % 16 elements, the rest `fill`.
KERNELS_ALWAYS_INLINE Vector load_rest(const float* from, int64_t count, float fill) {
  float values[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) values[j] = j < count ? from[j] : fill;
  return load(values);
}

KERNELS_ALWAYS_INLINE double lane_sum(const Vector& a) {
  double sum = 0.0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += static_cast<double>(a[lane]);
  return sum;
}

// The sum of term(i, rest) over vectors; rest < 16 where the vector is the last, incomplete one.
#define LANES_SUM(count, whole, last, result)                       \
  do {                                                               \
    Vector a = {}, b = {};                                           \
    int64_t j = 0;                                                   \
    for (; j + 2 * kLanes <= (count); j += 2 * kLanes) {             \
      a += whole(j);                                                 \
      b += whole(j + kLanes);                                        \
    }                                                                \
    if (j + kLanes <= (count)) {                                     \
      a += whole(j);                                                 \
      j += kLanes;                                                   \
    }                                                                \
    if (j < (count)) b += last(j);                                   \
    result = lane_sum(a) + lane_sum(b);                              \
  } while (0)

KERNELS_VECTOR inline double sum_of(const float* t, int64_t count) {
  double sum;
#define WHOLE(j) load(t + (j))
#define LAST(j) load_rest(t + (j), count - (j), 0.f)
  LANES_SUM(count, WHOLE, LAST, sum);
#undef WHOLE
#undef LAST
  return sum;
}

KERNELS_VECTOR inline double scatter_of(const float* t, int64_t count, float mean) {
  double sum;
#define WHOLE(j) ((load(t + (j)) - mean) * (load(t + (j)) - mean))
#define LAST(j)                                          \
  ((load_rest(t + (j), count - (j), mean) - mean) * \
   (load_rest(t + (j), count - (j), mean) - mean))
  LANES_SUM(count, WHOLE, LAST, sum);
#undef WHOLE
#undef LAST
  return sum;
}

}  // namespace lanes
}  // namespace common
