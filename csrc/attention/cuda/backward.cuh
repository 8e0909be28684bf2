// The backward kernel: a block is one (sample, head), a warp 16 of its keys.
//
// With P = exp(scale Q K^T - lse) and delta = sum of grad * out over a query's row,
//
//   dV = P^T grad      dS = P * (grad V^T - delta)      dK = scale dS^T Q      dQ = scale dS K
//
// five products and no atomics: a warp keeps dK and dV of its keys in registers while `chunk`
// queries at a time, all of a short sample's, pass through shared memory. It works on the transposed scores, so that P^T and
// dS^T are the A operands of its next products as they lie in registers. dS^T also goes to shared
// memory, [keys, chunk], from where all warps form dQ of the chunk, each sum in the order of keys.
// A block has at most 8 warps, 128 keys; of longer samples it takes 128 keys after the other, and
// dQ is summed in float32 in `partial` by the thread that added to it before.
#pragma once

#include "attention/cuda/forward.cuh"

namespace attention::kernels {

template <typename T>
struct BackwardArguments {
  Heads<T> grad, q, k, v, out;
  const float* lse;  // [B, H, T]
  T *dq, *dk, *dv;   // [B, T, H, d], null where not needed
  float* partial;    // like dq, null where a block takes all keys at once
  Masks masks;
  Rope rope;
  int64_t heads, tokens, key_tokens;
  int dim, chunk;  // chunk: a multiple of 16
  float scale;
};

// What the products need of a query beside its rows.
struct Query {
  Intervals seen;
  Rows rows;
  float lse, delta;  // lse in base 2
};

// The parts of shared memory, in bytes from its start, where the sample lies. A tile of values
// follows its tile of keys, a tile of grad its tile of queries, so that a lane addresses both with
// one register.
struct BackwardShared {
  size_t keys, queries, scores, notes, live, total;  // `out`, for delta alone, lies in scores

  __host__ __device__ BackwardShared(int padded_dim, int warps, int chunk) {
    const size_t row = 2 * (padded_dim + 8), count = static_cast<size_t>(warps) * kTile;
    keys = sizeof(Sample);
    queries = keys + 2 * count * row;
    scores = queries + 2 * chunk * row;
    const size_t slopes = count * 2 * (chunk + 8), outs = chunk * row;
    notes = scores + (slopes > outs ? slopes : outs);
    live = notes + chunk * sizeof(Query);
    total = live + static_cast<size_t>(warps) * (chunk / kTile);
  }
};

// The sum over the row of token lane % 16 of the product of two tiles, of vectors that the lane
// itself brought.
template <typename T, int D>
__device__ __forceinline__ float row_products(const T* x, const T* y) {
  using Shape = Tile<D>;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  float result = 0.f;
#pragma unroll 1
  for (int step = 0; step < Shape::kSteps; ++step) {
    float sum = 0.f;
    if (Shape::vector() < Shape::kVectors) {
      const int at = Shape::row(step) * Shape::kStride + Shape::vector() * 8;
      const uint4 left = *reinterpret_cast<const uint4*>(x + at);
      const uint4 right = *reinterpret_cast<const uint4*>(y + at);
      const auto add = [&](unsigned a, unsigned b) {
        const float2 u = common::unpack<T>(a), w = common::unpack<T>(b);
        sum += u.x * w.x + u.y * w.y;
      };
      add(left.x, right.x), add(left.y, right.y), add(left.z, right.z), add(left.w, right.w);
    }
#pragma unroll
    for (int offset = Shape::kRowLanes / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(common::kAllLanes, sum, offset);
    }
    const int mine = lane % kTile - step * Shape::kRowsAtOnce;  // the lane's token in this step
    const float product = __shfl_sync(common::kAllLanes, sum,
                                      (mine & (Shape::kRowsAtOnce - 1)) * Shape::kRowLanes);
    if (mine >= 0 && mine < Shape::kRowsAtOnce) result = product;
  }
  return result;
}

// Zeros in the rows of a tile whose bit is not set in `kept`, where the lane itself brought them.
template <typename T, int D>
__device__ __forceinline__ void clear_rows(T* tile, unsigned kept) {
  using Shape = Tile<D>;
  if (Shape::vector() >= Shape::kVectors) return;
#pragma unroll 1
  for (int step = 0; step < Shape::kSteps; ++step) {
    const int row = Shape::row(step);
    if ((kept >> row & 1u) != 0u) continue;
    *reinterpret_cast<uint4*>(tile + row * Shape::kStride + Shape::vector() * 8) = {0u, 0u, 0u, 0u};
  }
}

// Queries [begin, begin + count) of the sample into shared memory, a tile a warp; `outs`: a tile of
// `out` a tile of queries. All copies are on their way together, the caller's too, before anything
// waits. A query that sees no key is zeros then, as is what lies past the last query.
template <typename T, int D>
__device__ __forceinline__ void stage_queries(const BackwardArguments<T>& a, const Sample& sample,
                                              int64_t head, int begin, int count, T* queries,
                                              T* outs, Query* notes) {
  using Shape = Tile<D>;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int warp = static_cast<int>(threadIdx.x) / kLanes;
  const int warps = static_cast<int>(blockDim.x) / kLanes;
#pragma unroll 1
  for (int tile = warp; tile * kTile < count; tile += warps) {
    const int first = begin + tile * kTile, own = first + lane % kTile;
    const int64_t token = sample.q_begin + first;
    const bool there = own < sample.queries;
    const unsigned range = __ballot_sync(common::kAllLanes, there) & 0xffffu;
    T* const q = queries + tile * 2 * Shape::kElements;
    T* const grad = q + Shape::kElements;
    T* const out = outs + tile * Shape::kElements;
    fetch_tile<T, D>(a.grad, sample.batch, head, token, range, a.dim, grad);
    fetch_tile<T, D>(a.out, sample.batch, head, token, range, a.dim, out);
    fetch_tile<T, D>(a.q, sample.batch, head, token, range, a.dim, q);
    float lse = negative_infinity();
    if (there) lse = a.lse[(sample.batch * a.heads + head) * a.tokens + sample.q_begin + own];
    const bool valid = lse != negative_infinity();
    const unsigned bits = __ballot_sync(common::kAllLanes, valid) & 0xffffu;
    const Rows rows = valid ? a.rope.rows(sample.q_index, own) : Rows{{0, 0, 0}};
    common::wait_for_copies();
    if (bits != range) {
      clear_rows<T, D>(q, bits);
      clear_rows<T, D>(grad, bits);
    }
    const float delta = row_products<T, D>(grad, out);
    rotate_tile<T, D>(q, a.rope, rows);
    if (lane < kTile) {
      const Intervals none = {{0, 0}, {0, 0}};
      notes[tile * kTile + lane] = {valid ? sample.sees(own) : none, rows, lse, delta};
    }
  }
}

// Where a key lies in the rope's table.
__device__ __forceinline__ Rows key_rows(const Rope& rope, const Sample& sample, int key) {
  return key < sample.keys ? rope.rows(sample.k_index, key) : Rows{{0, 0, 0}};
}

// A warp's sums for its 16 keys.
template <int D>
struct KeyGradients {
  float k[D / 8][4], v[D / 8][4];
};

// One tile of queries against the warp's keys, from `key` on; `bits`: which of these some query
// sees. Adds to the sums and leaves dS^T [16, 16] in `scores`. Returns whether any pair is seen.
template <typename T, int D>
__device__ __forceinline__ bool add_queries(const BackwardArguments<T>& a, const T* keys,
                                            const T* queries, const Query* notes, int key,
                                            unsigned bits, T* scores, KeyGradients<D>& sums) {
  constexpr int kStride = Tile<D>::kStride;
  const T *const values = keys + Tile<D>::kElements, *const grads = queries + Tile<D>::kElements;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, g = lane / 4, t = lane % 4;
  const Intervals own = notes[lane % kTile].seen;
  const bool any = bits != 0u && overlaps(own, key);
  const bool all = bits == 0xffffu && covers(own, key);
  if (!__any_sync(common::kAllLanes, any)) return false;
  const bool full = __all_sync(common::kAllLanes, all);

  float p[2][4] = {}, ds[2][4] = {};
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t x[4], b[4];
    common::load_a(x, keys + k * 16, kStride);
    common::load_b(b, queries + k * 16, kStride);
    common::mma<T>(p[0], x, b[0], b[1]);
    common::mma<T>(p[1], x, b[2], b[3]);
    common::load_a(x, values + k * 16, kStride);
    common::load_b(b, grads + k * 16, kStride);
    common::mma<T>(ds[0], x, b[0], b[1]);
    common::mma<T>(ds[1], x, b[2], b[3]);
  }
  // Bit 4 n + e: whether the pair of that result is seen.
  unsigned seen = 0xffu;
  if (!full) {
    seen = 0u;
#pragma unroll 1  // few registers
    for (int i = 0; i < 4; ++i) {
      const Intervals& query = notes[i / 2 * 8 + 2 * t + i % 2].seen;
      const unsigned first = (bits >> g & 1u) != 0u && query.has(key + g);
      const unsigned second = (bits >> (g + 8) & 1u) != 0u && query.has(key + g + 8);
      seen |= (first | second << 2) << (i / 2 * 4 + i % 2);
    }
  }
  const float scale = a.scale * kLog2E;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const Query& query = notes[n * 8 + 2 * t + e % 2];
      const bool own = (seen >> (4 * n + e) & 1u) != 0u;
      p[n][e] = own ? exp2f(p[n][e] * scale - query.lse) : 0.f;
      ds[n][e] = own ? p[n][e] * (ds[n][e] - query.delta) : 0.f;
    }
  }
  uint32_t x[4];
  if (a.dv != nullptr) {
    common::as_a<T>(x, p[0], p[1]);
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];
      common::load_b_transposed(b, grads + n * 16, kStride);
      common::mma<T>(sums.v[2 * n], x, b[0], b[1]);
      common::mma<T>(sums.v[2 * n + 1], x, b[2], b[3]);
    }
  }
  common::as_a<T>(x, ds[0], ds[1]);
  if (a.dk != nullptr) {
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];
      common::load_b_transposed(b, queries + n * 16, kStride);
      common::mma<T>(sums.k[2 * n], x, b[0], b[1]);
      common::mma<T>(sums.k[2 * n + 1], x, b[2], b[3]);
    }
  }
  if (a.dq != nullptr) {
    const int stride = a.chunk + 8;
    T* at = scores + g * stride + 2 * t;
    *reinterpret_cast<uint32_t*>(at) = x[0];
    *reinterpret_cast<uint32_t*>(at + 8 * stride) = x[1];
    *reinterpret_cast<uint32_t*>(at + 8) = x[2];
    *reinterpret_cast<uint32_t*>(at + 8 * stride + 8) = x[3];
  }
  return true;
}

// 16 columns of dQ of a tile of queries, from dS^T of the block's keys, into `to` [16, kStride];
// live: for each tile of keys, whether there is a dS^T. token: the first query, of `here`.
template <typename T, int D>
__device__ __forceinline__ void query_gradient(const BackwardArguments<T>& a, int64_t head,
                                               int64_t token, int here, int column, const T* keys,
                                               const T* scores, const unsigned char* live,
                                               const Query* notes, bool first, bool last, T* to) {
  constexpr int kStride = Tile<D>::kStride;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, g = lane / 4, t = lane % 4;
  const int warps = static_cast<int>(blockDim.x) / kLanes;
  float sums[2][4] = {};
#pragma unroll 1
  for (int tile = 0; tile < warps; ++tile) {
    if (!live[tile]) continue;
    uint32_t x[4], b[4];
    common::load_a_transposed(x, scores + tile * kTile * (a.chunk + 8), a.chunk + 8);
    common::load_b_transposed(b, keys + tile * 2 * Tile<D>::kElements + column, kStride);
    common::mma<T>(sums[0], x, b[0], b[1]);
    common::mma<T>(sums[1], x, b[2], b[3]);
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int at = column + n * 8 + 2 * t, query = g + 8 * row;
      float &even = sums[n][2 * row], &odd = sums[n][2 * row + 1];
      if (a.partial != nullptr && query < here && at < a.dim) {
        float2* kept = reinterpret_cast<float2*>(
            a.partial + ((token + query) * a.heads + head) * a.dim + at);
        if (!first) {
          const float2 before = *kept;
          even += before.x, odd += before.y;
        }
        if (!last) *kept = make_float2(even, odd);
      }
      even *= a.scale, odd *= a.scale;
      if (last && a.rope.table != nullptr) {
        a.rope.turn_pair(even, odd, notes[query].rows, at, true);
      }
    }
    if (last) write_pair(to + column + n * 8, kStride, sums[n]);
  }
}

// dK or dV of a warp's tile: rounded into `tile`, which no one reads any more, and out of it.
template <typename T, int D>
__device__ __forceinline__ void write_key_gradient(float (&sums)[D / 8][4], T* tile, T* to,
                                                   int64_t stride, int here, int dim) {
  __syncwarp();
#pragma unroll
  for (int n = 0; n < D / 8; ++n) write_pair(tile + n * 8, Tile<D>::kStride, sums[n]);
  __syncwarp();
  copy_out<T, D>(tile, to, stride, here, dim);
}

// Whether keys are turned before the queries' copies are issued. That waits once more, but for sm_80
// nvcc spills up to 16 bytes of head dim 80 where the loop over queries turns them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kTurnFirst = true;
#else
constexpr bool kTurnFirst = false;
#endif

// Warps that a multiprocessor's registers hold, as the bounds below and nvcc leave it.
template <int D>
constexpr int kResidentWarps = D <= 64 ? 16 : D == 80 ? 12 : 8;

template <typename T, int D>
__global__ void __launch_bounds__(D == 80 ? kThreads168 : kMostWarps * kLanes, D <= 64 ? 2 : 1)
    attention_backward(const BackwardArguments<T> a) {
  constexpr int kElements = Tile<D>::kElements, kPair = 2 * kElements;
  DYNAMIC_SHARED(unsigned char, memory);
  const int lane = static_cast<int>(threadIdx.x) % kLanes, g = lane / 4, t = lane % 4;
  const int warp = static_cast<int>(threadIdx.x) / kLanes;
  const int warps = static_cast<int>(blockDim.x) / kLanes;
  const BackwardShared parts(D, warps, a.chunk);
  Sample& sample = *reinterpret_cast<Sample*>(memory);
  T* const keys = reinterpret_cast<T*>(memory + parts.keys);
  T* const queries = reinterpret_cast<T*>(memory + parts.queries);
  T* const scores = reinterpret_cast<T*>(memory + parts.scores);
  Query* const notes = reinterpret_cast<Query*>(memory + parts.notes);
  unsigned char* const live = memory + parts.live;
  T* const own_keys = keys + warp * kPair;
  T* const own_values = own_keys + kElements;
  const int head = static_cast<int>(blockIdx.x % a.heads);
  if (threadIdx.x == 0) sample = sample_of(a.masks, a.rope, blockIdx.x / a.heads);
  __syncthreads();
  const int64_t row = a.heads * a.dim;  // from token to token of a gradient
  const int block_keys = warps * kTile;

  int begin = 0;
  do {  // also without keys, for the queries' zeros
    const int key = begin + warp * kTile;
    const bool last_keys = begin + block_keys >= sample.keys;
    const bool valid = sample.seen(key + lane % kTile);
    const unsigned bits = __ballot_sync(common::kAllLanes, valid) & 0xffffu;
    {
      const int64_t token = sample.k_begin + key;
      __syncwarp();  // the tiles may still be copied out
      fetch_tile<T, D>(a.k, sample.batch, head, token, bits, a.dim, own_keys);
      fetch_tile<T, D>(a.v, sample.batch, head, token, bits, a.dim, own_values);
    }
    KeyGradients<D> sums;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums.k[n][e] = sums.v[n][e] = 0.f;
    }

    if (kTurnFirst) {
      common::wait_for_copies();
      rotate_tile<T, D>(own_keys, a.rope, key_rows(a.rope, sample, key + lane % kTile));
    }
#pragma unroll 1
    for (int from = 0; from < sample.queries; from += a.chunk) {
      const int here = min(a.chunk, sample.queries - from);
      const int tiles = (here + kTile - 1) / kTile;
      stage_queries<T, D>(a, sample, head, from, here, queries, scores, notes);
      if (from == 0 && !kTurnFirst) {
        common::wait_for_copies();  // a warp without queries has not waited yet
        rotate_tile<T, D>(own_keys, a.rope, key_rows(a.rope, sample, key + lane % kTile));
      }
      __syncthreads();
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) {
        const bool any = add_queries<T, D>(
            a, own_keys, queries + tile * kPair, notes + tile * kTile, key, bits,
            scores + warp * kTile * (a.chunk + 8) + tile * kTile, sums);
        if (lane == 0) live[tile * warps + warp] = any;
      }
      __syncthreads();
      if (a.dq == nullptr) continue;
      const int64_t token = sample.batch * a.tokens + sample.q_begin + from;
#pragma unroll 1
      for (int unit = warp; unit < tiles * (D / 16); unit += warps) {
        const int tile = unit % tiles, column = unit / tiles * 16;
        query_gradient<T, D>(a, head, token + tile * kTile, here - tile * kTile, column, keys,
                             scores + tile * kTile, live + tile * warps, notes + tile * kTile,
                             begin == 0, last_keys, queries + tile * kPair);
      }
      __syncthreads();
      if (!last_keys) continue;
#pragma unroll 1
      for (int tile = warp; tile < tiles; tile += warps) {  // as stage_queries shares them out
        copy_out<T, D>(queries + tile * kPair,
                       a.dq + (token + tile * kTile) * row + head * a.dim, row,
                       here - tile * kTile, a.dim);
      }
      __syncwarp();
    }

    common::wait_for_copies();  // of a sample without queries
    const int here = sample.keys - key;
    const int64_t at = (sample.batch * a.key_tokens + sample.k_begin + key) * row + head * a.dim;
    if (a.dv != nullptr) write_key_gradient<T, D>(sums.v, own_values, a.dv + at, row, here, a.dim);
    if (a.dk != nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Rows own = key_rows(a.rope, sample, key + g + 8 * half);
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          float &even = sums.k[n][2 * half], &odd = sums.k[n][2 * half + 1];
          even *= a.scale, odd *= a.scale;
          if (a.rope.table != nullptr) a.rope.turn_pair(even, odd, own, n * 8 + 2 * t, true);
        }
      }
      write_key_gradient<T, D>(sums.k, own_keys, a.dk + at, row, here, a.dim);
    }
    begin += block_keys;
  } while (begin < sample.keys);
}

}  // namespace attention::kernels
