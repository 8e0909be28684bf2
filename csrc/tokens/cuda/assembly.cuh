// Sequence assembly: the grid order by counting, the rows in it, and the mask token's gradient.
#pragma once

#include "tokens/cuda/access.cuh"

namespace tokens {
namespace kernels {

// One sample's part of an index.
struct List {
  Indices index;
  int64_t begin, count;

  __device__ __forceinline__ int64_t operator[](int64_t i) const { return index[begin + i]; }

  // Whether no entry at `from`, `from` + kThreads, ... is less than the one before it.
  __device__ __forceinline__ bool rises(int64_t from) const {
    bool all = true;
#pragma unroll 1
    for (int64_t i = from; i < count; i += kThreads) all = all && (*this)[i - 1] <= (*this)[i];
    return all;
  }

  // How many entries lie below `position`; with `equal`, also those at it.
  __device__ __forceinline__ int64_t below(int64_t position, bool equal, bool sorted) const {
    if (!sorted) {
      int64_t lower = 0;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t own = (*this)[i];
        lower += own < position || (equal && own == position);
      }
      return lower;
    }
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2, own = (*this)[middle];
      if (own < position || (equal && own == position)) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // The place of entry i among them, equal ones by their order.
  __device__ __forceinline__ int64_t rank(int64_t i, int64_t position, bool sorted) const {
    if (sorted) return i;
    int64_t before = 0;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t own = (*this)[j];
      before += own < position || (own == position && j < i);
    }
    return before;
  }
};

__device__ __forceinline__ void put_index(const Indices& to, int64_t i, int64_t value) {
  if (to.wide) {
    static_cast<int64_t*>(const_cast<void*>(to.data))[i] = value;
  } else {
    static_cast<int*>(const_cast<void*>(to.data))[i] = static_cast<int>(value);
  }
}

struct Sequences {
  Samples context, target;  // of context_index (batch: contexts) and target_index
  Indices context_index, target_index;
  Indices order, context_rows, target_rows;
  Divider blocks;  // for each sequence
};

// Place = entries before it in its own list + entries before it in the other one, context tokens
// first where positions are equal. Sorted lists, which are what masks give, take a binary search;
// others are counted through, 2 S comparisons a token.
__global__ void __launch_bounds__(kThreads) order_tokens(Sequences q) {
  int64_t block;
  const int64_t s = q.blocks.divide(blockIdx.x, block);
  const bool packed = q.context.offsets != nullptr;
  const int64_t own = packed ? s : q.context.batch.rest(s);
  const int64_t c_begin = q.context.begin(own), t_begin = q.target.begin(s);
  const int64_t c_end = q.context.end(own), t_end = q.target.end(s);
  const List context = {q.context_index, c_begin, c_end > c_begin ? c_end - c_begin : 0};
  const List target = {q.target_index, t_begin, t_end > t_begin ? t_end - t_begin : 0};
  const int64_t all = context.count + target.count;

  // The barriers take the votes, so that no two threads write one place of shared memory.
  const bool context_sorted = __syncthreads_and(context.rises(threadIdx.x + 1));
  const bool target_sorted = __syncthreads_and(target.rises(threadIdx.x + 1));

  const int64_t base = packed ? c_begin + t_begin : 0;
  const int64_t begin = packed ? base : s * all;
  for (int64_t k = block * kThreads + threadIdx.x; k < all; k += q.blocks.by * kThreads) {
    const bool first = k < context.count;
    const int64_t i = first ? k : k - context.count;
    const int64_t position = first ? context[i] : target[i];
    const int64_t place =
        first ? context.rank(i, position, context_sorted) +
                    target.below(position, false, target_sorted)
              : target.rank(i, position, target_sorted) +
                    context.below(position, true, context_sorted);
    put_index(q.order, begin + place, position);
    if (first) {
      put_index(q.context_rows, packed ? c_begin + i : s * context.count + i, base + place);
    } else {
      put_index(q.target_rows, t_begin + i, base + place);
    }
  }
}

template <typename T>
struct Assembled {
  int64_t sequences, kept, wanted, dim, table_length;
  Divider contexts, all;  // all = kept + wanted
  const T* context;
  Place context_place;
  const float* token;  // [D], or null where every target has a row
  const T* targets;
  Place target_place;
  const float* table;  // [table_length, D], or null
  Indices context_index, context_rows, target_index, target_rows;
  T* out;
};

// A warp a token: its row, plus its position's, to its place. NaN where the position is not in the
// table; a place out of range is not written.
template <typename T, bool Vectors>
__global__ void __launch_bounds__(kThreads, 4) assemble_rows(Assembled<T> q) {
  constexpr int W = kWidth<T, Vectors>;
  const int64_t all = q.all.by;
  for (int64_t i = first_row(); i < q.sequences * all; i += row_step()) {
    int64_t k;
    const int64_t s = q.all.divide(i, k), own_context = q.contexts.rest(s);
    const bool context = k < q.kept;
    int64_t place, position, stride;
    const T* from;
    if (context) {
      place = q.context_rows[s * q.kept + k];
      position = q.context_index[own_context * q.kept + k];
      from = q.context + q.context_place(own_context, k);
      stride = q.context_place.column;
    } else {
      const int64_t row = s * q.wanted + k - q.kept;
      place = q.target_rows[row];
      position = q.target_index[row];
      from = q.targets + q.target_place(s, k - q.kept);
      stride = q.target_place.column;
    }
    const bool outside = q.table != nullptr && (position < 0 || position >= q.table_length);
    if (place < 0 || place >= all) continue;
    T* to = q.out + (s * all + place) * q.dim;
    for (int64_t c = int64_t{lane()} * W; c < q.dim; c += kLanes * W) {
      float own[W];
      if (!context && q.token != nullptr) {
        load<W>(q.token + c, own);
      } else {
        load<W>(from + c * stride, own);
      }
      if (q.table != nullptr) {
        float add[W] = {};
        if (!outside) load<W>(q.table + position * q.dim + c, add);
#pragma unroll
        for (int w = 0; w < W; ++w) own[w] = outside ? not_a_number() : own[w] + add[w];
      }
      store<W>(to + c, own);
    }
  }
}

// partials[row block, D] = the sum of a block of rows of sequence [P, S, D] that `rows` names.
template <typename T, bool Vectors>
__global__ void __launch_bounds__(kThreads)
    column_partials(const T* sequence, Place place, int64_t length, int64_t dim, int64_t count,
                    Divider each, Indices rows, Divider tiles, int64_t block_rows,
                    float* partials) {
  constexpr int W = kWidth<T, Vectors>;
  SHARED_ARRAY(float, sums, kThreads * W);
  int64_t tile;
  const int64_t block = tiles.divide(blockIdx.x, tile);
  const int64_t c = (tile * kLanes + lane()) * W;
  const int64_t end = count < (block + 1) * block_rows ? count : (block + 1) * block_rows;
  float sum[W] = {};
  for (int64_t r = block * block_rows + warp(); r < end; r += kWarps) {
    const int64_t row = rows[r];
    if (c >= dim || row < 0 || row >= length) continue;
    float own[W];
    load<W>(sequence + place(each.quotient(r), row) + c * place.column, own);
#pragma unroll
    for (int w = 0; w < W; ++w) sum[w] += own[w];
  }
#pragma unroll
  for (int w = 0; w < W; ++w) sums[threadIdx.x * W + w] = sum[w];
  common::add_warps<kLanes * W>(sums, tile * kLanes * W, dim, partials + block * dim);
}

// A thread a column.
__global__ void __launch_bounds__(kThreads)
    column_finish(const float* partials, int64_t blocks, int64_t dim, float* out) {
  const int64_t column = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (column >= dim) return;
  double total = 0.0;
  for (int64_t i = 0; i < blocks; ++i) total += partials[i * dim + column];
  out[column] = static_cast<float>(total);
}

}  // namespace kernels
}  // namespace tokens
