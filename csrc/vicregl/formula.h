// The per-element maths of the VICRegL ops, written once for the CPU, CUDA and emulator builds.
//
// A position's nearest one is at the least squared distance sum_c (a_c - b_c)^2; its rank is that
// distance's place among those of its sample. Ties go to the lower index; a distance that is not a
// number counts as +inf.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/inline.h"

namespace vicregl {

// Sets of kept matches that one direction can have; MOST_COUNTS in contract.py.
constexpr int kMostCounts = 4;

KERNELS_ALWAYS_INLINE float ordered(float distance) {
  return distance == distance ? distance : INFINITY;
}

// Whether the distance `d` of index `i` comes before `e` of `j`; both `ordered`.
KERNELS_ALWAYS_INLINE bool before(float d, int64_t i, float e, int64_t j) {
  return d < e || (d == e && i < j);
}

// The matches that one direction keeps: those of rank < counts[t], factors[t] = weight / (B count C).
struct Kept {
  int64_t sets = 0;
  int64_t counts[kMostCounts] = {};
  float factors[kMostCounts] = {};

  // What multiplies the squared distance of the match of this rank; 0 for one that is not kept.
  KERNELS_ALWAYS_INLINE float factor(int64_t rank) const {
    float total = 0.f;
    for (int t = 0; t < kMostCounts; ++t) total += rank < counts[t] ? factors[t] : 0.f;
    return total;
  }
};

// d / d a of factor (a - b)^2, times the gradient of the result; d / d b is its negative.
KERNELS_ALWAYS_INLINE float slope(float grad, float factor) { return 2.f * grad * factor; }

}  // namespace vicregl
