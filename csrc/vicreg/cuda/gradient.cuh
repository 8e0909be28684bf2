// The gradient's epilogue.
#pragma once

#include "common/cuda/columns.cuh"
#include "vicreg/formula.h"

namespace vicreg {
namespace kernels {

using namespace common;

// The product of the squares and the centred values, for the rows and columns of a Cut: float32,
// element (0, 0) of the cut first. For float inputs it is the gradient's own memory.
struct Product {
  const float* data;
  int64_t group, row;
  const float* powers;  // [G, side], of its rows (N < D) or columns; null for float inputs
};

template <typename T>
struct Gradient {
  const float* grads;  // the gradient of the loss, or of the four terms
  int64_t grad_count, grad_stride;
  float scales[3], weights[3];
  float degrees, margin, eps;
  int64_t groups, rows, dim;
  int deflated_count;     // K
  const float* moments;   // [V, G, 3, D]
  const float* deflated;  // [V, G, K, N]
  const int64_t* index;   // [V, G, K]
  Product product[2];
  T* out[2];  // [G, N, D]; null where not wanted
};

// Both gradients in one read of both views; everything but the product is recomputed from them.
template <typename T, bool Vectors>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_rows(Views<T> views, Cut cut, Gradient<T> g) {
  constexpr int W = kGradientColumns;
  const Place at = place(cut);
  const Columns<W, Vectors> columns(cut, at.tile);
  const bool gram = g.rows < g.dim, pair = views.y.data != nullptr;

  float grads[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < g.grad_count) grads[i] = g.grads[i * g.grad_stride];
  }
  const float groups = static_cast<float>(g.groups), all = groups * static_cast<float>(g.dim);
  const Coefficients a = coefficients(grads, g.grad_count, g.scales, g.weights, groups, all,
                                      all * static_cast<float>(g.rows), g.degrees);

  float first[2][W] = {}, mean[2][W] = {}, factor[2][W] = {};
  // 4 bits a column: 7 - its place in T, or 0. Joined by `or`, the places of a column that an index
  // holds twice are still a place in T.
  static_assert(kDeflatedColumns <= 4, "7 - place has its bit of 4");
  unsigned deflated[2] = {};
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    if (g.out[v] == nullptr) continue;
    const int64_t batch = v * g.groups + at.batch;
    const float* moments = g.moments + batch * 3 * g.dim;
    load_means(moments, g.dim, columns, first[v], mean[v]);
    load(moments + 2 * g.dim, 1, columns, factor[v]);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      join_means<T>(first[v][w], mean[v][w]);
      const int64_t* index = g.index + batch * g.deflated_count;
      for (int k = 7; k > 7 - g.deflated_count; --k, ++index) {
        if (*index == columns[w]) deflated[v] |= static_cast<unsigned>(k) << (4 * w);
      }
      const bool subtract = gram && (deflated[v] >> (4 * w) & 15u) == 0u;
      factor[v][w] = column_factor(a, hinge_slope(factor[v][w], g.degrees, g.margin, g.eps),
                                   subtract ? factor[v][w] : 0.f);
    }
  }

#pragma unroll 1
  for (int64_t n = at.row_begin + warp(); n < at.row_end; n += kWarps) {
    float value[2][W] = {};
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const View<T> z = views[v];
      if (z.data == nullptr) continue;
      load(z.data + at.batch * z.group + n * z.row, z.column, columns, value[v]);
    }
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      if (g.out[v] == nullptr) continue;
      const Product& product = g.product[v];
      float result[W] = {};
      load(product.data + at.batch * product.group + (n - cut.row0) * product.row - cut.column0, 1,
           columns, result);
      if (product.powers != nullptr) {
        const float* powers = product.powers + at.batch * (gram ? g.rows : g.dim);
        float power[W] = {};
        if (!gram) load(powers, 1, columns, power);
#pragma unroll
        for (int w = 0; w < W; ++w) result[w] *= gram ? powers[n] : power[w];
      }
      if (deflated[v] != 0u) {
#pragma unroll
        for (int w = 0; w < W; ++w) {
          const unsigned k = deflated[v] >> (4 * w) & 15u;
          if (k == 0u) continue;
          const int64_t plane = v * g.groups + at.batch;
          result[w] = g.deflated[(plane * g.deflated_count + 7 - k) * g.rows + n];
        }
      }
#pragma unroll
      for (int w = 0; w < W; ++w) {
        const float difference = pair ? value[v][w] - value[1 - v][w] : 0.f;
        const float centred = (value[v][w] - first[v][w]) - mean[v][w];
        result[w] = gradient(a, result[w], factor[v][w], centred, difference);
      }
      store(g.out[v] + (at.batch * g.rows + n) * g.dim, columns, result);
    }
  }
}

}  // namespace kernels
}  // namespace vicreg
