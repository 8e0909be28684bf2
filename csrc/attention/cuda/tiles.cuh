// How a warp brings 16 tokens of a head into shared memory and results out of it.
//
// A tile is [16, D] with D the head dim rounded up to the tensor cores' 16, zeros in what is added,
// rows D + 8 elements apart: an odd multiple of 16 bytes, so that the eight rows that one matrix
// load reads fall into different banks. The lanes of a row lie side by side, 8 elements each; a row
// of the tensor is copied asynchronously where its vectors are aligned, and turned where it lies.
#pragma once

#include "attention/cuda/problem.cuh"
#include "common/cuda/async.cuh"

namespace attention::kernels {

template <int D>
struct Tile {
  static constexpr int kStride = D + 8;
  static constexpr int kElements = kTile * kStride;
  static constexpr int kVectors = D / 8;  // of a row
  static constexpr int kRowLanes = kVectors <= 2 ? 2 : kVectors <= 4 ? 4 : kVectors <= 8 ? 8 : 16;
  static constexpr int kRowsAtOnce = kLanes / kRowLanes;
  static constexpr int kSteps = kTile / kRowsAtOnce;

  // The row of a lane in a step, and its vector in that row (which a lane past the row lacks).
  __device__ __forceinline__ static int row(int step) {
    return step * kRowsAtOnce + static_cast<int>(threadIdx.x) % kLanes / kRowLanes;
  }
  __device__ __forceinline__ static int vector() {
    return static_cast<int>(threadIdx.x) % kRowLanes;
  }
};

// 8 elements of a row, one by one.
template <typename T>
__device__ __forceinline__ uint4 read_scalars(const T* from, int64_t stride) {
  T values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = from[i * stride];
  uint4 bits;
  memcpy(&bits, values, sizeof bits);
  return bits;
}

// The lane's own vector of a token.
template <typename T, int D>
__device__ __forceinline__ const T* lane_vector(const Heads<T>& heads, int64_t batch, int64_t head,
                                                int64_t token) {
  return heads.at(batch, head, token) + Tile<D>::vector() * 8 * heads.column;
}

// Starts to bring 16 tokens of a head, from `first` on (counted in the tensor, not in the sample),
// into a tile: those whose bit is set in `valid`, zeros for the others and past the head dim.
// common::wait_for_copies ends it for what the lane itself brought.
template <typename T, int D>
__device__ __forceinline__ void fetch_tile(const Heads<T>& heads, int64_t batch, int64_t head,
                                           int64_t first, unsigned valid, int dim, T* tile) {
  using Shape = Tile<D>;
  const int vector = Shape::vector();
  if (vector >= Shape::kVectors) return;
  valid = vector * 8 < dim ? valid : 0u;
  const T* const from = lane_vector<T, D>(heads, batch, head, first);
#pragma unroll 1
  for (int step = 0; step < Shape::kSteps; ++step) {
    const int row = Shape::row(step);
    const bool there = (valid >> row & 1u) != 0u;
    T* const to = tile + row * Shape::kStride + vector * 8;
    const T* const at = from + (there ? row * heads.token : 0);
    if (heads.vectors) {
      common::copy_async(to, at, there);
    } else {
      const uint4 zeros = {0u, 0u, 0u, 0u};
      *reinterpret_cast<uint4*>(to) = there ? read_scalars(at, heads.column) : zeros;
    }
  }
}

// Turns the vectors that the lane itself brought into a tile, in float32. rows: of the token
// lane % 16. Nothing without a rope.
template <typename T, int D>
__device__ __forceinline__ void rotate_tile(T* tile, const Rope& rope, const Rows& rows) {
  using Shape = Tile<D>;
  if (rope.table == nullptr) return;
  const int vector = Shape::vector();
#pragma unroll 1
  for (int step = 0; step < Shape::kSteps; ++step) {
    const int row = Shape::row(step);
    Rows own;
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      own.row[axis] = __shfl_sync(common::kAllLanes, rows.row[axis], row);
    }
    if (vector >= Shape::kVectors) continue;
    T* const at = tile + row * Shape::kStride + vector * 8;
#pragma unroll 1  // two pairs at a time: the sums of the backward need the registers
    for (int half = 0; half < 8; half += 4) {
      const auto turned = [&](unsigned pair, int column) {
        float2 both = common::unpack<T>(pair);
        rope.turn_pair(both.x, both.y, own, column, false);
        return common::pack<T>(both.x, both.y);
      };
      const uint2 bits = *reinterpret_cast<const uint2*>(at + half);
      *reinterpret_cast<uint2*>(at + half) = {turned(bits.x, vector * 8 + half),
                                              turned(bits.y, vector * 8 + half + 2)};
    }
  }
}

// Changes the sign of the vectors that the lane itself brought into a tile.
template <typename T, int D>
__device__ __forceinline__ void negate_tile(T* tile) {
  using Shape = Tile<D>;
  if (Shape::vector() >= Shape::kVectors) return;
#pragma unroll 1
  for (int step = 0; step < Shape::kSteps; ++step) {
    uint4* const at = reinterpret_cast<uint4*>(tile + Shape::row(step) * Shape::kStride +
                                               Shape::vector() * 8);
    constexpr unsigned kSigns = 0x80008000u;
    *at = {at->x ^ kSigns, at->y ^ kSigns, at->z ^ kSigns, at->w ^ kSigns};
  }
}

// Rows [0, count) of a tile to `to`, whose tokens lie `stride` elements apart and are contiguous.
template <typename T, int D>
__device__ __forceinline__ void copy_out(const T* tile, T* to, int64_t stride, int count, int dim) {
  using Shape = Tile<D>;
  const int column = Shape::vector() * 8;
#pragma unroll
  for (int step = 0; step < Shape::kSteps; ++step) {
    const int row = Shape::row(step);
    if (column < dim && row < count) {
      const uint4 bits = *reinterpret_cast<const uint4*>(tile + row * Shape::kStride + column);
      __stwb(reinterpret_cast<uint4*>(to + row * stride + column), bits);
    }
  }
}

// Two products' results, rows g and g + 8 of `left` and `right` side by side, into a tile.
template <typename T>
__device__ __forceinline__ void write_pair(T* tile, int stride, const float (&product)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes, g = lane / 4, t = lane % 4;
  *reinterpret_cast<uint32_t*>(tile + g * stride + 2 * t) = common::pack<T>(product[0], product[1]);
  *reinterpret_cast<uint32_t*>(tile + (g + 8) * stride + 2 * t) =
      common::pack<T>(product[2], product[3]);
}

}  // namespace attention::kernels
