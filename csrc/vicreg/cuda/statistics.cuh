// Column statistics, the choice of the deflated columns, and centring.
#pragma once

#include "common/cuda/columns.cuh"
#include "vicreg/formula.h"

namespace vicreg {
namespace kernels {

using namespace common;

constexpr int kMostDeflated = static_cast<int>(kDeflatedColumns);

// A column and its scatter, for the choice of the largest.
struct Candidate {
  float key;
  int column;
};

// NaN counts as smaller than any scatter, so that a choice is always made.
__device__ __forceinline__ float candidate_key(float scatter) {
  return scatter >= 0.f ? scatter : -1.f;
}
constexpr float kNoCandidate = -2.f;

__device__ __forceinline__ Candidate warp_largest(Candidate mine) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const float key = __shfl_xor_sync(kAllLanes, mine.key, offset);
    const int column = __shfl_xor_sync(kAllLanes, mine.column, offset);
    if (key > mine.key || (key == mine.key && column < mine.column)) mine = {key, column};
  }
  return mine;
}

// partials[row block, v, g, 0 or 1, D]: mean minus row 0, and scatter, of each column over the rows
// of a block; differences[block] = sum (x - y)^2. Welford's update on values less row 0: a common
// offset cancels exactly, and a large row 0 does no harm.
template <typename T, bool Vectors, int V>
__global__ void __launch_bounds__(kThreads, 2)
    column_partials(Views<T> views, Cut cut, int64_t dim, float* partials, double* differences) {
  constexpr int W = kColumns<T, Vectors>;
  SHARED_ARRAY(float, means, kThreads * W);
  SHARED_ARRAY(float, scatters, kThreads * W);
  const Place at = place(cut);
  const Columns<W, Vectors> columns(cut, at.tile);
  const int warp = threadIdx.x / kLanes;

  float shift[V][W] = {}, mean[V][W] = {}, scatter[V][W] = {};
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const View<T> z = views[v];
    load(z.data + at.batch * z.group, z.column, columns, shift[v]);
  }
  double difference = 0.0;
  float count = 0.f;
#pragma unroll 2
  for (int64_t n = at.row_begin + warp; n < at.row_end; n += kWarps) {
    float value[V][W] = {};
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const View<T> z = views[v];
      load(z.data + at.batch * z.group + n * z.row, z.column, columns, value[v]);
    }
    count += 1.f;
    const float inverse = 1.f / count;
    float row_difference = 0.f;
#pragma unroll
    for (int w = 0; w < W; ++w) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float shifted = value[v][w] - shift[v][w];
        const float delta = shifted - mean[v][w];
        mean[v][w] += delta * inverse;
        scatter[v][w] += delta * (shifted - mean[v][w]);
      }
      const float gap = value[0][w] - value[V - 1][w];
      row_difference += gap * gap;
    }
    if (V == 2) difference += row_difference;
  }

#pragma unroll
  for (int v = 0; v < V; ++v) {
    __syncthreads();
#pragma unroll
    for (int w = 0; w < W; ++w) {
      means[warp * kLanes * W + columns.slot(w)] = mean[v][w];
      scatters[warp * kLanes * W + columns.slot(w)] = scatter[v][w];
    }
    __syncthreads();
    float* out = partials + ((at.row_block * V + v) * cut.batches + at.batch) * 2 * dim;
    for (int slot = threadIdx.x; slot < kLanes * W; slot += kThreads) {
      Moments total;
      for (int i = 0; i < kWarps; ++i) {
        const int64_t rows = (at.row_end - at.row_begin - i + kWarps - 1) / kWarps;
        total = merge(total, {static_cast<float>(rows), means[i * kLanes * W + slot],
                              scatters[i * kLanes * W + slot]});
      }
      if (columns.begin + slot < columns.end) {
        out[columns.begin + slot] = total.mean;
        out[dim + columns.begin + slot] = total.scatter;
      }
    }
  }
  if (V == 2) {
    difference = block_sum(difference);
    if (threadIdx.x == 0) differences[blockIdx.x] = difference;
  }
}

// The second stage, a thread a column: moments[v, g, 3, D], the mean as load_means has it and the scatter;
// hinges[block]; and of each block the `count` columns of largest scatter, keys and key_columns
// [v, g, block, K].
template <typename T>
__global__ void __launch_bounds__(kThreads)
    column_finish(Views<T> views, Cut cut, int64_t batches, int64_t dim, int count, float degrees,
                  float margin, float eps, const float* partials, float* moments, double* hinges,
                  float* keys, int* key_columns, unsigned* done) {
  const int64_t blocks = (dim + kThreads - 1) / kThreads;
  const int64_t batch = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const int64_t j = block * kThreads + threadIdx.x;
  if (blockIdx.x == 0 && threadIdx.x == 0) *done = 0u;

  double gap = 0.0;
  Candidate mine = {kNoCandidate, static_cast<int>(j)};
  if (j < dim) {
    Moments total;
    for (int64_t r = 0; r < cut.row_blocks; ++r) {
      const float* in = partials + (r * batches + batch) * 2 * dim;
      total = merge(total, {static_cast<float>(cut.rows_in(r)), in[j], in[dim + j]});
    }
    const View<T> z = views[batch / cut.batches];
    float* out = moments + batch * 3 * dim + j;
    out[0] = widen(z.data[batch % cut.batches * z.group + j * z.column]);
    out[dim] = total.mean;
    out[2 * dim] = total.scatter;
    gap = hinge(total.scatter, degrees, margin, eps);
    mine.key = candidate_key(total.scatter);
  }
  gap = block_sum(gap);
  if (threadIdx.x == 0) hinges[blockIdx.x] = gap;

  if (count == 0) return;
  SHARED_ARRAY(float, best_keys, kWarps * kMostDeflated);
  SHARED_ARRAY(int, best_columns, kWarps * kMostDeflated);
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  for (int k = 0; k < kMostDeflated; ++k) {
    const Candidate best = warp_largest(mine);
    if (best.column == mine.column) mine.key = kNoCandidate;
    if (lane == k) {
      best_keys[warp * kMostDeflated + k] = best.key;
      best_columns[warp * kMostDeflated + k] = best.column;
    }
  }
  __syncthreads();
  if (warp != 0) return;
  mine = {best_keys[lane], best_columns[lane]};
  for (int k = 0; k < count; ++k) {
    const Candidate best = warp_largest(mine);
    if (best.column == mine.column) mine.key = kNoCandidate;
    if (lane == k) {
      keys[(batch * blocks + block) * kMostDeflated + k] = best.key;
      key_columns[(batch * blocks + block) * kMostDeflated + k] = best.column;
    }
  }
}

// The `count` largest columns of a batch among the candidates of its blocks, by one warp.
__device__ __forceinline__ void largest_columns(const float* keys, const int* key_columns,
                                                int64_t candidates, int count,
                                                int* best_columns) {
  const int lane = threadIdx.x % kLanes;
  int chosen[kMostDeflated] = {-1, -1, -1, -1};
#pragma unroll
  for (int k = 0; k < kMostDeflated; ++k) {
    if (k >= count) break;
    Candidate mine = {kNoCandidate, 0};
    for (int64_t i = lane; i < candidates; i += kLanes) {
      if (i % kMostDeflated >= count) continue;
      const Candidate next = {keys[i], key_columns[i]};
      bool chosen_before = false;
#pragma unroll
      for (int other = 0; other < kMostDeflated; ++other) {
        chosen_before |= chosen[other] == next.column;
      }
      if (!chosen_before &&
          (next.key > mine.key || (next.key == mine.key && next.column < mine.column))) {
        mine = next;
      }
    }
    chosen[k] = warp_largest(mine).column;
    if (lane == 0) best_columns[k] = chosen[k];
  }
}

struct Deflation {
  int count;                // K, 0 on the covariance side
  int64_t candidates;       // of each batch
  const float* keys;        // [V, G, candidates]
  const int* key_columns;   // [V, G, candidates]
  float* deflated_columns;  // [V, G, K, N], centred, float32
  float* scatters;          // [row block, V, G, D]: sum over its rows of what was stored, squared
  int64_t* index;           // [V, G, K]
};

// centred = z - mean in z's dtype, the deflated columns zeroed: the operand of the products.
template <typename T, bool Vectors>
__global__ void __launch_bounds__(kThreads, 2)
    centre(Views<T> views, int64_t groups, Cut cut, const float* moments, Deflation deflation,
           T* centred) {
  constexpr int W = kColumns<T, Vectors>;
  SHARED_ARRAY(int, best_columns, kMostDeflated);
  SHARED_ARRAY(float, scatters, kThreads * W);
  const Place at = place(cut);
  const Columns<W, Vectors> columns(cut, at.tile);
  const int64_t rows = cut.rows, dim = cut.columns;
  const int warp = threadIdx.x / kLanes, count = deflation.count;
  const View<T> z = views[at.batch / groups];
  const T* base = z.data + at.batch % groups * z.group;

  unsigned deflated[W] = {};  // 1 + the place in T
  if (count > 0) {
    if (warp == 0) {
      largest_columns(deflation.keys + at.batch * deflation.candidates,
                      deflation.key_columns + at.batch * deflation.candidates,
                      deflation.candidates, count, best_columns);
    }
    __syncthreads();
    for (int k = 0; k < count; ++k) {
      const int column = best_columns[k];
#pragma unroll
      for (int w = 0; w < W; ++w) {
        if (columns[w] == column) deflated[w] = k + 1;
      }
      if (at.tile == 0 && at.row_block == 0 && threadIdx.x == 0) {
        deflation.index[at.batch * count + k] = column;
      }
    }
  }

  float first[W] = {}, mean[W] = {}, scatter[W] = {};
  load_means(moments + at.batch * 3 * dim, dim, columns, first, mean);
#pragma unroll 2
  for (int64_t n = at.row_begin + warp; n < at.row_end; n += kWarps) {
    float value[W] = {};
    load(base + n * z.row, z.column, columns, value);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      value[w] = (value[w] - first[w]) - mean[w];
      if (deflated[w] != 0u) {
        deflation.deflated_columns[(at.batch * count + deflated[w] - 1) * rows + n] = value[w];
        value[w] = 0.f;
      }
      const float stored = widen(narrow<T>(value[w]));
      scatter[w] += stored * stored;
    }
    store(centred + (at.batch * rows + n) * dim, columns, value);
  }
  if (count == 0) return;

#pragma unroll
  for (int w = 0; w < W; ++w) scatters[warp * kLanes * W + columns.slot(w)] = scatter[w];
  __syncthreads();
  for (int slot = threadIdx.x; slot < kLanes * W; slot += kThreads) {
    float total = 0.f;
    for (int i = 0; i < kWarps; ++i) total += scatters[i * kLanes * W + slot];
    if (columns.begin + slot < columns.end) {
      deflation.scatters[(at.row_block * cut.batches + at.batch) * dim + columns.begin + slot] =
          total;
    }
  }
}

}  // namespace kernels
}  // namespace vicreg
