// Contiguous bfloat16 and float16 to float32 and back, to nearest.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/cpu/vector.h"

namespace common {

KERNELS_VECTOR inline void widen_bfloat16(const uint16_t* source, int64_t count, float* target) {
  for (int64_t j = 0; j < count; ++j) {
    const uint32_t bits = uint32_t{source[j]} << 16;
    std::memcpy(target + j, &bits, sizeof bits);
  }
}

KERNELS_VECTOR inline void widen_half(const _Float16* source, int64_t count, float* target) {
  for (int64_t j = 0; j < count; ++j) target[j] = static_cast<float>(source[j]);
}

KERNELS_VECTOR inline void narrow_bfloat16(const float* source, int64_t count, uint16_t* target) {
  for (int64_t j = 0; j < count; ++j) {
    uint32_t bits;
    std::memcpy(&bits, source + j, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    target[j] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
}

KERNELS_VECTOR inline void narrow_half(const float* source, int64_t count, _Float16* target) {
  for (int64_t j = 0; j < count; ++j) target[j] = static_cast<_Float16>(source[j]);
}

}  // namespace common
