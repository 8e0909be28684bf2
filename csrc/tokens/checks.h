// What the tokens ops take; contract.py documents every tensor. Of indices and offsets only the
// shapes are known here: the kernels look at the values.
#pragma once

#include "common/checks.h"
#include "tokens/formula.h"
#include "tokens/tokens.h"

namespace tokens {

using common::Argument, common::kAny, common::kSome;

// index [P, K] with P a multiple of `batch`, or [R] with offsets [batch + 1]; beside `z`.
inline Argument check_rows(const Tensor& index, const std::optional<Tensor>& offsets,
                           int64_t batch, const Argument& z) {
  const Argument rows("index", index);
  rows.plain(common::kIntegers, z);
  if (offsets) {
    rows.shape({kAny});
    Argument("offsets", *offsets).plain(common::kInt64, z).shape({batch + 1});
  } else {
    rows.shape({kAny, kAny});
    if (rows.size(0) % batch != 0) {
      rows.refuse_shape("a multiple of " + std::to_string(batch) + " (B) rows");
    }
  }
  return rows;
}

// A row of `dim` elements, kAny for any number, for each place of `index`.
inline const Argument& check_like(const Argument& z, const Argument& index, int64_t dim) {
  if (index.dims() == 1) return z.shape({index.size(0), dim});
  return z.shape({index.size(0), index.size(1), dim});
}

inline void check_gather(const Tensor& x, const Tensor& index,
                         const std::optional<Tensor>& offsets) {
  const Argument from("x", x);
  from.dtype(common::kFloats).shape({kSome, kSome, kSome});
  check_rows(index, offsets, from.size(0), from);
}

inline void check_scatter(const Tensor& rows, const Tensor& index,
                          const std::optional<Tensor>& offsets, int64_t batch, int64_t length,
                          double, bool, bool) {
  const Argument from("rows", rows);
  from.dtype(common::kFloats);
  common::check_range("batch", batch, 1, common::kMostElements);
  common::check_range("length", length, 1, common::kMostElements);
  check_like(from, check_rows(index, offsets, batch, from), kSome);
  common::check_product("batch and length", batch, length, from.size(from.dims() - 1));
}

inline Argument check_loss_forward(const Tensor& pred, const Tensor& teacher, const Tensor& index,
                                   const std::optional<Tensor>& offsets, int64_t kind, bool, double,
                                   double) {
  const Argument from("teacher", teacher), made("pred", pred);
  from.dtype(common::kFloats).on(made).shape({kSome, kSome, kSome});
  made.dtype(common::kFloats);
  const Argument rows = check_rows(index, offsets, from.size(0), made);
  check_like(made, rows, from.size(2));
  common::check_range("kind", kind, kSmoothL1, kCosine);
  return rows;
}

inline void check_loss_backward(const Tensor& grad, const Tensor& pred, const Tensor& teacher,
                                const Tensor& index, const std::optional<Tensor>& offsets,
                                const Tensor& saved, int64_t kind, bool normalize, double beta) {
  const Argument rows =
      check_loss_forward(pred, teacher, index, offsets, kind, normalize, beta, 0.0);
  Argument("grad", grad).plain(common::kFloat32, rows).one_element();
  Argument("saved", saved)
      .plain(common::kFloat32, rows)
      .shape({rows.elements(), saved_floats(kind)});
}

inline void check_order(const Tensor& context_index, const Tensor& target_index,
                        const std::optional<Tensor>& context_offsets,
                        const std::optional<Tensor>& target_offsets) {
  const Argument context("context_index", context_index), target("target_index", target_index);
  context.dtype(common::kIntegers).contiguous();
  target.plain(common::kIntegers, context);
  if (context_offsets.has_value() != target_offsets.has_value()) {
    common::refuse("context_offsets, target_offsets: got one of them, takes both or neither");
  }
  if (!context_offsets) {
    context.shape({kSome, kAny});
    target.shape({kSome, kAny});
    if (target.size(0) % context.size(0) != 0) {
      target.refuse_shape("a multiple of context_index's " + std::to_string(context.size(0)) +
                          " rows");
    }
    return;
  }
  context.shape({kAny});
  target.shape({kAny});
  const Argument first("context_offsets", *context_offsets);
  first.plain(common::kInt64, context).shape({kSome});
  if (first.size(0) < 2) first.refuse_shape("[B + 1], B at least 1");
  Argument("target_offsets", *target_offsets)
      .plain(common::kInt64, context)
      .shape({first.size(0)});
}

inline void check_assemble(const Tensor& context, const Tensor& context_index,
                           const Tensor& context_rows, const Tensor& target,
                           const Tensor& target_index, const Tensor& target_rows,
                           const std::optional<Tensor>& positions) {
  const Argument from("context", context), wanted("target_index", target_index);
  from.dtype(common::kFloats).shape({kSome, kAny, kSome});
  wanted.plain(common::kIntegers, from).shape({kSome, kAny});
  const int64_t contexts = from.size(0), sequences = wanted.size(0), dim = from.size(2);
  if (sequences % contexts != 0) {
    wanted.refuse_shape("a multiple of the context's " + std::to_string(contexts) + " rows");
  }
  const auto integers = [&](const char* name, const Tensor& z, int64_t rows, int64_t columns) {
    Argument(name, z).plain(common::kIntegers, from).shape({rows, columns});
  };
  integers("context_index", context_index, contexts, from.size(1));
  integers("context_rows", context_rows, sequences, from.size(1));
  integers("target_rows", target_rows, sequences, wanted.size(1));
  const Argument own("target", target);
  if (own.dims() == 1) {
    own.plain(common::kFloat32, from).shape({dim});
  } else {
    own.as(from).on(from).shape({sequences, wanted.size(1), dim});
  }
  if (positions) {
    Argument("positions", *positions).plain(common::kFloat32, from).shape({kSome, dim});
  }
}

inline void check_column_sum(const Tensor& sequence, const Tensor& rows) {
  const Argument from("sequence", sequence);
  from.dtype(common::kFloats).shape({kSome, kSome, kSome});
  Argument("rows", rows).plain(common::kIntegers, from).shape({from.size(0), kAny});
}

}  // namespace tokens
