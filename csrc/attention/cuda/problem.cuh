// What the kernels of the attention op are told: tensors, rules, rotary position; and the one
// (sample, head) that a block works on. All of it is read on the device.
#pragma once

#include "attention/formula.h"
#include "common/cuda/columns.cuh"
#include "common/cuda/mma.cuh"

namespace attention::kernels {

using common::kLanes;

// Tokens of a product's tile, the tensor cores' rows; a warp works on one tile at a time.
constexpr int kTile = 16;
constexpr int kMostWarps = 8;

// A kernel is launched with at most kMostWarps * kLanes threads; __launch_bounds__ is given more
// where a thread is to have 168 registers, so that 12 warps fit on a multiprocessor, not 8.
constexpr int kThreads168 = 384;

// [B, H, T, d] of any strides; vectors: every 8 adjacent elements lie at a multiple of 16 bytes.
template <typename T>
struct Heads {
  const T* data;
  int64_t batch, head, token, column;
  bool vectors;

  __device__ __forceinline__ const T* at(int64_t b, int64_t h, int64_t t) const {
    return data + b * batch + h * head + t * token;
  }
};

// The tensors of masks.MaskArguments, null where there is none. queries, keys: of a dense sample.
struct Masks {
  const int *q_offsets, *k_offsets, *lengths, *bounds;
  const bool* keep;
  int64_t keep_stride, bounds_stride;  // from sample to sample
  int block_count, frame, window, queries, keys;
};

// rope.RopeArguments; table is null for no rotation.
struct Rope {
  const float* table;  // [positions, part, 2]
  const int *q_index, *k_index;
  int64_t q_index_stride, k_index_stride;  // from batch to batch
  int64_t grid[3];
  int axes, part;

  // Where the token `place` of its sample lies in the table; index: its sample's first, or null.
  __device__ __forceinline__ Rows rows(const int* index, int place) const {
    if (table == nullptr) return {{0, 0, 0}};
    return table_rows(grid, axes, index == nullptr ? place : index[place]);
  }

  // The pair of elements `column` and column + 1 turned, for an even column.
  __device__ __forceinline__ void turn_pair(float& even, float& odd, const Rows& rows, int column,
                                            bool adjoint) const {
    const int axis = (column >= part) + (column >= 2 * part) + (column >= 3 * part);
    if (axis >= axes) return;
    const int64_t row = axis == 0 ? rows.row[0] : axis == 1 ? rows.row[1] : rows.row[2];
    const float4 angle =
        __ldg(reinterpret_cast<const float4*>(table + 2 * (row * part + column - axis * part)));
    turn(even, odd, angle.x, angle.y, angle.z, angle.w, adjoint);
  }
};

// One sample: packed ones are runs of tokens of batch 0. Kept in shared memory, not in registers,
// which the products need.
struct alignas(16) Sample {
  int64_t batch, q_begin, k_begin;
  const bool* keep;
  const int *q_index, *k_index;
  Rules rules;
  int queries, keys;

  // The keys that `query` sees; none past the last query.
  __device__ __forceinline__ Intervals sees(int query) const {
    if (query >= queries) return {{0, 0}, {0, 0}};
    return key_intervals(rules, query);
  }

  // Whether some query of the sample sees a key. What none sees is read as zeros, since 0 times
  // a NaN or an infinity would reach the products.
  __device__ __forceinline__ bool seen(int key) const {
    if (key >= rules.keys || queries == 0) return false;
    if (keep != nullptr && !keep[key]) return false;
    if (rules.bounds != nullptr && key >= rules.bounds[rules.block_count]) return false;
    if (rules.frame > 0) {
      const Rules frames = {rules.keys, rules.frame, 0, 0, nullptr};
      if (key >= key_intervals(frames, queries - 1).first.end) return false;
    }
    return true;
  }
};

__device__ __forceinline__ Sample sample_of(const Masks& masks, const Rope& rope, int64_t number) {
  Sample sample;
  sample.batch = masks.q_offsets == nullptr ? number : 0;
  sample.q_begin = sample.k_begin = 0;
  sample.queries = masks.queries;
  sample.keys = masks.keys;
  if (masks.q_offsets != nullptr) {
    // Offsets in the GPU's memory cannot be checked before the launch: none may leave the tensors.
    const auto within = [&](const int* offset, int tokens, int64_t* begin, int* count) {
      const int first = min(max(offset[0], 0), tokens);
      *begin = first;
      *count = min(max(offset[1], first), tokens) - first;
    };
    within(masks.q_offsets + number, masks.queries, &sample.q_begin, &sample.queries);
    within(masks.k_offsets + number, masks.keys, &sample.k_begin, &sample.keys);
  }
  sample.rules = {sample.keys, masks.frame, masks.window, masks.block_count,
                  masks.bounds == nullptr ? nullptr : masks.bounds + number * masks.bounds_stride};
  if (masks.lengths != nullptr) sample.rules.keys = min(sample.keys, masks.lengths[number]);
  sample.keep = masks.keep == nullptr ? nullptr : masks.keep + number * masks.keep_stride;
  const auto index = [&](const int* of, int64_t stride, int64_t begin) {
    return of == nullptr ? nullptr : of + sample.batch * stride + begin;
  };
  sample.q_index = index(rope.q_index, rope.q_index_stride, sample.q_begin);
  sample.k_index = index(rope.k_index, rope.k_index_stride, sample.k_begin);
  return sample;
}

// Whether keys [begin, begin + kTile) are all within one of the two, or any within either.
__device__ __forceinline__ bool overlaps(const Interval& seen, int begin) {
  return !seen.empty() && seen.begin < begin + kTile && begin < seen.end;
}
__device__ __forceinline__ bool covers(const Interval& seen, int begin) {
  return seen.begin <= begin && begin + kTile <= seen.end;
}
__device__ __forceinline__ bool overlaps(const Intervals& seen, int begin) {
  return overlaps(seen.first, begin) || overlaps(seen.second, begin);
}
__device__ __forceinline__ bool covers(const Intervals& seen, int begin) {
  return covers(seen.first, begin) || covers(seen.second, begin);
}

}  // namespace attention::kernels
