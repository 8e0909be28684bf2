// What the SIGReg ops take; op.py documents every tensor.
#pragma once

#include "common/checks.h"
#include "sigreg/formula.h"
#include "sigreg/sigreg.h"

namespace sigreg {

inline void check_knots(const std::vector<double>& knots) {
  common::check_count("knots", knots, 1, kMostKnots);
}

inline void check_directions(const Tensor& like, const std::optional<Tensor>& step, int64_t,
                             int64_t, int64_t dim, int64_t slices) {
  const common::Argument beside("like", like);
  beside.dtype(common::kFloats);
  if (step) common::Argument("step", *step).plain(common::kInt64, beside).one_element();
  common::check_range("dim", dim, 1, common::kMostElements);
  common::check_range("slices", slices, 1, common::kMostElements);
  common::check_product("dim and slices", dim, slices, 1);
}

inline void check_sums(const Tensor& z, const Tensor& directions,
                       const std::vector<double>& knots) {
  using common::kSome;
  const common::Argument first("z", z);
  first.dtype(common::kFloats).shape({kSome, kSome, kSome});
  common::Argument("directions", directions).on(first).as(first).shape({first.size(2), kSome});
  check_knots(knots);
}

inline void check_forward(const Tensor& z, const Tensor& directions,
                          const std::vector<double>& knots, const std::vector<double>& weights,
                          double, double) {
  check_sums(z, directions, knots);
  common::check_count("weights", weights, knots.size(), knots.size());
}

inline void check_statistic(const Tensor& sums, const std::vector<double>& knots,
                            const std::vector<double>& weights, double, double, double) {
  using common::kSome;
  check_knots(knots);
  common::check_count("weights", weights, knots.size(), knots.size());
  common::Argument("sums", sums)
      .dtype(common::kFloat32)
      .contiguous()
      .shape({kSome, 2, static_cast<int64_t>(knots.size()), kSome});
}

inline void check_gradient(const Tensor& grad, const Tensor& coefficients,
                           const Tensor& projections, const Tensor& directions,
                           const std::vector<double>& knots) {
  using common::Argument, common::kFloat32, common::kSome;
  check_knots(knots);
  const Argument p("projections", projections);
  p.dtype(kFloat32).contiguous().shape({kSome, kSome, kSome});
  Argument("grad", grad).plain(kFloat32, p).one_element();
  Argument("coefficients", coefficients)
      .plain(kFloat32, p)
      .shape({p.size(0), 2, static_cast<int64_t>(knots.size()), p.size(2)});
  Argument("directions", directions).dtype(common::kFloats).on(p).shape({kSome, p.size(2)});
}

}  // namespace sigreg
