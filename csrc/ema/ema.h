// The EMA op as each compiled library provides it; op.py documents the arguments.
#pragma once

#include "ema/lists.h"

namespace ema {

void update(const Lists& lists, std::optional<Tensor> momentum_tensor, double momentum,
            bool stochastic, int64_t seed, std::optional<Tensor> step_tensor, int64_t step);

}  // namespace ema
