// Masked attention on the CPU.
//
// Operations: 4 d forward and 10 d backward a head and pair of a query and a key that it sees (two
// products, and five: scores are made anew), and one exponential each way; bytes: every input once
// and every result once, O(T d) a head, so the products decide. They are hand-written
// (cpu/kernels.h), because torch's own ran at 110 GFLOP/s a core where the machine's AVX-512 peak
// was 325. Measured on one thread, AMD EPYC of family 26, float32: a backward over samples of 256
// to 1806 tokens 175 to 220, a forward with d >= 64 160 to 215; short samples (T = 69, d = 80) 103
// and 134, where copies and the last, part-filled panel of keys weigh more.
//
// A task is a sample and head, or a part of its queries where there are few (cpu/problem.h). It
// packs the keys it needs once, which drops what a boolean mask drops, and turns them by rotary
// position on the way; then tiles of 64 queries meet chunks of keys that they see. Forward keeps
// running maxima; backward takes chunks outermost, so that a chunk's keys, values and sums stay in
// cache while all queries pass by; chunks of twice that size were no faster.
// Threads take whole tasks, largest first: one parallel region a pass, besides those of the angles
// and of partial sums. Scratch is O(T d) a thread.
#include "attention/attention.h"
#include "attention/cpu/backward.h"
#include "attention/cpu/forward.h"

namespace attention {

using cpu::Problem;
using cpu::Result;
using cpu::Rotary;
using cpu::Tokens;

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Optional q_offsets,
                                   Optional k_offsets, Optional lengths, Optional keep,
                                   Optional bounds, int64_t, int64_t, int64_t tokens_per_frame,
                                   int64_t window, Optional table, Optional q_index,
                                   Optional k_index, std::vector<int64_t> grid, double scale) {
  const Problem p(q, k, q_offsets, k_offsets, lengths, keep, bounds, tokens_per_frame, window,
                  table, q_index, k_index, grid);
  const Result out(q, p.q_tokens);
  const Tensor lse =
      common::empty(q, {q.size(0), p.heads, p.q_tokens}, common::ScalarType::Float);
  const Tokens queries(q), keys(k), values(v);
  p.run([&] {
    return cpu::Forward(p, queries, keys, values, static_cast<float>(scale), out,
                        static_cast<float*>(lse.data_ptr()));
  });
  return {out.tensor(), lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Optional q_offsets,
    Optional k_offsets, Optional lengths, Optional keep, Optional bounds, int64_t, int64_t,
    int64_t tokens_per_frame, int64_t window, Optional table, Optional q_index, Optional k_index,
    std::vector<int64_t> grid, bool need_q, bool need_k, bool need_v, double scale) {
  const Problem p(q, k, q_offsets, k_offsets, lengths, keep, bounds, tokens_per_frame, window,
                  table, q_index, k_index, grid);
  const auto* logarithms = static_cast<const float*>(lse.const_data_ptr());
  const cpu::Inputs in = {Tokens(q),    Tokens(k),  Tokens(v),
                          Tokens(out),  Tokens(grad), logarithms,
                          static_cast<float>(scale)};
  const auto result = [](bool need, const Tensor& like) {
    return need ? std::optional<Result>(std::in_place, like, like.size(2)) : std::nullopt;
  };
  const auto dq = result(need_q, q), dk = result(need_k, k), dv = result(need_v, v);
  const cpu::Gradients to = {dq ? &*dq : nullptr, dk ? &*dk : nullptr, dv ? &*dv : nullptr};
  std::vector<cpu::Sums> partial(p.tasks.size());
  p.run([&] { return cpu::Backward(p, in, to, partial); });
  cpu::finish_parts(p, to, partial);
  const auto tensor = [](const std::optional<Result>& result, const Tensor& like) {
    return result ? result->tensor() : common::empty(like, {0}, like.scalar_type());
  };
  return {tensor(dq, q), tensor(dk, k), tensor(dv, v)};
}

Tensor rotate(Tensor x, Tensor table, Optional index, Optional offsets, std::vector<int64_t> grid,
              bool adjoint) {
  const int64_t tokens = x.size(2), heads = x.size(1);
  const int* at = cpu::integers(offsets);
  int64_t longest = tokens;
  if (offsets) longest = cpu::check_offsets("offsets", *offsets, tokens);
  const Tensor* own = index ? &*index : nullptr;
  cpu::check_places("index", own, grid, longest);
  const Rotary rotary(table, own, grid, longest);
  const Tokens source(x);
  const Result out(x, tokens);
  const int64_t row_cost = heads * x.size(3);
  torch::stable::parallel_for(
      0, x.size(0) * tokens, std::max<int64_t>(1, 32768 / row_cost),
      [&](int64_t first, int64_t last) {
        alignas(64) float row[128];
        int64_t sample = 0;
        for (int64_t i = first; i < last; ++i) {
          const int64_t batch = i / tokens, token = i % tokens;
          int64_t place = token;
          if (at != nullptr) {
            while (at[sample + 1] <= token) ++sample;
            place -= at[sample];
          }
          for (int64_t head = 0; head < heads; ++head) {
            source.copy(batch, head, token, row);
            rotary.apply(row, batch, token, place, adjoint);
            out.write(batch, head, token, row);
          }
        }
      });
  return out.tensor();
}

}  // namespace attention
