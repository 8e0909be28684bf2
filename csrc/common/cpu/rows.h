// Rows of a [G, N, D] or [N, D] tensor of any strides and of float32, bfloat16 or float16, as float32.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "common/cpu/convert.h"
#include "common/tensors.h"

namespace common {

template <typename T>
inline void to_float(const T* source, int64_t stride, int64_t count, float* target) {
  if (stride == 1) {
    if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
      widen_bfloat16(reinterpret_cast<const uint16_t*>(source), count, target);
    } else if constexpr (std::is_same_v<T, torch::headeronly::Half>) {
      widen_half(reinterpret_cast<const _Float16*>(source), count, target);
    } else {
      for (int64_t j = 0; j < count; ++j) target[j] = static_cast<float>(source[j]);
    }
  } else {
    for (int64_t j = 0; j < count; ++j) target[j] = static_cast<float>(source[j * stride]);
  }
}

class Rows {
 public:
  explicit Rows(const Tensor& z)  // [G, N, D], or [N, D], which is group 0
      : data_(z.const_data_ptr()),
        dtype_(z.scalar_type()),
        group_stride_(z.dim() == 3 ? z.stride(0) : 0),
        row_stride_(z.stride(-2)),
        column_stride_(z.size(-1) == 1 ? 1 : z.stride(-1)) {}  // one column has any stride

  // Whether `read` needs scratch.
  bool copies() const { return dtype_ != ScalarType::Float || column_stride_ != 1; }

  // Columns [begin, begin + count) of a row: in place where they lie there as float32, else copied
  // to `scratch` (count floats).
  const float* read(int64_t group, int64_t row, int64_t begin, int64_t count,
                    float* scratch) const {
    const int64_t at = group * group_stride_ + row * row_stride_ + begin * column_stride_;
    if (dtype_ == ScalarType::Float) {
      const float* source = static_cast<const float*>(data_) + at;
      if (column_stride_ == 1) return source;
      to_float(source, column_stride_, count, scratch);
    } else if (dtype_ == ScalarType::BFloat16) {
      to_float(static_cast<const torch::headeronly::BFloat16*>(data_) + at, column_stride_, count,
               scratch);
    } else {
      to_float(static_cast<const torch::headeronly::Half*>(data_) + at, column_stride_, count,
               scratch);
    }
    return scratch;
  }

 private:
  const void* data_;
  ScalarType dtype_;
  int64_t group_stride_, row_stride_, column_stride_;
};

// Writes a float32 row to contiguous memory of `dtype`.
inline void write_row(const float* source, int64_t count, ScalarType dtype, void* base,
                      int64_t at) {
  if (dtype == ScalarType::BFloat16) {
    narrow_bfloat16(source, count, static_cast<uint16_t*>(base) + at);
  } else {
    narrow_half(source, count, static_cast<_Float16*>(base) + at);
  }
}

}  // namespace common
