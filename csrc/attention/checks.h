// What the attention ops take; contract.py documents every tensor. Of offsets, lengths, bounds and
// places only the shapes are known here: the kernels look at the values.
#pragma once

#include "attention/attention.h"
#include "common/checks.h"

namespace attention {

using common::Argument, common::kAny, common::kSome;

inline void check_heads(const Argument& x) {
  x.dtype(common::kFloats).shape({kSome, kSome, kAny, kSome});
  const int64_t dim = x.size(3);
  if (dim % 8 != 0 || dim < 16 || dim > 128) {
    x.refuse_shape("[B, H, T, d] with d a multiple of 8 from 16 to 128");
  }
  if (x.size(2) > kMostTokens) x.refuse_shape("at most 2^30 tokens");
}

inline void check_table(const Tensor& table, const std::vector<int64_t>& grid, const Argument& x) {
  common::check_count("grid", grid, 4, 4);
  for (int axis = 0; axis < 3; ++axis) common::check_range("grid", grid[axis], 1, kMostTokens);
  common::check_product("grid", grid[0], grid[1], grid[2]);
  common::check_range("grid", grid[0] * grid[1] * grid[2], 1, kMostTokens);
  common::check_range("grid's axes", grid[3], 1, 3);
  const Argument angles("table", table);
  angles.plain(common::kFloat32, x).shape({grid[0] + grid[1] + grid[2], kSome, 2});
  if (angles.size(1) % 2 != 0 || grid[3] * angles.size(1) > x.size(3)) {
    angles.refuse_shape("[positions, part, 2] with an even part and axes x part at most d");
  }
}

// index [B or 1, T] of x [B, H, T, d].
inline void check_places(const char* name, const Optional& index, const Argument& x) {
  if (!index) return;
  const Argument places(name, *index);
  places.plain(common::kInt32, x).shape({kAny, x.size(2)});
  if (places.size(0) != 1 && places.size(0) != x.size(0)) places.refuse_shape("[B or 1, T]");
}

// offsets [samples + 1] of packed tokens, which are a batch of one; returns the samples.
inline int64_t check_packed(const char* name, const Tensor& offsets, const Argument& x) {
  const Argument at(name, offsets);
  at.plain(common::kInt32, x).shape({kSome});
  if (x.size(0) != 1) x.refuse_shape(std::string("a batch of 1 where ") + name + " are given");
  return at.size(0) - 1;
}

struct Sizes {
  Argument q, k;
};

inline Sizes check_inputs(const Tensor& q, const Tensor& k, const Tensor& v) {
  const Sizes x = {{"q", q}, {"k", k}};
  check_heads(x.q);
  x.k.on(x.q).as(x.q).shape({x.q.size(0), x.q.size(1), kAny, x.q.size(3)});
  if (x.k.size(2) > kMostTokens) x.k.refuse_shape("at most 2^30 tokens");
  Argument("v", v).on(x.q).as(x.q).like(x.k);
  return x;
}

inline Sizes check_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                           const Optional& q_offsets, const Optional& k_offsets,
                           const Optional& lengths, const Optional& keep, const Optional& bounds,
                           int64_t max_q, int64_t max_k, int64_t tokens_per_frame, int64_t window,
                           const Optional& table, const Optional& q_index, const Optional& k_index,
                           const std::vector<int64_t>& grid, double) {
  const Sizes x = check_inputs(q, k, v);
  if (q_offsets.has_value() != k_offsets.has_value()) {
    common::refuse("q_offsets, k_offsets: got one of them, takes both or neither");
  }
  int64_t samples = x.q.size(0);
  if (q_offsets) {
    samples = check_packed("q_offsets", *q_offsets, x.q);
    Argument("k_offsets", *k_offsets).plain(common::kInt32, x.q).shape({samples + 1});
  }
  if (lengths) Argument("lengths", *lengths).plain(common::kInt32, x.q).shape({samples});
  if (keep) Argument("keep", *keep).plain(common::kBool, x.q).shape({samples, x.k.size(2)});
  if (bounds) {
    const Argument ends("bounds", *bounds);
    ends.plain(common::kInt32, x.q).shape({kAny, kSome});
    if (ends.size(0) != 1 && ends.size(0) != samples) ends.refuse_shape("[B or 1, M + 1]");
  }
  common::check_range("max_q", max_q, q_offsets ? 0 : x.q.size(2), kMostTokens);
  common::check_range("max_k", max_k, k_offsets ? 0 : x.k.size(2), kMostTokens);
  common::check_range("tokens_per_frame", tokens_per_frame, 0, INT64_MAX);
  common::check_range("window", window, 0, INT64_MAX);
  if (table) {
    check_table(*table, grid, x.q);
    check_places("q_index", q_index, x.q);
    check_places("k_index", k_index, x.k);
  } else if (q_index || k_index) {
    common::refuse("q_index, k_index: got places without a table, takes them with one");
  }
  return x;
}

inline void check_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                           const Tensor& out, const Tensor& lse, const Optional& q_offsets,
                           const Optional& k_offsets, const Optional& lengths,
                           const Optional& keep, const Optional& bounds, int64_t max_q,
                           int64_t max_k, int64_t tokens_per_frame, int64_t window,
                           const Optional& table, const Optional& q_index, const Optional& k_index,
                           const std::vector<int64_t>& grid, bool, bool, bool, double scale) {
  const Sizes x = check_forward(q, k, v, q_offsets, k_offsets, lengths, keep, bounds, max_q, max_k,
                                tokens_per_frame, window, table, q_index, k_index, grid, scale);
  Argument("grad", grad).on(x.q).as(x.q).like(x.q);
  Argument("out", out).on(x.q).as(x.q).like(x.q);
  Argument("lse", lse)
      .plain(common::kFloat32, x.q)
      .shape({x.q.size(0), x.q.size(1), x.q.size(2)});
}

inline void check_rotate(const Tensor& x, const Tensor& table, const Optional& index,
                         const Optional& offsets, const std::vector<int64_t>& grid, bool) {
  const Argument rows("x", x);
  check_heads(rows);
  check_table(table, grid, rows);
  check_places("index", index, rows);
  if (offsets) check_packed("offsets", *offsets, rows);
}

}  // namespace attention
