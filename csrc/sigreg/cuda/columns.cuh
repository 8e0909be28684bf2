// Column sums of cos(t p) and sin(t p) over the rows of the projections.
//
// A lane keeps a column and its block's eight warps share the rows, so that a row's loads fall
// together, every sum stays in a register and threads meet once a block. Blocks of rows leave
// partial sums, [row blocks, G, 2, K, M], which are added in their order (statistic.cuh).
#pragma once

#include "sigreg/cuda/circle.cuh"

namespace sigreg {
namespace kernels {

constexpr int kMostPairs = 8;
constexpr int kChunk = 2 * kMostPairs;  // knots whose two sums a thread keeps
constexpr int kMostChunks = kMostKnots / kChunk;

// By value, as a kernel's parameter.
struct Table {
  Turns turns[kMostKnots];
};

// Equally spaced knots in chunks of 2 P, each about its centre: between two knots where t_0 is half
// the step (`half`), else on knot P of the chunk, counted from 1.
struct Centres {
  Turns start;  // t_0: step, or half of it
  bool half;
  Turns centre[kMostChunks];
};

struct Sums {
  const float* projections;  // [G, N, M]
  float* out;                // [row blocks, G, 2, K, M]
  int64_t knots, chunks;
  unsigned* done;  // what knot_terms counts its blocks in: set to 0
};

// Blocks of 256 threads whose registers fit a multiprocessor at once: at most 80 a thread, or 64.
// As many are launched, so that all run together, whatever their number: 4 where 3 fit would take
// two turns, the second a third full.
template <int P>
constexpr int kResident = P < 6 ? 4 : 3;
constexpr int kSingleResident = 4;

// Block i of the launch: chunk i % chunks of the knots, then as common::place.
__device__ __forceinline__ Place place(const Cut& cut, int64_t block) {
  const int64_t rest = block / cut.tiles, row_block = rest % cut.row_blocks;
  const int64_t begin = row_block * cut.block_rows;
  const int64_t end = begin + cut.rows_in(row_block);
  return {rest / cut.row_blocks, row_block, block % cut.tiles, begin, end};
}

__device__ __forceinline__ void store_sums(const Sums& s, const Cut& cut, const Place& at,
                                           int64_t knot, int64_t column, float cosines,
                                           float sines) {
  if (knot >= s.knots) return;
  float* out = s.out + ((at.row_block * cut.batches + at.batch) * 2 * s.knots + knot) * cut.columns;
  out[column] = cosines;
  out[s.knots * cut.columns + column] = sines;
}

// sums[i] of all warps to shared memory, [count, warps, lanes].
template <int Count>
__device__ __forceinline__ void share(const float (&sums)[Count], float* shared) {
#pragma unroll
  for (int i = 0; i < Count; ++i) shared[i * kThreads + threadIdx.x] = sums[i];
  __syncthreads();
}

// The sum over warps of number i in this thread's column.
__device__ __forceinline__ float shared_sum(const float* shared, int i) {
  const float* own = shared + i * kThreads + threadIdx.x % kLanes;
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += own[w * kLanes];
  return total;
}

// Knots in pairs mu +- d_j about the chunk's centre mu, where d_j is j + 1 steps, or with `half`
// j + 1/2 of them:
//
//     sum cos(mu +- d_j) = sum cos mu cos d_j -+ sum sin mu sin d_j
//     sum sin(mu +- d_j) = sum sin mu cos d_j +- sum cos mu sin d_j
//
// Four multiply-adds a pair to add up and four to rotate d_j on, where knots one by one take four
// and eight. One sincos a projection and chunk, of t_0, and one more for the centres of the chunks
// after the first.
template <int P>
__global__ void __launch_bounds__(kThreads, kResident<P>)
    paired_sums(Sums s, Cut cut, Centres centres) {
  SHARED_ARRAY(float, shared, (4 * P + 2) * kThreads);
  if (blockIdx.x == 0 && threadIdx.x == 0) *s.done = 0u;
  const int chunk = static_cast<int>(blockIdx.x % s.chunks), warp = threadIdx.x / kLanes;
  const Place at = place(cut, blockIdx.x / s.chunks);
  const int64_t column = at.tile * kLanes + threadIdx.x % kLanes;
  const bool half = centres.half;
  Turns centre = centres.centre[0];  // a variable index would put them into local memory
#pragma unroll
  for (int c = 1; c < kMostChunks; ++c) {
    if (chunk == c) centre = centres.centre[c];
  }
  float sums[4 * P + 2] = {};
  if (column < cut.columns) {
    const float* in = s.projections + at.batch * cut.rows * cut.columns + column;
    for (int64_t n = at.row_begin + warp; n < at.row_end; n += kWarps) {
      const float p = in[n * cut.columns];
      Unit<float> d[P];
      d[0] = circle(p, centres.start);
      const Unit<float> step = half ? twice(d[0]) : d[0];
#pragma unroll
      for (int j = 1; j < P; ++j) d[j] = rotate(d[j - 1], step);
      Unit<float> mu = d[P - 1];
      if (chunk > 0) {
        mu = circle(p, centre);
      } else if (half) {
        mu = rotate(mu, d[0]);
      }
#pragma unroll
      for (int j = 0; j < P; ++j) {
        sums[4 * j] += mu.c * d[j].c;
        sums[4 * j + 1] += mu.s * d[j].s;
        sums[4 * j + 2] += mu.s * d[j].c;
        sums[4 * j + 3] += mu.c * d[j].s;
      }
      sums[4 * P] += mu.c;
      sums[4 * P + 1] += mu.s;
    }
  }
  share(sums, shared);
  if (warp >= P || column >= cut.columns) return;
  const float cc = shared_sum(shared, 4 * warp), ss = shared_sum(shared, 4 * warp + 1);
  const float sc = shared_sum(shared, 4 * warp + 2), cs = shared_sum(shared, 4 * warp + 3);
  const int middle = (2 * chunk + 1) * P;
  store_sums(s, cut, at, middle + warp, column, cc - ss, sc + cs);
  if (half || warp < P - 1) {
    store_sums(s, cut, at, middle - (half ? 1 : 2) - warp, column, cc + ss, sc - cs);
  } else {  // mu - d_j is the last knot of the chunk before, or 0
    store_sums(s, cut, at, middle - 1, column, shared_sum(shared, 4 * P),
               shared_sum(shared, 4 * P + 1));
  }
}

// Knots of any spacing, a sincos each.
__global__ void __launch_bounds__(kThreads, kSingleResident)
    single_sums(Sums s, Cut cut, Table knots) {
  SHARED_ARRAY(float, shared, 2 * kChunk * kThreads);
  if (blockIdx.x == 0 && threadIdx.x == 0) *s.done = 0u;
  const int64_t chunk = blockIdx.x % s.chunks;
  const Place at = place(cut, blockIdx.x / s.chunks);
  const int warp = threadIdx.x / kLanes, first = static_cast<int>(chunk) * kChunk;
  const int64_t column = at.tile * kLanes + threadIdx.x % kLanes;
  float sums[2 * kChunk] = {};
  if (column < cut.columns) {
    const float* in = s.projections + at.batch * cut.rows * cut.columns + column;
    for (int64_t n = at.row_begin + warp; n < at.row_end; n += kWarps) {
      const float p = in[n * cut.columns];
#pragma unroll
      for (int k = 0; k < kChunk; ++k) {
        if (first + k < s.knots) {
          const Unit<float> wave = circle(p, knots.turns[first + k]);
          sums[2 * k] += wave.c;
          sums[2 * k + 1] += wave.s;
        }
      }
    }
  }
  share(sums, shared);
  if (column >= cut.columns) return;
#pragma unroll
  for (int k = warp; k < kChunk; k += kWarps) {
    store_sums(s, cut, at, first + k, column, shared_sum(shared, 2 * k),
               shared_sum(shared, 2 * k + 1));
  }
}

}  // namespace kernels
}  // namespace sigreg
