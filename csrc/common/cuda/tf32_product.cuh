// out = a b in float32 on the tensor cores (tf32.cuh): batches of products, and of symmetric ones
// the upper triangle of tiles, mirrored. Times: not measured yet.
//
// A block takes a tile of Edge x Edge results and a part of the sum; a warp takes 32 x 32 of them.
// The operands come through shared memory by asynchronous copies, 32 deep, one ahead of the
// products. A sum of 8 leaves the tensor core, which cuts off instead of rounding, for a float32 sum
// outside of it: over thousands of terms of one sign the cuts would add up to 1e-4 of the sum.
//
// Where the tiles are too few to fill the device the sum is cut into parts, whose tiles go to
// scratch and are added in order by a second launch: two runs are bitwise equal. Elements right of
// the diagonal alone are stored, each twice, so that a symmetric result is exactly symmetric.
#pragma once

#include <algorithm>

#include "common/cuda/async.cuh"
#include "common/cuda/launch.h"
#include "common/cuda/tf32.cuh"

namespace common {

constexpr int kDepth = 32;         // of the sum, in shared memory at a time
constexpr int kWarpEdge = 32;      // a warp's results
constexpr int kFragments = 8;      // 16 x 8 results each: 2 down, 4 across
constexpr int kAlongStride = kDepth + 4;  // of rows in shared memory: an odd multiple of 16 bytes

// A matrix [batches, side, length] of which `length` is summed over. Along: neighbours along the
// sum are adjacent, and rows `stride` apart; else neighbours along the side are.
struct Factor {
  const float* data;
  int64_t batch, stride, side;
  bool vectors;  // 16-byte accesses are aligned
};

struct Tiling {
  Factor a, b;
  int64_t length, part;      // of the sum: whole, and a block's
  int down;                  // tiles, one below the other
  int tiles, parts;          // a batch; tiles of the upper triangle where symmetric
  bool symmetric;
  float* out;                // [batches, a.side, b.side]
  float4* scratch;           // [batches, tiles, parts, fragment, thread]; null where parts = 1
};

template <int Edge>
constexpr int kTileThreads = Edge / kWarpEdge * (Edge / kWarpEdge) * 32;

// Floats of one operand in shared memory: [Edge][36], or [32][Edge + 8].
template <int Edge>
constexpr int kTileFloats = Edge * kAlongStride > kDepth * (Edge + 8) ? Edge * kAlongStride
                                                                     : kDepth * (Edge + 8);

template <int Edge>
constexpr size_t kTileShared = 2 * 2 * kTileFloats<Edge> * sizeof(float);

struct TilePlace {
  int batch, tile, part, row, column;  // row, column: of the tile, in tiles
};

__device__ __forceinline__ TilePlace tile_place(const Tiling& t, int block) {
  TilePlace at;
  at.tile = block % t.tiles;
  at.part = block / t.tiles % t.parts;
  at.batch = block / (t.tiles * t.parts);
  if (t.symmetric) {  // column by column, rows up to the diagonal
    const auto tile = static_cast<float>(at.tile);
    auto j = static_cast<int>((sqrtf(8.f * tile + 1.f) - 1.f) * 0.5f);
    while (int64_t{j} * (j + 1) / 2 > at.tile) --j;
    while (int64_t{j + 1} * (j + 2) / 2 <= at.tile) ++j;
    at.column = j;
    at.row = at.tile - static_cast<int>(int64_t{j} * (j + 1) / 2);
  } else {
    at.row = at.tile % t.down;
    at.column = at.tile / t.down;
  }
  return at;
}

// A block's share of a factor: [side, length] from `data` on, of which it takes Edge rows at most.
struct Share {
  const float* data;
  int64_t stride;
  int side, length;
  bool vectors;
};

template <int Edge, bool Along>
__device__ __forceinline__ Share share(const Factor& f, int batch, int64_t first, int64_t begin,
                                       int length) {
  const int64_t side = min(f.side - first, int64_t{Edge});
  const float* data = f.data + batch * f.batch;
  data += Along ? first * f.stride + begin : begin * f.stride + first;
  return {data, f.stride, static_cast<int>(side), length, f.vectors};
}

// Begins the copy of [Edge, 32] of a share, from element k of the sum on, to shared memory; zeros
// past its edges.
template <int Edge, bool Along>
__device__ __forceinline__ void copy_tile(float* shared, const Share& s, int k) {
  constexpr int kThreads = kTileThreads<Edge>, kInner = Along ? kDepth : Edge;
  constexpr int kStride = Along ? kAlongStride : Edge + 8;
  const int inner = Along ? s.length - k : s.side, outer = Along ? s.side : s.length - k;
  const float* from = s.data + (Along ? k : k * s.stride);
  if (s.vectors) {
#pragma unroll 1
    for (int at = threadIdx.x; at < Edge * kDepth / 4; at += kThreads) {
      const int o = at / (kInner / 4), i = at % (kInner / 4) * 4;
      const bool valid = o < outer && i < inner;
      copy_async(shared + o * kStride + i, valid ? from + o * s.stride + i : s.data, valid);
    }
  } else {
#pragma unroll 1
    for (int at = threadIdx.x; at < Edge * kDepth; at += kThreads) {
      const int o = at / kInner, i = at % kInner;
      const bool valid = o < outer && i < inner;
      copy_word_async(shared + o * kStride + i, valid ? from + o * s.stride + i : s.data, valid);
    }
  }
}

// Elements (row g, k = t), (g + 8, t), (g, t + 4), (g + 8, t + 4) of 16 rows: the A operand, and
// elements 0, 2 and 1, 3 the B operands of two products side by side.
template <int Edge, bool Along>
__device__ __forceinline__ void load_rows(uint32_t (&out)[4], const float* tile, int row, int k) {
  const int lane = threadIdx.x % 32;
  if constexpr (Along) {
    load_matrices<false>(out, tile + (row + lane % 16) * kAlongStride + k + lane / 16 * 4);
  } else {
    const float* from = tile + (k + lane % 4) * (Edge + 8) + row + lane / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      memcpy(&out[i], from + i / 2 * 4 * (Edge + 8) + i % 2 * 8, sizeof out[i]);
    }
  }
}

// total += the products of a tile 32 deep.
template <int Edge, bool AlongA, bool AlongB>
__device__ __forceinline__ void multiply_tile(float (&total)[kFragments][4], const float* a,
                                              const float* b, int row, int column) {
#pragma unroll 1  // else the next operands are held beside these, and spill
  for (int k = 0; k < kDepth; k += 8) {
    uint32_t big_a[2][4], small_a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      uint32_t raw[4];
      load_rows<Edge, AlongA>(raw, a, row + 16 * m, k);
#pragma unroll
      for (int i = 0; i < 4; ++i) split_tf32(raw[i], big_a[m][i], small_a[m][i]);
    }
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t raw[4], big_b[4], small_b[4];
      load_rows<Edge, AlongB>(raw, b, column + 16 * pair, k);
#pragma unroll
      for (int i = 0; i < 4; ++i) split_tf32(raw[i], big_b[i], small_b[i]);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          float sum[4] = {};
          mma_tf32(sum, small_a[m], big_b[n], big_b[n + 2]);
          mma_tf32(sum, big_a[m], small_b[n], small_b[n + 2]);
          mma_tf32(sum, big_a[m], big_b[n], big_b[n + 2]);
#pragma unroll
          for (int i = 0; i < 4; ++i) total[4 * m + 2 * pair + n][i] += sum[i];
        }
      }
    }
  }
}

// Where a thread's element 0 of fragment f lies in the tile.
template <int Edge>
__device__ __forceinline__ void fragment_place(int f, int& row, int& column) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = Edge / kWarpEdge;
  row = warp / warps * kWarpEdge + f / 4 * 16 + lane / 4;
  column = warp % warps * kWarpEdge + f % 4 * 8 + lane % 4 * 2;
}

template <int Edge>
__device__ __forceinline__ void store_fragment(const Tiling& t, const TilePlace& at, int f,
                                               const float (&c)[4]) {
  int row, column;
  fragment_place<Edge>(f, row, column);
  const int64_t rows = t.a.side, columns = t.b.side;
  float* out = t.out + at.batch * rows * columns;
  const bool pairs = !t.symmetric && columns % 2 == 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t m = int64_t{at.row} * Edge + row + i / 2 * 8;
    const int64_t n = int64_t{at.column} * Edge + column + i % 2;
    if (m >= rows || n >= columns || (t.symmetric && n < m)) continue;
    if (!pairs) {
      out[m * columns + n] = c[i];
    } else if (i % 2 == 0) {
      *reinterpret_cast<float2*>(out + m * columns + n) = make_float2(c[i], c[i + 1]);
    }
    if (t.symmetric) out[n * columns + m] = c[i];
  }
}

template <int Edge, bool AlongA, bool AlongB>
__global__ void __launch_bounds__(kTileThreads<Edge>, 512 / kTileThreads<Edge>)
    tf32x3_tiles(Tiling t) {
  DYNAMIC_SHARED(float, shared);
  const TilePlace at = tile_place(t, blockIdx.x);
  const int64_t begin = int64_t{at.part} * t.part;
  const auto length = static_cast<int>(min(t.part, t.length - begin));
  const Share a = share<Edge, AlongA>(t.a, at.batch, int64_t{at.row} * Edge, begin, length);
  const Share b = share<Edge, AlongB>(t.b, at.batch, int64_t{at.column} * Edge, begin, length);
  const int warp = threadIdx.x / 32, warps = Edge / kWarpEdge;
  const int row = warp / warps * kWarpEdge, column = warp % warps * kWarpEdge;

  float total[kFragments][4] = {};
  float *now = shared, *next = shared + 2 * kTileFloats<Edge>;
  copy_tile<Edge, AlongA>(now, a, 0);
  copy_tile<Edge, AlongB>(now + kTileFloats<Edge>, b, 0);
#pragma unroll 1
  for (int k = 0; k < length; k += kDepth) {
    wait_for_copies();
    __syncthreads();  // all see this tile, and all are done with the one before
    if (k + kDepth < length) {
      copy_tile<Edge, AlongA>(next, a, k + kDepth);
      copy_tile<Edge, AlongB>(next + kTileFloats<Edge>, b, k + kDepth);
    }
    multiply_tile<Edge, AlongA, AlongB>(total, now, now + kTileFloats<Edge>, row, column);
    float* const done = now;
    now = next;
    next = done;
  }

  const int64_t slot = (int64_t{at.batch} * t.tiles + at.tile) * t.parts + at.part;
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
    if (t.parts == 1) {
      store_fragment<Edge>(t, at, f, total[f]);
    } else {
      t.scratch[(slot * kFragments + f) * kTileThreads<Edge> + threadIdx.x] =
          make_float4(total[f][0], total[f][1], total[f][2], total[f][3]);
    }
  }
}

// Adds the parts up; a block takes one fragment of every thread of a tile.
template <int Edge>
__global__ void __launch_bounds__(kTileThreads<Edge>) tf32x3_add_parts(Tiling t) {
  constexpr int kSize = kFragments * kTileThreads<Edge>;
  const int f = blockIdx.x % kFragments;
  const int64_t block = blockIdx.x / kFragments;  // batches * t.tiles of them
  TilePlace at = tile_place(t, static_cast<int>(block % t.tiles));  // of part 0 of batch 0
  at.batch = static_cast<int>(block / t.tiles);
  const float4* part = t.scratch + block * t.parts * kSize + f * kTileThreads<Edge> + threadIdx.x;
  float total[4] = {};
#pragma unroll 4
  for (int64_t p = 0; p < t.parts; ++p) {
    const float4 value = part[p * kSize];
    total[0] += value.x, total[1] += value.y, total[2] += value.z, total[3] += value.w;
  }
  store_fragment<Edge>(t, at, f, total);
}

}  // namespace common
