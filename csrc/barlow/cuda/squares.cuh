// The square matrices: what the forward reads off them, and what the gradient needs of them.
#pragma once

#include "barlow/formula.h"
#include "common/cuda/columns.cuh"

namespace barlow {
namespace kernels {

using namespace common;

struct Finish {
  const double* invariance;  // partial sums of (C_jj - 1)^2
  int64_t count;
  double factor;  // of the sum over i != j
  unsigned* done;
  float* loss;
};

// The last block to come here adds up the loss, in an order that does not depend on which it is.
__device__ __forceinline__ void finish_loss(double sum, double* sums, const Finish& finish) {
  if (!last_block(sum, sums, finish.done)) return;
  const double on = sum_of(finish.invariance, finish.count), off = sum_of(sums, gridDim.x);
  if (threadIdx.x == 0) *finish.loss = static_cast<float>(on + finish.factor * off);
}

// N < D. The inner product of the Gram matrices [2, N, N], which is symmetric: a warp takes the
// upper half of a row. Off it come the squared diagonal elements of N C of the stored values, whose
// parts are products [row block, D].
__global__ void __launch_bounds__(kThreads)
    gram_rows(int64_t rows, int64_t dim, int64_t row_blocks, const float* grams,
              const float* products, double* sums, Finish finish) {
  double sum = 0.0;
  for (int64_t n = first_row(); n < rows; n += row_step()) {
    const float *x = grams + n * rows, *y = x + rows * rows;
    float part = 0.f;
#pragma unroll 4
    for (int64_t m = n + 1 + lane(); m < rows; m += kLanes) part += x[m] * y[m];
    sum += 2.0 * part;
    if (lane() == 0) sum += static_cast<double>(x[n]) * y[n];
  }
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; j < dim; j += step) {
    float total = 0.f;
    for (int64_t r = 0; r < row_blocks; ++r) total += products[r * dim + j];
    sum -= static_cast<double>(total) * total;
  }
  finish_loss(sum, sums, finish);
}

// N >= D. Makes C [D, D] of the product N C, its diagonal zero, and sums its squares; a warp takes a
// row.
__global__ void __launch_bounds__(kThreads)
    cross_rows(int64_t dim, float inverse_rows, float* cross, double* sums, Finish finish) {
  double sum = 0.0;
  for (int64_t i = first_row(); i < dim; i += row_step()) {
    float* row = cross + i * dim;
    float part = 0.f;
#pragma unroll 4
    for (int64_t j = lane(); j < dim; j += kLanes) {
      const float value = j == i ? 0.f : row[j] * inverse_rows;
      row[j] = value;
      part += value * value;
    }
    sum += part;
  }
  finish_loss(sum, sums, finish);
}

// For the gradient where N >= D: the squares of C [D, D], summed within the block's tile of columns
// for each row, by_row [tiles, D], and over its rows for each column, by_column [row blocks, D].
// T, unless it is float: also rounded [D, D] = C times `power`, the operand of the products.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    cross_squares(Cut cut, const float* cross, float power, T* rounded, float* by_row,
                  float* by_column) {
  constexpr int W = 4;
  SHARED_ARRAY(float, shared, kThreads * W);
  const Place at = place(cut);
  const Columns<W, false> columns(cut, at.tile);
  const int64_t dim = cut.columns;
  float sum[W] = {};
#pragma unroll 2
  for (int64_t i = at.row_begin + warp(); i < at.row_end; i += kWarps) {
    float value[W] = {}, row = 0.f;
    load(cross + i * dim, 1, columns, value);
    if constexpr (!std::is_same_v<T, float>) {
      float scaled[W];
#pragma unroll
      for (int w = 0; w < W; ++w) scaled[w] = value[w] * power;
      store(rounded + i * dim, columns, scaled);
    }
#pragma unroll
    for (int w = 0; w < W; ++w) {
      sum[w] += value[w] * value[w];
      row += value[w] * value[w];
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) row += __shfl_xor_sync(kAllLanes, row, offset);
    if (lane() == 0) by_row[at.tile * dim + i] = row;
  }
#pragma unroll
  for (int w = 0; w < W; ++w) shared[warp() * kLanes * W + columns.slot(w)] = sum[w];
  add_warps<kLanes * W>(shared, columns.begin, columns.end, by_column + at.row_block * dim);
}

// For the gradient of half inputs where N < D: rounded [2, N, N] = grams times `power`, the diagonal
// zero; a warp takes a row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    round_grams(int64_t rows, const float* grams, float power, T* rounded) {
  for (int64_t at = first_row(); at < 2 * rows; at += row_step()) {
    const int64_t n = at % rows;
#pragma unroll 4
    for (int64_t m = lane(); m < rows; m += kLanes) {
      rounded[at * rows + m] = narrow<T>(m == n ? 0.f : grams[at * rows + m] * power);
    }
  }
}

}  // namespace kernels
}  // namespace barlow
