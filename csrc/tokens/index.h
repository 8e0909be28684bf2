// Which token of which sample a row names: index tensors of either width, and samples that are
// equally long (row / K) or packed one after the other (offsets). For host and device code.
#pragma once

#include "common/divider.h"
#include "common/search.h"
#include "tokens/formula.h"

namespace tokens {

using common::Divider, common::divider;

struct Indices {
  const void* data;
  bool wide;  // int64, else int32

  KERNELS_ALWAYS_INLINE int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// Rows 0 .. count of a batch. offsets: [batch + 1] where samples are packed, else null and each has
// `each` rows; then there may be several times `batch` of them, in turns (mask-major order).
struct Samples {
  const int64_t* offsets;
  Divider batch, each;
  int64_t count;

  // In [0, batch) whatever the offsets hold.
  KERNELS_ALWAYS_INLINE int64_t of(int64_t row) const {
    if (offsets == nullptr) return batch.rest(each.quotient(row));
    return common::last_not_above(batch.by, row, [&](int64_t sample) { return offsets[sample]; });
  }
  // Rows [begin, end) of a sample, inside [0, count] whatever the offsets hold.
  KERNELS_ALWAYS_INLINE int64_t begin(int64_t sample) const {
    return clamp(offsets == nullptr ? sample * each.by : offsets[sample]);
  }
  KERNELS_ALWAYS_INLINE int64_t end(int64_t sample) const {
    return clamp(offsets == nullptr ? (sample + 1) * each.by : offsets[sample + 1]);
  }

 private:
  KERNELS_ALWAYS_INLINE int64_t clamp(int64_t row) const {
    return row < 0 ? 0 : row > count ? count : row;
  }
};

// Where row r of [P, K, D] or [R, D] begins, in elements.
struct Place {
  Divider each;
  int64_t group, row, column;

  KERNELS_ALWAYS_INLINE int64_t operator()(int64_t r) const {
    int64_t rest;
    const int64_t quotient = each.divide(r, rest);
    return quotient * group + rest * row;
  }
  KERNELS_ALWAYS_INLINE int64_t operator()(int64_t g, int64_t r) const {
    return g * group + r * row;
  }
};

}  // namespace tokens
