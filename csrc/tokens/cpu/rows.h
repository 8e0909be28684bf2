// What the CPU kernels share: rows of any dtype as float32, checks of indices, threads over rows.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "common/cpu/convert.h"
#include "tokens/host.h"

namespace tokens {
namespace cpu {

using common::narrow_bfloat16, common::narrow_half, common::widen_bfloat16, common::widen_half;

// An error that Python sees as a ValueError.
template <typename... Words>
[[noreturn]] void refuse(const Words&... words) {
  std::ostringstream message;
  (message << ... << words);
  throw std::invalid_argument(message.str());
}

inline void check_index(const char* name, const Indices& index, int64_t count, int64_t length) {
  for (int64_t i = 0; i < count; ++i) {
    if (index[i] < 0 || index[i] >= length) {
      refuse(name, ": got ", index[i], " in place ", i, ", takes 0 to ", length - 1,
             " (the sample has ", length, " tokens)");
    }
  }
}

inline void check_offsets(const char* name, const int64_t* offsets, int64_t batch, int64_t total) {
  if (offsets == nullptr) return;
  if (offsets[0] != 0) refuse(name, ": got ", offsets[0], " first, takes 0");
  for (int64_t b = 0; b < batch; ++b) {
    if (offsets[b + 1] < offsets[b]) {
      refuse(name, ": got ", offsets[b + 1], " after ", offsets[b], ", takes numbers that never fall");
    }
  }
  if (offsets[batch] != total) {
    refuse(name, ": got ", offsets[batch], " last, takes the number of packed rows, ", total);
  }
}

inline int64_t element_bytes(ScalarType dtype) { return dtype == ScalarType::Float ? 4 : 2; }

// Rows of a tensor of any strides.
class Source {
 public:
  explicit Source(const Tensor& z)
      : data_(static_cast<const char*>(z.const_data_ptr())),
        dtype_(z.scalar_type()),
        bytes_(element_bytes(z.scalar_type())),
        columns_(z.size(z.dim() - 1)),
        place(tokens::place(z)) {}

  bool contiguous() const { return place.column == 1 || columns_ == 1; }
  const char* at(int64_t offset) const { return data_ + offset * bytes_; }

  // The row that begins at `offset` as float32: in place, or in `scratch` (2 D floats).
  const float* read(int64_t offset, float* scratch) const {
    const char* from = at(offset);
    if (dtype_ == ScalarType::Float) {
      if (contiguous()) return reinterpret_cast<const float*>(from);
      const float* source = reinterpret_cast<const float*>(from);
      for (int64_t j = 0; j < columns_; ++j) scratch[j] = source[j * place.column];
      return scratch;
    }
    if (!contiguous()) {  // packed behind the floats, which are then made of it
      auto* packed = reinterpret_cast<uint16_t*>(scratch + columns_);
      const auto* source = reinterpret_cast<const uint16_t*>(from);
      for (int64_t j = 0; j < columns_; ++j) packed[j] = source[j * place.column];
      from = reinterpret_cast<const char*>(packed);
    }
    if (dtype_ == ScalarType::BFloat16) {
      widen_bfloat16(reinterpret_cast<const uint16_t*>(from), columns_, scratch);
    } else {
      widen_half(reinterpret_cast<const _Float16*>(from), columns_, scratch);
    }
    return scratch;
  }

  // Copies the row to contiguous memory.
  void copy(int64_t offset, char* target) const {
    const char* from = at(offset);
    if (contiguous()) {
      std::memcpy(target, from, columns_ * bytes_);
    } else if (bytes_ == 4) {
      strided<uint32_t>(from, target);
    } else {
      strided<uint16_t>(from, target);
    }
  }

 private:
  template <typename Bits>
  void strided(const char* from, char* target) const {
    const Bits* source = reinterpret_cast<const Bits*>(from);
    Bits* to = reinterpret_cast<Bits*>(target);
    for (int64_t j = 0; j < columns_; ++j) to[j] = source[j * place.column];
  }

  const char* data_;
  ScalarType dtype_;
  int64_t bytes_, columns_;

 public:
  Place place;
};

// Writes a float32 row as `dtype`.
inline void write(const float* row, int64_t count, ScalarType dtype, char* target) {
  if (dtype == ScalarType::Float) {
    if (reinterpret_cast<const char*>(row) != target) std::memcpy(target, row, 4 * count);
  } else if (dtype == ScalarType::BFloat16) {
    narrow_bfloat16(row, count, reinterpret_cast<uint16_t*>(target));
  } else {
    narrow_half(row, count, reinterpret_cast<_Float16*>(target));
  }
}

// task(first, last) for parts of [0, rows), each of at least 64 KB.
template <typename Task>
void over_rows(int64_t rows, int64_t row_bytes, const Task& task) {
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, row_bytes));
  torch::stable::parallel_for(0, rows, grain, task);
}

}  // namespace cpu
}  // namespace tokens
