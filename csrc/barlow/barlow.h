// The two ops of Barlow Twins as each compiled library provides them; op.py documents every
// tensor. tf32x3: float32 products on CUDA as three TF32 ones; the CPU's are float32 throughout.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace barlow {

using torch::stable::Tensor;

// Whether forward saves the standardised views for backward; else `standardised` is empty.
extern const bool kSavesStandardised;

// -> loss, moments, diagonal, products, standardised.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(Tensor x, Tensor y, double eps,
                                                           double std_eps, bool unbiased,
                                                           double lambd, bool tf32x3);

// -> gradients of x and y, empty where not needed.
std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor y, Tensor moments,
                                    Tensor diagonal, Tensor products, Tensor standardised,
                                    bool need_x, bool need_y, double eps, double std_eps,
                                    bool unbiased, double lambd, bool tf32x3);

}  // namespace barlow
