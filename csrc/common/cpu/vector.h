// KERNELS_VECTOR: compiles a function once per vector width and picks one when the library loads,
// so that a wheel runs on any x86-64 and still uses AVX2 or AVX-512 where there is one.
#pragma once

#include "common/inline.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define KERNELS_VECTOR \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define KERNELS_VECTOR
#endif

namespace common {

// A vector type's value from any address.
template <typename V>
KERNELS_ALWAYS_INLINE V load(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

}  // namespace common
