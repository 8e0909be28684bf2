// Small helpers over torch's stable ABI, shared by the CPU and CUDA sides of every op.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

namespace common {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An uninitialised contiguous tensor on the device of `like` (filled where torch's deterministic
// mode asks for it). Not torch::stable::new_empty, which looks its op up by name and boxes the
// arguments at every call, of which a loss's forward makes nine.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.begin(),
                                                   static_cast<int64_t>(sizes.size()), &type,
                                                   nullptr, nullptr, 0, nullptr, &made));
  return Tensor(made);
}

// A view of `base` from `offset` elements after its first one (the shim adds base's own offset).
inline Tensor strided(const Tensor& base, std::initializer_list<int64_t> sizes,
                      std::initializer_list<int64_t> strides, int64_t offset) {
  AtenTensorHandle view;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      base.get(), static_cast<int64_t>(sizes.size()), sizes.begin(), strides.begin(),
      offset, &view));
  return Tensor(view);
}

// out = a b + beta out, for CPU matrices of any strides, through torch's own product. Below
// the dispatcher, so that autocast cannot lower it; beta = 0 does not read `out`.
inline void addmm_cpu(const Tensor& out, const Tensor& a, const Tensor& b, double beta) {
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), beta, 1.0));
}

}  // namespace common
