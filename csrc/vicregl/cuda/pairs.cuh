// The squared differences of the kept matches, and their gradient.
//
// Forward a warp takes a position: it reads its rank, and where that is kept the two rows. Backward
// a warp owns one position of one map, finds the matches that name it, and writes its gradient once:
// for each view of the other side its own match, then those that name it in ascending order. No
// position is written twice, so that nothing depends on an order of threads.
#pragma once

#include "vicregl/cuda/maps.cuh"

namespace vicregl {
namespace kernels {

// One direction's matches, [U, V, B, L]; those of rank < most are kept.
struct Matches {
  const int* nearest;
  const int* rank;
  int64_t most;
  Kept kept;
};

__device__ __forceinline__ int lowest(unsigned mask) {
#ifdef __CUDACC__
  return __ffs(static_cast<int>(mask)) - 1;
#else
  return __builtin_ctz(mask);
#endif
}

// An index out of range is not followed: it gives NaN.
__device__ __forceinline__ bool follow(int64_t& position, int64_t rows, float& factor) {
  if (position >= 0 && position < rows) return true;
  position = 0;
  factor = NAN;
  return false;
}

// partials[block] = the sum over a block's positions: those of a, then those of b.
template <typename T, bool Vectors>
__global__ void __launch_bounds__(kThreads, 4)
    pair_sums(Maps<T> a, Maps<T> b, Shape q, Matches from_a, Matches from_b, double* partials) {
  constexpr int W = kWidth<T, Vectors>;
  const int64_t rows_a = q.samples() * q.rows_a, rows = rows_a + q.samples() * q.rows_b;
  double total = 0.0;
  for (int64_t r = first_row(); r < rows; r += row_step()) {
    const bool of_a = r < rows_a;
    const int64_t at = of_a ? r : r - rows_a, length = of_a ? q.rows_a : q.rows_b;
    const int64_t rank = of_a ? from_a.rank[at] : from_b.rank[at];
    if (rank >= (of_a ? from_a.most : from_b.most)) continue;
    float factor = of_a ? from_a.kept.factor(rank) : from_b.kept.factor(rank);
    int64_t own = at % length, other = of_a ? from_a.nearest[at] : from_b.nearest[at];
    follow(other, of_a ? q.rows_b : q.rows_a, factor);
    const int64_t s = at / length, n = s % q.batch, pair = s / q.batch;
    const T* left = a.at(pair / q.views_b, n, of_a ? own : other);
    const T* right = b.at(pair % q.views_b, n, of_a ? other : own);
    float sum = 0.f;
#pragma unroll 4
    for (int64_t c = int64_t{lane()} * W; c < q.channels; c += kLanes * W) {
      float x[W], y[W];
      load(left + c * a.column, x);
      load(right + c * b.column, y);
#pragma unroll
      for (int w = 0; w < W; ++w) sum += (x[w] - y[w]) * (x[w] - y[w]);
    }
    total += static_cast<double>(factor) * warp_sum(sum);
  }
  total = common::block_sum(lane() == 0 ? total : 0.0);
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

// One block: the sum of the partials in a fixed order.
__global__ void __launch_bounds__(kThreads)
    pair_finish(const double* partials, int64_t count, float* result) {
  const double total = common::sum_of(partials, count);
  if (threadIdx.x == 0) *result = static_cast<float>(total);
}

// What the gradient of one side's positions needs. The pair of views (own x, other y) is number
// x own_step + y other_step.
template <typename T>
struct Side {
  Maps<T> own, other;
  int64_t own_views, other_views, own_rows, other_rows, own_step, other_step;
  Matches from_own, from_other;
  T* out;  // [own views, B, own rows, C], null where not wanted
};

// Elements that a lane keeps of a row: 512 channels a warp, and half as many where single elements
// would need as many addresses.
template <typename T, bool Vectors>
constexpr int kKept = Vectors ? 16 : 8;

// The gradient of a warp's position, for the channels from `channel` on.
template <typename T, bool Vectors>
__device__ __forceinline__ void position_gradient(const Side<T>& side, int64_t batch,
                                                  int64_t channels, int64_t channel, float grad,
                                                  int64_t view, int64_t n, int64_t position,
                                                  T* out) {
  constexpr int W = kWidth<T, Vectors>, P = kKept<T, Vectors> / W;
  float own[P][W], sum[P][W] = {};
  bool read = false;
  const auto over = [&](const auto& use) {
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const int64_t c = channel + (p * kLanes + lane()) * W;
      if (c < channels) use(p, c);
    }
  };
  const auto add = [&](int64_t y, int64_t other, float factor) {
    follow(other, side.other_rows, factor);
    const float by = slope(grad, factor);
    if (!read) {
      const T* row = side.own.at(view, n, position);
      over([&](int p, int64_t c) { load(row + c * side.own.column, own[p]); });
      read = true;
    }
    const T* row = side.other.at(y, n, other);
    over([&](int p, int64_t c) {
      float value[W];
      load(row + c * side.other.column, value);
#pragma unroll
      for (int w = 0; w < W; ++w) sum[p][w] += by * (own[p][w] - value[w]);
    });
  };

  // Own match first, as if 32 positions before the first one held it, so that there is one
  // copy of `add`.
  for (int64_t y = 0; y < side.other_views; ++y) {
    const int64_t s = (view * side.own_step + y * side.other_step) * batch + n;
    const int64_t at = s * side.own_rows + position, others = s * side.other_rows;
#pragma unroll 1
    for (int64_t first = -kLanes; first < side.other_rows; first += kLanes) {
      int to = static_cast<int>(first) + lane();
      bool named = false;
      float factor = 0.f;
      if (first < 0) {
        if (lane() == 0) {
          const int64_t rank = side.from_own.rank[at];
          named = rank < side.from_own.most;
          to = side.from_own.nearest[at];
          factor = side.from_own.kept.factor(rank);
        }
      } else if (to < side.other_rows && side.from_other.nearest[others + to] == position) {
        const int64_t rank = side.from_other.rank[others + to];
        named = rank < side.from_other.most;
        factor = side.from_other.kept.factor(rank);
      }
      unsigned left = __ballot_sync(kAllLanes, named);
      while (left != 0u) {
        const int bit = lowest(left);
        left &= left - 1u;
        add(y, __shfl_sync(kAllLanes, to, bit), __shfl_sync(kAllLanes, factor, bit));
      }
    }
  }
  over([&](int p, int64_t c) { store(out + c, sum[p]); });
}

// The positions of a, then those of b. Each side has its own copy of the code: a choice between two
// sets of parameters would hold them all in registers, and ptxas spills for sm_100.
template <typename T, bool Vectors>
__global__ void __launch_bounds__(kThreads, 2)
    pair_gradients(Side<T> a, Side<T> b, int64_t batch, int64_t channels, const float* grad) {
  const int64_t rows_a = a.out == nullptr ? 0 : a.own_views * batch * a.own_rows;
  const int64_t rows_b = b.out == nullptr ? 0 : b.own_views * batch * b.own_rows;
  const float incoming = *grad;
  const auto row_gradient = [=](const Side<T>& side, int64_t row) {
    const int64_t rest = row / side.own_rows;
#pragma unroll 1
    for (int64_t c = 0; c < channels; c += kLanes * kKept<T, Vectors>) {
      position_gradient<T, Vectors>(side, batch, channels, c, incoming, rest / batch, rest % batch,
                                    row % side.own_rows, side.out + row * channels);
    }
  };
  for (int64_t r = first_row(); r < rows_a + rows_b; r += row_step()) {
    if (r < rows_a) {
      row_gradient(a, r);
    } else {
      row_gradient(b, r - rows_a);
    }
  }
}

}  // namespace kernels
}  // namespace vicregl
