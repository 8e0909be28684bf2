// Symmetric products on the CPU, sums of squares, and chunks that stay in cache.
#pragma once

#include <algorithm>
#include <vector>

#include "common/tensors.h"
#include "common/vector.h"

namespace common {

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
    addmm_cpu(strided(matrix, {count, begin + count}, {m, 1}, begin * m),
              strided(a, {count, k}, {row, column}, begin * row),
              strided(a, {k, begin + count}, {column, row}, 0), accumulate ? 1.0 : 0.0);
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

}  // namespace common
