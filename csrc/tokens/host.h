// How the host side of the ops reads its tensors, on the CPU and on CUDA alike.
#pragma once

#include <optional>
#include <vector>

#include "common/tensors.h"
#include "tokens/index.h"

namespace tokens {

using common::ScalarType;
using common::Tensor;

inline Indices indices(const Tensor& index) {
  return {index.const_data_ptr(), index.scalar_type() == ScalarType::Long};
}

// index: [P, K], or [R] with offsets [B + 1]; contiguous.
inline Samples samples(const Tensor& index, const std::optional<Tensor>& offsets, int64_t batch) {
  const int64_t each = index.dim() == 1 ? index.size(0) : index.size(1);
  return {offsets ? static_cast<const int64_t*>(offsets->const_data_ptr()) : nullptr,
          divider(batch), divider(each > 0 ? each : 1), index.numel()};
}

inline Place place(const Tensor& z) {
  if (z.dim() == 2) return {divider(z.size(0) > 0 ? z.size(0) : 1), 0, z.stride(0), z.stride(1)};
  return {divider(z.size(1) > 0 ? z.size(1) : 1), z.stride(0), z.stride(1), z.stride(2)};
}

// A contiguous tensor with the shape of `index` and the columns of `z`, and z's dtype.
inline Tensor empty_rows(const Tensor& index, const Tensor& z, ScalarType dtype) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < index.dim(); ++i) sizes.push_back(index.size(i));
  sizes.push_back(z.size(z.dim() - 1));
  return torch::stable::new_empty(z, {sizes.data(), sizes.size()}, dtype);
}

inline Tensor empty_like_index(const Tensor& index) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < index.dim(); ++i) sizes.push_back(index.size(i));
  return torch::stable::new_empty(index, {sizes.data(), sizes.size()}, index.scalar_type());
}

}  // namespace tokens
