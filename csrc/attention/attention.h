// The attention ops as each compiled library provides them; vicreg_kernels/attention/contract.py
// documents every tensor.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace attention {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Tokens of a sample and tokens a frame are counted as int32 in the kernels.
constexpr int64_t kMostTokens = int64_t{1} << 30;

// -> out, lse.
std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Optional q_offsets,
                                   Optional k_offsets, Optional lengths, Optional keep,
                                   Optional bounds, int64_t max_q, int64_t max_k,
                                   int64_t tokens_per_frame, int64_t window, Optional table,
                                   Optional q_index, Optional k_index, std::vector<int64_t> grid,
                                   double scale);

// -> gradients of q, k and v, empty where not needed.
std::tuple<Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Optional q_offsets,
    Optional k_offsets, Optional lengths, Optional keep, Optional bounds, int64_t max_q,
    int64_t max_k, int64_t tokens_per_frame, int64_t window, Optional table, Optional q_index,
    Optional k_index, std::vector<int64_t> grid, bool need_q, bool need_k, bool need_v,
    double scale);

Tensor rotate(Tensor x, Tensor table, Optional index, Optional offsets, std::vector<int64_t> grid,
              bool adjoint);

}  // namespace attention
