// The per-element maths of the SIGReg op, written once for the CPU, CUDA and emulator builds.
//
// Notation: p = z . a is a row's projection on a direction, t_k the K knots, C_k = sum_n cos(t_k p)
// and S_k = sum_n sin(t_k p) the sums over rows, phi_k = exp(-t_k^2 / 2), w_k the quadrature weight
// with phi_k in it, count the rows of all ranks. A slice's statistic is
//
//     sum_k w_k ((C_k / count - phi_k)^2 + (S_k / count)^2)
//
// Functions of a type T take float, or a vector of floats with the same operators.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/inline.h"

namespace sigreg {

constexpr int kMostKnots = 64;

// ---- Directions: Philox4x32-10 (Salmon et al., 2011) and Box-Muller.

constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

// High and low halves of a product.
struct WideProduct {
  KERNELS_ALWAYS_INLINE void operator()(uint32_t a, uint32_t b, uint32_t* high,
                                        uint32_t* low) const {
    const uint64_t product = static_cast<uint64_t>(a) * b;
    *high = static_cast<uint32_t>(product >> 32);
    *low = static_cast<uint32_t>(product);
  }
};

// counter becomes four words of noise. Word: uint32_t, or a vector of them with its own Product.
template <typename Word, typename Product = WideProduct>
KERNELS_ALWAYS_INLINE void philox(Word (&counter)[4], uint32_t key0, uint32_t key1,
                          Product wide_product = {}) {
  for (int round = 0; round < 10; ++round) {
    Word high0, low0, high1, low1;
    wide_product(counter[0], kMultiplier0, &high0, &low0);
    wide_product(counter[2], kMultiplier1, &high1, &low1);
    counter[0] = high1 ^ counter[1] ^ key0;
    counter[1] = low1;
    counter[2] = high0 ^ counter[3] ^ key1;
    counter[3] = low0;
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
}

// (word + 0.5) 2^-32 in float32, at most 1 - 2^-24: never 0, never 1, the same bits everywhere.
constexpr float kWordScale = 0x1p-32f, kHalfWord = 0x1p-33f, kBelowOne = 1.f - 0x1p-24f;

KERNELS_ALWAYS_INLINE float uniform(uint32_t word) {
  const float u = static_cast<float>(word) * kWordScale + kHalfWord;
  return u < kBelowOne ? u : kBelowOne;
}

// The radius of Box-Muller for u in (0, 1); the angle is 2 pi times the other uniform.
KERNELS_ALWAYS_INLINE float radius(float u) { return std::sqrt(-2.f * std::log(u)); }

// Entry d of slice m is normal d % 4 of group m * groups_of(dim) + d / 4.
KERNELS_ALWAYS_INLINE int64_t groups_of(int64_t dim) { return (dim + 3) / 4; }

// ---- Knots.

// Equally spaced: t_k = start + k step with start = step or step / 2, so that the knots' cosines and
// sines follow from those of start * p. k from 0.
struct Spacing {
  bool equal = false;
  bool half = false;  // start = step / 2
  double start = 0.0;
};

inline Spacing spacing_of(const double* knots, int64_t count) {
  const double first = knots[0];
  const double step = count > 1 ? (knots[count - 1] - first) / static_cast<double>(count - 1) : first;
  const double slack = 1e-7 * knots[count - 1];
  for (int64_t k = 0; k < count; ++k) {
    if (std::fabs(knots[k] - (first + static_cast<double>(k) * step)) > slack) return {};
  }
  if (std::fabs(first - step) <= slack) return {true, false, first};
  if (std::fabs(first - 0.5 * step) <= slack) return {true, true, first};
  return {};
}

// ---- Angles.

// cos and sin of an angle.
template <typename T>
struct Unit {
  T c, s;
};

// The sum of two angles: four multiply-adds.
template <typename T>
KERNELS_ALWAYS_INLINE Unit<T> rotate(const Unit<T>& a, const Unit<T>& b) {
  return {a.c * b.c - a.s * b.s, a.s * b.c + a.c * b.s};
}

// Twice an angle. 1 - 2 s^2 keeps the digits of a small angle, which c has lost.
template <typename T>
KERNELS_ALWAYS_INLINE Unit<T> twice(const Unit<T>& a) {
  const T s2 = a.s + a.s;
  return {1.f - s2 * a.s, s2 * a.c};
}

// One step of sum_k a_k cos(k x) + b_k sin(k x) = Re sum_k (a_k - i b_k) e^{ikx} by Horner's rule:
// held <- held * e + (a - i b), held = (real, imaginary).
template <typename T>
KERNELS_ALWAYS_INLINE Unit<T> horner(const Unit<T>& held, const Unit<T>& e, T a, T b) {
  return {a + held.c * e.c - held.s * e.s, held.s * e.c - b + held.c * e.s};
}

// ---- The statistic.

KERNELS_ALWAYS_INLINE double phi_of(double knot) { return std::exp(-0.5 * knot * knot); }

struct KnotTerm {
  double loss;  // this knot's term of the statistic
  double a, b;  // `scale` times its derivative by p is a cos(t p) + b sin(t p)
};

// In float64, because C / count - phi cancels.
// phi: phi_of(knot).
KERNELS_ALWAYS_INLINE KnotTerm knot_term(double cosines, double sines, double knot, double phi,
                                 double weight, double count, double scale) {
  const double real = cosines / count - phi;
  const double imaginary = sines / count;
  const double slope = scale * 2.0 * weight * knot / count;
  return {weight * (real * real + imaginary * imaginary), slope * imaginary, -slope * real};
}

}  // namespace sigreg
