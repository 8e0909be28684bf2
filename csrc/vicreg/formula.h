// The per-element maths of the VICReg op, written once for the CPU, CUDA and emulator builds.
//
// Notation: Z is [N, D], zc = z - column mean, d = column scatter sum_n zc^2, c = 1 (unbiased) or 0,
// degrees = N - c, std = sqrt(d / degrees + eps). P is the covariance gradient before scaling,
// P[n, j] = sum_{i != j} zc_ni (z_i . z_j).
#pragma once

#include <cmath>
#include <cstdint>

#include "common/inline.h"

namespace vicreg {

// Columns of largest scatter that the Gram side treats apart; DEFLATED_COLUMNS in contract.py.
constexpr int64_t kDeflatedColumns = 4;

// Count, mean and scatter of a set of values; sets merge without cancellation (Chan et al., 1983).
struct Moments {
  float count = 0.f;
  float mean = 0.f;
  float scatter = 0.f;
};

KERNELS_INLINE Moments merge(const Moments& a, const Moments& b) {
  const float count = a.count + b.count;
  if (count == 0.f) {
    return a;
  }
  const float delta = b.mean - a.mean;
  const float share = b.count / count;
  return {count, a.mean + delta * share, a.scatter + b.scatter + delta * delta * a.count * share};
}

// relu(margin - std) that passes NaN on, as torch.relu does.
KERNELS_INLINE float hinge(float scatter, float degrees, float margin, float eps) {
  const float gap = margin - std::sqrt(scatter / degrees + eps);
  return gap <= 0.f ? 0.f : gap;
}

// -d hinge / d z_nj = slope * zc_nj: 1 / (degrees std) below the margin, 0 at or above it.
KERNELS_INLINE float hinge_slope(float scatter, float degrees, float margin, float eps) {
  const float std = std::sqrt(scatter / degrees + eps);
  return std >= margin ? 0.f : 1.f / (degrees * std);
}

// What multiplies (x - y), the hinge slope and P in the gradient.
struct Coefficients {
  float invariance = 0.f;
  float variance = 0.f;
  float covariance = 0.f;
};

// grads: the gradient of the loss (count 1) or of loss, invariance, variance, covariance (count 4).
// scales, weights: [3], as in conventions.py. elements = G N D, columns = G D.
KERNELS_INLINE Coefficients coefficients(const float* grads, int64_t count, const float* scales,
                                        const float* weights, float groups, float columns,
                                        float elements, float degrees) {
  float terms[3];
  for (int i = 0; i < 3; ++i) {
    terms[i] = (grads[0] * weights[i] + (count > 1 ? grads[i + 1] : 0.f)) * scales[i];
  }
  return {2.f * terms[0] / elements, terms[1] / columns,
          4.f * terms[2] / (groups * degrees * degrees)};
}

// The factor of zc in the gradient: the hinge, and on the Gram side the diagonal that the product
// gram . Zc has too much (pass scatter = 0 where it does not: the covariance side, and deflated
// columns).
KERNELS_INLINE float column_factor(const Coefficients& a, float slope, float scatter) {
  return -a.variance * slope - a.covariance * scatter;
}

// One element of the gradient.
KERNELS_INLINE float gradient(const Coefficients& a, float product, float factor, float centred,
                             float difference) {
  return a.covariance * product + factor * centred + a.invariance * difference;
}

}  // namespace vicreg
