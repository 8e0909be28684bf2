// The EMA op as each compiled library provides it; op.py documents the arguments.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace ema {

using torch::stable::Tensor;

void update(std::vector<Tensor> targets, std::vector<Tensor> onlines, std::vector<Tensor> shadows,
            std::optional<Tensor> momentum_tensor, double momentum, bool stochastic, int64_t seed,
            std::optional<Tensor> step_tensor, int64_t step);

}  // namespace ema
