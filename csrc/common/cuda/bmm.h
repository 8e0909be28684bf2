// Products of the CUDA side: torch's own, through its dispatcher.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <array>

#include "common/tensors.h"

namespace common {

// out = a b for batches of matrices, float32 whatever the inputs are.
inline void bmm(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  const auto call = [](const char* overload, StableIValue* stack) {
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::bmm", overload, stack, TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  };
  if (a.scalar_type() == ScalarType::Float) {
    std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
    call("out", stack.data());
    return;
  }
#ifdef __CUDACC__
  std::array<StableIValue, 4> stack{from(a), from(b), from(ScalarType::Float), from(out)};
  call("dtype_out", stack.data());
#else  // a CPU torch has no such overload; products of half values are exact in float32
  bmm(torch::stable::to(a, ScalarType::Float), torch::stable::to(b, ScalarType::Float), out);
#endif
}

}  // namespace common
