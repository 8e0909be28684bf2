// The host's side of columns.cuh: which accesses a tensor allows, how many blocks share the work.
#pragma once

#include <algorithm>

#include "common/chunk.h"
#include "common/cuda/columns.cuh"
#include "common/tensors.h"

namespace common {

template <typename T>
View<T> view(const Tensor& z) {  // [G, N, D]
  return {static_cast<const T*>(z.const_data_ptr()), z.stride(0), z.stride(1), z.stride(2)};
}

// Elements of 16 bytes.
inline int64_t pack_elements(ScalarType dtype) { return 16 / element_bytes(dtype); }

// Whether accesses of `elements` adjacent elements, at most 16 bytes at a time, are aligned in every
// row of z and of a contiguous tensor of its shape.
inline bool aligned(const Tensor& z, int64_t elements) {
  const int64_t last = z.dim() - 1, bytes = elements * element_bytes(z.scalar_type());
  if (z.size(last) % elements != 0 || z.stride(last) != 1) return false;
  for (int64_t d = 0; d < last; ++d) {
    if (z.stride(d) % elements != 0) return false;
  }
  return reinterpret_cast<uintptr_t>(z.const_data_ptr()) % std::min<int64_t>(bytes, 16) == 0;
}

// The same of accesses of 16 bytes.
inline bool aligned(const Tensor& z) { return aligned(z, pack_elements(z.scalar_type())); }

// About `blocks` blocks over [batches, rows, columns], each of at least 32 rows; `width` columns a
// thread.
inline Cut cut(int64_t batches, int64_t row0, int64_t rows, int64_t column0, int64_t columns,
               int width, int64_t blocks) {
  const int64_t tiles = ceil_div(columns, kLanes * width);
  const int64_t wanted = std::clamp<int64_t>(blocks / (tiles * batches), 1, ceil_div(rows, 32));
  const int64_t block_rows = ceil_div(rows, wanted);
  return {batches, row0, rows, column0, columns, tiles, ceil_div(rows, block_rows), block_rows};
}

inline Cut cut(int64_t batches, const Chunk& c, int width, int64_t blocks) {
  return cut(batches, c.row, c.rows, c.column, c.columns, width, blocks);
}

inline unsigned grid(int64_t blocks) {
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "too large for one launch");
  return static_cast<unsigned>(blocks);
}

inline unsigned blocks_of(const Cut& c) { return grid(c.batches * c.row_blocks * c.tiles); }

// Blocks for `rows` warps, at least one and at most `each` a multiprocessor: 8 fit at once.
inline unsigned blocks_of_warps(int64_t rows, const Queue& queue, int each = 8) {
  return static_cast<unsigned>(
      std::clamp<int64_t>(ceil_div(rows, kWarps), 1, int64_t{each} * queue.multiprocessors()));
}

// Rows or columns of a piece of a product [across, extent] that takes about `elements` elements, or
// an eighth of the product where that is more; at least 64.
inline int64_t piece_length(int64_t elements, int64_t across, int64_t extent) {
  const int64_t all = std::max(elements, across * extent / 8);
  return std::min(extent, std::max<int64_t>(64, all / across / 64 * 64));
}

}  // namespace common
