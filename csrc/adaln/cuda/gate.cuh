// The gated residual: lanes along D, W columns each, and warps down the tokens.
#pragma once

#include "adaln/cuda/access.cuh"
#include "adaln/formula.h"

namespace adaln {
namespace kernels {

// A warp a piece of a row: columns [32 W tile, 32 W (tile + 1)).
template <typename Tokens, typename Branch, typename Gates>
__global__ void __launch_bounds__(kThreads)
    gate_rows(Cut q, Divider tokens, Divider tiles, Tokens x, Branch y, Gates gate, Tokens out) {
  constexpr int W = Tokens::W;
  const int64_t pieces = q.frames * q.tokens * tiles.by;
  for (int64_t i = common::first_row(); i < pieces; i += common::row_step()) {
    int64_t tile, token;
    const int64_t frame = tokens.divide(tiles.divide(i, tile), token);
    const int64_t c = (tile * kLanes + common::lane()) * W;
    if (c >= q.dim) continue;
    float own[W], other[W], open[W];
    x.read(frame, token, c, own);
    y.read(frame, token, c, other);
    gate.read(frame, c, open);
#pragma unroll
    for (int w = 0; w < W; ++w) own[w] = gated(own[w], open[w], other[w]);
    out.write(frame, token, c, own);
  }
}

// Frames: as in norm_gradients. A block a tile of columns and a part of the tokens.
template <bool Frames, typename Tokens, typename Branch, typename Gates>
__global__ void __launch_bounds__(kThreads)
    gate_gradients(Cut q, Divider tiles, bool need_y, bool need_gate, Tokens grad, Branch y,
                   Gates gate, Branch to_y, Gates to_gate) {
  constexpr int W = Tokens::W;
  int64_t tile, frame, begin, end;
  const int64_t block = tiles.divide(blockIdx.x, tile);
  q.range<Frames>(block, frame, begin, end);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t c = (tile * kLanes + lane) * W;
  const bool inside = c < q.dim;
  float open[W] = {}, sum[W] = {};
  if (Frames && inside) gate.read(frame, c, open);
  for (int64_t row = begin + warp; inside && row < end; row += kWarps) {
    const int64_t token = Frames ? row : 0, at = Frames ? frame : row;
    float g[W], other[W];
    grad.read(at, token, c, g);
    if (!Frames) gate.read(at, c, open);
    if (need_gate) {
      y.read(at, token, c, other);
#pragma unroll
      for (int w = 0; w < W; ++w) sum[w] = (Frames ? sum[w] : 0.f) + g[w] * other[w];
      if (!Frames) to_gate.write(at, c, sum);
    }
    if (need_y) {
#pragma unroll
      for (int w = 0; w < W; ++w) g[w] *= open[w];
      to_y.write(at, token, c, g);
    }
  }
  if (!Frames || !need_gate) return;
  SHARED_ARRAY(float, warps, kThreads * W);
#pragma unroll
  for (int w = 0; w < W; ++w) warps[(warp * kLanes + lane) * W + w] = sum[w];
  __syncthreads();
  if (warp != 0 || !inside) return;
  for (int other = 1; other < kWarps; ++other) {
#pragma unroll
    for (int w = 0; w < W; ++w) sum[w] += warps[(other * kLanes + lane) * W + w];
  }
  to_gate.write(block, c, sum);
}

}  // namespace kernels
}  // namespace adaln
