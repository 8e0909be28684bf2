// Binary search, for host and device code.
#pragma once

#include "common/inline.h"

namespace common {

// The last of at(0), ..., at(count - 1), which rise, that is not above `value`; 0 where none is.
template <typename Index, typename Value, typename At>
KERNELS_ALWAYS_INLINE Index last_not_above(Index count, Value value, const At& at) {
  Index low = 0, high = count;
  while (high - low > 1) {
    const Index middle = (low + high) / 2;
    if (at(middle) <= value) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace common
