// The kernels of the tokens ops as each compiled library provides them; contract.py documents them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace tokens {

using torch::stable::Tensor;

Tensor gather(Tensor x, Tensor index, std::optional<Tensor> offsets);

Tensor scatter(Tensor rows, Tensor index, std::optional<Tensor> offsets, int64_t batch,
               int64_t length, double fill, bool accumulate, bool reduce);

// -> loss, saved.
std::tuple<Tensor, Tensor> loss_forward(Tensor pred, Tensor teacher, Tensor index,
                                        std::optional<Tensor> offsets, int64_t kind, bool normalize,
                                        double beta, double eps);

Tensor loss_backward(Tensor grad, Tensor pred, Tensor teacher, Tensor index,
                     std::optional<Tensor> offsets, Tensor saved, int64_t kind, bool normalize,
                     double beta);

// -> index, context_rows, target_rows.
std::tuple<Tensor, Tensor, Tensor> order(Tensor context_index, Tensor target_index,
                                         std::optional<Tensor> context_offsets,
                                         std::optional<Tensor> target_offsets);

Tensor assemble(Tensor context, Tensor context_index, Tensor context_rows, Tensor target,
                Tensor target_index, Tensor target_rows, std::optional<Tensor> positions);

Tensor column_sum(Tensor sequence, Tensor rows);

}  // namespace tokens
