// Which token of which sample a row names: index tensors of either width, and samples that are
// equally long (row / K) or packed one after the other (offsets). For host and device code.
#pragma once

#include "tokens/formula.h"

namespace tokens {

// Division by a number known to the host, exact up to 2^52: what a GPU does instead is a function call.
struct Divider {
  int64_t by;
  double inverse;

  KERNELS_ALWAYS_INLINE int64_t divide(int64_t value, int64_t& rest) const {
    int64_t quotient = static_cast<int64_t>(static_cast<double>(value) * inverse);
    rest = value - quotient * by;
    if (rest < 0) {
      --quotient;
      rest += by;
    } else if (rest >= by) {
      ++quotient;
      rest -= by;
    }
    return quotient;
  }
  KERNELS_ALWAYS_INLINE int64_t quotient(int64_t value) const {
    int64_t rest;
    return divide(value, rest);
  }
  KERNELS_ALWAYS_INLINE int64_t rest(int64_t value) const {
    int64_t rest;
    divide(value, rest);
    return rest;
  }
};

inline Divider divider(int64_t number) {
  return {number, number > 0 ? 1.0 / static_cast<double>(number) : 0.0};
}

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
    int64_t low = 0, high = batch.by;  // offsets[low] <= row < offsets[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (offsets[middle] <= row) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
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
