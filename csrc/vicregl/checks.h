// What the VICRegL ops take; contract.py documents every tensor.
#pragma once

#include "common/checks.h"
#include "vicregl/vicregl.h"

namespace vicregl {

struct Sides {
  common::Argument a, b;
};

inline Sides check_match(const Tensor& a, const Tensor& b) {
  using common::kSome;
  const Sides sides = {{"a", a}, {"b", b}};
  sides.a.dtype(common::kFloats).shape({kSome, kSome, kSome, kSome});
  sides.b.on(sides.a).as(sides.a).shape({kSome, sides.a.size(1), kSome, sides.a.size(3)});
  return sides;
}

// The sets of matches that one direction keeps, of `length` positions.
inline void check_kept(const char* counts_name, const std::vector<int64_t>& counts,
                       const char* weights_name, const std::vector<double>& weights,
                       int64_t length) {
  common::check_count(counts_name, counts, 0, kMostCounts);
  common::check_count(weights_name, weights, counts.size(), counts.size());
  for (const int64_t count : counts) common::check_range(counts_name, count, 1, length);
}

inline Sides check_pairs_forward(const Tensor& a, const Tensor& b, const Tensor& nearest_a,
                                 const Tensor& rank_a, const Tensor& nearest_b,
                                 const Tensor& rank_b, const std::vector<int64_t>& counts_a,
                                 const std::vector<double>& weights_a,
                                 const std::vector<int64_t>& counts_b,
                                 const std::vector<double>& weights_b) {
  using common::Argument, common::kInt32;
  const Sides sides = check_match(a, b);
  const int64_t views_a = sides.a.size(0), views_b = sides.b.size(0), batch = sides.a.size(1);
  const int64_t rows_a = sides.a.size(2), rows_b = sides.b.size(2);
  const auto matches = [&](const char* name, const Tensor& z, int64_t rows) {
    Argument(name, z).plain(kInt32, sides.a).shape({views_a, views_b, batch, rows});
  };
  matches("nearest_a", nearest_a, rows_a);
  matches("rank_a", rank_a, rows_a);
  matches("nearest_b", nearest_b, rows_b);
  matches("rank_b", rank_b, rows_b);
  check_kept("counts_a", counts_a, "weights_a", weights_a, rows_a);
  check_kept("counts_b", counts_b, "weights_b", weights_b, rows_b);
  return sides;
}

inline void check_pairs_backward(const Tensor& grad, const Tensor& a, const Tensor& b,
                                 const Tensor& nearest_a, const Tensor& rank_a,
                                 const Tensor& nearest_b, const Tensor& rank_b, bool, bool,
                                 const std::vector<int64_t>& counts_a,
                                 const std::vector<double>& weights_a,
                                 const std::vector<int64_t>& counts_b,
                                 const std::vector<double>& weights_b) {
  const Sides sides = check_pairs_forward(a, b, nearest_a, rank_a, nearest_b, rank_b, counts_a,
                                          weights_a, counts_b, weights_b);
  common::Argument("grad", grad).plain(common::kFloat32, sides.a).one_element();
}

}  // namespace vicregl
