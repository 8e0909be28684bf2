// Adaptive layer norm on CUDA: what is launched, and why. Times: not measured yet.
//
// With N = G T tokens of D elements of e bytes (y of e'):
//
//   op              launches                            bytes                     operations
//   norm forward    norm_rows                           2 e N D + 8 N             8 N D
//   norm backward   norm_gradients, 2 finish_vectors    3 e N D + 8 N             13 N D
//   gate forward    gate_rows                           (2 e + e') N D            2 N D
//   gate backward   gate_gradients, finish_vectors      (e + 2 e') N D            3 N D
//
// beside the vectors, of which a frame of T tokens reads and writes 1 / T as much. All are bound by
// memory: 8 x 16 x 196 tokens of 384 in bfloat16 are 19 MB a stream, so on an H100 (3.35 TB/s) the
// norm's floor is 12 us forward and 17 us backward, where 13 operations an element take 2 us of the
// float32 units. A frame's sums are finished by a launch of their own only where several blocks share
// the frame: as many as give a multiprocessor four, of at least four rounds each.
//
// No result depends on the host: no synchronisation, and all memory from torch's allocator, so CUDA
// graphs capture it. No float is added by an atomic.
#include <algorithm>

#include "adaln/adaln.h"
#include "adaln/cuda/gate.cuh"
#include "adaln/cuda/norm.cuh"
#include "common/checks.h"
#include "common/cuda/plan.cuh"

namespace adaln {
namespace {

using common::by_dtype, common::ceil_div, common::data, common::divider, common::grid;
using common::Queue, common::reading, common::ScalarType;
using namespace kernels;

bool in_float(const Tensor& z) { return z.scalar_type() == ScalarType::Float; }

void* memory(const Tensor& z) { return const_cast<void*>(z.const_data_ptr()); }

// Tokens [G, T, D], or vectors [G, D] as frames of one token.
Place place(const Tensor& z) {
  if (z.dim() == 2) return {z.stride(0), 0, z.stride(1)};
  return {z.stride(0), z.stride(1), z.stride(2)};
}

// Whether accesses of 16 bytes are aligned in every row; of nothing they are.
bool all_aligned(std::initializer_list<const Tensor*> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor* z) {
    return z->numel() == 0 || common::aligned(*z);
  });
}

template <typename Access>
Access access(const Tensor& z);

template <>
Strided access<Strided>(const Tensor& z) {
  if (z.numel() == 0) return {nullptr, {0, 0, 0}, 0};
  return {memory(z), place(z), common::dtype_code(z.scalar_type())};
}

// Of Typed<W, T> and Vector<W, T>.
template <typename Access>
Access access(const Tensor& z) {
  if (z.numel() == 0) return {};
  if constexpr (requires(Access a) { a.wide; }) {
    return {memory(z), place(z), in_float(z)};
  } else {
    return {static_cast<decltype(Access::data)>(memory(z)), place(z)};
  }
}

template <typename T>
struct Type {
  using type = T;
};

// run(types of tokens and of vectors) with the accesses that all of `tensors` allow.
template <typename F>
void by_access(std::initializer_list<const Tensor*> tensors, const Tensor& tokens, F&& run) {
  const bool wide = all_aligned(tensors);
  by_dtype("adaln", tokens.scalar_type(), [&](auto element) {
    using T = decltype(element);
    constexpr int W = 16 / static_cast<int>(sizeof(T));
    if (wide) {
      run(Type<Typed<W, T>>{}, Type<Vector<W, T>>{});
    } else {
      run(Type<Typed<1, T>>{}, Type<Vector<1, T>>{});
    }
  });
}

// The same with the type of a branch beside float32 tokens or tokens of its own dtype.
template <typename F>
void by_two(std::initializer_list<const Tensor*> tensors, const Tensor& tokens,
            const Tensor& branch, F&& run) {
  const bool wide = in_float(tokens) && !in_float(branch);
  const bool eight = !wide || branch.size(2) % 8 == 0;
  if (!eight || !all_aligned(tensors)) {
    run(Type<Strided>{}, Type<Strided>{}, Type<Strided>{});
    return;
  }
  by_dtype("adaln", branch.scalar_type(), [&](auto element) {
    using T = decltype(element);
    constexpr int W = 16 / static_cast<int>(sizeof(T));
    using Own = Typed<W, T>;
    using Gates = Vector<W, T>;
    if (wide) {
      run(Type<Typed<W, float>>{}, Type<Own>{}, Type<Gates>{});
    } else {
      run(Type<Own>{}, Type<Own>{}, Type<Gates>{});
    }
  });
}

// The warps that keep a token.
int warps_of(int64_t dim, int width) {
  int warps = 1;
  while (int64_t{warps} * kLanes * kElements < ceil_div(dim, width) * width) warps *= 2;
  return warps;
}

void check_longest(int64_t dim) {
  if (dim > kLongest) {
    common::refuse("x: got ", dim, " elements a token, takes at most ", kLongest);
  }
}

// How many blocks share a frame, for `wanted` in all, of at least four rounds of `at_once` tokens; of
// frames of one token, how many share all.
Cut cut(const Tensor& z, int64_t wanted, int64_t at_once) {
  const int64_t frames = z.size(0), tokens = z.size(1);
  const bool single = tokens == 1;
  const int64_t length = single ? frames : tokens, count = single ? 1 : frames;
  const int64_t parts =
      std::clamp<int64_t>(ceil_div(wanted, count), 1, ceil_div(length, 4 * at_once));
  const int64_t each = ceil_div(length, parts);
  return {frames, tokens, z.size(2), divider(ceil_div(length, each)), each};
}

Tensor empty_tokens(const Tensor& z, bool needed = true) {
  if (!needed) return common::empty(z, {0}, z.scalar_type());
  return common::empty(z, {z.size(0), z.size(1), z.size(2)}, z.scalar_type());
}

Tensor empty_vector(const Tensor& z, bool needed) {
  if (!needed) return common::empty(z, {0}, z.scalar_type());
  return common::empty(z, {z.size(0), z.size(1)}, z.scalar_type());
}

// Where blocks write a vector's gradient: `out` itself, or a row for each block.
Tensor sums_of(const Tensor& out, const Cut& q) {
  if (out.numel() == 0 || q.tokens == 1 || q.parts.by == 1) return out;
  return common::empty(out, {q.frames * q.parts.by, q.dim}, ScalarType::Float);
}

void finish(const Queue& queue, const Tensor& sums, const Cut& q, const Tensor& out) {
  if (sums.get() == out.get()) return;
  by_dtype("adaln", out.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const int64_t blocks = ceil_div(q.frames * q.dim, kThreads);
    queue.launch(&finish_vectors<T>, grid(std::min<int64_t>(blocks, 8 * queue.multiprocessors())),
                 kThreads, 0, reading<float>(sums), q.frames, divider(q.dim), q.parts.by,
                 data<T>(out));
  });
}

}  // namespace

std::tuple<Tensor, Tensor> norm_forward(Tensor x, Tensor shift, Tensor scale, double eps) {
  const int64_t frames = x.size(0), tokens = x.size(1), dim = x.size(2);
  check_longest(dim);
  const Tensor out = empty_tokens(x);
  const Tensor saved = common::empty(x, {frames, tokens, 2}, ScalarType::Float);
  const Queue queue(x);
  by_access({&x, &shift, &scale}, x, [&](auto t, auto v) {
    using Tokens = typename decltype(t)::type;
    using Vectors = typename decltype(v)::type;
    const int warps = warps_of(dim, Tokens::W);
    const int64_t blocks = ceil_div(frames * tokens, kWarps / warps);
    queue.launch(&norm_rows<Tokens, Vectors>,
                 grid(std::min<int64_t>(blocks, 16 * queue.multiprocessors())), kThreads, 0,
                 cut(x, 1, 1), divider(tokens), warps, 1.0 / static_cast<double>(dim),
                 static_cast<float>(eps), access<Tokens>(x), access<Vectors>(shift),
                 access<Vectors>(scale), access<Tokens>(out), data<float>(saved));
  });
  return {out, saved};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(Tensor grad, Tensor x, Tensor scale, Tensor saved,
                                                 bool need_x, bool need_vectors) {
  check_longest(x.size(2));
  const Tensor grad_x = empty_tokens(x, need_x);
  const Tensor grad_shift = empty_vector(scale, need_vectors);
  const Tensor grad_scale = empty_vector(scale, need_vectors);
  const Queue queue(x);
  by_access({&grad, &x, &scale}, x, [&](auto t, auto v) {
    using Tokens = typename decltype(t)::type;
    using Vectors = typename decltype(v)::type;
    const int warps = warps_of(x.size(2), Tokens::W);
    const Cut q = cut(x, 4 * queue.multiprocessors(), kWarps / warps);
    const Tensor to_shift = sums_of(grad_shift, q), to_scale = sums_of(grad_scale, q);
    const auto run = [&](auto kernel, int64_t blocks) {
      queue.launch(kernel, grid(blocks), kThreads, 0, q, warps,
                   1.0 / static_cast<double>(q.dim), need_x, need_vectors, access<Tokens>(grad),
                   access<Tokens>(x), access<Vectors>(scale), reading<float>(saved),
                   access<Tokens>(grad_x), access<Vectors>(to_shift), access<Vectors>(to_scale));
    };
    if (q.tokens == 1) {
      run(&norm_gradients<false, Tokens, Vectors>, q.parts.by);
    } else {
      run(&norm_gradients<true, Tokens, Vectors>, q.frames * q.parts.by);
    }
    finish(queue, to_shift, q, grad_shift);
    finish(queue, to_scale, q, grad_scale);
  });
  return {grad_x, grad_shift, grad_scale};
}

Tensor gate_forward(Tensor x, Tensor y, Tensor gate) {
  const Tensor out = empty_tokens(x);
  const Queue queue(x);
  by_two({&x, &y, &gate}, x, y, [&](auto t, auto b, auto v) {
    using Tokens = typename decltype(t)::type;
    using Branch = typename decltype(b)::type;
    using Gates = typename decltype(v)::type;
    const Cut q = cut(x, 1, 1);
    const int64_t tiles = ceil_div(q.dim, kLanes * Tokens::W);
    const int64_t blocks = ceil_div(q.frames * q.tokens * tiles, kWarps);
    queue.launch(&gate_rows<Tokens, Branch, Gates>,
                 grid(std::min<int64_t>(blocks, 32 * queue.multiprocessors())), kThreads, 0, q,
                 divider(q.tokens), divider(tiles), access<Tokens>(x), access<Branch>(y),
                 access<Gates>(gate), access<Tokens>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor> gate_backward(Tensor grad, Tensor y, Tensor gate, bool need_y,
                                         bool need_gate) {
  const Tensor grad_y = empty_tokens(y, need_y), grad_gate = empty_vector(gate, need_gate);
  const Queue queue(y);
  by_two({&grad, &y, &gate}, grad, y, [&](auto t, auto b, auto v) {
    using Tokens = typename decltype(t)::type;
    using Branch = typename decltype(b)::type;
    using Gates = typename decltype(v)::type;
    const int64_t tiles = ceil_div(y.size(2), kLanes * Tokens::W);
    const Cut q = cut(y, ceil_div(8 * queue.multiprocessors(), tiles), kWarps);
    const Tensor to_gate = sums_of(grad_gate, q);
    const auto run = [&](auto kernel, int64_t blocks) {
      queue.launch(kernel, grid(blocks * tiles), kThreads, 0, q, divider(tiles), need_y, need_gate,
                   access<Tokens>(grad), access<Branch>(y), access<Gates>(gate),
                   access<Branch>(grad_y), access<Gates>(to_gate));
    };
    if (q.tokens == 1) {
      run(&gate_gradients<false, Tokens, Branch, Gates>, q.parts.by);
    } else {
      run(&gate_gradients<true, Tokens, Branch, Gates>, q.frames * q.parts.by);
    }
    finish(queue, to_gate, q, grad_gate);
  });
  return {grad_y, grad_gate};
}

}  // namespace adaln
