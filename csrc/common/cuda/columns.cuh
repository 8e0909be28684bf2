// How a CUDA kernel shares out a [G, N, D] tensor of any strides, and how it adds up.
//
// A block is 8 warps. Where it works on columns, its lanes lie side by side along D and its warps
// one below the other along N; a thread keeps a few columns and walks down the rows. Every sum has
// a fixed order: lanes, warps, then blocks through partial results in memory; there is no float
// atomic. All offsets are int64.
#pragma once

#include "common/cuda/pieces.cuh"

namespace common {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kLanes * kWarps;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane() { return threadIdx.x % kLanes; }
__device__ __forceinline__ int warp() { return threadIdx.x / kLanes; }

// Where a warp takes whole rows, one after the other: its first one, and how far the next lies.
__device__ __forceinline__ int64_t first_row() { return int64_t{blockIdx.x} * kWarps + warp(); }
__device__ __forceinline__ int64_t row_step() { return int64_t{gridDim.x} * kWarps; }

// One view: [G, N, D] of any strides.
template <typename T>
struct View {
  const T* data;
  int64_t group, row, column;
};

// y.data is null for one view.
template <typename T>
struct Views {
  View<T> x, y;

  // Field by field: an index would put the whole into local memory.
  __device__ __forceinline__ View<T> operator[](int64_t v) const {
    return v == 0 ? View<T>{x.data, x.group, x.row, x.column}
                  : View<T>{y.data, y.group, y.row, y.column};
  }
};

// Cuts [batches, rows, columns], which begins at row0 and column0 of each batch, into one block for
// each tile of 32 W columns and each block of rows.
struct Cut {
  int64_t batches, row0, rows, column0, columns;
  int64_t tiles, row_blocks, block_rows;

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

// Columns that a thread keeps: 16 bytes' worth where 16-byte accesses are aligned in every tensor
// and W divides D, else 4.
template <typename T, bool Vectors>
constexpr int kColumns = Vectors ? 16 / static_cast<int>(sizeof(T)) : 4;

// The same in the gradient of two views, for half inputs too, although their accesses are of 8 bytes
// then: 8 columns of two views spill.
constexpr int kGradientColumns = 4;

// Which they are: adjacent ones for vector accesses, else 32 apart, so that a warp's scalar
// accesses fall together.
template <int W, bool Vectors>
struct Columns {
  int64_t begin, end;  // the tile's first column; past the last of all columns

  __device__ __forceinline__ Columns(const Cut& cut, int64_t tile)
      : begin(cut.column0 + tile * kLanes * W), end(cut.column0 + cut.columns) {}
  __device__ __forceinline__ static int slot(int w) {
    return Vectors ? lane() * W + w : lane() + w * kLanes;
  }
  __device__ __forceinline__ int64_t operator[](int w) const { return begin + slot(w); }
  __device__ __forceinline__ bool has(int w) const { return begin + slot(w) < end; }
};

// out[w] = row[column w * stride], untouched where there is no such column.
template <typename T, int W, bool Vectors>
__device__ __forceinline__ void load(const T* row, int64_t stride,
                                     const Columns<W, Vectors>& columns, float (&out)[W]) {
  if constexpr (Vectors) {
    if (!columns.has(0)) return;
    constexpr int N = pieces::kPart<W, T>;
#pragma unroll
    for (int part = 0; part < W; part += N) {
      const auto pack = Pack<T, N>::read(row + columns[part]);
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
template <typename T, int W, bool Vectors>
__device__ __forceinline__ void store(T* row, const Columns<W, Vectors>& columns,
                                      const float (&in)[W]) {
  if constexpr (Vectors) {
    if (!columns.has(0)) return;
    Pack<T, W> pack;
#pragma unroll
    for (int w = 0; w < W; ++w) pack.values[w] = narrow<T>(in[w]);
    pack.write(row + columns[0]);
  } else {
#pragma unroll
    for (int w = 0; w < W; ++w) {
      if (columns.has(w)) row[columns[w]] = narrow<T>(in[w]);
    }
  }
}

// The mean of each column in two parts, row 0 and the rest, because rounding their sum where the
// common offset is large would shift every centred value; moments [2 or more, D] begin with them.
template <int W, bool Vectors>
__device__ __forceinline__ void load_means(const float* moments, int64_t dim,
                                           const Columns<W, Vectors>& columns, float (&first)[W],
                                           float (&rest)[W]) {
  load(moments, 1, columns, first);
  load(moments + dim, 1, columns, rest);
}

// Makes one of both for half values, whose bits leave no room for an offset that the second would
// serve.
template <typename T>
__device__ __forceinline__ void join_means(float& first, float& rest) {
  if (sizeof(T) == 2) {
    rest += first;
    first = 0.f;
  }
}

// out[first + slot] = the sum over the block's warps of shared[kWarps, Slots], before `end`. Begins
// with a barrier of the whole block.
template <int Slots>
__device__ __forceinline__ void add_warps(const float* shared, int64_t first, int64_t end,
                                          float* out) {
  __syncthreads();
  for (int slot = threadIdx.x; slot < Slots; slot += kThreads) {
    float total = 0.f;
    for (int i = 0; i < kWarps; ++i) total += shared[i * Slots + slot];
    if (first + slot < end) out[first + slot] = total;
  }
}

__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// The same sum in every thread of the block.
__device__ __forceinline__ double block_sum(double value) {
  SHARED_ARRAY(double, warps, kWarps);
  value = warp_sum(value);
  __syncthreads();  // the array may still be read from a sum before
  if (lane() == 0) warps[warp()] = value;
  __syncthreads();
  double total = 0.0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += warps[w];
  return total;
}

// The sum of partial sums of earlier or other blocks, the same in every thread of the block.
__device__ __forceinline__ double sum_of(const double* partials, int64_t count) {
  double total = 0.0;
  for (int64_t p = threadIdx.x; p < count; p += kThreads) {
    total += __ldcg(partials + p);  // past L1, which other blocks do not write to
  }
  return block_sum(total);
}

// Stores the block's sum; true in the block that is the last to come here, which then sees those of
// all. done: blocks that are through, 0 at the launch. Returns after a barrier of the whole block.
__device__ __forceinline__ bool last_block(double sum, double* sums, unsigned* done) {
  SHARED_ARRAY(unsigned, before, 1);
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
    __threadfence();
    before[0] = atomicAdd(done, 1u);
  }
  __syncthreads();
  if (before[0] != gridDim.x - 1) return false;
  __threadfence();
  return true;
}

}  // namespace common
