// The per-element maths of the Barlow Twins op, written once for the CPU, CUDA and emulator builds.
//
// Notation, for one view: zc = x - column mean, d = column scatter sum_n zc^2, degrees = N or N - 1,
// root = sqrt(d / degrees + eps), z = zc * inverse with inverse = 1 / (root + std_eps). C = Z1^T Z2 / N.
// P is the view's product: on the Gram side (N < D) P1 = (Z2 Z2^T) Z1, on the other P1 = Z2 C0^T and
// P2 = Z1 C0, C0 being C without its diagonal.
//
// With g = dL/dZ, for view 1 (view 2 is its mirror image),
//
//     g1_nj = product_slope P1_nj + diagonal_slope_j z2_nj
//     dL/dx1_nj = inverse_j (g1_nj - mean_n g1_nj - radial_slope_j (sum_n g1_nj z1_nj) z1_nj).
//
// mean_n g1_nj is zero: g1 is a combination of columns of Z2, and those are centred.
#pragma once

#include <cmath>

#include "common/inline.h"

namespace barlow {

// How a view is standardised.
struct Standard {
  float degrees = 1.f;
  float eps = 0.f;
  float std_eps = 0.f;
};

// NaN where float32 does not hold the sum of squares: where it is infinite, and where it is below
// the normal numbers with nothing added to it.
KERNELS_INLINE float inverse_std(float scatter, const Standard& s) {
  constexpr float kLeast = 1.17549435e-38f, kMost = 3.40282347e38f;
  const float variance = scatter / s.degrees + s.eps;
  const bool held = variance <= kMost && variance + s.std_eps >= kLeast;
  return held ? 1.f / (std::sqrt(variance) + s.std_eps) : nanf("");
}

// What multiplies (sum_n g z) z in the gradient of the standardisation: (root + std_eps) / root /
// degrees. A constant column without eps has root = 0 and zc = 0: there it is 0, as torch.std has it.
KERNELS_INLINE float radial_slope(float scatter, const Standard& s) {
  const float root = std::sqrt(scatter / s.degrees + s.eps);
  return root == 0.f ? 0.f : (root + s.std_eps) / (root * s.degrees);
}

// d loss / d C_ij = 2 lambd C_ij off the diagonal and 2 (C_jj - 1) on it, through P.
KERNELS_INLINE float product_slope(float lambd, float rows, bool gram) {
  return gram ? 2.f * lambd / (rows * rows) : 2.f * lambd / rows;
}

// P of the Gram side has the diagonal's lambd C_jj z2 in it, which is taken out here.
KERNELS_INLINE float diagonal_slope(float diagonal, float lambd, float rows, bool gram) {
  return 2.f / rows * (gram ? (diagonal - 1.f) - lambd * diagonal : diagonal - 1.f);
}

// sum_n g z of a column, from sum_n P z: that is N sum_{i != j} C_ij^2 on the other side.
KERNELS_INLINE float radial(float product_dot, float diagonal, float lambd, float rows, bool gram) {
  return product_slope(lambd, rows, gram) * product_dot +
         diagonal_slope(diagonal, lambd, rows, gram) * rows * diagonal;
}

// A column of the gradient: product * P + other * z of the other view + own * z.
struct Coefficients {
  float product = 0.f;
  float other = 0.f;
  float own = 0.f;
};

// grad: the gradient of the loss.
KERNELS_INLINE Coefficients coefficients(float grad, float scatter, const Standard& s,
                                        float product_dot, float diagonal, float lambd, float rows,
                                        bool gram) {
  const float scale = grad * inverse_std(scatter, s);
  return {scale * product_slope(lambd, rows, gram),
          scale * diagonal_slope(diagonal, lambd, rows, gram),
          -scale * radial_slope(scatter, s) * radial(product_dot, diagonal, lambd, rows, gram)};
}

KERNELS_INLINE float gradient(const Coefficients& a, float product, float other, float own) {
  return a.product * product + a.other * other + a.own * own;
}

}  // namespace barlow
