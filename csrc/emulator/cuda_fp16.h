// The emulator's <cuda_fp16.h>: storage and conversions, through the compiler's own _Float16.
#pragma once

#include <cstdint>
#include <cstring>

struct alignas(2) __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  _Float16 half;
  std::memcpy(&half, &value, sizeof half);
  return static_cast<float>(half);
}

inline __half __float2half_rn(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  __half result;
  std::memcpy(&result, &half, sizeof half);
  return result;
}

inline __half __float2half(float value) { return __float2half_rn(value); }
