// The ops of VICRegL as each compiled library provides them; contract.py documents them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "vicregl/formula.h"

namespace vicregl {

using torch::stable::Tensor;

// -> nearest_a, rank_a, nearest_b, rank_b.
std::tuple<Tensor, Tensor, Tensor, Tensor> match(Tensor a, Tensor b);

Tensor pairs_forward(Tensor a, Tensor b, Tensor nearest_a, Tensor rank_a, Tensor nearest_b,
                     Tensor rank_b, std::vector<int64_t> counts_a, std::vector<double> weights_a,
                     std::vector<int64_t> counts_b, std::vector<double> weights_b);

// -> gradients of a and b, empty where not needed.
std::tuple<Tensor, Tensor> pairs_backward(Tensor grad, Tensor a, Tensor b, Tensor nearest_a,
                                          Tensor rank_a, Tensor nearest_b, Tensor rank_b,
                                          bool need_a, bool need_b, std::vector<int64_t> counts_a,
                                          std::vector<double> weights_a,
                                          std::vector<int64_t> counts_b,
                                          std::vector<double> weights_b);

// z: [views, B, L, C], the side whose positions are kept.
inline Kept kept(const Tensor& z, const std::vector<int64_t>& counts,
                 const std::vector<double>& weights) {
  Kept made;
  made.sets = static_cast<int64_t>(counts.size());
  for (int64_t t = 0; t < made.sets && t < kMostCounts; ++t) {
    made.counts[t] = counts[t];
    made.factors[t] = static_cast<float>(
        weights[t] / (static_cast<double>(z.size(1)) * counts[t] * z.size(3)));
  }
  return made;
}

}  // namespace vicregl
