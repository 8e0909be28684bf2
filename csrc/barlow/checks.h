// What the Barlow Twins ops take; op.py documents every tensor.
#pragma once

#include "barlow/barlow.h"
#include "common/checks.h"

namespace barlow {

inline common::Argument check_forward(const Tensor& x, const Tensor& y, double, double, bool,
                                      double, bool) {
  const common::Argument first("x", x);
  first.dtype(common::kFloats).shape({common::kSome, common::kSome});
  common::Argument("y", y).on(first).as(first).like(first);
  return first;
}

inline void check_backward(const Tensor& grad, const Tensor& x, const Tensor& y,
                           const Tensor& moments, const Tensor& diagonal, const Tensor& products,
                           const Tensor& standardised, bool, bool, double eps, double std_eps,
                           bool unbiased, double lambd, bool tf32x3) {
  using common::Argument, common::kFloat32;
  const Argument first = check_forward(x, y, eps, std_eps, unbiased, lambd, tf32x3);
  const int64_t rows = first.size(0), dim = first.size(1), side = std::min(rows, dim);
  Argument("grad", grad).plain(kFloat32, first).one_element();
  Argument("moments", moments).plain(kFloat32, first).shape({2, 3, dim});
  Argument("diagonal", diagonal).plain(kFloat32, first).shape({dim});
  Argument("products", products).plain(kFloat32, first).shape({rows < dim ? 2 : 1, side, side});
  if (kSavesStandardised) {
    Argument("standardised", standardised).as(first).on(first).contiguous().shape({2, rows, dim});
  } else {
    Argument("standardised", standardised).shape({0});
  }
}

}  // namespace barlow
