// The two ops of VICReg as each compiled library provides them; op.py documents every tensor.
// tf32x3: float32 products on CUDA as three TF32 ones; the CPU's are float32 throughout.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace vicreg {

using torch::stable::Tensor;

// Whether forward saves the centred views for backward; else `centred` is empty.
extern const bool kSavesCentred;
// Whether x and y may be [N, D], one group, beside [G, N, D].
extern const bool kTakesRows;

// -> terms, moments, squares, deflated, index, centred.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    Tensor x, std::optional<Tensor> y, double margin, double eps, bool unbiased,
    std::vector<double> scales, std::vector<double> weights, bool tf32x3);

// -> gradients of x and y, empty where not needed.
std::tuple<Tensor, Tensor> backward(Tensor grads, Tensor x, std::optional<Tensor> y, Tensor moments,
                                    Tensor squares, Tensor deflated, Tensor index, Tensor centred,
                                    bool need_x, bool need_y, double margin, double eps,
                                    bool unbiased, std::vector<double> scales,
                                    std::vector<double> weights, bool tf32x3);

}  // namespace vicreg
