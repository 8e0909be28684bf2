// The gradient's epilogue: from the products to the views, and through the standardisation.
#pragma once

#include "barlow/formula.h"
#include "common/cuda/columns.cuh"

namespace barlow {
namespace kernels {

using namespace common;

// A view's product, for the rows and columns of a Cut: float32, element (0, 0) of the cut first. For
// float inputs it is the gradient's own memory. For half inputs and N < D the Gram matrix is rounded
// without its diagonal, N^0.5 or more times the rest, which multiplies z here instead: most of that
// is in z's own direction, where the standardisation's gradient takes it out again.
struct Product {
  const float* data;
  int64_t row;
  const float* diagonal;  // of the Gram matrix, or null
};

// Sums over the rows for each column, in `count` parts that lie `stride` apart.
struct Parts {
  const float* data;
  int64_t count, stride;

  __device__ __forceinline__ float operator()(int64_t column) const {
    float total = 0.f;
    for (int64_t i = 0; i < count; ++i) total += data[i * stride + column];
    return total;
  }
};

template <typename T>
struct Gradient {
  const float* grad;  // of the loss
  Standard standard;
  float lambd;
  float power;  // what the product of half inputs must be multiplied with
  int64_t rows, dim;
  const float* moments;    // [2, 3, D]
  const float* diagonal;   // [D]
  Product product[2];
  Parts parts[2];  // N < D: of product times z, from the cut's first column; else of C_ij^2
  T* out[2];       // [N, D]; null where not wanted
};

// Standardises the views' own values, whose dtype the stored z may have rounded: in a gradient that
// points along z2 - C_jj z1, small where the views agree, that rounding would be large.
template <typename T, int W, bool Vectors>
struct Standardised {
  float first[2][W] = {}, mean[2][W] = {}, inverse[2][W] = {};

  __device__ __forceinline__ Standardised(const Gradient<T>& g, const Columns<W, Vectors>& columns) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const float* moments = g.moments + v * 3 * g.dim;
      load_means(moments, g.dim, columns, first[v], mean[v]);
      load(moments + 2 * g.dim, 1, columns, inverse[v]);
#pragma unroll
      for (int w = 0; w < W; ++w) {
        inverse[v][w] = inverse_std(inverse[v][w], g.standard);
        join_means<T>(first[v][w], mean[v][w]);
      }
    }
  }
  __device__ __forceinline__ void read(const Views<T>& views, int v, int64_t n,
                                       const Columns<W, Vectors>& columns, float (&z)[W]) const {
    const View<T> view = views[v];
    load(view.data + n * view.row, view.column, columns, z);
#pragma unroll
    for (int w = 0; w < W; ++w) z[w] = ((z[w] - first[v][w]) - mean[v][w]) * inverse[v][w];
  }
};

// P of formula.h for row n of the cut's columns, z being those of the view.
template <typename T, int W, bool Vectors>
__device__ __forceinline__ void load_product(const Gradient<T>& g, int v, const Cut& cut, int64_t n,
                                             const Columns<W, Vectors>& columns,
                                             const float (&z)[W], float (&out)[W]) {
  const Product& product = g.product[v];
  load(product.data + (n - cut.row0) * product.row - cut.column0, 1, columns, out);
  if constexpr (!std::is_same_v<T, float>) {
    const float diagonal = product.diagonal == nullptr ? 0.f : product.diagonal[n * (g.rows + 1)];
#pragma unroll
    for (int w = 0; w < W; ++w) out[w] = g.power * out[w] + diagonal * z[w];
  }
}

// N < D: sums [row block, 2, cut.columns] over the block's rows of product times z.
template <typename T, bool Vectors>
__global__ void __launch_bounds__(kThreads, 2)
    product_sums(Views<T> views, Cut cut, Gradient<T> g, float* sums) {
  constexpr int W = kGradientColumns, kSlots = kLanes * W;
  SHARED_ARRAY(float, shared, kWarps * kSlots);
  const Place at = place(cut);
  const Columns<W, Vectors> columns(cut, at.tile);
  const Standardised<T, W, Vectors> standardised(g, columns);
  const int warp = threadIdx.x / kLanes;
  float sum[2][W] = {};
#pragma unroll 2
  for (int64_t n = at.row_begin + warp; n < at.row_end; n += kWarps) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      if (g.out[v] == nullptr) continue;
      float value[W] = {}, z[W] = {};
      standardised.read(views, v, n, columns, z);
      load_product(g, v, cut, n, columns, z, value);
#pragma unroll
      for (int w = 0; w < W; ++w) sum[v][w] += value[w] * z[w];
    }
  }
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    if (g.out[v] == nullptr) continue;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < W; ++w) shared[warp * kSlots + columns.slot(w)] = sum[v][w];
    __syncthreads();
    for (int slot = threadIdx.x; slot < kSlots; slot += kThreads) {
      float total = 0.f;
      for (int i = 0; i < kWarps; ++i) total += shared[i * kSlots + slot];
      if (columns.begin + slot < columns.end) {
        sums[(at.row_block * 2 + v) * cut.columns + columns.begin + slot - cut.column0] = total;
      }
    }
  }
}

// Both gradients in one read of both views and of the products.
template <typename T, bool Vectors>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_rows(Views<T> views, Cut cut, Gradient<T> g) {
  constexpr int W = kGradientColumns;
  const Place at = place(cut);
  const Columns<W, Vectors> columns(cut, at.tile);
  const bool gram = g.rows < g.dim;
  const float grad = *g.grad, rows = static_cast<float>(g.rows);

  const Standardised<T, W, Vectors> standardised(g, columns);
  Coefficients a[2][W];
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    if (g.out[v] == nullptr) continue;
#pragma unroll
    for (int w = 0; w < W; ++w) {
      if (!columns.has(w)) continue;
      const int64_t j = columns[w];
      const float dot = gram ? g.parts[v](j - cut.column0) : rows * g.parts[v](j);
      a[v][w] = coefficients(grad, g.moments[(v * 3 + 2) * g.dim + j], g.standard, dot,
                             g.diagonal[j], g.lambd, rows, gram);
    }
  }

#pragma unroll 1
  for (int64_t n = at.row_begin + warp(); n < at.row_end; n += kWarps) {
    float z[2][W] = {};
#pragma unroll
    for (int v = 0; v < 2; ++v) standardised.read(views, v, n, columns, z[v]);
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      if (g.out[v] == nullptr) continue;
      float result[W] = {};
      load_product(g, v, cut, n, columns, z[v], result);
#pragma unroll
      for (int w = 0; w < W; ++w) {
        result[w] = gradient(a[v][w], result[w], z[1 - v][w], z[v][w]);
      }
      store(g.out[v] + n * g.dim, columns, result);
    }
  }
}

}  // namespace kernels
}  // namespace barlow
