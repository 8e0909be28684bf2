// The tokens ops on CUDA: what is launched, and why. Times: not measured yet.
//
// With R rows of D elements kept of [B, T, D], S = Kc + Kt tokens a sequence, e bytes an element and
// i bytes an index:
//
//   op               launches                      bytes                            operations
//   gather           gather_rows                   2 e R D + i R                    none
//   scatter          map_tokens, scatter_rows      e (R + B T) D + 8 B T + i R      none
//   its sum          map_tokens, scatter_sums      the same                         R D
//   loss forward     loss_rows, loss_finish        (e + e') R D + 8 R + i R         13 R D
//   loss backward    gradient_rows                 (2 e + e') R D + 8 R + i R       6 R D
//   assembly         order_tokens, assemble_rows   e (Kc + S) D + 4 i S a sequence  S D
//   column sum       column_partials, _finish      e Kt D + 8 D x row blocks        Kt D
//
// All are bound by memory: on an H100 (3.35 TB/s) I-JEPA's 128 x 4 x 44 rows of 1280 in bfloat16 are
// 58 MB a stream, 35 us forward and 52 us backward at the peak rate, where 13 operations an element
// take 10 us of the float32 units. A warp a row with 16-byte accesses: a row of the loss has 2.5 to
// 5 KB, five pieces of 512 bytes a warp, so 16 warps a multiprocessor have 40 KB under way; 18 KB
// are needed to cover 700 ns at full rate. A block a row would have to meet twice at a barrier for
// every row; two passes over the teacher (a layer norm, then the loss) would move 1.5 times as much.
//
// No result depends on the host: no synchronisation, and all memory from torch's allocator, so CUDA
// graphs capture it. An index out of range is never followed: gather gives NaN, the loss is NaN,
// scatter leaves the row out.
#include <algorithm>

#include "common/cuda/launch.h"
#include "common/cuda/plan.cuh"
#include "tokens/cuda/assembly.cuh"
#include "tokens/host.h"
#include "tokens/cuda/loss.cuh"
#include "tokens/cuda/rows.cuh"
#include "tokens/tokens.h"

namespace tokens {
namespace {

using common::aligned, common::blocks_of_warps, common::by_dtype, common::by_kind;
using common::ceil_div, common::data, common::Queue, common::reading;
using namespace kernels;

constexpr int kRowBlocks = 16;  // a multiprocessor's, of warps that move rows

Place divided(const Place& p, int64_t by) { return {p.each, p.group / by, p.row / by, p.column}; }

// run(unit, elements a unit) with the widest unit that copies rows of z.
template <typename F>
void by_unit(const Tensor& z, F&& run) {
  const int64_t elements = common::pack_elements(z.scalar_type());
  if (aligned(z)) {
    run(uint4{}, elements);
  } else if (elements == 4) {
    run(uint32_t{}, int64_t{1});
  } else {
    run(uint16_t{}, int64_t{1});
  }
}

// The fill value, as often as a unit has room for it.
template <typename Unit>
Unit filling(double fill, ScalarType dtype) {
  Unit unit;
  by_dtype("tokens", dtype, [&](auto element) {
    using T = decltype(element);
    T values[sizeof(Unit) < sizeof(T) ? 1 : sizeof(Unit) / sizeof(T)];
    for (T& value : values) {
      if constexpr (std::is_same_v<T, float>) {
        value = static_cast<float>(fill);
      } else if constexpr (std::is_same_v<T, __half>) {
        value = __float2half_rn(static_cast<float>(fill));
      } else {
        value = __float2bfloat16_rn(static_cast<float>(fill));
      }
    }
    std::memcpy(&unit, values, std::min(sizeof unit, sizeof values));
  });
  return unit;
}

Strided strided(const Tensor& z) {
  return {const_cast<void*>(z.const_data_ptr()), place(z), common::dtype_code(z.scalar_type())};
}

template <typename T>
Aligned<T> vectors_of(const Tensor& z) {
  return {static_cast<T*>(const_cast<void*>(z.const_data_ptr())), place(z)};
}

// run(pred, teacher, out) with the accesses that both allow; out may be pred itself.
template <typename F>
void by_access(const Tensor& pred, const Tensor& teacher, const Tensor& out, F&& run) {
  const auto half = [](const Tensor& z) { return z.scalar_type() != ScalarType::Float; };
  const bool two_halves = half(pred) && half(teacher) && pred.scalar_type() != teacher.scalar_type();
  if (!aligned(pred, 8) || !aligned(teacher, 8) || two_halves) {  // float16 with bfloat16 is rare
    run(strided(pred), strided(teacher), strided(out));
    return;
  }
  by_dtype("tokens", pred.scalar_type(), [&](auto p) {
    by_dtype("tokens", teacher.scalar_type(), [&](auto t) {
      using P = decltype(p);
      using T = decltype(t);
      if constexpr (std::is_same_v<P, T> || std::is_same_v<P, float> || std::is_same_v<T, float>) {
        run(vectors_of<P>(pred), vectors_of<T>(teacher), vectors_of<P>(out));
      }
    });
  });
}

LossSettings settings(const Tensor& teacher, const Tensor& index,
                      const std::optional<Tensor>& offsets, int64_t kind, bool normalize,
                      double beta, double eps) {
  return {samples(index, offsets, teacher.size(0)),
          indices(index),
          teacher.size(1),
          teacher.size(2),
          1.0 / static_cast<double>(teacher.size(2)),
          static_cast<int>(kind),
          normalize,
          static_cast<float>(beta),
          beta > 0.0 ? static_cast<float>(1.0 / beta) : 0.f,
          static_cast<float>(eps)};
}

double loss_scale(const LossSettings& q) {
  return 1.0 / (static_cast<double>(q.rows.count) * (q.kind == kCosine ? 1 : q.dim));
}

}  // namespace

Tensor gather(Tensor x, Tensor index, std::optional<Tensor> offsets) {
  const Samples rows = samples(index, offsets, x.size(0));
  const Tensor out = empty_rows(index, x, x.scalar_type());
  if (rows.count == 0) return out;
  const Queue queue(x);
  by_unit(x, [&](auto unit, int64_t elements) {
    using Unit = decltype(unit);
    queue.launch(&gather_rows<Unit>, blocks_of_warps(rows.count, queue, kRowBlocks), kThreads,
                 0, reading<Unit>(x),
                 divided(place(x), elements), x.size(1), x.size(2) / elements, rows, indices(index),
                 data<Unit>(out));
  });
  return out;
}

Tensor scatter(Tensor rows, Tensor index, std::optional<Tensor> offsets, int64_t batch,
               int64_t length, double fill, bool accumulate, bool reduce) {
  const Samples all = samples(index, offsets, batch);
  const ScalarType dtype = rows.scalar_type();
  const int64_t dim = rows.size(rows.dim() - 1);
  STD_TORCH_CHECK(all.count < kNoRow, "tokens: takes fewer than 2^31 rows");
  const Tensor out = reduce ? common::empty(rows, {length, dim}, dtype)
                            : common::empty(rows, {batch, length, dim}, dtype);
  const Queue queue(rows);
  const Tensor maps = common::empty(rows, {2, batch, length}, ScalarType::Int);
  const TokenMap map = {data<int>(maps), data<int>(maps) + batch * length};
  queue.launch(&map_tokens, static_cast<unsigned>(batch), kThreads, 0, all, indices(index), length,
               map);
  const int64_t slots = reduce ? length : batch * length;
  const unsigned blocks = blocks_of_warps(slots, queue, kRowBlocks);
  if (!accumulate) {
    by_unit(rows, [&](auto unit, int64_t elements) {
      using Unit = decltype(unit);
      queue.launch(&scatter_rows<Unit>, blocks, kThreads, 0, reading<Unit>(rows),
                   divided(place(rows), elements), slots, dim / elements, map.last,
                   filling<Unit>(fill, dtype), data<Unit>(out));
    });
    return out;
  }
  by_kind("tokens", dtype, aligned(rows), [&](auto element, auto vectors) {
    using T = decltype(element);
    queue.launch(&scatter_sums<T, vectors>, blocks, kThreads, 0, reading<T>(rows), place(rows),
                 slots, divider(length), reduce ? batch : int64_t{1}, dim, indices(index), map,
                 data<T>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor> loss_forward(Tensor pred, Tensor teacher, Tensor index,
                                        std::optional<Tensor> offsets, int64_t kind, bool normalize,
                                        double beta, double eps) {
  const LossSettings q = settings(teacher, index, offsets, kind, normalize, beta, eps);
  const Tensor loss = torch::stable::new_empty(pred, {}, ScalarType::Float);
  const Tensor saved = common::empty(pred, {q.rows.count, saved_floats(kind)}, ScalarType::Float);
  const Queue queue(pred);
  const unsigned blocks = blocks_of_warps(q.rows.count, queue, 2);
  const Tensor partials = common::empty(pred, {blocks}, ScalarType::Double);
  by_access(pred, teacher, pred, [&](auto p, auto t, auto) {
    queue.launch(&loss_rows<decltype(p), decltype(t)>, blocks, kThreads, 0, q, p, t,
                 data<float>(saved), data<double>(partials));
  });
  queue.launch(&loss_finish, 1, kThreads, 0, reading<double>(partials), int64_t{blocks},
               loss_scale(q), data<float>(loss));
  return {loss, saved};
}

Tensor loss_backward(Tensor grad, Tensor pred, Tensor teacher, Tensor index,
                     std::optional<Tensor> offsets, Tensor saved, int64_t kind, bool normalize,
                     double beta) {
  const LossSettings q = settings(teacher, index, offsets, kind, normalize, beta, 0.0);
  const Tensor out = empty_rows(index, pred, pred.scalar_type());
  const Queue queue(pred);
  by_access(pred, teacher, out, [&](auto p, auto t, auto to) {
    using P = decltype(p);
    using T = decltype(t);
    constexpr decltype(&gradient_rows<kSmoothL1, P, T>) kernels[] = {
        &gradient_rows<kSmoothL1, P, T>, &gradient_rows<kL1, P, T>, &gradient_rows<kMse, P, T>,
        &gradient_rows<kCosine, P, T>};
    queue.launch(kernels[kind], blocks_of_warps(q.rows.count, queue, kRowBlocks), kThreads, 0, q,
                 p, t, reading<float>(saved), reading<float>(grad), loss_scale(q), to);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> order(Tensor context_index, Tensor target_index,
                                         std::optional<Tensor> context_offsets,
                                         std::optional<Tensor> target_offsets) {
  const bool packed = context_offsets.has_value();
  const int64_t batch = packed ? context_offsets->numel() - 1 : target_index.size(0);
  const int64_t contexts = packed ? batch : context_index.size(0);
  const int64_t kept = packed ? 0 : context_index.size(1);
  const int64_t total = packed ? context_index.numel() + target_index.numel()
                               : batch * (kept + target_index.size(1));
  const ScalarType dtype = context_index.scalar_type();
  const Tensor out = packed ? common::empty(context_index, {total}, dtype)
                            : common::empty(context_index, {batch, total / batch}, dtype);
  const Tensor context_rows = packed ? empty_like_index(context_index)
                                     : common::empty(context_index, {batch, kept}, dtype);
  const Tensor target_rows = empty_like_index(target_index);
  if (total == 0) return {out, context_rows, target_rows};
  Sequences q = {samples(context_index, context_offsets, contexts),
                 samples(target_index, target_offsets, batch),
                 indices(context_index),
                 indices(target_index),
                 indices(out),
                 indices(context_rows),
                 indices(target_rows),
                 divider(ceil_div(total, batch * 4 * kThreads))};
  if (!packed) {  // each = 0 is a sequence without such tokens
    q.context.each = divider(kept);
    q.target.each = divider(target_index.size(1));
  }
  const Queue queue(context_index);
  queue.launch(&order_tokens, static_cast<unsigned>(batch * q.blocks.by), kThreads, 0, q);
  return {out, context_rows, target_rows};
}

Tensor assemble(Tensor context, Tensor context_index, Tensor context_rows, Tensor target,
                Tensor target_index, Tensor target_rows, std::optional<Tensor> positions) {
  const int64_t sequences = target_index.size(0), kept = context.size(1), dim = context.size(2);
  const int64_t wanted = target_index.size(1);
  const ScalarType dtype = context.scalar_type();
  const bool single = target.dim() == 1;
  const Tensor out = common::empty(context, {sequences, kept + wanted, dim}, dtype);
  if (sequences * (kept + wanted) == 0) return out;
  const Queue queue(context);
  const auto at = [](const Tensor& z) { return reinterpret_cast<uintptr_t>(z.const_data_ptr()); };
  const bool vectors = aligned(context) && (single ? at(target) % 16 == 0 : aligned(target)) &&
                       (!positions || at(*positions) % 16 == 0);
  // Outside the braces below, in which they crash the device compiler of CUDA 13.0.
  const Place target_place = place(single ? context : target);
  const Divider contexts = divider(context.size(0)), all = divider(kept + wanted);
  by_kind("tokens", dtype, vectors, [&](auto element, auto wide) {
    using T = decltype(element);
    const Assembled<T> q = {sequences,
                            kept,
                            wanted,
                            dim,
                            positions ? positions->size(0) : 0,
                            contexts,
                            all,
                            reading<T>(context),
                            place(context),
                            single ? reading<float>(target) : nullptr,
                            single ? nullptr : reading<T>(target),
                            target_place,
                            positions ? reading<float>(*positions) : nullptr,
                            indices(context_index),
                            indices(context_rows),
                            indices(target_index),
                            indices(target_rows),
                            data<T>(out)};
    queue.launch(&assemble_rows<T, wide>,
                 blocks_of_warps(sequences * (kept + wanted), queue, kRowBlocks), kThreads, 0, q);
  });
  return out;
}

Tensor column_sum(Tensor sequence, Tensor rows) {
  const int64_t dim = sequence.size(2), count = rows.numel();
  const ScalarType dtype = sequence.scalar_type();
  const Tensor out = common::empty(sequence, {dim}, ScalarType::Float);
  const Queue queue(sequence);
  by_kind("tokens", dtype, aligned(sequence), [&](auto element, auto vectors) {
    using T = decltype(element);
    const int64_t tiles = ceil_div(dim, kLanes * kWidth<T, vectors>);
    const int64_t wanted = std::clamp<int64_t>(2 * queue.multiprocessors() / tiles, 1,
                                               std::max<int64_t>(1, count / 64));
    const int64_t block_rows = std::max<int64_t>(1, ceil_div(count, wanted));
    const int64_t blocks = ceil_div(count, block_rows);
    const Tensor partials = common::empty(sequence, {blocks, dim}, ScalarType::Float);
    if (blocks > 0) {
      queue.launch(&column_partials<T, vectors>, static_cast<unsigned>(tiles * blocks), kThreads, 0,
                   reading<T>(sequence), place(sequence), sequence.size(1), dim, count,
                   divider(rows.size(1)), indices(rows), divider(tiles), block_rows, data<float>(partials));
    }
    queue.launch(&column_finish, static_cast<unsigned>(ceil_div(dim, kThreads)), kThreads, 0,
                 reading<float>(partials), blocks, dim, data<float>(out));
  });
  return out;
}

}  // namespace tokens
