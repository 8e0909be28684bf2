// The modulated layer norm: one pass over the tokens forward, one over tokens and gradients backward.
//
// A team of 1, 2, 4 or 8 warps takes a token and keeps it in registers, 16 elements a lane. Backward a
// block stays in one frame, whose gradients of shift and scale it keeps in registers too; its teams'
// parts are added up through shared memory, in order, and a frame's blocks through memory. Where each
// token has its own vectors there is nothing to add up.
#pragma once

#include "adaln/cuda/access.cuh"
#include "adaln/formula.h"

namespace adaln {
namespace kernels {

constexpr int kElements = 16;  // a lane's
static_assert(kElements * kThreads == kLongest);

// The warps that share a token; all of a block call `sum` equally often.
struct Team {
  int warps, number, count, lane;
  int parity = 0;

  __device__ __forceinline__ explicit Team(int warps)
      : warps(warps),
        number(threadIdx.x / kLanes / warps),
        count(kWarps / warps),
        lane(threadIdx.x % (kLanes * warps)) {}

  // The sums over the team of both values, in both.
  __device__ __forceinline__ void sum(double& a, double& b) {
    a = warp_sum(a);
    b = warp_sum(b);
    if (warps == 1) return;
    SHARED_ARRAY(double, parts, 4 * kWarps);
    double* own = parts + parity * 2 * kWarps;  // the other half may still be read
    parity ^= 1;
    const int warp = threadIdx.x / kLanes;
    if (threadIdx.x % kLanes == 0) {
      own[warp] = a;
      own[kWarps + warp] = b;
    }
    __syncthreads();
    a = b = 0.0;
    for (int w = number * warps; w < (number + 1) * warps; ++w) {
      a += own[w];
      b += own[kWarps + w];
    }
  }

  // That the addresses of 16 single elements are made anew from here on, and not kept in registers,
  // of which there are not as many.
  template <int W>
  __device__ __forceinline__ void forget_addresses() {
#ifdef __CUDACC__
    if constexpr (W == 1) asm volatile("" : "+r"(lane));
#endif
  }

  // The first column of piece i, of W elements.
  template <int W>
  __device__ __forceinline__ int64_t column(int i) const {
    return int64_t{i * kLanes * warps + lane} * W;
  }
};

// saved: [G, T, 2].
template <typename Tokens, typename Vectors>
__global__ void __launch_bounds__(kThreads, 2)
    norm_rows(Cut q, Divider tokens, int warps, double inverse_dim, float eps, Tokens x,
              Vectors shift, Vectors scale, Tokens out, float* saved) {
  constexpr int W = Tokens::W, kPieces = kElements / W;
  Team team(warps);
  const int64_t rows = q.frames * q.tokens;
  for (int64_t first = int64_t{blockIdx.x} * team.count; first < rows;
       first += int64_t{gridDim.x} * team.count) {
    team.forget_addresses<W>();
    const int64_t row = first + team.number;
    const bool valid = row < rows;
    int64_t token = 0;
    const int64_t frame = valid ? tokens.divide(row, token) : 0;
    float kept[kPieces][W] = {};
    float part = 0.f;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int64_t c = team.column<W>(i);
      if (valid && c < q.dim) x.read(frame, token, c, kept[i]);
#pragma unroll
      for (int w = 0; w < W; ++w) part += kept[i][w];
    }
    double sum = part, scatter = 0.0;
    team.sum(sum, scatter);
    const float mean = static_cast<float>(sum * inverse_dim);
    part = 0.f;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (team.column<W>(i) < q.dim) {
#pragma unroll
        for (int w = 0; w < W; ++w) part += (kept[i][w] - mean) * (kept[i][w] - mean);
      }
    }
    scatter = part;
    team.sum(scatter, sum);
    const float rstd = rstd_of(scatter, inverse_dim, eps);
    if (!valid) continue;
    if (team.lane == 0) {
      saved[2 * row] = mean;
      saved[2 * row + 1] = rstd;
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int64_t c = team.column<W>(i);
      if (c < q.dim) {
        float moved[W], factor[W];
        shift.read(frame, c, moved);
        scale.read(frame, c, factor);
#pragma unroll
        for (int w = 0; w < W; ++w) {
          kept[i][w] = modulated(normed(kept[i][w], mean, rstd), factor[w], moved[w]);
        }
        out.write(frame, token, c, kept[i]);
      }
    }
  }
}

// Frames: whether vectors belong to frames; to_shift and to_scale then take a row for each block.
template <bool Frames, typename Tokens, typename Vectors>
__global__ void __launch_bounds__(kThreads, 2)
    norm_gradients(Cut q, int warps, double inverse_dim, bool need_x, bool need_vectors,
                   Tokens grad, Tokens x, Vectors scale, const float* saved, Tokens to_x,
                   Vectors to_shift, Vectors to_scale) {
  constexpr int W = Tokens::W, kPieces = kElements / W;
  Team team(warps);
  int64_t frame, begin, end;
  q.range<Frames>(blockIdx.x, frame, begin, end);
  float by_shift[kPieces][W] = {}, by_scale[kPieces][W] = {};
  for (int64_t first = begin; first < end; first += team.count) {
    team.forget_addresses<W>();
    const int64_t row = first + team.number;
    const bool valid = row < end;
    const int64_t token = Frames ? row : 0, at = Frames ? frame : row;
    const int64_t place = Frames ? frame * q.tokens + row : row;
    const float mean = valid ? saved[2 * place] : 0.f, rstd = valid ? saved[2 * place + 1] : 0.f;
    float s[kPieces][W] = {}, n[kPieces][W] = {};
    float a = 0.f, b = 0.f;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int64_t c = team.column<W>(i);
      if (valid && c < q.dim) {
        float g[W], factor[W];
        grad.read(at, token, c, g);
        x.read(at, token, c, n[i]);
        scale.read(at, c, factor);
#pragma unroll
        for (int w = 0; w < W; ++w) {
          n[i][w] = normed(n[i][w], mean, rstd);
          s[i][w] = scaled(g[w], factor[w]);
          a += s[i][w];
          b += s[i][w] * n[i][w];
          by_shift[i][w] = (Frames ? by_shift[i][w] : 0.f) + g[w];
          by_scale[i][w] = (Frames ? by_scale[i][w] : 0.f) + g[w] * n[i][w];
        }
        if (!Frames && need_vectors) {
          to_shift.write(at, c, by_shift[i]);
          to_scale.write(at, c, by_scale[i]);
        }
      }
    }
    if (!need_x) continue;
    double sums[2] = {a, b};
    team.sum(sums[0], sums[1]);
    a = static_cast<float>(sums[0] * inverse_dim);
    b = static_cast<float>(sums[1] * inverse_dim);
    team.forget_addresses<W>();
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int64_t c = team.column<W>(i);
      if (valid && c < q.dim) {
#pragma unroll
        for (int w = 0; w < W; ++w) s[i][w] = norm_slope(s[i][w], n[i][w], a, b, rstd);
        to_x.write(at, token, c, s[i]);
      }
    }
  }
  if (!Frames || !need_vectors) return;
  SHARED_ARRAY(float, teams, kLongest);
#pragma unroll
  for (int vector = 0; vector < 2; ++vector) {
    team.forget_addresses<W>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int64_t c = team.column<W>(i);
      if (c < q.dim) {
#pragma unroll
        for (int w = 0; w < W; ++w) {
          teams[team.number * q.dim + c + w] = vector == 0 ? by_shift[i][w] : by_scale[i][w];
        }
      }
    }
    __syncthreads();
    for (int64_t c = int64_t{threadIdx.x} * W; c < q.dim; c += kThreads * W) {
      float total[W] = {};
      for (int t = 0; t < team.count; ++t) {
#pragma unroll
        for (int w = 0; w < W; ++w) total[w] += teams[t * q.dim + c + w];
      }
      (vector == 0 ? to_shift : to_scale).write(blockIdx.x, c, total);
    }
  }
}

}  // namespace kernels
}  // namespace adaln
