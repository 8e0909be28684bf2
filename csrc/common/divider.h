// Division by a number known to the host, for host and device code.
#pragma once

#include <cstdint>

#include "common/inline.h"

namespace common {

// Exact up to 2^52: what a GPU does instead is a function call.
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

}  // namespace common
