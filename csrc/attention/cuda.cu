// The attention op on CUDA for short sequences: what is launched, and why. Times: not measured yet.
//
// One launch forward and one backward, a block for each (sample, head). With n tokens of a sample,
// all seen, of D = d rounded up to 16, and 2-byte elements, a block
//
//   forward    moves 8 n d bytes (q, k, v, out once), does 4 n^2 D operations
//   backward   moves 16 n d bytes (grad, q, k, v, out; dq, dk, dv), does 10 n^2 D operations
//
// so per byte n D / 2d operations forward: below 256 tokens less than 128 x D / d where an H100
// (3.35 TB/s, about 600 TFLOP/s for mma.sync) balances at 180. The floor is the memory's:
//
//   I-JEPA ViT-H, B 128, H 16, d 80   69 tokens   90 MB   27 us forward, 54 us backward
//                                    110 tokens  144 MB   43 us          86 us
//   V-JEPA ViT-L, B 24, H 16, d 64   111 tokens   22 MB    7 us          13 us
//                                    240 tokens   47 MB   14 us          28 us
//
// A padded T x T or a mask would be read beside that; rules cost integers a token. Rounding d = 80
// to 128, as a power of two, would cost 1.6 times the operations and shared memory.
//
// Shared memory, n = 110, d = 80: forward 59 KB, 7 warps, registers 128 a thread: 2 blocks on a
// multiprocessor of an H100. The backward holds all queries of a sample beside all keys where that
// costs no block: what fits is counted from the registers first (queries_at_once). So 69 queries
// are 5 tiles at once, not 64 and 5, and every copy of the block is on its way before it waits:
//
//   n, d        warps   registers   blocks by registers   shared memory   blocks by shared memory
//   69, 64          5         128                     3           64 KB                         3
//   69, 80          5         168                     2           74 KB                         3
//   111, 64         7         128                     2           97 KB                         2
//   110, 80         7         168                     1          111 KB                         2
//   128, 64         8         128                     2          115 KB                         2
//
// 80 sums, two tiles of scores and addresses do not fit 128 registers without spilling, so d = 80
// stays at 12 warps. What does not fit a device's shared memory is taken in pieces: chunks of keys
// forward, of queries backward. Samples may be of any length, but beyond 128 keys the backward
// brings the queries in anew for each 128, which is why the public function stops at 256 tokens and
// leaves longer ones (V-JEPA's 303) to Triton until both are measured.
//
// Left out: a double buffer (with two blocks a multiprocessor one loads while the other
// multiplies), wgmma (sm_90 alone, and its 64-row tiles waste half of 69 tokens).
#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/attention.h"
#include "attention/cuda/backward.cuh"
#include "attention/cuda/forward.cuh"
#include "attention/cuda/rotate.cuh"
#include "common/cuda/launch.h"
#include "common/tensors.h"

namespace attention {
namespace {

using common::ceil_div, common::data, common::Queue, common::ScalarType;
using namespace kernels;

int to_tiles(int64_t tokens) {
  return static_cast<int>(std::max<int64_t>(ceil_div(tokens, kTile), 1));
}

const int* integers(const Optional& tensor) {
  return tensor ? static_cast<const int*>(tensor->const_data_ptr()) : nullptr;
}

// 16-byte vectors of T, which the head dim is a multiple of.
template <typename T>
Heads<T> view(const Tensor& x) {
  constexpr int64_t kVector = 16 / static_cast<int64_t>(sizeof(T));
  const Heads<T> result = {static_cast<const T*>(x.const_data_ptr()), x.stride(0), x.stride(1),
                           x.stride(2), x.stride(3), false};
  const bool aligned = result.column == 1 && result.batch % kVector == 0 &&
                       result.head % kVector == 0 && result.token % kVector == 0 &&
                       reinterpret_cast<uintptr_t>(result.data) % 16 == 0;
  return {result.data, result.batch, result.head, result.token, result.column, aligned};
}

struct Rotary {
  Optional table, q_index, k_index;
  std::vector<int64_t> grid;
};

Rope rope_of(const Rotary& rotary) {
  Rope rope = {};
  if (!rotary.table) return rope;
  rope.table = static_cast<const float*>(rotary.table->const_data_ptr());
  rope.part = static_cast<int>(rotary.table->size(1));
  rope.q_index = integers(rotary.q_index);
  rope.k_index = integers(rotary.k_index);
  const auto stride = [](const Optional& index) {
    return index && index->size(0) > 1 ? index->stride(0) : int64_t{0};
  };
  rope.q_index_stride = stride(rotary.q_index);
  rope.k_index_stride = stride(rotary.k_index);
  std::copy_n(rotary.grid.begin(), 3, rope.grid);
  rope.axes = static_cast<int>(rotary.grid[3]);
  return rope;
}

struct Rule {
  Optional q_offsets, k_offsets, lengths, keep, bounds;
  int64_t max_q, max_k, tokens_per_frame, window;
};

Masks masks_of(const Rule& rule, const Tensor& q, const Tensor& k) {
  Masks masks = {};
  masks.q_offsets = integers(rule.q_offsets);
  masks.k_offsets = integers(rule.k_offsets);
  masks.lengths = integers(rule.lengths);
  if (rule.keep) {
    masks.keep = static_cast<const bool*>(rule.keep->const_data_ptr());
    masks.keep_stride = rule.keep->stride(0);
  }
  if (rule.bounds) {
    masks.bounds = integers(rule.bounds);
    masks.block_count = static_cast<int>(rule.bounds->size(1)) - 1;
    masks.bounds_stride = rule.bounds->size(0) > 1 ? rule.bounds->stride(0) : 0;
  }
  // A frame longer than any sample is the whole of it.
  masks.frame = static_cast<int>(std::min(rule.tokens_per_frame, kMostTokens));
  masks.window = static_cast<int>(std::min(rule.window, kMostTokens));
  masks.queries = static_cast<int>(q.size(2));
  masks.keys = static_cast<int>(k.size(2));
  return masks;
}

unsigned blocks_of(const Rule& rule, const Tensor& q) {
  const int64_t samples = rule.q_offsets ? rule.q_offsets->size(0) - 1 : q.size(0);
  const int64_t blocks = samples * q.size(1);
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "attention: too many samples and heads");
  return static_cast<unsigned>(blocks);
}

// Uninitialised [B, H, T, d] that lies as [B, T, H, d].
Tensor empty_like_heads(const Tensor& x, ScalarType dtype) {
  const int64_t tokens = x.size(2), heads = x.size(1), dim = x.size(3);
  const Tensor base = common::empty(x, {x.size(0), tokens, heads, dim}, dtype);
  return common::strided(base, {x.size(0), heads, tokens, dim},
                         {tokens * heads * dim, dim, heads * dim, 1}, 0);
}

// run(element, integral_constant<int, D>) with D = d rounded up to 16.
template <typename F>
void by_kind(const Tensor& q, F&& run) {
  const auto with = [&](auto element) {
    switch (ceil_div(q.size(3), 16)) {
#define ATTENTION_DIM(n) \
  case n:                \
    return run(element, std::integral_constant<int, 16 * n>{})
      ATTENTION_DIM(1);
      ATTENTION_DIM(2);
      ATTENTION_DIM(3);
      ATTENTION_DIM(4);
      ATTENTION_DIM(5);
      ATTENTION_DIM(6);
      ATTENTION_DIM(7);
      ATTENTION_DIM(8);
#undef ATTENTION_DIM
      default:
        STD_TORCH_CHECK(false, "attention: head dim ", q.size(3), ", takes at most 128");
    }
  };
  STD_TORCH_CHECK(q.size(3) % 8 == 0, "attention: head dim ", q.size(3), ", takes a multiple of 8");
  if (q.scalar_type() == ScalarType::Half) return with(__half{});
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::BFloat16,
                  "attention on cuda: takes bfloat16 or float16");
  with(__nv_bfloat16{});
}

void check_fits(size_t bytes, const Queue& queue) {
  STD_TORCH_CHECK(bytes <= queue.shared_limit(), "attention on cuda: needs ", bytes,
                  " bytes of shared memory a block, this device has ", queue.shared_limit());
}

// As many warps as a pass over the tiles keeps busy, at most 8: 9 tiles take 2 passes of 5.
int warps_for(int tiles) {
  return static_cast<int>(ceil_div(tiles, ceil_div(tiles, kMostWarps)));
}

template <typename T, int D>
void forward_kernel(const Rule& rule, const Rotary& rotary, const Tensor& q, const Tensor& k,
                    const Tensor& v, double scale, const Tensor& out, const Tensor& lse) {
  const unsigned blocks = blocks_of(rule, q);
  if (blocks == 0) return;
  const Queue queue(q);
  int warps = warps_for(to_tiles(rule.max_q)), chunk = to_tiles(rule.max_k) * kTile;
  // All keys and fewer warps before all warps and fewer keys at once.
  while (warps > 4 && ForwardShared(D, chunk, warps).total > queue.shared_limit()) --warps;
  while (chunk > kTile && ForwardShared(D, chunk, warps).total > queue.shared_limit()) {
    chunk -= kTile;
  }
  const size_t shared = ForwardShared(D, chunk, warps).total;
  // Not 0, which times the -inf of a hidden score would be NaN; scores times this one are 0 too.
  const float least = std::numeric_limits<float>::denorm_min();
  const float factor = std::max(static_cast<float>(std::abs(scale) * M_LOG2E), least);
  check_fits(shared, queue);
  const ForwardArguments<T> arguments = {view<T>(q), view<T>(k), view<T>(v), data<T>(out),
                                         data<float>(lse), masks_of(rule, q, k), rope_of(rotary),
                                         q.size(1), q.size(2), static_cast<int>(q.size(3)), chunk,
                                         factor, scale < 0.0};
  queue.launch(&attention_forward<T, D>, blocks, warps * kLanes, shared, arguments);
}

// Tiles of queries that the backward holds: all of them, unless fewer blocks would then fit a
// multiprocessor's shared memory than fit its registers; then in equal parts, down to 4 tiles.
int queries_at_once(int padded_dim, int warps, int resident_warps, int tiles, const Queue& queue) {
  constexpr size_t kReserved = 1024;  // of each block, by the driver
  const size_t blocks = std::max(resident_warps / warps, 1);
  const size_t each = (queue.shared_limit() + kReserved) / blocks - kReserved;
  int most = tiles;
  while (most > 4 && BackwardShared(padded_dim, warps, most * kTile).total > each) --most;
  return static_cast<int>(ceil_div(tiles, ceil_div(tiles, most)));
}

template <typename T, int D>
void backward_kernel(const Rule& rule, const Rotary& rotary, const Tensor& grad, const Tensor& q,
                     const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                     double scale, const Optional& dq, const Optional& dk, const Optional& dv) {
  const unsigned blocks = blocks_of(rule, q);
  if (blocks == 0) return;
  const Queue queue(q);
  int warps = warps_for(to_tiles(rule.max_k));
  int chunk = queries_at_once(D, warps, kResidentWarps<D>, to_tiles(rule.max_q), queue) * kTile;
  // Fewer queries at once before fewer keys, which bring every query in once more.
  while (chunk > kTile && BackwardShared(D, warps, chunk).total > queue.shared_limit()) {
    chunk -= kTile;
  }
  while (warps > 1 && BackwardShared(D, warps, chunk).total > queue.shared_limit()) --warps;
  const size_t shared = BackwardShared(D, warps, chunk).total;
  check_fits(shared, queue);
  Optional partial;
  if (dq && rule.max_k > warps * kTile) partial = empty_like_heads(q, ScalarType::Float);
  const auto target = [](const Optional& x) { return x ? data<T>(*x) : nullptr; };
  const BackwardArguments<T> arguments = {
      view<T>(grad), view<T>(q), view<T>(k), view<T>(v), view<T>(out), data<float>(lse),
      target(dq), target(dk), target(dv), partial ? data<float>(*partial) : nullptr,
      masks_of(rule, q, k), rope_of(rotary), q.size(1), q.size(2), k.size(2),
      static_cast<int>(q.size(3)), chunk, static_cast<float>(scale)};
  queue.launch(&attention_backward<T, D>, blocks, warps * kLanes, shared, arguments);
}

}  // namespace

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Optional q_offsets,
                                   Optional k_offsets, Optional lengths, Optional keep,
                                   Optional bounds, int64_t max_q, int64_t max_k,
                                   int64_t tokens_per_frame, int64_t window, Optional table,
                                   Optional q_index, Optional k_index, std::vector<int64_t> grid,
                                   double scale) {
  const Rule rule = {q_offsets, k_offsets, lengths, keep, bounds,
                     max_q, max_k, tokens_per_frame, window};
  const Rotary rotary = {table, q_index, k_index, grid};
  const Tensor out = empty_like_heads(q, q.scalar_type());
  const Tensor lse = common::empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  by_kind(q, [&](auto element, auto dim) {
    forward_kernel<decltype(element), dim.value>(rule, rotary, q, k, v, scale, out, lse);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Optional q_offsets,
    Optional k_offsets, Optional lengths, Optional keep, Optional bounds, int64_t max_q,
    int64_t max_k, int64_t tokens_per_frame, int64_t window, Optional table, Optional q_index,
    Optional k_index, std::vector<int64_t> grid, bool need_q, bool need_k, bool need_v,
    double scale) {
  const Rule rule = {q_offsets, k_offsets, lengths, keep, bounds,
                     max_q, max_k, tokens_per_frame, window};
  const Rotary rotary = {table, q_index, k_index, grid};
  const auto gradient = [](const Tensor& x, bool need) {
    return need ? Optional(empty_like_heads(x, x.scalar_type())) : std::nullopt;
  };
  const Optional dq = gradient(q, need_q), dk = gradient(k, need_k), dv = gradient(v, need_v);
  if (need_q || need_k || need_v) {
    by_kind(q, [&](auto element, auto dim) {
      backward_kernel<decltype(element), dim.value>(rule, rotary, grad, q, k, v, out, lse, scale,
                                                    dq, dk, dv);
    });
  }
  const auto result = [&](const Optional& x) {
    return x ? *x : common::empty(q, {0}, q.scalar_type());
  };
  return {result(dq), result(dk), result(dv)};
}

Tensor rotate(Tensor x, Tensor table, Optional index, Optional offsets, std::vector<int64_t> grid,
              bool adjoint) {
  const Tensor out = empty_like_heads(x, x.scalar_type());
  if (x.numel() == 0) return out;
  const Rope rope = rope_of({table, index, std::nullopt, grid});
  const auto run = [&](auto element) {
    using T = decltype(element);
    const Queue queue(x);
    const RotateArguments<T> arguments = {
        view<T>(x), data<T>(out), rope, integers(offsets), x.size(0), x.size(1), x.size(2),
        offsets ? static_cast<int>(offsets->size(0)) - 1 : 1, static_cast<int>(x.size(3)), adjoint};
    const int64_t blocks = std::min<int64_t>(ceil_div(x.size(0) * x.size(2), common::kWarps),
                                             16 * queue.multiprocessors());
    queue.launch(arguments.x.vectors ? &attention_rotate<T, true> : &attention_rotate<T, false>,
                 static_cast<unsigned>(blocks), common::kThreads, 0, arguments);
  };
  common::by_dtype("attention_rotate", x.scalar_type(), run);
  return out;
}

}  // namespace attention
