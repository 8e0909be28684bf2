// Rows of bfloat16 and float16 to float32 and back, to nearest or stochastically.
//
// The integer arithmetic of bfloat16 vectorises by itself. float16 takes the processor's own
// instructions where it has them; the rest is torch's arithmetic.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#include "common/cpu/vector.h"
#include "ema/formula.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define EMA_X86
#endif

namespace ema {

KERNELS_VECTOR inline void widen_bfloat16(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = float_of(uint32_t{from[i]} << 16);
}

KERNELS_VECTOR inline void narrow_bfloat16(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = nearest_bfloat16(from[i]);
}

#ifdef EMA_X86
__attribute__((target("avx2,f16c"))) inline int64_t widen_float16_8(const uint16_t* from,
                                                                    int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
  }
  return i;
}

__attribute__((target("avx2,f16c"))) inline int64_t narrow_float16_8(const float* from,
                                                                     int64_t count, uint16_t* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
  }
  return i;
}

inline bool has_f16c() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  return has;
}
#endif

inline void widen_float16(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
#ifdef EMA_X86
  if (has_f16c()) i = widen_float16_8(from, count, to);
#endif
  for (; i < count; ++i) {
    to[i] = torch::headeronly::Half(from[i], torch::headeronly::Half::from_bits());
  }
}

inline void narrow_float16(const float* from, int64_t count, uint16_t* to) {
  int64_t i = 0;
#ifdef EMA_X86
  if (has_f16c()) i = narrow_float16_8(from, count, to);
#endif
  for (; i < count; ++i) to[i] = torch::headeronly::Half(from[i]).x;
}

// The 16 random bits of elements `first` (a multiple of kGroup) to first + count - 1, rounded up to
// whole groups.
KERNELS_VECTOR inline void draw_row(uint64_t seed, uint64_t step, uint32_t tensor, int64_t first,
                                   int64_t count, uint16_t* random) {
  const int64_t begin = first / kGroup, groups = (count + kGroup - 1) / kGroup;
  for (int64_t g = 0; g < groups; ++g) {
    const Words words = draw(seed, step, tensor, static_cast<uint64_t>(begin + g));
    const uint32_t all[4] = {words.x, words.y, words.z, words.w};
    for (int k = 0; k < 4; ++k) {
      random[g * kGroup + 2 * k] = static_cast<uint16_t>(all[k]);
      random[g * kGroup + 2 * k + 1] = static_cast<uint16_t>(all[k] >> 16);
    }
  }
}

KERNELS_VECTOR inline void round_bfloat16(const float* from, const uint16_t* random, int64_t count,
                                         uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = stochastic_bfloat16(from[i], random[i]);
}

KERNELS_VECTOR inline void round_float16(const float* from, const uint16_t* random, int64_t count,
                                        uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = stochastic_float16(from[i], random[i]);
}

}  // namespace ema
