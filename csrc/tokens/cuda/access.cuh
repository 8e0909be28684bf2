// How the CUDA kernels share out rows and reach their elements.
//
// A block is 8 warps and a warp takes whole rows, one after the other; its lanes lie side by side
// along D, W elements each: 16 bytes' worth where every row is aligned for it, else one.
#pragma once

#include "common/cuda/columns.cuh"
#include "tokens/index.h"

namespace tokens {
namespace kernels {

using common::first_row, common::lane, common::row_step, common::warp, common::warp_sum;
using common::kLanes, common::kThreads, common::kWarps;
using common::pieces::kWidth, common::pieces::load, common::pieces::store;

__device__ __forceinline__ float not_a_number() {
  const unsigned bits = 0x7fffffffu;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Bits that move as they are: 16 bytes, 4 or 2; all ones is a NaN of every dtype.
template <typename Unit>
__device__ __forceinline__ Unit ones() {
  if constexpr (sizeof(Unit) == 16) {
    return Unit{~0u, ~0u, ~0u, ~0u};
  } else {
    return static_cast<Unit>(~Unit{0});
  }
}

template <typename Unit>
__device__ __forceinline__ void put(Unit* to, const Unit& value) {
  if constexpr (sizeof(Unit) == 16) {
    __stwb(to, value);
  } else {
    *to = value;
  }
}

// Copies a row of `columns` units, `stride` apart; four loads are under way at once.
template <typename Unit>
__device__ __forceinline__ void copy_row(const Unit* from, int64_t stride, int64_t columns,
                                         Unit* to) {
  for (int64_t c = lane(); c < columns; c += 4 * kLanes) {
    Unit kept[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (c + i * kLanes < columns) kept[i] = from[(c + i * kLanes) * stride];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (c + i * kLanes < columns) put(to + c + i * kLanes, kept[i]);
    }
  }
}

template <typename Unit>
__device__ __forceinline__ void fill_row(const Unit& value, int64_t columns, Unit* to) {
  for (int64_t c = lane(); c < columns; c += kLanes) put(to + c, value);
}

}  // namespace kernels
}  // namespace tokens
