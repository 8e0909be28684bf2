// The host's side of tf32_product.cuh: the tile, the parts of the sum, the launches.
#pragma once

#include <algorithm>

#include "common/cuda/bmm.h"
#include "common/cuda/plan.cuh"
#include "common/cuda/tf32_product.cuh"

namespace common {

// How the tiles of one edge would be shared out, and a cost that compares such plans: waves of
// blocks times the steps of a block. Not measured: 4 steps for the parts' way through memory, and a
// quarter more for small tiles, which read each operand twice as often.
struct TilePlan {
  int64_t tiles, parts, part;
  double cost;
};

inline TilePlan tile_plan(int64_t rows, int64_t columns, int64_t length, int64_t batches,
                          bool symmetric, int edge, int64_t slots, int64_t scratch) {
  const int64_t down = ceil_div(rows, edge), across = ceil_div(columns, edge);
  const int64_t tiles = symmetric ? down * (down + 1) / 2 : down * across;
  const int64_t steps = ceil_div(length, kDepth), area = batches * tiles * edge * edge;
  TilePlan best = {tiles, 1, steps * kDepth, 0.0};
  for (int64_t wanted = 1; wanted <= std::min<int64_t>(steps, 256); ++wanted) {
    const int64_t each = ceil_div(steps, wanted), parts = ceil_div(steps, each);
    if (parts > 1 && parts * area > scratch) break;
    const auto waves = static_cast<double>(ceil_div(tiles * batches * parts, slots));
    const double cost = waves * (each + (parts > 1 ? 4 : 0)) * (edge == 64 ? 1.25 : 1.0);
    if (wanted == 1 || cost < best.cost) best = {tiles, parts, each * kDepth, cost};
  }
  return best;
}

// The matrix [B, side, length] whose strides are given; `along` is set where the sum is contiguous.
inline Factor factor(const Tensor& z, int side, int length, bool& along) {
  Factor f = {static_cast<const float*>(z.const_data_ptr()), z.stride(0), 0, z.size(side), false};
  along = z.stride(length) == 1;
  f.stride = z.stride(along ? side : length);
  const int64_t adjacent = along ? z.size(length) : f.side;
  f.vectors = adjacent % 4 == 0 && f.stride % 4 == 0 && f.batch % 4 == 0 &&
              reinterpret_cast<uintptr_t>(f.data) % 16 == 0;
  return f;
}

// out [B, M, N], contiguous, = a [B, M, K] b [B, K, N], all float32, of each of a and b one matrix
// dimension contiguous, and not a across the sum with b along it. symmetric: b is a's transpose.
// scratch: elements that parts of the sum may take.
inline void tf32x3_product(const Queue& queue, const Tensor& a, const Tensor& b, const Tensor& out,
                           bool symmetric, int64_t scratch) {
  bool along_a, along_b;
  Tiling t = {};
  t.a = factor(a, 1, 2, along_a);
  t.b = factor(b, 2, 1, along_b);
  t.length = a.size(2);
  t.symmetric = symmetric;
  t.out = static_cast<float*>(out.data_ptr());
  const int64_t batches = a.size(0), processors = queue.multiprocessors();
  const auto plan = [&](int edge) {
    const int64_t slots = processors * (edge == 64 ? 4 : 1);
    return tile_plan(t.a.side, t.b.side, t.length, batches, symmetric, edge, slots, scratch);
  };
  const auto run = [&]<int Edge>(const TilePlan& p) {
    Tensor parts;
    if (p.parts > 1) {
      parts = empty(out, {batches * p.tiles * p.parts * Edge * Edge}, ScalarType::Float);
      t.scratch = static_cast<float4*>(parts.data_ptr());
    }
    const int64_t blocks = batches * p.tiles * std::max<int64_t>(p.parts, kFragments);
    STD_TORCH_CHECK(std::max(blocks, p.part) < (int64_t{1} << 31), "too large for one launch");
    t.down = static_cast<int>(ceil_div(t.a.side, Edge));
    t.tiles = static_cast<int>(p.tiles), t.parts = static_cast<int>(p.parts), t.part = p.part;
    const auto kernel = !along_a  ? &tf32x3_tiles<Edge, false, false>
                        : along_b ? &tf32x3_tiles<Edge, true, true>
                                  : &tf32x3_tiles<Edge, true, false>;
    queue.launch(kernel, static_cast<unsigned>(batches * p.tiles * p.parts), kTileThreads<Edge>,
                 kTileShared<Edge>, t);
    if (p.parts > 1) {
      queue.launch(&tf32x3_add_parts<Edge>, static_cast<unsigned>(batches * p.tiles * kFragments),
                   kTileThreads<Edge>, 0, t);
    }
  };
  const TilePlan small = plan(64), large = plan(128);
  if (large.cost < small.cost) {
    run.template operator()<128>(large);
  } else {
    run.template operator()<64>(small);
  }
}

// The same through tf32x3_product or through torch, whatever the dtype.
inline void product(const Queue& queue, bool tf32x3, const Tensor& a, const Tensor& b,
                    const Tensor& out, bool symmetric, int64_t scratch) {
  if (tf32x3) {
    tf32x3_product(queue, a, b, out, symmetric, scratch);
  } else {
    bmm(a, b, out);
  }
}

// Elements that parts of a forward's products may take beside `operands`, which has as many as its
// gradients will.
inline int64_t product_scratch(const Tensor& operands) {
  return std::max<int64_t>(operands.numel(), 1 << 18);
}

}  // namespace common
