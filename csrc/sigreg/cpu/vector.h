// Sixteen floats at a time. The compiler lowers them to whatever width a clone has (KERNELS_VECTOR);
// everything here is inlined into the clone that calls it.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/cpu/vector.h"
#include "sigreg/formula.h"

// For lambdas, which would else be functions of the baseline's width.
#define SIGREG_ALWAYS __attribute__((always_inline))

namespace sigreg {

constexpr int kLanes = 16;
typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef double Doubles __attribute__((vector_size(8 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint64_t Indices __attribute__((vector_size(8 * kLanes)));

using common::load;

template <typename V>
KERNELS_ALWAYS_INLINE void store(void* to, const V& value) {
  std::memcpy(to, &value, sizeof value);
}

template <typename To, typename From>
KERNELS_ALWAYS_INLINE To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  return load<To>(&from);
}

// The first `count` lanes, which are all that the memory has.
KERNELS_ALWAYS_INLINE Vector load_some(const float* from, int64_t count) {
  if (count >= kLanes) return load<Vector>(from);
  Vector value = {};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

KERNELS_ALWAYS_INLINE void store_some(float* to, const Vector& value, int64_t count) {
  if (count >= kLanes) {
    store(to, value);
  } else {
    std::memcpy(to, &value, count * sizeof(float));
  }
}

struct WideProducts {
  KERNELS_ALWAYS_INLINE void operator()(const Words& a, uint32_t b, Words* high, Words* low) const {
    const Indices product = __builtin_convertvector(a, Indices) * b;
    *high = __builtin_convertvector(product >> 32, Words);
    *low = __builtin_convertvector(product, Words);
  }
};

// cos and sin of x = r + n pi / 2, |r| <= pi / 4, to 1 ulp while |n| < 2^15: the first two parts of
// pi / 2 have so few digits that their multiples are exact. Beyond it r is held to its range, so
// that the results lose their digits but not their bounds. NaN stays, infinity becomes NaN.
KERNELS_ALWAYS_INLINE Unit<Vector> unit(const Vector& x) {
  constexpr float kRound = 0x1.8p23f;  // added and taken away, it leaves the nearest integer
  const Vector shifted = x * 0.636619772f + kRound;
  const Vector n = shifted - kRound;
  Vector r = x - n * 1.5703125f;
  r = r - n * 4.837512969970703125e-4f;
  r = r - n * 7.54978995489188216e-8f;
  r = r > 0.786f ? Vector{} + 0.786f : r;
  r = r < -0.786f ? Vector{} - 0.786f : r;
  const Vector r2 = r * r;
  const Vector sine =
      r + r * r2 * (-1.666665494e-1f + r2 * (8.332178145e-3f + r2 * -1.951729888e-4f));
  const Vector cosine =
      1.f - r2 * (0.5f - r2 * (4.166664687e-2f + r2 * (-1.388736751e-3f + r2 * 2.443845142e-5f)));
  // The two lowest bits of n are the quadrant.
  const Integers quadrant = same_bits<Integers>(shifted);
  const Integers odd = (quadrant & 1) != 0;
  const Vector c = odd ? sine : cosine;
  const Vector s = odd ? cosine : sine;
  const Words flip_c = same_bits<Words>((quadrant + 1) << 30) & 0x80000000u;
  const Words flip_s = same_bits<Words>(quadrant << 30) & 0x80000000u;
  return {same_bits<Vector>(same_bits<Words>(c) ^ flip_c),
          same_bits<Vector>(same_bits<Words>(s) ^ flip_s)};
}

// The natural logarithm of normal positive numbers, to 1 ulp.
KERNELS_ALWAYS_INLINE Vector logarithm(const Vector& x) {
  constexpr int32_t kRootHalf = 0x3F3504F3;  // sqrt(1/2): f = x 2^-e - 1 is in [-0.293, 0.415]
  const Integers bits = same_bits<Integers>(x);
  const Integers e = (bits - kRootHalf) >> 23;
  const Vector f = same_bits<Vector>(bits - (e << 23)) - 1.f;
  Vector p = f * 6.915424470e-2f - 1.178983519e-1f;
  p = p * f + 1.187296549e-1f;
  p = p * f - 1.238434308e-1f;
  p = p * f + 1.421865888e-1f;
  p = p * f - 1.666925115e-1f;
  p = p * f + 2.000222658e-1f;
  p = p * f - 2.499998659e-1f;
  p = p * f + 3.333331044e-1f;
  const Vector f2 = f * f;
  const Vector exponent = __builtin_convertvector(e, Vector);
  return f + (f * f2 * p - 0.5f * f2 + exponent * -2.12194440e-4f) + exponent * 0.693359375f;
}

}  // namespace sigreg
