// How a warp brings 16 tokens of a head into shared memory and results out of it.
//
// A tile is [16, D] with D the head dim rounded up to the tensor cores' 16, zeros in what is added,
// rows D + 8 elements apart: an odd multiple of 16 bytes, so that the eight rows that one matrix
// load reads fall into different banks. The lanes of a row lie side by side, 8 elements each, and
// a lane's loads of up to four rows are issued before the first is used.
#pragma once

#include "attention/problem.cuh"

namespace attention::kernels {

template <int D>
struct Tile {
  static constexpr int kStride = D + 8;
  static constexpr int kElements = kTile * kStride;
  static constexpr int kVectors = D / 8;  // of a row
  static constexpr int kRowLanes = kVectors <= 2 ? 2 : kVectors <= 4 ? 4 : kVectors <= 8 ? 8 : 16;
  static constexpr int kRowsAtOnce = kLanes / kRowLanes;
  static constexpr int kSteps = kTile / kRowsAtOnce;
  static constexpr int kBatch = kSteps < 4 ? kSteps : 4;  // steps whose loads are in flight at once

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

// A lane's vectors of kBatch steps of a tile.
template <int D>
struct Part {
  uint4 vectors[Tile<D>::kBatch];
};

// From step `step` on, the tile of tokens that begins at `from` (the lane's own vector of its first
// token): the rows whose bit is set in `valid`, zeros for the others and past the head dim.
template <typename T, int D>
__device__ __forceinline__ Part<D> read_part(const Heads<T>& heads, const T* from, int step,
                                             unsigned valid, int dim) {
  using Shape = Tile<D>;
  Part<D> part;
  valid = Shape::vector() * 8 < dim ? valid : 0u;
#pragma unroll
  for (int i = 0; i < Shape::kBatch; ++i) part.vectors[i] = {0u, 0u, 0u, 0u};
  if (heads.vectors) {
#pragma unroll
    for (int i = 0; i < Shape::kBatch; ++i) {
      const int row = Shape::row(step + i);
      if (valid >> row & 1u) {
        part.vectors[i] = __ldg(reinterpret_cast<const uint4*>(from + row * heads.token));
      }
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < Shape::kBatch; ++i) {
      const int row = Shape::row(step + i);
      if (!(valid >> row & 1u)) continue;
      const uint4 bits = read_scalars(from + row * heads.token, heads.column);
#pragma unroll
      for (int j = 0; j < Shape::kBatch; ++j) {  // an index by i would be in local memory
        if (j == i) part.vectors[j] = bits;
      }
    }
  }
  return part;
}

// The lane's own vector of a token.
template <typename T, int D>
__device__ __forceinline__ const T* lane_vector(const Heads<T>& heads, int64_t batch, int64_t head,
                                                int64_t token) {
  return heads.at(batch, head, token) + Tile<D>::vector() * 8 * heads.column;
}

template <typename T, int D>
__device__ __forceinline__ void write_part(const Part<D>& part, T* tile, int step) {
  using Shape = Tile<D>;
  if (Shape::vector() >= Shape::kVectors) return;
#pragma unroll
  for (int i = 0; i < Shape::kBatch; ++i) {
    *reinterpret_cast<uint4*>(tile + Shape::row(step + i) * Shape::kStride + Shape::vector() * 8) =
        part.vectors[i];
  }
}

// 16 tokens of a head, from `first` on (counted in the tensor, not in the sample), into a tile in
// shared memory; with a rope turned in float32 on the way. rows: of the token lane % 16.
template <typename T, int D, bool Rotated>
__device__ __forceinline__ void stage_tile(const Heads<T>& heads, int64_t batch, int64_t head,
                                           int64_t first, unsigned valid, int dim, T* tile,
                                           const Rope& rope, const Rows& rows) {
  using Shape = Tile<D>;
  const T* from = lane_vector<T, D>(heads, batch, head, first);
#pragma unroll 1
  for (int step = 0; step < Shape::kSteps; step += Shape::kBatch) {
    Part<D> part = read_part<T, D>(heads, from, step, valid, dim);
    if (Rotated && rope.table != nullptr) {
#pragma unroll
      for (int i = 0; i < Shape::kBatch; ++i) {
        Rows own;
#pragma unroll
        for (int axis = 0; axis < 3; ++axis) {
          own.row[axis] = __shfl_sync(common::kAllLanes, rows.row[axis], Shape::row(step + i));
        }
        unsigned* const pairs = &part.vectors[i].x;
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          float2 both = common::unpack<T>(pairs[pair]);
          rope.turn_pair(both.x, both.y, own, Shape::vector() * 8 + 2 * pair, false);
          pairs[pair] = common::pack<T>(both.x, both.y);
        }
      }
    }
    write_part<T, D>(part, tile, step);
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
