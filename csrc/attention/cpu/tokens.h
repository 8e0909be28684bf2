// Rows of [B, H, T, d] tensors of any strides as float32, and keys packed for the products.
#pragma once

#include <cstring>
#include <memory>
#include <new>

#include "attention/cpu/range.h"
#include "attention/cpu/rotary.h"
#include "attention/cpu/tiles.h"
#include "common/cpu/rows.h"

namespace attention {
namespace {  // included by cpu.cpp alone
namespace cpu {

using common::ScalarType;
using common::Tensor;

// Float32 scratch on a cache line.
class Floats {
 public:
  Floats() = default;
  explicit Floats(int64_t count)
      : data_(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t(64)))) {}
  float* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* data) const { ::operator delete(data, std::align_val_t(64)); }
  };
  std::unique_ptr<float, Free> data_;
};

// The tokens of q, k, v, out or grad, read row by row.
class Tokens {
 public:
  explicit Tokens(const Tensor& x)
      : data_(x.const_data_ptr()),
        dtype_(x.scalar_type()),
        dim_(x.size(3)),
        batch_(x.stride(0)),
        head_(x.stride(1)),
        token_(x.stride(2)),
        column_(x.stride(3)) {}

  // The row as float32: in place where it lies there so, else in `scratch`.
  const float* read(int64_t batch, int64_t head, int64_t token, float* scratch) const {
    const int64_t at = batch * batch_ + head * head_ + token * token_;
    if (dtype_ == ScalarType::Float) {
      const float* source = static_cast<const float*>(data_) + at;
      if (column_ == 1) return source;
      common::to_float(source, column_, dim_, scratch);
    } else if (dtype_ == ScalarType::BFloat16) {
      common::to_float(static_cast<const torch::headeronly::BFloat16*>(data_) + at, column_, dim_,
                       scratch);
    } else {
      common::to_float(static_cast<const torch::headeronly::Half*>(data_) + at, column_, dim_,
                       scratch);
    }
    return scratch;
  }

  void copy(int64_t batch, int64_t head, int64_t token, float* to) const {
    const float* from = read(batch, head, token, to);
    if (from != to) std::memcpy(to, from, dim_ * sizeof(float));
  }

 private:
  const void* data_;
  ScalarType dtype_;
  int64_t dim_, batch_, head_, token_, column_;
};

// A result [B, H, T, d] that lies as [B, T, H, d].
class Result {
 public:
  Result(const Tensor& like, int64_t tokens)
      : dtype_(like.scalar_type()), heads_(like.size(1)), tokens_(tokens), dim_(like.size(3)) {
    const int64_t batch = like.size(0);
    const Tensor base = common::empty(like, {batch, tokens, heads_, dim_}, dtype_);
    tensor_ = common::strided(base, {batch, heads_, tokens, dim_},
                              {tokens * heads_ * dim_, dim_, heads_ * dim_, 1}, 0);
    data_ = tensor_.data_ptr();
  }

  const Tensor& tensor() const { return tensor_; }

  void write(int64_t batch, int64_t head, int64_t token, const float* row) const {
    const int64_t at = ((batch * tokens_ + token) * heads_ + head) * dim_;
    if (dtype_ == ScalarType::Float) {
      std::memcpy(static_cast<float*>(data_) + at, row, dim_ * sizeof(float));
    } else {
      common::write_row(row, dim_, dtype_, data_, at);
    }
  }

 private:
  Tensor tensor_;
  void* data_;
  ScalarType dtype_;
  int64_t heads_, tokens_, dim_;
};

// What the packing of keys and values makes; null where it is not needed.
// panels: [panels, dim, panel], so that the products walk along keys; rows: [keys, padded].
struct Packed {
  float *panels, *rows;
};

typedef float Four __attribute__((vector_size(16)));

inline Four load_four(const float* from) {
  Four value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

// Columns [0, dim) of four rows become four adjacent floats of `to` each, `panel` apart.
inline void transpose_four(const float* const (&rows)[4], int dim, int panel, float* to) {
  typedef int Pick __attribute__((vector_size(16)));
  for (int j = 0; j < dim; j += 4, to += 4 * panel) {
    const Four a = load_four(rows[0] + j), b = load_four(rows[1] + j);
    const Four c = load_four(rows[2] + j), d = load_four(rows[3] + j);
#ifdef __clang__
    const Four e = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    const Four f = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Four g = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    const Four h = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    const Four out[4] = {
        __builtin_shufflevector(e, g, 0, 1, 4, 5), __builtin_shufflevector(e, g, 2, 3, 6, 7),
        __builtin_shufflevector(f, h, 0, 1, 4, 5), __builtin_shufflevector(f, h, 2, 3, 6, 7)};
#else
    const Pick low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, left = {0, 1, 4, 5}, right = {2, 3, 6, 7};
    const Four e = __builtin_shuffle(a, b, low), f = __builtin_shuffle(a, b, high);
    const Four g = __builtin_shuffle(c, d, low), h = __builtin_shuffle(c, d, high);
    const Four out[4] = {__builtin_shuffle(e, g, left), __builtin_shuffle(e, g, right),
                         __builtin_shuffle(f, h, left), __builtin_shuffle(f, h, right)};
#endif
    for (int k = 0; k < 4; ++k) __builtin_memcpy(to + k * panel, &out[k], sizeof(Four));
  }
}

// Packs keys [0, to a multiple of panel) of a head, from `begin` kept keys on; rows past `end` are
// zero. Returns the bits of the largest (largest_bits).
inline int32_t pack(const Tokens& x, const Sample& sample, int64_t head, int begin, int end, int dim,
                 int padded, const Kernels& kernel, const Rotary& rotary, const Packed& to) {
  alignas(64) float scratch[4][128];
  const int panel = kernel.panel;
  const int count = (end - begin + panel - 1) / panel * panel;
  int32_t largest = 0;
  for (int i = 0; i < count; i += 4) {
    const float* rows[4];
    for (int r = 0; r < 4; ++r) {
      const int kept = begin + i + r;
      if (kept >= end) {
        std::memset(scratch[r], 0, dim * sizeof(float));
        rows[r] = scratch[r];
        continue;
      }
      const int place = sample.key(kept);
      const int64_t token = sample.key_token + place;
      rows[r] = x.read(sample.batch, head, token, scratch[r]);
      if (rotary.any()) {
        if (rows[r] != scratch[r]) std::memcpy(scratch[r], rows[r], dim * sizeof(float));
        rotary.apply(scratch[r], sample.batch, token, place, false);
        rows[r] = scratch[r];
      }
      largest = std::max(largest, largest_bits(rows[r], dim));
      if (to.rows != nullptr) {
        float* row = to.rows + static_cast<int64_t>(i + r) * padded;
        std::memcpy(row, rows[r], dim * sizeof(float));
        std::memset(row + dim, 0, (padded - dim) * sizeof(float));
      }
    }
    if (to.panels != nullptr) {
      transpose_four(rows, dim, panel,
                     to.panels + static_cast<int64_t>(i / panel) * panel * dim + i % panel);
    }
  }
  return largest;
}

}  // namespace cpu
}  // namespace
}  // namespace attention
