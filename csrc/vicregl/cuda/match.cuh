// Nearest positions both ways, and the ranks of their distances.
//
// A block takes a tile of 4 RA x 8 RB distances of one sample. Each warp sums (a - b)^2 over an
// eighth of the channels for the whole tile, a lane for RA x RB of its distances, so that one value
// read from shared memory serves 7 subtractions and 7 multiply-adds. Distance and index then become
// one integer, whose minimum is the nearest position, ties to the lowest index. A second launch
// merges the tiles' minima and counts ranks.
#pragma once

#include "vicregl/cuda/maps.cuh"

namespace vicregl {
namespace kernels {

// Distances are never negative, so that their bits are ordered as they are.
__device__ __forceinline__ uint64_t key(float distance, int64_t index) {
  const float value = ordered(distance);
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return uint64_t{bits} << 32 | static_cast<uint32_t>(index);
}
constexpr uint64_t kNoKey = ~uint64_t{0};

__device__ __forceinline__ uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

// The least key of 2 or 4 neighbouring lanes.
template <int Lanes>
__device__ __forceinline__ uint64_t least_of(uint64_t own) {
#pragma unroll
  for (int by = 1; by < Lanes; by *= 2) own = least(own, __shfl_xor_sync(kAllLanes, own, by));
  return own;
}

// A thread's share of the next channels of a tile's rows, first those of a, then those of b: kept
// in registers while the last ones are subtracted, then put into one of two buffers in shared
// memory: kDepth channels of TA + 1 and of TB + 1 values. Rows and channels past the last are 0. W:
// adjacent channels of an access, 4 or 1 (half as many at once, or their addresses would spill).
template <int W, int TA, int TB>
struct Stage {
  static constexpr int kDepth = W == 4 ? 32 : 16;
  static constexpr int kAcross = kDepth / W, kDown = kThreads / kAcross;
  static constexpr int kSteps = (TA + TB + kDown - 1) / kDown;
  static constexpr int kFloats = kDepth * (TA + TB + 2);

  float kept[kSteps][W];

  // a0, b0: where the tile's first rows begin; rows_a, rows_b: how many there are from them on.
  __device__ __forceinline__ void load(const AnyMaps& a, int64_t a0, int64_t rows_a,
                                       const AnyMaps& b, int64_t b0, int64_t rows_b,
                                       int64_t channel, int64_t channels) {
    const int64_t c = channel + threadIdx.x % kAcross * W;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int r = threadIdx.x / kAcross + step * kDown;
#pragma unroll
      for (int w = 0; w < W; ++w) kept[step][w] = 0.f;
      if (c >= channels) continue;
      if (r < TA) {
        if (r < rows_a) kernels::load(a.data, a.dtype, a0 + r * a.row + c * a.column, kept[step]);
      } else if (r - TA < rows_b) {
        if (r < TA + TB) {
          kernels::load(b.data, b.dtype, b0 + (r - TA) * b.row + c * b.column, kept[step]);
        }
      }
    }
  }

  __device__ __forceinline__ void put(float* as, float* bs) const {
    const int c = threadIdx.x % kAcross * W;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int r = threadIdx.x / kAcross + step * kDown;
#pragma unroll
      for (int w = 0; w < W; ++w) {
        if (r < TA) {
          as[(c + w) * (TA + 1) + r] = kept[step][w];
        } else if (r < TA + TB) {
          bs[(c + w) * (TB + 1) + r - TA] = kept[step][w];
        }
      }
    }
  }
};

// row_keys [U, V, B, tiles of b, L1]: the least key of each position of a among the tile's
// positions of b; column_keys [U, V, B, tiles of a, L2] the other way round.
template <int W, int RA, int RB>
__global__ void __launch_bounds__(kThreads, 2)
    match_tiles(AnyMaps a, AnyMaps b, Shape q, int64_t tiles_a, int64_t tiles_b,
                uint64_t* row_keys, uint64_t* column_keys) {
  constexpr int TA = 4 * RA, TB = 8 * RB;
  using Rows = Stage<W, TA, TB>;
  constexpr int kPitch = TB + 1, kTile = TA * kPitch;
  constexpr int kShared = 2 * Rows::kFloats > 4 * kTile ? 2 * Rows::kFloats : 4 * kTile;
  constexpr int kDepth = Rows::kDepth, kEach = kDepth / kWarps;
  SHARED_ARRAY(float, shared, kShared);

  const int64_t tile_b = blockIdx.x % tiles_b, rest = blockIdx.x / tiles_b;
  const int64_t tile_a = rest % tiles_a, s = rest / tiles_a;
  const int64_t n = s % q.batch, pair = s / q.batch;
  const int64_t i0 = tile_a * TA, j0 = tile_b * TB;
  const int64_t a0 = a.at(pair / q.views_b, n, i0);
  const int64_t b0 = b.at(pair % q.views_b, n, j0);
  const int64_t rows_a = q.rows_a - i0, rows_b = q.rows_b - j0;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int y = lane / 8, x = lane % 8;

  float sum[RA][RB] = {};
  Rows rows;
  rows.load(a, a0, rows_a, b, b0, rows_b, 0, q.channels);
  rows.put(shared, shared + kDepth * (TA + 1));
  __syncthreads();
  int buffer = 0;
#pragma unroll 1
  for (int64_t channel = kDepth;; channel += kDepth) {
    const bool more = channel < q.channels;
    if (more) rows.load(a, a0, rows_a, b, b0, rows_b, channel, q.channels);
    const float* as = shared + buffer * Rows::kFloats;
    const float* bs = as + kDepth * (TA + 1);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int c = warp * kEach + k;
      float left[RA], right[RB];
#pragma unroll
      for (int i = 0; i < RA; ++i) left[i] = as[c * (TA + 1) + y + 4 * i];
#pragma unroll
      for (int j = 0; j < RB; ++j) right[j] = bs[c * (TB + 1) + x + 8 * j];
#pragma unroll
      for (int i = 0; i < RA; ++i) {
#pragma unroll
        for (int j = 0; j < RB; ++j) {
          const float difference = left[i] - right[j];
          sum[i][j] += difference * difference;
        }
      }
    }
    buffer ^= 1;
    if (more) {
      float* next = shared + buffer * Rows::kFloats;
      rows.put(next, next + kDepth * (TA + 1));
    }
    __syncthreads();
    if (!more) break;
  }

  // The warps' shares, added in the same order always: w + (w + 4), then the four of them.
  float* share = shared + warp % 4 * kTile;
#pragma unroll
  for (int round = 0; round < 2; ++round) {
    if ((round == 0) == (warp >= 4)) {
#pragma unroll
      for (int i = 0; i < RA; ++i) {
#pragma unroll
        for (int j = 0; j < RB; ++j) {
          float* to = share + (y + 4 * i) * kPitch + x + 8 * j;
          *to = round == 0 ? sum[i][j] : *to + sum[i][j];
        }
      }
    }
    __syncthreads();
  }
  for (int e = threadIdx.x; e < kTile; e += kThreads) {
    shared[e] = (shared[e] + shared[e + kTile]) + (shared[e + 2 * kTile] + shared[e + 3 * kTile]);
  }
  __syncthreads();

  // Four threads a row of the tile, two a column.
  constexpr int kHalf = kThreads / 2;
  static_assert(4 * TA <= kHalf && 2 * TB <= kHalf);
  uint64_t best = kNoKey;
  if (threadIdx.x < kHalf) {
    const int i = threadIdx.x / 4;
    if (i < TA) {
      for (int j = threadIdx.x % 4; j < TB && j < rows_b; j += 4) {
        best = least(best, key(shared[i * kPitch + j], j0 + j));
      }
    }
    best = least_of<4>(best);
    if (threadIdx.x % 4 == 0 && i < TA && i < rows_a) {
      row_keys[(s * tiles_b + tile_b) * q.rows_a + i0 + i] = best;
    }
  } else {
    const int j = (threadIdx.x - kHalf) / 2;
    if (j < TB) {
      for (int i = threadIdx.x % 2; i < TA && i < rows_a; i += 2) {
        best = least(best, key(shared[i * kPitch + j], i0 + i));
      }
    }
    best = least_of<2>(best);
    if (threadIdx.x % 2 == 0 && j < TB && j < rows_b) {
      column_keys[(s * tiles_a + tile_a) * q.rows_b + j0 + j] = best;
    }
  }
}

// One side's minima, keys [U, V, B, tiles of the other side, L], and what becomes of them,
// [U, V, B, L].
struct Ranking {
  const uint64_t* keys;
  int64_t tiles, rows;
  int* nearest;
  int* rank;

  __device__ __forceinline__ uint64_t merged(int64_t s, int64_t position) const {
    uint64_t best = kNoKey;
    for (int64_t t = 0; t < tiles; ++t) {
      best = least(best, keys[(s * tiles + t) * rows + position]);
    }
    return best;
  }
};

// The key that orders a side's positions: that of its distance and its own index.
__device__ __forceinline__ uint64_t ranked(uint64_t key, int64_t position) {
  return key >> 32 << 32 | static_cast<uint32_t>(position);
}

// A block a side of a sample, at most kThreads threads. A rank is the number of lower keys: L^2
// comparisons, which for maps take less time than the launch.
__global__ void __launch_bounds__(kThreads) match_ranks(Ranking a, Ranking b) {
  SHARED_ARRAY(uint64_t, keys, kThreads);
  const Ranking side = blockIdx.x % 2 == 0 ? a : b;
  const int64_t s = blockIdx.x / 2;
  for (int64_t first = 0; first < side.rows; first += blockDim.x) {
    const int64_t i = first + threadIdx.x;
    uint64_t own = kNoKey;
    if (i < side.rows) {
      own = side.merged(s, i);
      side.nearest[s * side.rows + i] = static_cast<int>(own & 0xffffffffu);
      own = ranked(own, i);
    }
    int rank = 0;
    for (int64_t others = 0; others < side.rows; others += blockDim.x) {
      const int64_t j = others + threadIdx.x;
      __syncthreads();
      if (j < side.rows) keys[threadIdx.x] = ranked(side.merged(s, j), j);
      __syncthreads();
      const int count = static_cast<int>(min(int64_t{blockDim.x}, side.rows - others));
      for (int k = 0; k < count; ++k) rank += keys[k] < own ? 1 : 0;
    }
    if (i < side.rows) side.rank[s * side.rows + i] = rank;
  }
}

}  // namespace kernels
}  // namespace vicregl
