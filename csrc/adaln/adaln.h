// The kernels of adaptive layer norm as each compiled library provides them; contract.py documents
// them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace adaln {

using torch::stable::Tensor;

// -> out, saved.
std::tuple<Tensor, Tensor> norm_forward(Tensor x, Tensor shift, Tensor scale, double eps);

// -> gradients of x, shift and scale.
std::tuple<Tensor, Tensor, Tensor> norm_backward(Tensor grad, Tensor x, Tensor scale, Tensor saved,
                                                 bool need_x, bool need_vectors);

Tensor gate_forward(Tensor x, Tensor y, Tensor gate);

// -> gradients of y and gate.
std::tuple<Tensor, Tensor> gate_backward(Tensor grad, Tensor y, Tensor gate, bool need_y,
                                         bool need_gate);

}  // namespace adaln
