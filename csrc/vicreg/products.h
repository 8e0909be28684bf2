// Symmetric products on the CPU and what is read off them.
#pragma once

#include <algorithm>
#include <vector>

#include "common/tensors.h"
#include "common/vector.h"
#include "vicreg/formula.h"

namespace vicreg {

using torch::stable::Tensor;

// Length of a chunk along the long side (`extent`) when the other one is `across`: about half a MiB
// of float32, so that what is centred is still in cache when it is multiplied and combined, and in
// all `parts` of the extent together at most an eighth of it, so that scratch stays small beside it.
inline int64_t chunk_length(int64_t across, int64_t extent, int64_t parts) {
  constexpr int64_t kElements = 128 * 1024;
  const int64_t cached = std::max<int64_t>(256, kElements / across / 64 * 64);
  return std::min(cached, std::max<int64_t>(16, extent / (8 * parts)));
}

// The lower triangle of matrix (+)= a a^T, by trapezoids of row blocks; a: [m, k], any strides.
// With b blocks that is (b + 1) / 2b of the whole product.
inline void add_symmetric(const Tensor& matrix, const Tensor& a, bool accumulate) {
  const int64_t m = a.size(0), k = a.size(1);
  const int64_t row = a.stride(0), column = a.stride(1);
  const int64_t block = m <= 64 ? m : m <= 256 ? 64 : 128;
  for (int64_t begin = 0; begin < m; begin += block) {
    const int64_t count = std::min(block, m - begin);
    common::addmm_cpu(common::strided(matrix, {count, begin + count}, {m, 1}, begin * m),
                      common::strided(a, {count, k}, {row, column}, begin * row),
                      common::strided(a, {k, begin + count}, {column, row}, 0),
                      accumulate ? 1.0 : 0.0);
  }
}

// Copies the lower triangle of an m x m matrix onto the upper one.
inline void mirror(float* matrix, int64_t m) {
  constexpr int64_t kTile = 32;
  const int64_t tiles = (m + kTile - 1) / kTile;
  torch::stable::parallel_for(0, tiles, 4, [&](int64_t first, int64_t last) {
    for (int64_t i = first * kTile; i < std::min(last * kTile, m); i += kTile) {
      for (int64_t j = 0; j <= i; j += kTile) {
        for (int64_t n = i; n < std::min(i + kTile, m); ++n) {
          for (int64_t k = j; k < std::min(j + kTile, n); ++k) {
            matrix[k * m + n] = matrix[n * m + k];
          }
        }
      }
    }
  });
}

VICREG_VECTOR inline double row_square_sum(const float* values, int64_t count) {
  double lanes[8] = {};
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    for (int64_t i = 0; i < 8; ++i) {
      const double value = values[j + i];
      lanes[i] += value * value;
    }
  }
  for (; j < count; ++j) lanes[0] += static_cast<double>(values[j]) * values[j];
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
         ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// out = the row's sum of squares and its products with the four rows of `taken` [4, count].
VICREG_VECTOR inline void row_products(const float* row, const float* taken, int64_t count,
                                       double* out) {
  double lanes[5][8] = {};
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    for (int64_t i = 0; i < 8; ++i) {
      const double value = row[j + i];
      lanes[0][i] += value * value;
      for (int64_t k = 0; k < 4; ++k) lanes[k + 1][i] += value * taken[k * count + j + i];
    }
  }
  for (; j < count; ++j) {
    const double value = row[j];
    lanes[0][0] += value * value;
    for (int64_t k = 0; k < 4; ++k) lanes[k + 1][0] += value * taken[k * count + j];
  }
  for (int64_t k = 0; k < 5; ++k) {
    out[k] = ((lanes[k][0] + lanes[k][1]) + (lanes[k][2] + lanes[k][3])) +
             ((lanes[k][4] + lanes[k][5]) + (lanes[k][6] + lanes[k][7]));
  }
}

// row += sum_k scale[k] taken[k].
VICREG_VECTOR inline void add_taken(const float* taken, const float* scale, int64_t count,
                                    float* row) {
  const float a = scale[0], b = scale[1], c = scale[2], d = scale[3];
  for (int64_t j = 0; j < count; ++j) {
    row[j] += (a * taken[j] + b * taken[count + j]) +
              (c * taken[2 * count + j] + d * taken[3 * count + j]);
  }
}

VICREG_VECTOR inline void add_scaled(const float* a, float scale, int64_t count, float* out) {
  for (int64_t j = 0; j < count; ++j) out[j] += scale * a[j];
}

// sum of squares in float64, the same whatever the number of threads.
inline double square_sum(const float* values, int64_t count) {
  constexpr int64_t kPiece = 16384;
  const int64_t pieces = (count + kPiece - 1) / kPiece;
  std::vector<double> partial(pieces);
  torch::stable::parallel_for(0, pieces, 4, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      partial[i] = row_square_sum(values + i * kPiece, std::min(kPiece, count - i * kPiece));
    }
  });
  double total = 0.0;
  for (const double value : partial) total += value;
  return total;
}

// gram: Kr [m, m] without the columns `taken` [4, m], of which the first `columns` are used and the
// rest zero. Returns the covariance sum but for the scatters of the other columns; fills `deflated`
// [columns, m] with the covariance gradient of the taken columns, and makes gram the whole Gram
// matrix.
inline double restore_deflated(float* gram, int64_t m, const float* taken, int64_t columns,
                               float* deflated) {
  static_assert(kDeflatedColumns == 4, "row_products and add_taken take four");
  double between[4][5];  // [i][k + 1] = z_i . z_k
  double total = 0.0;
  for (int64_t i = 0; i < 4; ++i) {
    row_products(taken + i * m, taken, m, between[i]);
    between[i][i + 1] = 0.0;
    for (int64_t k = 0; k < 4; ++k) total += between[i][k + 1] * between[i][k + 1];
  }
  std::vector<double> partial(m);
  torch::stable::parallel_for(0, m, std::max<int64_t>(1, 16384 / m),
                              [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      double products[5];
      row_products(gram + n * m, taken, m, products);
      partial[n] = products[0];
      float own[4];
      for (int64_t k = 0; k < 4; ++k) {
        own[k] = taken[k * m + n];
        partial[n] += 2.0 * own[k] * products[k + 1];
      }
      for (int64_t k = 0; k < columns; ++k) {
        double gradient = products[k + 1];
        for (int64_t i = 0; i < 4; ++i) gradient += between[i][k + 1] * own[i];
        deflated[k * m + n] = static_cast<float>(gradient);
      }
      add_taken(taken, own, m, gram + n * m);
    }
  });
  for (const double value : partial) total += value;
  return total;
}

}  // namespace vicreg
