// Column statistics of both views in one read, and standardising.
#pragma once

#include "barlow/formula.h"
#include "common/cuda/columns.cuh"

namespace barlow {
namespace kernels {

using namespace common;

// Of pairs (x, y): count, means, scatters, and comoment = sum (x - mean x)(y - mean y).
struct PairMoments {
  float count = 0.f;
  float mean_x = 0.f, mean_y = 0.f;
  float scatter_x = 0.f, scatter_y = 0.f, comoment = 0.f;
};
constexpr int kMoments = 5;  // those stored: all but the count

// Sets merge without cancellation (Chan et al., 1983).
__device__ __forceinline__ PairMoments merge(const PairMoments& a, const PairMoments& b) {
  const float count = a.count + b.count;
  if (count == 0.f) return a;
  const float dx = b.mean_x - a.mean_x, dy = b.mean_y - a.mean_y;
  const float share = b.count / count, both = a.count * share;
  return {count,
          a.mean_x + dx * share,
          a.mean_y + dy * share,
          a.scatter_x + b.scatter_x + dx * dx * both,
          a.scatter_y + b.scatter_y + dy * dy * both,
          a.comoment + b.comoment + dx * dy * both};
}

// partials[row block, kMoments, D], means less row 0. Welford's update on values less row 0: a
// common offset cancels exactly, and a large row 0 does no harm.
template <typename T, bool Vectors>
__global__ void __launch_bounds__(kThreads, 2)
    column_partials(Views<T> views, Cut cut, int64_t dim, float* partials) {
  constexpr int W = kColumns<T, Vectors>, kSlots = kLanes * W;
  SHARED_ARRAY(float, shared, kMoments * kWarps * kSlots);
  const Place at = place(cut);
  const Columns<W, Vectors> columns(cut, at.tile);
  const int warp = threadIdx.x / kLanes;
  const View<T> x = views.x, y = views.y;

  float first_x[W] = {}, first_y[W] = {};
  load(x.data, x.column, columns, first_x);
  load(y.data, y.column, columns, first_y);
  float mean_x[W] = {}, mean_y[W] = {}, scatter_x[W] = {}, scatter_y[W] = {}, comoment[W] = {};
  float count = 0.f;
#pragma unroll 2
  for (int64_t n = at.row_begin + warp; n < at.row_end; n += kWarps) {
    float a[W] = {}, b[W] = {};
    load(x.data + n * x.row, x.column, columns, a);
    load(y.data + n * y.row, y.column, columns, b);
    count += 1.f;
    const float inverse = 1.f / count;
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const float shifted_x = a[w] - first_x[w], shifted_y = b[w] - first_y[w];
      const float dx = shifted_x - mean_x[w], dy = shifted_y - mean_y[w];
      mean_x[w] += dx * inverse;
      mean_y[w] += dy * inverse;
      const float rest = shifted_y - mean_y[w];
      scatter_x[w] += dx * (shifted_x - mean_x[w]);
      scatter_y[w] += dy * rest;
      comoment[w] += dx * rest;
    }
  }

#pragma unroll
  for (int w = 0; w < W; ++w) {
    float* mine = shared + warp * kSlots + columns.slot(w);
    const float values[kMoments] = {mean_x[w], mean_y[w], scatter_x[w], scatter_y[w], comoment[w]};
#pragma unroll
    for (int k = 0; k < kMoments; ++k) mine[k * kWarps * kSlots] = values[k];
  }
  __syncthreads();
  for (int slot = threadIdx.x; slot < kSlots; slot += kThreads) {
    PairMoments total;
    for (int i = 0; i < kWarps; ++i) {
      const int64_t rows = (at.row_end - at.row_begin - i + kWarps - 1) / kWarps;
      const float* in = shared + i * kSlots + slot;
      constexpr int kStride = kWarps * kSlots;
      total = merge(total, {static_cast<float>(rows), in[0], in[kStride], in[2 * kStride],
                            in[3 * kStride], in[4 * kStride]});
    }
    if (columns.begin + slot < columns.end) {
      float* out = partials + at.row_block * kMoments * dim + columns.begin + slot;
      const float values[kMoments] = {total.mean_x, total.mean_y, total.scatter_x, total.scatter_y,
                                      total.comoment};
#pragma unroll
      for (int k = 0; k < kMoments; ++k) out[k * dim] = values[k];
    }
  }
}

// The second stage, a thread a column: moments [2, 3, D], each mean as load_means has it and the scatter;
// diagonal [D]; sums[block] = sum of (C_jj - 1)^2.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    column_finish(Views<T> views, Cut cut, Standard standard, const float* partials,
                  float* moments, float* diagonal, double* sums, unsigned* done) {
  const int64_t dim = cut.columns, j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (blockIdx.x == 0 && threadIdx.x == 0) *done = 0u;
  double gap = 0.0;
  if (j < dim) {
    PairMoments total;
    for (int64_t r = 0; r < cut.row_blocks; ++r) {
      const float* in = partials + r * kMoments * dim + j;
      total = merge(total, {static_cast<float>(cut.rows_in(r)), in[0], in[dim], in[2 * dim],
                            in[3 * dim], in[4 * dim]});
    }
    float* out = moments + j;
    out[0] = widen(views.x.data[j * views.x.column]);
    out[dim] = total.mean_x;
    out[2 * dim] = total.scatter_x;
    out[3 * dim] = widen(views.y.data[j * views.y.column]);
    out[4 * dim] = total.mean_y;
    out[5 * dim] = total.scatter_y;
    const float c = total.comoment * inverse_std(total.scatter_x, standard) *
                    inverse_std(total.scatter_y, standard) / static_cast<float>(cut.rows);
    diagonal[j] = c;
    gap = (static_cast<double>(c) - 1.0) * (static_cast<double>(c) - 1.0);
  }
  gap = block_sum(gap);
  if (threadIdx.x == 0) sums[blockIdx.x] = gap;
}

// standardised [2, N, D] in the views' dtype: the operand of the products. Where products is not
// null, products[row block, D] = sum over the block's rows of what was stored, x times y.
template <typename T, bool Vectors>
__global__ void __launch_bounds__(kThreads, 2)
    standardise(Views<T> views, Cut cut, Standard standard, const float* moments,
                T* standardised, float* products) {
  constexpr int W = kColumns<T, Vectors>, kSlots = kLanes * W;
  SHARED_ARRAY(float, shared, kWarps * kSlots);
  const Place at = place(cut);
  const Columns<W, Vectors> columns(cut, at.tile);
  const int64_t rows = cut.rows, dim = cut.columns;
  const int warp = threadIdx.x / kLanes;

  float first[2][W] = {}, mean[2][W] = {}, inverse[2][W] = {};
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    load_means(moments + v * 3 * dim, dim, columns, first[v], mean[v]);
    load(moments + (v * 3 + 2) * dim, 1, columns, inverse[v]);
#pragma unroll
    for (int w = 0; w < W; ++w) inverse[v][w] = inverse_std(inverse[v][w], standard);
  }
  float sum[W] = {};
#pragma unroll 2
  for (int64_t n = at.row_begin + warp; n < at.row_end; n += kWarps) {
    float value[2][W] = {};
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const View<T> z = views[v];
      load(z.data + n * z.row, z.column, columns, value[v]);
    }
#pragma unroll
    for (int w = 0; w < W; ++w) {
      float stored[2];
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        value[v][w] = ((value[v][w] - first[v][w]) - mean[v][w]) * inverse[v][w];
        stored[v] = widen(narrow<T>(value[v][w]));
      }
      sum[w] += stored[0] * stored[1];
    }
#pragma unroll
    for (int v = 0; v < 2; ++v) store(standardised + (v * rows + n) * dim, columns, value[v]);
  }
  if (products == nullptr) return;

#pragma unroll
  for (int w = 0; w < W; ++w) shared[warp * kSlots + columns.slot(w)] = sum[w];
  __syncthreads();
  for (int slot = threadIdx.x; slot < kSlots; slot += kThreads) {
    float total = 0.f;
    for (int i = 0; i < kWarps; ++i) total += shared[i * kSlots + slot];
    if (columns.begin + slot < columns.end) {
      products[at.row_block * dim + columns.begin + slot] = total;
    }
  }
}

}  // namespace kernels
}  // namespace barlow
