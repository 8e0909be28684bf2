// Gather and scatter of token rows.
//
// Gather moves each kept row once. Scatter first finds which rows name each token, with integer
// minima and maxima, whose result does not depend on their order; each row of the result then has
// one owner, which fills it, copies one row into it, or adds up several in ascending order.
#pragma once

#include "tokens/cuda/access.cuh"

namespace tokens {
namespace kernels {

template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    gather_rows(const Unit* x, Place place, int64_t length, int64_t columns, Samples rows,
                Indices index, Unit* out) {
  for (int64_t r = first_row(); r < rows.count; r += row_step()) {
    const int64_t token = index[r];
    Unit* to = out + r * columns;
    if (token < 0 || token >= length) {
      fill_row(ones<Unit>(), columns, to);
    } else {
      copy_row(x + place(rows.of(r), token), place.column, columns, to);
    }
  }
}

// The first and the last row that name each token of each sample, -1 and -1 where none does.
struct TokenMap {
  int* first;
  int* last;
};

constexpr int kNoRow = 0x7fffffff;

// A block a sample. An index out of range names no token.
__global__ void __launch_bounds__(kThreads)
    map_tokens(Samples rows, Indices index, int64_t length, TokenMap map) {
  const int64_t sample = blockIdx.x;
  int* first = map.first + sample * length;
  int* last = map.last + sample * length;
  for (int64_t t = threadIdx.x; t < length; t += kThreads) {
    first[t] = kNoRow;
    last[t] = -1;
  }
  __syncthreads();
  for (int64_t r = rows.begin(sample) + threadIdx.x; r < rows.end(sample); r += kThreads) {
    const int64_t token = index[r];
    if (token < 0 || token >= length) continue;
    atomicMin(first + token, static_cast<int>(r));
    atomicMax(last + token, static_cast<int>(r));
  }
}

// out[slot] = the last row that names it, or `fill`.
template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    scatter_rows(const Unit* rows, Place place, int64_t slots, int64_t columns, const int* last,
                 Unit fill, Unit* out) {
  for (int64_t slot = first_row(); slot < slots; slot += row_step()) {
    const int row = last[slot];
    Unit* to = out + slot * columns;
    if (row < 0) {
      fill_row(fill, columns, to);
    } else {
      copy_row(rows + place(row), place.column, columns, to);
    }
  }
}

// out[slot] = the sum of the rows that name it; over `samples` samples where slots are tokens of all
// of them. Rows between the first and the last are asked only where a token repeats.
template <typename T, bool Vectors>
__global__ void __launch_bounds__(kThreads, 4)  // without the 4, ptxas spills to keep 32 registers
    scatter_sums(const T* rows, Place place, int64_t slots, Divider length, int64_t samples,
                 int64_t columns, Indices index, TokenMap map, T* out) {
  constexpr int W = kWidth<T, Vectors>;
  for (int64_t slot = first_row(); slot < slots; slot += row_step()) {
    const int64_t token = length.rest(slot);
    for (int64_t c = int64_t{lane()} * W; c < columns; c += kLanes * W) {
      float sum[W] = {};
      for (int64_t s = 0; s < samples; ++s) {
        const int first = map.first[s * length.by + slot], last = map.last[s * length.by + slot];
        for (int64_t r = first; r <= last; ++r) {
          if (r != first && r != last && index[r] != token) continue;
          float own[W];
          load<W>(rows + place(r) + c * place.column, own);
#pragma unroll
          for (int w = 0; w < W; ++w) sum[w] += own[w];
        }
      }
      store<W>(out + slot * columns + c, sum);
    }
  }
}

}  // namespace kernels
}  // namespace tokens
