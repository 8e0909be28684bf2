// The gradient's epilogue: from the products to the views, and through the standardisation.
#pragma once

#include "barlow/formula.h"
#include "common/columns.cuh"

namespace barlow {
namespace kernels {

using namespace common;

// For half inputs too, although their accesses are of 8 bytes then: 8 columns of two views spill.
constexpr int kGradientColumns = 4;

// A view's product, for the rows and columns of a Cut: float32, element (0, 0) of the cut first. For
// float inputs it is the gradient's own memory.
struct Product {
  const float* data;
  int64_t row;
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
  float power;  // what makes P of formula.h of the product
  int64_t rows, dim;
  const float* moments;    // [2, 3, D]
  const float* diagonal;   // [D]
  const T* standardised;   // [2, N, D]
  Product product[2];
  Parts parts[2];  // N < D: of product times z, from the cut's first column; else of C_ij^2
  T* out[2];       // [N, D]; null where not wanted
};

// N < D: sums [row block, 2, cut.columns] over the block's rows of product times z.
template <typename T, bool Vectors>
__global__ void __launch_bounds__(kThreads, 2)
    product_sums(Cut cut, Gradient<T> g, float* sums) {
  constexpr int W = kGradientColumns, kSlots = kLanes * W;
  SHARED_ARRAY(float, shared, kWarps * kSlots);
  const Place at = place(cut);
  const Columns<W, Vectors> columns(cut, at.tile);
  const int warp = threadIdx.x / kLanes;
  float sum[2][W] = {};
#pragma unroll 2
  for (int64_t n = at.row_begin + warp; n < at.row_end; n += kWarps) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      if (g.out[v] == nullptr) continue;
      const Product& product = g.product[v];
      float value[W] = {}, z[W] = {};
      load(product.data + n * product.row - cut.column0, 1, columns, value);
      load(g.standardised + (v * g.rows + n) * g.dim, 1, columns, z);
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

// Both gradients in one read of both standardised views and of the products.
template <typename T, bool Vectors>
__global__ void __launch_bounds__(kThreads, 2) gradient_rows(Cut cut, Gradient<T> g) {
  constexpr int W = kGradientColumns;
  const Place at = place(cut);
  const Columns<W, Vectors> columns(cut, at.tile);
  const bool gram = g.rows < g.dim;
  const float grad = *g.grad, rows = static_cast<float>(g.rows);

  Coefficients a[2][W];
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    if (g.out[v] == nullptr) continue;
#pragma unroll
    for (int w = 0; w < W; ++w) {
      if (!columns.has(w)) continue;
      const int64_t j = columns[w];
      const float dot = gram ? g.power * g.parts[v](j - cut.column0) : rows * g.parts[v](j);
      a[v][w] = coefficients(grad, g.moments[(v * 3 + 2) * g.dim + j], g.standard, dot,
                             g.diagonal[j], g.lambd, rows, gram);
      a[v][w].product *= g.power;
    }
  }

#pragma unroll 1
  for (int64_t n = at.row_begin + threadIdx.x / kLanes; n < at.row_end; n += kWarps) {
    float z[2][W] = {};
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      load(g.standardised + (v * g.rows + n) * g.dim, 1, columns, z[v]);
    }
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      if (g.out[v] == nullptr) continue;
      float result[W] = {};
      load(g.product[v].data + (n - cut.row0) * g.product[v].row - cut.column0, 1, columns, result);
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
