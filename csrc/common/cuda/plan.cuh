// The host's side of columns.cuh: which accesses a tensor allows, how many blocks share the work.
#pragma once

#include <algorithm>

#include "common/cuda/columns.cuh"
#include "common/tensors.h"

namespace common {

template <typename T>
View<T> view(const Tensor& z) {  // [G, N, D]
  return {static_cast<const T*>(z.const_data_ptr()), z.stride(0), z.stride(1), z.stride(2)};
}

// Whether 16-byte accesses are aligned in every row of a view and in contiguous rows of `dim`.
template <typename T>
bool aligned(int64_t dim, const View<T>& z) {
  constexpr int64_t kElements = 16 / static_cast<int64_t>(sizeof(T));
  return dim % kElements == 0 && z.column == 1 && z.row % kElements == 0 &&
         z.group % kElements == 0 && reinterpret_cast<uintptr_t>(z.data) % 16 == 0;
}

// About `blocks` blocks over [batches, rows, columns], each of at least 32 rows; `width` columns a
// thread.
inline Cut cut(int64_t batches, int64_t row0, int64_t rows, int64_t column0, int64_t columns,
               int width, int64_t blocks) {
  const int64_t tiles = ceil_div(columns, kLanes * width);
  const int64_t wanted = std::clamp<int64_t>(blocks / (tiles * batches), 1, ceil_div(rows, 32));
  const int64_t block_rows = ceil_div(rows, wanted);
  return {batches, row0, rows, column0, columns, tiles, ceil_div(rows, block_rows), block_rows};
}

inline unsigned blocks_of(const Cut& c) {
  const int64_t blocks = c.batches * c.row_blocks * c.tiles;
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "too large for one launch");
  return static_cast<unsigned>(blocks);
}

// Blocks for `rows` warps, no more than fit on the device at once.
inline unsigned blocks_of_warps(int64_t rows, const Queue& queue) {
  return static_cast<unsigned>(
      std::min<int64_t>(ceil_div(rows, kWarps), 8 * queue.multiprocessors()));
}

}  // namespace common
