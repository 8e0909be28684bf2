// The forward kernel: a block is one (sample, head), a warp 16 of its queries at a time.
//
// Rotated keys and the values lie in shared memory for all warps, `chunk` keys at once: all of them
// where they fit. A warp's queries, scores and outputs stay in its registers; scores are taken
// 32 or 64 keys at a time in groups of 16, each left out where no query of the warp sees it.
// Softmax is float32, base 2, with a running maximum; its weights are rounded to the input's type
// as the A operand of the second product, their sum is not.
//
// A score that is infinite before `scale` makes the result of a query that sees it NaN, and the
// logarithm of its sum, which spreads in the backward: as -inf it would leave its key out although
// only a sum on its way passed float32. Noticing it, by 0 times infinity, takes one instruction a
// score; that which multiplied by `scale` is saved, which the exponential's subtraction does too.
#pragma once

#include <type_traits>

#include "attention/cuda/tiles.cuh"

namespace attention::kernels {

constexpr float kLog2E = 1.4426950408889634f;

// Groups of 16 keys whose scores a warp holds at once, as its registers allow.
template <int D>
constexpr int kGroups = D <= 32 ? 4 : 2;

// Whether the queries' operands stay in registers, or are read again for each of the products.
template <int D>
constexpr bool kKeepQueries = D <= 64;

__device__ __forceinline__ float negative_infinity() { return -INFINITY; }

// Over the four lanes that hold a row of a product's result.
__device__ __forceinline__ float row_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(common::kAllLanes, value, 1));
  return fmaxf(value, __shfl_xor_sync(common::kAllLanes, value, 2));
}
__device__ __forceinline__ float row_sum(float value) {
  value += __shfl_xor_sync(common::kAllLanes, value, 1);
  return value + __shfl_xor_sync(common::kAllLanes, value, 2);
}

// Makes `sum` NaN where a score is infinite (or NaN), else leaves it. float16 holds no numbers whose
// products are so large.
template <typename T>
__device__ __forceinline__ void note_infinite(float score, float& sum) {
  if constexpr (!std::is_same_v<T, __half>) sum = fmaf(score, 0.f, sum);
}

template <typename T>
struct ForwardArguments {
  Heads<T> q, k, v;
  T* out;      // [B, T, H, d]
  float* lse;  // [B, H, T]
  Masks masks;
  Rope rope;
  int64_t heads, tokens;
  int dim, chunk;  // chunk: a multiple of 16
  float scale;     // positive, times log2 e
  bool negate;     // the queries: the scale was negative
};

// The parts of shared memory, in bytes from its start, where the sample lies.
struct ForwardShared {
  size_t keys, values, own, rows, seen, total;

  // own, rows: of each warp, a tile of queries, then of outputs, and what each of them sees.
  // seen: for each tile of keys, which of them some query sees.
  __host__ __device__ ForwardShared(int padded_dim, int chunk, int warps) {
    const size_t row = 2 * (padded_dim + 8);
    keys = sizeof(Sample);
    values = keys + chunk * row;
    own = values + chunk * row;
    rows = own + warps * kTile * row;
    seen = rows + warps * kTile * sizeof(Intervals);
    total = seen + chunk / kTile * sizeof(unsigned);
  }
};

// A warp's state: 16 queries, of which a lane holds parts of two, rows g and g + 8.
template <int D>
struct Running {
  float out[D / 8][4];
  float most[2], sum[2];
};

// Keys [begin, begin + count) of the sample into shared memory, a tile a warp; `seen`: for each
// tile, which of its keys some query sees.
template <typename T, int D>
__device__ __forceinline__ void stage_keys(const ForwardArguments<T>& a, const Sample& sample,
                                           int64_t head, int begin, int count, T* keys, T* values,
                                           unsigned* seen) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int warp = static_cast<int>(threadIdx.x) / kLanes;
  const int warps = static_cast<int>(blockDim.x) / kLanes;
#pragma unroll 1
  for (int tile = warp; tile * kTile < count; tile += warps) {
    const int first = begin + tile * kTile;
    const unsigned bits = __ballot_sync(common::kAllLanes, sample.seen(first + lane % kTile));
    const int64_t token = sample.k_begin + first;
    fetch_tile<T, D>(a.k, sample.batch, head, token, bits, a.dim, keys + tile * Tile<D>::kElements);
    fetch_tile<T, D>(a.v, sample.batch, head, token, bits, a.dim,
                     values + tile * Tile<D>::kElements);
    if (lane == 0) seen[tile] = bits & 0xffffu;
  }
  common::wait_for_copies();
  if (a.rope.table == nullptr) return;
#pragma unroll 1
  for (int tile = warp; tile * kTile < count; tile += warps) {
    const int own = begin + tile * kTile + lane % kTile;
    const Rows rows = own < sample.keys ? a.rope.rows(sample.k_index, own) : Rows{{0, 0, 0}};
    rotate_tile<T, D>(keys + tile * Tile<D>::kElements, a.rope, rows);
  }
}

// The groups of keys from `keys` on, which is key `key` of the sample. live, full: those that some
// query sees, and that all of them see whole; rows: what each query sees.
template <typename T, int D>
__device__ __forceinline__ void attend(uint32_t (&q)[D / 16][4], const T* own, const T* keys,
                                       const T* values, const unsigned* seen, int key,
                                       unsigned live, unsigned full, const Intervals* rows,
                                       float scale, Running<D>& state) {
  constexpr int kStride = Tile<D>::kStride, kElements = Tile<D>::kElements;
  const int t = static_cast<int>(threadIdx.x) % 4, g = static_cast<int>(threadIdx.x) % kLanes / 4;
  float scores[2 * kGroups<D>][4];
#pragma unroll
  for (int group = 0; group < kGroups<D>; ++group) {
    float(&left)[4] = scores[2 * group], (&right)[4] = scores[2 * group + 1];
    if (!(live >> group & 1u)) {
#pragma unroll
      for (int e = 0; e < 4; ++e) left[e] = right[e] = negative_infinity();
      continue;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) left[e] = right[e] = 0.f;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint32_t b[4];
      if constexpr (!kKeepQueries<D>) common::load_a(q[0], own + k * 16, kStride);
      uint32_t(&x)[4] = q[kKeepQueries<D> ? k : 0];
      common::load_b(b, keys + group * kElements + k * 16, kStride);
      common::mma<T>(left, x, b[0], b[1]);
      common::mma<T>(right, x, b[2], b[3]);
    }
    if (full >> group & 1u) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        note_infinite<T>(left[e], state.sum[e / 2]);
        note_infinite<T>(right[e], state.sum[e / 2]);
      }
    } else {
      const unsigned bits = seen[group];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at = 2 * t + e % 2, first = key + group * kTile;
        const Intervals& row = rows[g + e / 2 * 8];
        const bool sees_left = (bits >> at & 1u) && row.has(first + at);
        const bool sees_right = (bits >> (at + 8) & 1u) && row.has(first + at + 8);
        note_infinite<T>(sees_left ? left[e] : 0.f, state.sum[e / 2]);
        note_infinite<T>(sees_right ? right[e] : 0.f, state.sum[e / 2]);
        if (!sees_left) left[e] = negative_infinity();
        if (!sees_right) right[e] = negative_infinity();
      }
    }
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float most = negative_infinity();
#pragma unroll
    for (int n = 0; n < 2 * kGroups<D>; ++n) {
      most = fmaxf(most, fmaxf(scores[n][2 * row], scores[n][2 * row + 1]));
    }
    most = row_max(most);
    const bool none = most == negative_infinity() && state.most[row] == negative_infinity();
    most = fmaxf(state.most[row], most * scale);
    const float base = none ? 0.f : most;
    const float rescale = exp2f(state.most[row] - base);
    state.most[row] = most;
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < 2 * kGroups<D>; ++n) {
#pragma unroll
      for (int e = 2 * row; e < 2 * row + 2; ++e) {
        scores[n][e] = exp2f(fmaf(scores[n][e], scale, -base));
        sum += scores[n][e];
      }
    }
    state.sum[row] = state.sum[row] * rescale + sum;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      state.out[n][2 * row] *= rescale;
      state.out[n][2 * row + 1] *= rescale;
    }
  }
#pragma unroll
  for (int group = 0; group < kGroups<D>; ++group) {
    if (!(live >> group & 1u)) continue;
    uint32_t weights[4];
    common::as_a<T>(weights, scores[2 * group], scores[2 * group + 1]);
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];
      common::load_b_transposed(b, values + group * kElements + n * 16, kStride);
      common::mma<T>(state.out[2 * n], weights, b[0], b[1]);
      common::mma<T>(state.out[2 * n + 1], weights, b[2], b[3]);
    }
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(D <= 96 ? kMostWarps * kLanes : kThreads168, D <= 96 ? 2 : 1)
    attention_forward(const ForwardArguments<T> a) {
  constexpr int kElements = Tile<D>::kElements, kStride = Tile<D>::kStride;
  DYNAMIC_SHARED(unsigned char, memory);
  const int lane = static_cast<int>(threadIdx.x) % kLanes, g = lane / 4, t = lane % 4;
  const int warp = static_cast<int>(threadIdx.x) / kLanes;
  const int warps = static_cast<int>(blockDim.x) / kLanes;
  const ForwardShared parts(D, a.chunk, warps);
  Sample& sample = *reinterpret_cast<Sample*>(memory);
  T* const keys = reinterpret_cast<T*>(memory + parts.keys);
  T* const values = reinterpret_cast<T*>(memory + parts.values);
  T* const own = reinterpret_cast<T*>(memory + parts.own) + warp * kElements;
  Intervals* const rows = reinterpret_cast<Intervals*>(memory + parts.rows) + warp * kTile;
  unsigned* const seen = reinterpret_cast<unsigned*>(memory + parts.seen);
  const int head = static_cast<int>(blockIdx.x % a.heads);
  if (threadIdx.x == 0) sample = sample_of(a.masks, a.rope, blockIdx.x / a.heads);
  __syncthreads();
  const int count = sample.rules.keys;  // without what is padding to all

#pragma unroll 1
  for (int first = 0; first < sample.queries; first += warps * kTile) {
    const int query = first + warp * kTile;
    const int here = min(kTile, sample.queries - query);  // may be negative: a warp without queries
    const bool valid = lane % kTile < here;
    const unsigned bits = __ballot_sync(common::kAllLanes, valid);
    const Rows own_rows =
        valid ? a.rope.rows(sample.q_index, query + lane % kTile) : Rows{{0, 0, 0}};
    __syncwarp();  // the tile may still be copied out
    fetch_tile<T, D>(a.q, sample.batch, head, sample.q_begin + query, bits, a.dim, own);
    common::wait_for_copies();
    rotate_tile<T, D>(own, a.rope, own_rows);
    if (a.negate) negate_tile<T, D>(own);
    __syncwarp();
    uint32_t q[D / 16][4];
    if constexpr (kKeepQueries<D>) {
#pragma unroll
      for (int k = 0; k < D / 16; ++k) common::load_a(q[k], own + k * 16, kStride);
    }
    // Rows past the last query see what it sees, so that they make no group look half hidden.
    if (lane < kTile) {
      rows[lane] = sample.sees(here > 0 ? min(query + lane, sample.queries - 1) : sample.queries);
    }
    __syncwarp();
    Running<D> state;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) state.out[n][e] = 0.f;
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) state.most[row] = negative_infinity(), state.sum[row] = 0.f;

#pragma unroll 1
    for (int begin = 0; begin < count; begin += a.chunk) {
      const int keys_here = min(a.chunk, count - begin);
      if (first == 0 || count > a.chunk) {
        __syncthreads();  // the chunk before may still be read
        stage_keys<T, D>(a, sample, head, begin, keys_here, keys, values, seen);
        __syncthreads();
      }
#pragma unroll 1
      for (int at = 0; at < keys_here; at += kGroups<D> * kTile) {
        const Intervals mine = rows[lane % kTile];
        unsigned live = 0, full = 0;
#pragma unroll
        for (int group = 0; group < kGroups<D>; ++group) {
          const int tile = at + group * kTile, key = begin + tile;
          const unsigned keep = tile < keys_here ? seen[tile / kTile] : 0u;
          const bool any = keep != 0u && overlaps(mine, key);
          const bool all = keep == 0xffffu && covers(mine, key);
          live |= static_cast<unsigned>(__any_sync(common::kAllLanes, any)) << group;
          full |= static_cast<unsigned>(__all_sync(common::kAllLanes, all)) << group;
        }
        if (live == 0u) continue;
        attend<T, D>(q, own, keys + at * kStride, values + at * kStride, seen + at / kTile,
                     begin + at, live, full, rows, a.scale, state);
      }
    }

#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float sum = row_sum(state.sum[row]);
      const float inverse = sum == 0.f ? 0.f : 1.f / sum;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        state.out[n][2 * row] *= inverse;
        state.out[n][2 * row + 1] *= inverse;
      }
      if (t == 0 && g + 8 * row < here) {
        const float lse = sum == 0.f ? negative_infinity() : state.most[row] + log2f(sum);
        const int64_t token = sample.q_begin + query + g + 8 * row;
        a.lse[(sample.batch * a.heads + head) * a.tokens + token] = lse;
      }
    }
    __syncwarp();
#pragma unroll
    for (int n = 0; n < D / 8; ++n) write_pair(own + n * 8, kStride, state.out[n]);
    __syncwarp();
    const int64_t token = sample.batch * a.tokens + sample.q_begin + query;
    copy_out<T, D>(own, a.out + (token * a.heads + head) * a.dim, a.heads * a.dim, here, a.dim);
  }
}

}  // namespace attention::kernels
