// Symmetric products on the CPU, sums of squares, and chunks that stay in cache.
#pragma once

#include <algorithm>
#include <vector>

#include "common/chunk.h"
#include "common/cpu/vector.h"
#include "common/tensors.h"

namespace common {

// Length of a chunk along the long side (`extent`) when the other one is `across`: about half a MiB
// of float32, so that what is centred is still in cache when it is multiplied and combined, and in
// all `parts` of the extent together at most an eighth of it, so that scratch stays small beside it.
inline int64_t chunk_length(int64_t across, int64_t extent, int64_t parts) {
  constexpr int64_t kElements = 128 * 1024;
  const int64_t cached = std::max<int64_t>(256, kElements / across / 64 * 64);
  return std::min(cached, std::max<int64_t>(16, extent / (8 * parts)));
}

// A float32 matrix inside a tensor's memory: element (i, j) lies `offset + i row + j column` floats
// after the tensor's first one. No tensor of its own, which would cost the host a microsecond.
struct __attribute__((visibility("hidden"))) Matrix {  // as torch's Tensor is
  const Tensor& base;
  int64_t rows, columns, row, column, offset;

  float* data() const { return static_cast<float*>(base.mutable_data_ptr()) + offset; }
  const float* read() const { return static_cast<const float*>(base.const_data_ptr()) + offset; }
  Tensor view() const { return strided(base, {rows, columns}, {row, column}, offset); }
  Matrix transposed() const { return {base, columns, rows, column, row, offset}; }
  Matrix top(int64_t first, int64_t count, int64_t width) const {
    return {base, count, width, row, column, offset + first * row};
  }
};

inline Matrix contiguous(const Tensor& base, int64_t rows, int64_t columns, int64_t offset) {
  return {base, rows, columns, columns, 1, offset};
}

inline Matrix contiguous(const Tensor& base, const Chunk& c, int64_t offset) {
  return contiguous(base, c.rows, c.columns, offset);
}

// Multiplications of a product up to which plain loops are faster than the views, the checks and
// the packing of torch's matmul: measured, 1.5 us a product in VICReg's backward of 8 x 16.
constexpr int64_t kSmallProduct = 4096;

KERNELS_VECTOR inline float dot(const float* a, const float* b, int64_t count) {
  float lanes[8] = {};
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    for (int64_t i = 0; i < 8; ++i) lanes[i] += a[j + i] * b[j + i];
  }
  for (; j < count; ++j) lanes[0] += a[j] * b[j];
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
         ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// out[j] += sum_k a[k a_stride] b[k b_stride + j]
KERNELS_VECTOR inline void add_scaled_rows(const float* a, int64_t a_stride, const float* b,
                                   int64_t b_stride, int64_t depth, int64_t count, float* out) {
  for (int64_t k = 0; k < depth; ++k) {
    const float factor = a[k * a_stride];
    for (int64_t j = 0; j < count; ++j) out[j] += factor * b[k * b_stride + j];
  }
}

// By loops; out has rows of adjacent elements. lower: only columns up to the diagonal.
inline void multiply_small(const Matrix& out, const Matrix& a, const Matrix& b, bool accumulate,
                           bool lower) {
  const float *left = a.read(), *right = b.read();
  float* const target = out.data();
  for (int64_t i = 0; i < out.rows; ++i) {
    float* row = target + i * out.row;
    const int64_t count = lower ? i + 1 : out.columns;
    if (!accumulate) std::fill_n(row, count, 0.f);
    if (b.column != 1 && b.row == 1 && a.column == 1) {
      for (int64_t j = 0; j < count; ++j) {
        row[j] += dot(left + i * a.row, right + j * b.column, a.columns);
      }
    } else if (b.column == 1) {
      add_scaled_rows(left + i * a.row, a.column, right, b.row, a.columns, count, row);
    } else {
      for (int64_t k = 0; k < a.columns; ++k) {
        const float factor = left[i * a.row + k * a.column];
        for (int64_t j = 0; j < count; ++j) row[j] += factor * right[k * b.row + j * b.column];
      }
    }
  }
}

// out (+)= a b; out has rows of adjacent elements.
inline void multiply(const Matrix& out, const Matrix& a, const Matrix& b, bool accumulate) {
  if (out.rows * out.columns * a.columns <= kSmallProduct) {
    multiply_small(out, a, b, accumulate, false);
  } else {
    addmm_cpu(out.view(), a.view(), b.view(), accumulate ? 1.0 : 0.0);
  }
}

// The lower triangle of matrix (+)= a a^T, by trapezoids of row blocks. With b blocks that is
// (b + 1) / 2b of the whole product.
inline void add_symmetric(const Matrix& matrix, const Matrix& a, bool accumulate) {
  const int64_t m = matrix.rows;
  const Matrix other = a.transposed();
  if (m * m * a.columns <= kSmallProduct) {
    multiply_small(matrix, a, other, accumulate, true);
    return;
  }
  const int64_t block = m <= 64 ? m : m <= 256 ? 64 : 128;
  for (int64_t begin = 0; begin < m; begin += block) {
    const int64_t count = std::min(block, m - begin), width = begin + count;
    addmm_cpu(matrix.top(begin, count, width).view(), a.top(begin, count, a.columns).view(),
              Matrix{a.base, a.columns, width, a.column, a.row, a.offset}.view(),
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

KERNELS_VECTOR inline double row_square_sum(const float* values, int64_t count) {
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

KERNELS_VECTOR inline void add_scaled(const float* a, float scale, int64_t count, float* out) {
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
