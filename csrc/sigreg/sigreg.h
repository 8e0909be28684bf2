// The five ops of SIGReg as each compiled library provides them; op.py documents every tensor.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace sigreg {

using torch::stable::Tensor;

// -> directions [dim, slices], columns of length 1, of like's dtype on its device. step: int64, 0-d,
// read on the device; without it, `number` is the step.
Tensor directions(Tensor like, std::optional<Tensor> step, int64_t number, int64_t seed,
                  int64_t dim, int64_t slices);

// z [G, N, D], directions [D, M] -> sums [G, 2, K, M], projections [G, N, M], float32.
std::tuple<Tensor, Tensor> sums(Tensor z, Tensor directions, std::vector<double> knots);

// -> loss, 0-d, coefficients [G, 2, K, M], float32.
std::tuple<Tensor, Tensor> statistic(Tensor sums, std::vector<double> knots,
                                     std::vector<double> weights, double count, double factor,
                                     double ranks);

// sums and statistic for one rank: -> loss, 0-d, coefficients [G, 2, K, M], projections [G, N, M].
std::tuple<Tensor, Tensor, Tensor> forward(Tensor z, Tensor directions, std::vector<double> knots,
                                           std::vector<double> weights, double count,
                                           double factor);

// -> the gradient of z, [G, N, D] in directions' dtype. grad: float32, one element.
Tensor gradient(Tensor grad, Tensor coefficients, Tensor projections, Tensor directions,
                std::vector<double> knots);

}  // namespace sigreg
