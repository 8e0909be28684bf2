// The statistic of the column sums, which row blocks have left in parts, and its coefficients.
#pragma once

#include "sigreg/cuda/circle.cuh"

namespace sigreg {
namespace kernels {

// Across ranks, before their sums are added up: out[i] = the sum over row blocks of partials[r, i], in order.
__global__ void __launch_bounds__(kThreads)
    finish_sums(const float* partials, int64_t row_blocks, int64_t count, float* out) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  float total = 0.f;
#pragma unroll 4
  for (int64_t r = 0; r < row_blocks; ++r) total += partials[r * count + i];
  out[i] = total;
}

struct Rule {
  double knots[kMostKnots], targets[kMostKnots], weights[kMostKnots];  // targets: phi
  double count, scale;  // scale: of the gradient, ranks factor / (G M)
};

struct Terms {
  const float* partials;  // [row blocks, G, 2, K, M]
  int64_t row_blocks, groups, knots, slices;
  float* coefficients;  // [G, 2, K, M]
  double* shares;       // [blocks]
  unsigned* done;       // blocks that are through, 0 at the launch
  double factor;        // of the loss
  float* loss;
};

// A thread a knot of a slice: its sums over the row blocks, in order, and its two coefficients. The
// last block to come adds up the statistic's terms of all, in order of blocks, so that the loss does
// not depend on which it is.
__global__ void __launch_bounds__(kThreads) knot_terms(Terms t, Rule rule) {
  const int64_t tiles = (t.slices + kThreads - 1) / kThreads;
  const int64_t m = blockIdx.x % tiles * kThreads + threadIdx.x, rest = blockIdx.x / tiles;
  const int64_t k = rest % t.knots, g = rest / t.knots;
  double share = 0.0;
  if (m < t.slices) {
    const int64_t behind = t.knots * t.slices, size = 2 * t.groups * behind;
    const int64_t cosines = (2 * g * t.knots + k) * t.slices + m, sines = cosines + behind;
    float c = 0.f, s = 0.f;
#pragma unroll 4
    for (int64_t r = 0; r < t.row_blocks; ++r) {
      c += t.partials[r * size + cosines];
      s += t.partials[r * size + sines];
    }
    const KnotTerm term = knot_term(c, s, rule.knots[k], rule.targets[k], rule.weights[k],
                                    rule.count, rule.scale);
    share = term.loss;
    t.coefficients[cosines] = static_cast<float>(term.a);
    t.coefficients[sines] = static_cast<float>(term.b);
  }
  if (!last_block(share, t.shares, t.done)) return;
  const double total = sum_of(t.shares, gridDim.x);
  if (threadIdx.x == 0) *t.loss = static_cast<float>(t.factor * total);
}

}  // namespace kernels
}  // namespace sigreg
