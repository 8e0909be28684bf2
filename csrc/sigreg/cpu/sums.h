// Sums over rows of cos(t_k p) and sin(t_k p), and their transpose, the gradient by p, on the CPU.
//
// Equally spaced knots take one cosine and sine an element. The first eight multiples follow by
// products of neighbours, one multiply-add each. A higher knot 8 g + j is never formed: with
// A = 8 g steps and b the angle of knot j,
//
//     cos(A + b) = 2 cos A cos b - cos(A - b)      sin(A + b) = 2 sin A cos b - sin(A - b)
//
// so that only sums of products are kept, one multiply-add each, and the subtraction is done once,
// on the sums. K = 16: 29 operations for the angle, 20 for eight multiples, 32 for the sums; a
// rotation a knot would be 64 + 32. The gradient runs the same identities backwards, on the
// coefficients: 34 multiply-adds where Horner's rule takes 64.
#pragma once

#include <vector>

#include "common/cpu/vector.h"
#include "sigreg/cpu/vector.h"

namespace sigreg {

constexpr int kLow = 8;    // knots formed one by one
constexpr int kRows = 2;   // rows whose terms are added before they meet the running sums
constexpr int kMostGiants = (kMostKnots - 1) / kLow;

// cos and sin of the first eight knots' angles, and of eight steps.
struct Multiples {
  Vector c[kLow], s[kLow];
  Unit<Vector> eight;
};

// a + b where the angles a - b and a are given, and cos b: the sum of the two identities above.
KERNELS_ALWAYS_INLINE Unit<Vector> beyond(const Unit<Vector>& twice_a, const Vector& cos_b,
                                  const Vector& c, const Vector& s) {
  return {twice_a.c * cos_b - c, twice_a.s * cos_b - s};
}

// one: the first knot's angle; half: it is half a step.
template <bool half>
KERNELS_ALWAYS_INLINE Multiples multiples(const Unit<Vector>& one) {
  Multiples out;
  const auto put = [&](int j, const Unit<Vector>& value) SIGREG_ALWAYS {
    out.c[j] = value.c;
    out.s[j] = value.s;
  };
  const auto doubled = [](const Unit<Vector>& a) SIGREG_ALWAYS {
    return Unit<Vector>{a.c + a.c, a.s + a.s};
  };
  const Unit<Vector> two = twice(one), four = twice(two), eight = twice(four);
  const Unit<Vector> d2 = doubled(two), d4 = doubled(four);
  const Unit<Vector> three = beyond(d2, one.c, one.c, one.s);
  const Unit<Vector> five = beyond(d4, one.c, three.c, three.s);
  const Unit<Vector> seven = beyond(d4, three.c, one.c, one.s);
  if constexpr (half) {
    const Unit<Vector> d8 = doubled(eight);
    put(0, one);
    put(1, three);
    put(2, five);
    put(3, seven);
    for (int j = 0; j < 4; ++j) {
      put(4 + j, beyond(d8, out.c[j], out.c[3 - j], out.s[3 - j]));
    }
    out.eight = twice(eight);
  } else {
    put(0, one);
    put(1, two);
    put(2, three);
    put(3, four);
    put(4, five);
    put(5, beyond(d4, two.c, two.c, two.s));
    put(6, seven);
    put(7, eight);
    out.eight = eight;
  }
  return out;
}

// The knot whose angle is 8 g steps less that of knot j; -1: the angle 0.
template <bool half>
KERNELS_ALWAYS_INLINE int64_t mirror(int64_t g, int64_t j) {
  return kLow * g - j - (half ? 1 : 2);
}

inline int64_t giants(int64_t knots) { return (knots - 1) / kLow; }

// p [rows, stride], sixteen columns from `p` on of which `count` are there. partial: vectors
// [(giants + 1) * 16] of sums of this block of rows: cosines and sines of the first eight knots,
// then of each giant angle A the sums of cos A cos b and of sin A cos b.
template <bool half>
KERNELS_ALWAYS_INLINE void accumulate(const float* p, int64_t rows, int64_t stride, int64_t count,
                              int64_t giant_count, float start, Vector* partial) {
  for (int64_t i = 0; i < (giant_count + 1) * 2 * kLow; ++i) partial[i] = Vector{};
  const auto add = [&](const Multiples* m, Unit<Vector>* giant, int count_of_rows) SIGREG_ALWAYS {
    for (int j = 0; j < kLow; ++j) {
      Vector c = m[0].c[j], s = m[0].s[j];
      for (int r = 1; r < count_of_rows; ++r) {
        c += m[r].c[j];
        s += m[r].s[j];
      }
      partial[j] += c;
      partial[kLow + j] += s;
    }
    Vector* sums = partial + 2 * kLow;
    for (int64_t g = 0; g < giant_count; ++g, sums += 2 * kLow) {
      for (int j = 0; j < kLow; ++j) {
        Vector c = sums[j], s = sums[kLow + j];
        for (int r = 0; r < count_of_rows; ++r) {
          c += giant[r].c * m[r].c[j];
          s += giant[r].s * m[r].c[j];
        }
        sums[j] = c;
        sums[kLow + j] = s;
      }
      for (int r = 0; r < count_of_rows; ++r) giant[r] = rotate(giant[r], m[r].eight);
    }
  };
  int64_t n = 0;
  for (; n + kRows <= rows; n += kRows) {
    Multiples m[kRows];
    Unit<Vector> giant[kRows];
    for (int r = 0; r < kRows; ++r) {
      m[r] = multiples<half>(unit(load_some(p + (n + r) * stride, count) * start));
      giant[r] = m[r].eight;
    }
    add(m, giant, kRows);
  }
  for (; n < rows; ++n) {
    const Multiples m = multiples<half>(unit(load_some(p + n * stride, count) * start));
    Unit<Vector> giant = m.eight;
    add(&m, &giant, 1);
  }
}

// A block of rows of p [rows, stride], `count` columns: their terms are added to `running`, doubles
// [vectors of columns, (giants + 1) * 16, 16].
KERNELS_VECTOR inline void add_rows(const float* p, int64_t rows, int64_t stride, int64_t count,
                                   int64_t giant_count, float start, bool half, double* running) {
  Vector partial[(kMostGiants + 1) * 2 * kLow];
  const int64_t held = (giant_count + 1) * 2 * kLow;
  for (int64_t m = 0; m < count; m += kLanes, running += held * kLanes) {
    if (half) {
      accumulate<true>(p + m, rows, stride, count - m, giant_count, start, partial);
    } else {
      accumulate<false>(p + m, rows, stride, count - m, giant_count, start, partial);
    }
    for (int64_t i = 0; i < held; ++i) {
      double* sum = running + i * kLanes;
      store(sum, load<Doubles>(sum) + __builtin_convertvector(partial[i], Doubles));
    }
  }
}

// What `running` [(giants + 1) * 16, 16] of one vector of columns holds, as sums of the K knots:
// out [2, K, stride], `count` of the sixteen columns.
template <bool half>
inline void resolve(const double* running, int64_t rows, int64_t knots, int64_t count,
                    int64_t stride, float* out) {
  double sums[2][kMostKnots][kLanes];
  for (int64_t k = 0; k < knots; ++k) {
    const int64_t g = k / kLow, j = k % kLow;
    const int64_t other = g > 0 ? mirror<half>(g, j) : 0;
    for (int part = 0; part < 2; ++part) {
      const double* held = running + (g * 2 * kLow + part * kLow + j) * kLanes;
      for (int i = 0; i < kLanes; ++i) {
        double sum = held[i];
        if (g > 0) {
          const double at_zero = part == 0 ? static_cast<double>(rows) : 0.0;
          sum = 2.0 * sum - (other < 0 ? at_zero : sums[part][other][i]);
        }
        sums[part][k][i] = sum;
      }
      float* target = out + (part * knots + k) * stride;
      for (int64_t i = 0; i < count; ++i) target[i] = static_cast<float>(sums[part][k][i]);
    }
  }
}

// Coefficients of one vector of columns [2, K, stride] times `grad`, for what `slopes` multiplies:
// a constant, then as in `accumulate`. table: [1 + (giants + 1) * 16].
template <bool half>
KERNELS_ALWAYS_INLINE void spread(const float* coefficients, float grad, int64_t knots,
                                  int64_t count,
                          int64_t stride, Vector* table) {
  const int64_t held = (giants(knots) + 1) * 2 * kLow;
  for (int64_t i = 0; i <= held; ++i) table[i] = Vector{};
  const auto at = [&](int part, int64_t k) SIGREG_ALWAYS -> Vector& {
    return table[1 + k / kLow * 2 * kLow + part * kLow + k % kLow];
  };
  for (int part = 0; part < 2; ++part) {
    for (int64_t k = 0; k < knots; ++k) {
      at(part, k) = grad * load_some(coefficients + (part * knots + k) * stride, count);
    }
    for (int64_t k = knots - 1; k >= kLow; --k) {
      const int64_t other = mirror<half>(k / kLow, k % kLow);
      const Vector value = at(part, k);
      if (other >= 0) {
        at(part, other) -= value;
      } else if (part == 0) {
        table[0] -= value;
      }
      at(part, k) = value + value;
    }
  }
}

// sum_k a_k cos(t_k p) + b_k sin(t_k p) for p [rows, p_stride] -> out [rows, out_stride].
KERNELS_VECTOR inline void slopes(const float* p, const float* coefficients, float grad,
                                 int64_t rows, int64_t p_stride, int64_t count, int64_t knots,
                                 int64_t stride, float start, bool half, float* out,
                                 int64_t out_stride) {
  Vector table[1 + (kMostGiants + 1) * 2 * kLow];
  const int64_t giant_count = giants(knots);
  const auto element = [&](const Multiples& m) SIGREG_ALWAYS {
    Vector value = table[0], other = Vector{};
    for (int j = 0; j < kLow; ++j) {
      value += table[1 + j] * m.c[j];
      other += table[1 + kLow + j] * m.s[j];
    }
    const Vector* factors = table + 1 + 2 * kLow;
    Unit<Vector> giant = m.eight;
    for (int64_t g = 0; g < giant_count; ++g, factors += 2 * kLow) {
      Vector c = factors[0] * m.c[0], s = factors[kLow] * m.c[0];
      for (int j = 1; j < kLow; ++j) {
        c += factors[j] * m.c[j];
        s += factors[kLow + j] * m.c[j];
      }
      value += giant.c * c;
      other += giant.s * s;
      giant = rotate(giant, m.eight);
    }
    return value + other;
  };
  for (int64_t m = 0; m < count; m += kLanes) {
    const int64_t columns = count - m;
    if (half) {
      spread<true>(coefficients + m, grad, knots, columns, stride, table);
      for (int64_t n = 0; n < rows; ++n) {
        const Vector angle = load_some(p + n * p_stride + m, columns) * start;
        store_some(out + n * out_stride + m, element(multiples<true>(unit(angle))), columns);
      }
    } else {
      spread<false>(coefficients + m, grad, knots, columns, stride, table);
      for (int64_t n = 0; n < rows; ++n) {
        const Vector angle = load_some(p + n * p_stride + m, columns) * start;
        store_some(out + n * out_stride + m, element(multiples<false>(unit(angle))), columns);
      }
    }
  }
}

// ---- Knots of any spacing: a cosine and sine each.

// As add_rows; running: doubles [vectors of columns, 2 K, 16].
KERNELS_VECTOR inline void add_rows_each(const float* p, int64_t rows, int64_t stride,
                                        int64_t count, const double* knots, int64_t knot_count,
                                        double* running) {
  for (int64_t m = 0; m < count; m += kLanes, running += 2 * knot_count * kLanes) {
    for (int64_t k = 0; k < knot_count; ++k) {
      const float t = static_cast<float>(knots[k]);
      Vector c = {}, s = {};
      for (int64_t n = 0; n < rows; ++n) {
        const Unit<Vector> e = unit(load_some(p + n * stride + m, count - m) * t);
        c += e.c;
        s += e.s;
      }
      double* at = running + k * kLanes;
      store(at, load<Doubles>(at) + __builtin_convertvector(c, Doubles));
      at += knot_count * kLanes;
      store(at, load<Doubles>(at) + __builtin_convertvector(s, Doubles));
    }
  }
}

KERNELS_VECTOR inline void slopes_each(const float* p, const float* coefficients, float grad,
                                      int64_t rows, int64_t p_stride, int64_t count,
                                      const double* knots, int64_t knot_count, int64_t stride,
                                      float* out, int64_t out_stride) {
  for (int64_t m = 0; m < count; m += kLanes) {
    const int64_t columns = count - m;
    for (int64_t n = 0; n < rows; ++n) {
      const Vector value = load_some(p + n * p_stride + m, columns);
      Vector sum = {};
      for (int64_t k = 0; k < knot_count; ++k) {
        const Unit<Vector> e = unit(value * static_cast<float>(knots[k]));
        const float* a = coefficients + k * stride + m;
        sum += load_some(a, columns) * e.c + load_some(a + knot_count * stride, columns) * e.s;
      }
      store_some(out + n * out_stride + m, sum * grad, columns);
    }
  }
}

}  // namespace sigreg
