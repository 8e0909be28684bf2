// The gradient by the projections, sum_k a_k cos(t_k p) + b_k sin(t_k p) with a and b by column,
// and what keeps it inside float16's range.
#pragma once

#include "sigreg/cuda/columns.cuh"

namespace sigreg {
namespace kernels {

// Rows that a thread works on at once, so that a coefficient read from shared memory serves four.
constexpr int kRowsAtOnce = 4;
// Rows that a block's eight warps cover in one step.
constexpr int kStepRows = kRowsAtOnce * kWarps;

struct Waves {
  const float* grad;          // [1]
  const float* powers;        // [G] for float16, else null
  const float* coefficients;  // [G, 2, K, M]
  const float* projections;   // [G, N, M]
  int knots;
};

// Where the knots are equally spaced, from `start` in steps of it or, `half`, of twice that, the
// sum is Re of a polynomial in e^{i step p}: complex Horner, four multiply-adds a knot. Else a
// sincos for each knot of the table. A thread keeps a column, as in columns.cuh.
template <typename T, bool Equal>
__global__ void __launch_bounds__(kThreads)
    waves(Waves w, Cut cut, Turns start, bool half, Table knots, T* out) {
  SHARED_ARRAY(float2, coefficients, kMostKnots * kLanes);
  const Place at = place(cut);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t column = at.tile * kLanes + lane;
  const bool inside = column < cut.columns;
  for (int k = warp; k < w.knots; k += kWarps) {
    const float* own = w.coefficients + (at.batch * 2 * w.knots + k) * cut.columns + column;
    coefficients[k * kLanes + lane] =
        inside ? make_float2(own[0], own[w.knots * cut.columns]) : make_float2(0.f, 0.f);
  }
  __syncthreads();
  if (!inside) return;

  const float scale = w.powers == nullptr ? w.grad[0] : w.powers[at.batch];
  const int64_t first_row = at.batch * cut.rows + at.row_begin + warp;
  const float* in = w.projections + first_row * cut.columns + column;
  T* to = out + first_row * cut.columns + column;
  const int64_t step_down = kWarps * cut.columns;
  int left = static_cast<int>(at.row_end - at.row_begin) - warp;  // rows from this one on
  for (; left > 0; left -= kStepRows) {
    float p[kRowsAtOnce], wave[kRowsAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      p[i] = i * kWarps < left ? in[i * step_down] : 0.f;
    }
    if constexpr (Equal) {
      Unit<float> first[kRowsAtOnce], step[kRowsAtOnce], held[kRowsAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        first[i] = circle(p[i], start);
        step[i] = half ? twice(first[i]) : first[i];
      }
#pragma unroll 4
      for (int k = w.knots - 1; k >= 0; --k) {
        const float2 own = coefficients[k * kLanes + lane];
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) held[i] = horner(held[i], step[i], own.x, own.y);
      }
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) wave[i] = rotate(held[i], first[i]).c;
    } else {
      for (int k = 0; k < w.knots; ++k) {
        const float2 own = coefficients[k * kLanes + lane];
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
          const Unit<float> angle = circle(p[i], knots.turns[k]);
          wave[i] += own.x * angle.c + own.y * angle.s;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (i * kWarps < left) to[i * step_down] = narrow<T>(scale * wave[i]);
    }
    in += kRowsAtOnce * step_down;
    to += kRowsAtOnce * step_down;
  }
}

// The power of two that keeps any sum of a row's M waves times directions below 2^15 and loses none
// of the digits above 2^-14: a block a group, from the largest sum of a column's coefficients. 1
// for 0 and infinity.
__global__ void __launch_bounds__(kThreads)
    wave_powers(const float* coefficients, int64_t knots, int64_t slices, float* powers) {
  SHARED_ARRAY(float, largest, kThreads);
  const float* own = coefficients + int64_t{blockIdx.x} * 2 * knots * slices;
  float most = 0.f;
  for (int64_t m = threadIdx.x; m < slices; m += kThreads) {
    float sum = 0.f;
    for (int64_t i = 0; i < 2 * knots; ++i) sum += std::fabs(own[i * slices + m]);
    most = sum > most ? sum : most;
  }
  largest[threadIdx.x] = most;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads; ++i) most = largest[i] > most ? largest[i] : most;
  const float bound = most * static_cast<float>(slices);
  const bool usual = bound > 0.f && bound <= 0x1.fffffep127f;
  const int exponent = usual ? 14 - std::ilogb(bound) : 0;
  powers[blockIdx.x] = std::ldexp(1.f, exponent < 120 ? exponent : 120);
}

// out [G, N, D] holds the product of the scaled waves; times grad, and without the scale. `share`
// blocks a group.
__global__ void __launch_bounds__(kThreads)
    unscale(const float* grad, const float* powers, int64_t share, int64_t group_size,
            __half* out) {
  const int64_t g = blockIdx.x / share;
  const float factor = grad[0] * (1.f / powers[g]);
  for (int64_t i = blockIdx.x % share * kThreads + threadIdx.x; i < group_size;
       i += share * kThreads) {
    __half* own = out + g * group_size + i;
    *own = narrow<__half>(widen(*own) * factor);
  }
}

}  // namespace kernels
}  // namespace sigreg
