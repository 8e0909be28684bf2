// What a query sees, and what rotary position does to a pair: the maths of the attention op, once
// for the CPU, for CUDA and for the emulator.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/inline.h"

namespace attention {

// Keys [begin, end) of a sample.
struct Interval {
  int begin, end;

  KERNELS_INLINE bool has(int key) const { return begin <= key && key < end; }
  KERNELS_INLINE bool empty() const { return end <= begin; }
};

// A query sees the keys of both; they never overlap, and `first` lies before `second`.
struct Intervals {
  Interval first, second;

  KERNELS_INLINE bool has(int key) const { return first.has(key) || second.has(key); }
};

// The rules of one sample. keys: how many it has, padding taken off; frame: tokens a frame and
// window: frames seen, each 0 for no such rule; bounds: block_count + 1 ends of the context and of
// its blocks, null for no blocks.
struct Rules {
  int keys, frame, window, block_count;
  const int* bounds;
};

KERNELS_INLINE Interval clip(Interval a, Interval to) {
  return {a.begin < to.begin ? to.begin : a.begin, a.end > to.end ? to.end : a.end};
}

// What the query at place `query` of its sample sees. Both ends are monotone in `query` but at the
// step from one block to the next, so a tile of queries lies within the hull of its rows.
KERNELS_INLINE Intervals key_intervals(const Rules& rules, int query) {
  Interval all = {0, rules.keys};
  if (rules.frame > 0) {
    const int frame = query / rules.frame;
    const int64_t end = (static_cast<int64_t>(frame) + 1) * rules.frame;
    if (end < all.end) all.end = static_cast<int>(end);
    if (rules.window > 0 && frame >= rules.window) {
      all.begin = (frame - rules.window + 1) * rules.frame;
    }
  }
  if (rules.bounds == nullptr) return {all, {0, 0}};
  const int context = rules.bounds[0];
  Interval own = {0, 0};
  for (int m = 0; m < rules.block_count; ++m) {
    if (rules.bounds[m] <= query && query < rules.bounds[m + 1]) {
      own = {rules.bounds[m], rules.bounds[m + 1]};
    }
  }
  return {clip({0, context}, all), clip(own, all)};
}

// Where a token lies in the table of cosines and sines: its row for each axis, the first `axes` of
// which count. grid: the three axes' sizes; a place outside the grid is taken to be its last one.
struct Rows {
  int row[3];
};

KERNELS_INLINE Rows table_rows(const int64_t* grid, int axes, int64_t place) {
  const int64_t places = grid[0] * grid[1] * grid[2];
  if (place < 0 || place >= places) place = places - 1;
  // A place is an int32: divisions of 32 bits, a fifth of the instructions of 64 on a GPU.
  const auto at = static_cast<uint32_t>(place), width = static_cast<uint32_t>(grid[2]);
  const uint32_t line = at / width, frame = line / static_cast<uint32_t>(grid[1]);
  const int column = static_cast<int>(grid[0] + grid[1] + (at - line * width));
  const int row = static_cast<int>(grid[0] + (line - frame * static_cast<uint32_t>(grid[1])));
  // Named, not indexed: an array indexed by `axes` would lie in a GPU's local memory.
  if (axes == 3) return {{static_cast<int>(frame), row, column}};
  if (axes == 2) return {{row, column, 0}};
  return {{column, 0, 0}};
}

// The pair (even, odd) turned, each element by its own angle; `adjoint`: what the gradient takes.
KERNELS_INLINE void turn(float& even, float& odd, float cos_even, float sin_even, float cos_odd,
                         float sin_odd, bool adjoint) {
  const float a = even, b = odd;
  if (adjoint) {
    even = a * cos_even + b * sin_odd;
    odd = b * cos_odd - a * sin_even;
  } else {
    even = a * cos_even - b * sin_even;
    odd = b * cos_odd + a * sin_odd;
  }
}

}  // namespace attention
