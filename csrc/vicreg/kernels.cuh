// The CUDA kernels of the VICReg op; cuda.cu launches them and counts their bytes and operations.
//
// A block is 8 warps. Where it works on columns, its lanes lie side by side along D and its warps
// one below the other along N; a thread keeps W = 16 bytes' worth of columns and walks down the
// rows. Where it works on a square matrix, a warp takes a row. Every sum has a fixed order: lanes,
// warps, then blocks through partial results in memory; there is no float atomic. All offsets are
// int64. Elements of NaN or Inf go through the same arithmetic as any other.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/launch.h"
#include "vicreg/formula.h"

namespace vicreg {
namespace kernels {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kLanes * kWarps;
constexpr int kTaken = static_cast<int>(kDeflatedColumns);
constexpr unsigned kAll = 0xffffffffu;

template <typename T>
constexpr int kWidth = 16 / static_cast<int>(sizeof(T));

// ------------------------------------------------------------------------------------- elements

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T narrow(float value);
template <>
__device__ __forceinline__ float narrow<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// One view: [G, N, D] of any strides.
template <typename T>
struct View {
  const T* data;
  int64_t group, row, column;
};

// y.data is null for one view.
template <typename T>
struct Views {
  View<T> view[2];
};

// ------------------------------------------------------------------------------------ work sharing

// Cuts [batches, rows, columns], which begins at row0 and column0 of each batch, into one block for
// each tile of 32 W columns and each block of rows.
struct Cut {
  int64_t batches, row0, rows, column0, columns;
  int64_t tiles, row_blocks, block_rows;
  bool vectors;  // 16-byte accesses are aligned in every tensor, and W divides D

  __host__ __device__ int64_t rows_in(int64_t block) const {
    const int64_t left = rows - block * block_rows;
    return left < block_rows ? left : block_rows;
  }
};

struct Place {
  int64_t batch, row_block, tile, row_begin, row_end;
};

__device__ __forceinline__ Place place(const Cut& cut) {
  const int64_t block = blockIdx.x, rest = block / cut.tiles;
  const int64_t row_block = rest % cut.row_blocks;
  const int64_t row_begin = cut.row0 + row_block * cut.block_rows;
  return {rest / cut.row_blocks, row_block, block % cut.tiles, row_begin,
          row_begin + cut.rows_in(row_block)};
}

// A thread's W columns: adjacent ones for vector accesses, else 32 apart, so that a warp's scalar
// accesses fall together.
template <int W>
struct Columns {
  int64_t begin, end;  // of the tile's first column; of all columns
  int slot0, step;
  bool vectors;

  __device__ __forceinline__ Columns(const Cut& cut, int64_t tile)
      : begin(cut.column0 + tile * kLanes * W),
        end(cut.column0 + cut.columns),
        slot0(static_cast<int>(threadIdx.x % kLanes) * (cut.vectors ? W : 1)),
        step(cut.vectors ? 1 : kLanes),
        vectors(cut.vectors) {}
  __device__ __forceinline__ int slot(int w) const { return slot0 + w * step; }
  __device__ __forceinline__ int64_t operator[](int w) const { return begin + slot(w); }
  __device__ __forceinline__ bool has(int w) const { return begin + slot(w) < end; }
};

template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
  T values[N];
};

// out[w] = row[column w * stride], untouched where there is no such column.
template <typename T, int W>
__device__ __forceinline__ void load(const T* row, int64_t stride, const Columns<W>& columns,
                                     float (&out)[W]) {
  if (columns.vectors) {
    if (!columns.has(0)) return;
    constexpr int N = kWidth<T>;
#pragma unroll
    for (int part = 0; part < W; part += N) {
      const auto pack = *reinterpret_cast<const Pack<T, N>*>(row + columns[part]);
#pragma unroll
      for (int w = 0; w < N; ++w) out[part + w] = widen(pack.values[w]);
    }
  } else {
#pragma unroll
    for (int w = 0; w < W; ++w) {
      if (columns.has(w)) out[w] = widen(row[columns[w] * stride]);
    }
  }
}

// The reverse, for a contiguous row.
template <typename T, int W>
__device__ __forceinline__ void store(T* row, const Columns<W>& columns, const float (&in)[W]) {
  if (columns.vectors) {
    if (!columns.has(0)) return;
    Pack<T, W> pack;
#pragma unroll
    for (int w = 0; w < W; ++w) pack.values[w] = narrow<T>(in[w]);
    *reinterpret_cast<Pack<T, W>*>(row + columns[0]) = pack;
  } else {
#pragma unroll
    for (int w = 0; w < W; ++w) {
      if (columns.has(w)) row[columns[w]] = narrow<T>(in[w]);
    }
  }
}

// ------------------------------------------------------------------------------------- reductions

__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kAll, value, offset);
  return value;
}

// The same sum in every thread of the block.
__device__ __forceinline__ double block_sum(double value) {
  SHARED_ARRAY(double, warps, kWarps);
  value = warp_sum(value);
  __syncthreads();  // the array may still be read from a sum before
  if (threadIdx.x % kLanes == 0) warps[threadIdx.x / kLanes] = value;
  __syncthreads();
  double total = 0.0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += warps[w];
  return total;
}

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
    const float key = __shfl_xor_sync(kAll, mine.key, offset);
    const int column = __shfl_xor_sync(kAll, mine.column, offset);
    if (key > mine.key || (key == mine.key && column < mine.column)) mine = {key, column};
  }
  return mine;
}

// --------------------------------------------------------------------------------------- statistics

// partials[row block, v, g, 0 or 1, D]: mean minus row 0, and scatter, of each column over the rows
// of a block; differences[block] = sum (x - y)^2. Welford's update on values less row 0: a common
// offset cancels exactly, and a large row 0 does no harm.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    column_partials(Views<T> views, Cut cut, int64_t dim, float* partials, double* differences) {
  constexpr int W = kWidth<T>;
  SHARED_ARRAY(float, means, kThreads * W);
  SHARED_ARRAY(float, scatters, kThreads * W);
  const Place at = place(cut);
  const Columns<W> columns(cut, at.tile);
  const int warp = threadIdx.x / kLanes;

  float shift[V][W] = {}, mean[V][W] = {}, scatter[V][W] = {};
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const View<T>& z = views.view[v];
    load(z.data + at.batch * z.group, z.column, columns, shift[v]);
  }
  double difference = 0.0;
  float count = 0.f;
#pragma unroll 2
  for (int64_t n = at.row_begin + warp; n < at.row_end; n += kWarps) {
    float value[V][W] = {};
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const View<T>& z = views.view[v];
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

// The second stage, a thread a column: moments[v, g, 0 or 1, D]; hinges[block]; and of each block
// the `take` columns of largest scatter, keys and key_columns [v, g, block of columns, K].
template <typename T>
__global__ void __launch_bounds__(kThreads)
    column_finish(Views<T> views, Cut cut, int64_t batches, int64_t dim, int take, float degrees,
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
    const View<T>& z = views.view[batch / cut.batches];
    const float shift = widen(z.data[batch % cut.batches * z.group + j * z.column]);
    moments[batch * 2 * dim + j] = shift + total.mean;
    moments[batch * 2 * dim + dim + j] = total.scatter;
    gap = hinge(total.scatter, degrees, margin, eps);
    mine.key = candidate_key(total.scatter);
  }
  gap = block_sum(gap);
  if (threadIdx.x == 0) hinges[blockIdx.x] = gap;

  if (take == 0) return;
  SHARED_ARRAY(float, best_keys, kWarps * kTaken);
  SHARED_ARRAY(int, best_columns, kWarps * kTaken);
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  for (int k = 0; k < kTaken; ++k) {
    const Candidate best = warp_largest(mine);
    if (best.column == mine.column) mine.key = kNoCandidate;
    if (lane == k) {
      best_keys[warp * kTaken + k] = best.key;
      best_columns[warp * kTaken + k] = best.column;
    }
  }
  __syncthreads();
  if (warp != 0) return;
  mine = {best_keys[lane], best_columns[lane]};
  for (int k = 0; k < take; ++k) {
    const Candidate best = warp_largest(mine);
    if (best.column == mine.column) mine.key = kNoCandidate;
    if (lane == k) {
      keys[(batch * blocks + block) * kTaken + k] = best.key;
      key_columns[(batch * blocks + block) * kTaken + k] = best.column;
    }
  }
}

// The `take` largest columns of a batch among the candidates of its blocks, by one warp.
__device__ __forceinline__ void largest_columns(const float* keys, const int* key_columns,
                                                int64_t count, int take, int* best_columns) {
  const int lane = threadIdx.x % kLanes;
  int chosen[kTaken] = {-1, -1, -1, -1};
#pragma unroll
  for (int k = 0; k < kTaken; ++k) {
    if (k >= take) break;
    Candidate mine = {kNoCandidate, 0};
    for (int64_t i = lane; i < count; i += kLanes) {
      if (i % kTaken >= take) continue;
      const Candidate next = {keys[i], key_columns[i]};
      bool taken = false;
#pragma unroll
      for (int other = 0; other < kTaken; ++other) taken |= chosen[other] == next.column;
      if (!taken && (next.key > mine.key || (next.key == mine.key && next.column < mine.column))) {
        mine = next;
      }
    }
    chosen[k] = warp_largest(mine).column;
    if (lane == 0) best_columns[k] = chosen[k];
  }
}

// ------------------------------------------------------------------------------------------ centring

struct Deflation {
  int take;                // K, 0 on the covariance side
  int64_t candidates;      // of each batch
  const float* keys;       // [V, G, candidates]
  const int* key_columns;  // [V, G, candidates]
  float* taken;            // [V, G, K, N]: the deflated columns, centred, float32
  float* scatters;         // [row block, V, G, D]: sum over its rows of what was stored, squared
  int64_t* index;          // [V, G, K]
};

// centred = z - mean in z's dtype, the deflated columns zeroed: the operand of the products.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    centre(Views<T> views, int64_t groups, Cut cut, const float* moments, Deflation deflation,
           T* centred) {
  constexpr int W = kWidth<T>;
  SHARED_ARRAY(int, best_columns, kTaken);
  SHARED_ARRAY(float, scatters, kThreads * W);
  const Place at = place(cut);
  const Columns<W> columns(cut, at.tile);
  const int64_t rows = cut.rows, dim = cut.columns;
  const int warp = threadIdx.x / kLanes, take = deflation.take;
  const View<T>& z = views.view[at.batch / groups];
  const T* base = z.data + at.batch % groups * z.group;

  unsigned deflated[W] = {};  // 1 + the place in T
  if (take > 0) {
    if (warp == 0) {
      largest_columns(deflation.keys + at.batch * deflation.candidates,
                      deflation.key_columns + at.batch * deflation.candidates,
                      deflation.candidates, take, best_columns);
    }
    __syncthreads();
    for (int k = 0; k < take; ++k) {
      const int column = best_columns[k];
#pragma unroll
      for (int w = 0; w < W; ++w) {
        if (columns[w] == column) deflated[w] = k + 1;
      }
      if (at.tile == 0 && at.row_block == 0 && threadIdx.x == 0) {
        deflation.index[at.batch * take + k] = column;
      }
    }
  }

  float mean[W] = {}, scatter[W] = {};
  load(moments + at.batch * 2 * dim, 1, columns, mean);
#pragma unroll 2
  for (int64_t n = at.row_begin + warp; n < at.row_end; n += kWarps) {
    float value[W] = {};
    load(base + n * z.row, z.column, columns, value);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      value[w] -= mean[w];
      if (deflated[w] != 0u) {
        deflation.taken[(at.batch * take + deflated[w] - 1) * rows + n] = value[w];
        value[w] = 0.f;
      }
      const float stored = widen(narrow<T>(value[w]));
      scatter[w] += stored * stored;
    }
    store(centred + (at.batch * rows + n) * dim, columns, value);
  }
  if (take == 0) return;

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

// -------------------------------------------------------------------------------- the square matrix

struct Finish {
  const double* partials[3];  // of the invariance, the hinge, the squares
  int64_t counts[3];
  double factors[3];  // from the sums to the terms
  double weights[3];
  unsigned* done;  // blocks that are through, 0 at the launch
  float* terms;
};

// The last block to come here adds the partial sums of all blocks up to the four terms, in an order
// that does not depend on which block that is. Returns after a barrier of the whole block.
__device__ __forceinline__ void finish_terms(double sum, double* sums, const Finish& finish) {
  SHARED_ARRAY(unsigned, before, 1);
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
    __threadfence();
    before[0] = atomicAdd(finish.done, 1u);
  }
  __syncthreads();
  if (before[0] != gridDim.x - 1) return;
  __threadfence();
  double totals[3];
  for (int i = 0; i < 3; ++i) {
    double total = 0.0;
    for (int64_t p = threadIdx.x; p < finish.counts[i]; p += kThreads) {
      total += __ldcg(finish.partials[i] + p);  // past L1, which other blocks do not write to
    }
    totals[i] = block_sum(total);
  }
  if (threadIdx.x != 0) return;
  double loss = 0.0;
  for (int i = 0; i < 3; ++i) {
    const double term = finish.factors[i] * totals[i];
    finish.terms[i + 1] = static_cast<float>(term);
    loss += finish.weights[i] * term;
  }
  finish.terms[0] = static_cast<float>(loss);
}

// N < D. squares [V, G, N, N] holds Kr and becomes the whole Gram matrix; deflated [V, G, K, N] is
// filled; a warp takes a row of Kr, and its share of the columns whose squared scatters come off.
__global__ void __launch_bounds__(kThreads)
    gram_rows(int64_t batches, int64_t rows, int64_t dim, int64_t row_blocks, Deflation deflation,
              float* squares, float* deflated, double* sums, Finish finish) {
  const int lane = threadIdx.x % kLanes, take = deflation.take;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  double sum = 0.0;
  for (int64_t at = warp; at < batches * rows; at += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t batch = at / rows, n = at % rows;
    const float* z = deflation.taken + batch * take * rows;
    const int64_t* index = deflation.index + batch * take;
    float* row = squares + at * rows;
    float own[kTaken] = {}, product[kTaken] = {}, pair[kTaken][kTaken] = {}, square = 0.f;
    for (int k = 0; k < take; ++k) own[k] = z[k * rows + n];
    for (int64_t m = lane; m < rows; m += kLanes) {
      const float value = row[m];
      float whole = value, other[kTaken] = {};
#pragma unroll
      for (int k = 0; k < kTaken; ++k) {
        if (k >= take) break;
        other[k] = z[k * rows + m];
        product[k] += value * other[k];
        whole += own[k] * other[k];
#pragma unroll
        for (int i = 0; i < k; ++i) pair[i][k] += other[i] * other[k];
      }
      square += value * value;
      row[m] = whole;
    }
    sum += square;

    double products[kTaken], pairs[kTaken][kTaken];
#pragma unroll
    for (int k = 0; k < kTaken; ++k) {
      products[k] = warp_sum(product[k]);
#pragma unroll
      for (int i = 0; i < k; ++i) pairs[i][k] = pairs[k][i] = warp_sum(pair[i][k]);
    }
    if (lane == 0) {
#pragma unroll
      for (int k = 0; k < kTaken; ++k) {
        if (k >= take) break;
        double gradient = products[k];
#pragma unroll
        for (int i = 0; i < kTaken; ++i) {
          if (i == k) continue;
          gradient += pairs[i][k] * own[i];
          if (n == 0) sum += pairs[i][k] * pairs[i][k];
        }
        sum += 2.0 * own[k] * products[k];
        deflated[(batch * take + k) * rows + n] = static_cast<float>(gradient);
      }
    }

    const int64_t end = (n + 1) * dim / rows;
    for (int64_t j = n * dim / rows + lane; j < end; j += kLanes) {
      bool taken = false;
      for (int k = 0; k < take; ++k) taken |= index[k] == j;
      if (taken) continue;
      float scatter = 0.f;
      for (int64_t r = 0; r < row_blocks; ++r) {
        scatter += deflation.scatters[(r * batches + batch) * dim + j];
      }
      sum -= static_cast<double>(scatter) * scatter;
    }
  }
  finish_terms(sum, sums, finish);
}

// N >= D. Zeroes the diagonal of squares [V, G, D, D] and sums the rest; a warp takes a row.
__global__ void __launch_bounds__(kThreads)
    covariance_rows(int64_t batches, int64_t dim, float* squares, double* sums, Finish finish) {
  const int lane = threadIdx.x % kLanes;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  double sum = 0.0;
  for (int64_t at = warp; at < batches * dim; at += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t i = at % dim;
    float* row = squares + at * dim;
    float square = 0.f;
#pragma unroll 4
    for (int64_t j = lane; j < dim; j += kLanes) {
      const float value = j == i ? 0.f : row[j];
      square += value * value;
    }
    if (i % kLanes == lane) row[i] = 0.f;
    sum += square;
  }
  finish_terms(sum, sums, finish);
}

// ------------------------------------------------------------------------------------------ gradient

// rounded [rows, length] = squares in a half dtype, each row divided by the power of two that brings
// its largest element to [1/2, 1], which goes to powers [rows]: float16 neither over- nor underflows.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    round_rows(int64_t rows, int64_t length, const float* squares, T* rounded, float* powers) {
  const int lane = threadIdx.x % kLanes;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  for (int64_t at = warp; at < rows; at += static_cast<int64_t>(gridDim.x) * kWarps) {
    const float* row = squares + at * length;
    float largest = 0.f;
    for (int64_t j = lane; j < length; j += kLanes) largest = fmaxf(largest, fabsf(row[j]));
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, offset));
    }
    int exponent = 0;
    if (largest > 0.f && largest <= 3.4e38f) frexpf(largest, &exponent);
    exponent = max(-126, min(126, exponent));
    const float down = ldexpf(1.f, -exponent);
    for (int64_t j = lane; j < length; j += kLanes) {
      rounded[at * length + j] = narrow<T>(row[j] * down);
    }
    if (lane == 0) powers[at] = ldexpf(1.f, exponent);
  }
}

// The product of the squares and the centred values, for the rows and columns of a Cut: float32,
// element (0, 0) of the cut first. For float inputs it is the gradient's own memory.
struct Product {
  const float* data;
  int64_t group, row;
  const float* powers;  // [G, side] that multiply its rows (N < D) or columns; null for float inputs
};

template <typename T>
struct Gradient {
  const float* grads;  // the gradient of the loss, or of the four terms
  int64_t grad_count, grad_stride;
  float scales[3], weights[3];
  float degrees, margin, eps;
  int64_t groups, rows, dim;
  int take;
  const float* moments;   // [V, G, 2, D]
  const float* deflated;  // [V, G, K, N]
  const int64_t* index;   // [V, G, K]
  Product product[2];
  T* out[2];  // [G, N, D]; null where not wanted
};

// Both gradients in one read of both views; everything but the product is recomputed from them.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    gradient_rows(Views<T> views, Cut cut, Gradient<T> g) {
  constexpr int W = kWidth<T>;
  const Place at = place(cut);
  const Columns<W> columns(cut, at.tile);
  const bool gram = g.rows < g.dim, pair = views.view[1].data != nullptr;

  float grads[4] = {};
  for (int64_t i = 0; i < g.grad_count; ++i) grads[i] = g.grads[i * g.grad_stride];
  const float groups = static_cast<float>(g.groups), all = groups * static_cast<float>(g.dim);
  const Coefficients a = coefficients(grads, g.grad_count, g.scales, g.weights, groups, all,
                                      all * static_cast<float>(g.rows), g.degrees);

  float mean[2][W] = {}, factor[2][W] = {};
  unsigned deflated[2] = {};  // 4 bits a column: 1 + the place in T
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    if (g.out[v] == nullptr) continue;
    const int64_t batch = v * g.groups + at.batch;
    const float* moments = g.moments + batch * 2 * g.dim;
    load(moments, 1, columns, mean[v]);
    load(moments + g.dim, 1, columns, factor[v]);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      for (int k = 0; k < g.take; ++k) {
        if (g.index[batch * g.take + k] == columns[w]) deflated[v] |= (k + 1u) << (4 * w);
      }
      const bool subtract = gram && (deflated[v] >> (4 * w) & 15u) == 0u;
      factor[v][w] = column_factor(a, hinge_slope(factor[v][w], g.degrees, g.margin, g.eps),
                                   subtract ? factor[v][w] : 0.f);
    }
  }

#pragma unroll 1
  for (int64_t n = at.row_begin + threadIdx.x / kLanes; n < at.row_end; n += kWarps) {
    float value[2][W] = {};
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const View<T>& z = views.view[v];
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
          result[w] = g.deflated[((v * g.groups + at.batch) * g.take + k - 1) * g.rows + n];
        }
      }
#pragma unroll
      for (int w = 0; w < W; ++w) {
        const float difference = pair ? value[v][w] - value[1 - v][w] : 0.f;
        result[w] = gradient(a, result[w], factor[v][w], value[v][w] - mean[v][w], difference);
      }
      store(g.out[v] + (at.batch * g.rows + n) * g.dim, columns, result);
    }
  }
}

}  // namespace kernels
}  // namespace vicreg
