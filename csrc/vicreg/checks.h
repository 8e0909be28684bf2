// What the VICReg ops take; op.py documents every tensor.
#pragma once

#include "common/checks.h"
#include "vicreg/formula.h"
#include "vicreg/vicreg.h"

namespace vicreg {

inline common::Argument check_views(const Tensor& x, const std::optional<Tensor>& y,
                                    const std::vector<double>& scales,
                                    const std::vector<double>& weights) {
  using common::kSome;
  const common::Argument first("x", x);
  first.dtype(common::kFloats);
  if (first.dims() != 2 || !kTakesRows) first.shape({kSome, kSome, kSome});
  if (first.dims() == 2) first.shape({kSome, kSome});
  if (y) common::Argument("y", *y).on(first).as(first).like(first);
  common::check_count("scales", scales, 3, 3);
  common::check_count("weights", weights, 3, 3);
  return first;
}

inline void check_forward(const Tensor& x, const std::optional<Tensor>& y, double, double, bool,
                          const std::vector<double>& scales, const std::vector<double>& weights,
                          bool) {
  check_views(x, y, scales, weights);
}

inline void check_backward(const Tensor& grads, const Tensor& x, const std::optional<Tensor>& y,
                           const Tensor& moments, const Tensor& squares, const Tensor& deflated,
                           const Tensor& index, const Tensor& centred, bool, bool need_y, double,
                           double, bool, const std::vector<double>& scales,
                           const std::vector<double>& weights, bool) {
  using common::Argument, common::kFloat32;
  const Argument first = check_views(x, y, scales, weights);
  if (need_y && !y) common::refuse("need_y: got True without y, takes False");
  const int64_t leading = first.dims() - 2;  // [N, D] is one group
  const int64_t views = y ? 2 : 1, groups = leading == 0 ? 1 : first.size(0);
  const int64_t rows = first.size(leading), dim = first.size(leading + 1);
  const int64_t side = std::min(rows, dim);
  const int64_t deflated_count = rows < dim ? std::min(kDeflatedColumns, dim) : 0;
  const Argument of("grads", grads);
  of.plain(kFloat32, first);
  if (of.dims() > 1 || (of.elements() != 1 && of.elements() != 4)) {
    of.refuse_shape("1 or 4 elements, [] or [1] or [4]");
  }
  Argument("moments", moments).plain(kFloat32, first).shape({views, groups, 3, dim});
  Argument("squares", squares).plain(kFloat32, first).shape({views, groups, side, side});
  Argument("deflated", deflated)
      .plain(kFloat32, first)
      .shape({views, groups, deflated_count, rows});
  Argument("index", index).plain(common::kInt64, first).shape({views, groups, deflated_count});
  if (kSavesCentred) {
    Argument("centred", centred).as(first).on(first).contiguous().shape({views, groups, rows, dim});
  } else {
    Argument("centred", centred).shape({0});
  }
}

}  // namespace vicreg
