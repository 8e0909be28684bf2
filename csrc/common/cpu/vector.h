// KERNELS_VECTOR: compiles a function once per vector width and picks one when the library loads,
// so that a wheel runs on any x86-64 and still uses AVX2 or AVX-512 where there is one.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define KERNELS_VECTOR \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define KERNELS_VECTOR
#endif
