// What the EMA op takes; op.py documents the arguments.
#pragma once

#include "common/checks.h"
#include "ema/ema.h"

namespace ema {

constexpr int64_t kMostSteps = int64_t{1} << 48;  // MOST_STEPS in checks.py

// The settings of a call whose lists match and hold something.
inline void check_settings(const Lists& lists, const std::optional<Tensor>& momentum_tensor,
                           double momentum, const std::optional<Tensor>& step_tensor,
                           int64_t step) {
  using common::Argument;
  if (!(momentum >= 0.0 && momentum <= 1.0)) {
    common::refuse("momentum: got ", momentum, ", takes a number in [0, 1]");
  }
  common::check_range("step", step, 0, kMostSteps - 1);
  if (!momentum_tensor && !step_tensor) return;
  const Tensor first = lists.first();
  const Argument target("targets[0]", first);
  if (momentum_tensor) {
    Argument("momentum_tensor", *momentum_tensor).plain(common::kWide, target).one_element();
  }
  if (step_tensor) {
    Argument("step_tensor", *step_tensor).plain(common::kInt64, target).one_element();
  }
}

}  // namespace ema
