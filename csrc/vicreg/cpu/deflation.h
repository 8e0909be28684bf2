// The Gram matrix without its largest columns, and how they come back (docs/cancellation.md).
#pragma once

#include <algorithm>
#include <vector>

#include "common/cpu/vector.h"
#include "vicreg/formula.h"

namespace vicreg {

// out = the row's sum of squares and its products with the four rows of `deflated` [4, count].
KERNELS_VECTOR inline void row_products(const float* row, const float* deflated, int64_t count,
                                       double* out) {
  double lanes[5][8] = {};
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    for (int64_t i = 0; i < 8; ++i) {
      const double value = row[j + i];
      lanes[0][i] += value * value;
      for (int64_t k = 0; k < 4; ++k) lanes[k + 1][i] += value * deflated[k * count + j + i];
    }
  }
  for (; j < count; ++j) {
    const double value = row[j];
    lanes[0][0] += value * value;
    for (int64_t k = 0; k < 4; ++k) lanes[k + 1][0] += value * deflated[k * count + j];
  }
  for (int64_t k = 0; k < 5; ++k) {
    out[k] = ((lanes[k][0] + lanes[k][1]) + (lanes[k][2] + lanes[k][3])) +
             ((lanes[k][4] + lanes[k][5]) + (lanes[k][6] + lanes[k][7]));
  }
}

// row += sum_k scale[k] deflated[k].
KERNELS_VECTOR inline void add_deflated(const float* deflated, const float* scale, int64_t count,
                                    float* row) {
  const float a = scale[0], b = scale[1], c = scale[2], d = scale[3];
  for (int64_t j = 0; j < count; ++j) {
    row[j] += (a * deflated[j] + b * deflated[count + j]) +
              (c * deflated[2 * count + j] + d * deflated[3 * count + j]);
  }
}

// gram: Kr [m, m] without the deflated columns `z` [4, m], of which the first `count` are used and the
// rest zero. Returns the covariance sum but for the scatters of the other columns; fills `deflated`
// [count, m] with the covariance gradient of the deflated columns, and makes gram the whole Gram
// matrix.
inline double restore_deflated(float* gram, int64_t m, const float* z, int64_t count,
                               float* deflated) {
  static_assert(kDeflatedColumns == 4, "row_products and add_deflated take four");
  double between[4][5];  // [i][k + 1] = z_i . z_k
  double total = 0.0;
  for (int64_t i = 0; i < 4; ++i) {
    row_products(z + i * m, z, m, between[i]);
    between[i][i + 1] = 0.0;
    for (int64_t k = 0; k < 4; ++k) total += between[i][k + 1] * between[i][k + 1];
  }
  std::vector<double> partial(m);
  torch::stable::parallel_for(0, m, std::max<int64_t>(1, 16384 / m),
                              [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      double products[5];
      row_products(gram + n * m, z, m, products);
      partial[n] = products[0];
      float own[4];
      for (int64_t k = 0; k < 4; ++k) {
        own[k] = z[k * m + n];
        partial[n] += 2.0 * own[k] * products[k + 1];
      }
      for (int64_t k = 0; k < count; ++k) {
        double gradient = products[k + 1];
        for (int64_t i = 0; i < 4; ++i) gradient += between[i][k + 1] * own[i];
        deflated[k * m + n] = static_cast<float>(gradient);
      }
      add_deflated(z, own, m, gram + n * m);
    }
  });
  for (const double value : partial) total += value;
  return total;
}

}  // namespace vicreg
