// What VICReg reads off the column scatters.
#pragma once

#include <algorithm>

#include "common/cpu/vector.h"
#include "vicreg/formula.h"

namespace vicreg {

KERNELS_VECTOR inline double hinge_sum(const float* scatter, int64_t count, float degrees,
                                      float margin, float eps) {
  double lanes[8] = {};
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    for (int64_t i = 0; i < 8; ++i) lanes[i] += hinge(scatter[j + i], degrees, margin, eps);
  }
  for (; j < count; ++j) lanes[0] += hinge(scatter[j], degrees, margin, eps);
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
         ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

KERNELS_VECTOR inline void hinge_slopes(const float* scatter, int64_t count, float degrees,
                                       float margin, float eps, float* slope) {
  for (int64_t j = 0; j < count; ++j) slope[j] = hinge_slope(scatter[j], degrees, margin, eps);
}

// The `count` columns of largest scatter, largest first; NaN counts as smaller than any.
inline void largest_columns(const float* scatter, int64_t dim, int64_t count, int64_t* index) {
  const auto key = [&](int64_t j) { return scatter[j] >= 0.f ? scatter[j] : -1.f; };
  for (int64_t j = 0; j < dim; ++j) {
    int64_t place = std::min(j, count);
    if (place == count && !(key(j) > key(index[count - 1]))) continue;
    while (place > 0 && key(j) > key(index[place - 1])) {
      if (place < count) index[place] = index[place - 1];
      --place;
    }
    index[place] = j;
  }
}

}  // namespace vicreg
