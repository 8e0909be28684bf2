// Sequence assembly on the CPU: the grid order of context and target tokens, and the rows in it.
#pragma once

#include <numeric>

#include "tokens/cpu/loss.h"
#include "tokens/cpu/rows.h"

namespace tokens {
namespace cpu {

// The places of one sample's tokens in ascending order of their grid positions, context tokens first
// where positions are equal, then by their own order: a merge of two lists, each sorted first where
// it is not sorted yet.
class Merge {
 public:
  void sort(const Indices& index, int64_t begin, int64_t count, std::vector<int64_t>& by) {
    by.resize(count);
    std::iota(by.begin(), by.end(), begin);
    for (int64_t i = 1; i < count; ++i) {
      if (index[begin + i] < index[begin + i - 1]) {
        std::stable_sort(by.begin(), by.end(),
                         [&](int64_t a, int64_t b) { return index[a] < index[b]; });
        return;
      }
    }
  }

  // write(place, position), context(row, place) and target(row, place) for every token.
  template <typename Write, typename First, typename Second>
  void run(const Indices& context, int64_t context_begin, int64_t context_count,
           const Indices& target, int64_t target_begin, int64_t target_count, const Write& write,
           const First& first, const Second& second) {
    sort(context, context_begin, context_count, a_);
    sort(target, target_begin, target_count, b_);
    int64_t i = 0, j = 0;
    for (int64_t at = 0; at < context_count + target_count; ++at) {
      const bool take = j == target_count || (i < context_count && context[a_[i]] <= target[b_[j]]);
      write(at, take ? context[a_[i]] : target[b_[j]]);
      if (take) {
        first(a_[i++], at);
      } else {
        second(b_[j++], at);
      }
    }
  }

 private:
  std::vector<int64_t> a_, b_;
};

inline void put(const Indices& to, int64_t i, int64_t value) {
  if (to.wide) {
    static_cast<int64_t*>(const_cast<void*>(to.data))[i] = value;
  } else {
    static_cast<int32_t*>(const_cast<void*>(to.data))[i] = static_cast<int32_t>(value);
  }
}

inline void check_positive(const char* name, const Indices& index, int64_t count) {
  check_index(name, index, count, std::numeric_limits<int32_t>::max());
}

inline std::tuple<Tensor, Tensor, Tensor> sequence_order(
    const Tensor& context_index, const Tensor& target_index, const int64_t* context_offsets,
    const int64_t* target_offsets, int64_t batch) {
  const Indices context = indices(context_index), target = indices(target_index);
  const bool ragged = context_offsets != nullptr;
  check_offsets("context_offsets", context_offsets, batch, context_index.numel());
  check_offsets("target_offsets", target_offsets, batch, target_index.numel());
  check_positive("context_index", context, context_index.numel());
  check_positive("target_index", target, target_index.numel());
  const int64_t kc = ragged ? 0 : context_index.size(1), kt = ragged ? 0 : target_index.size(1);
  const int64_t sequences = ragged ? batch : target_index.size(0);
  const int64_t contexts = ragged ? batch : context_index.size(0);
  const Tensor out = ragged ? common::empty(context_index,
                                            {context_index.numel() + target_index.numel()},
                                            context_index.scalar_type())
                            : common::empty(context_index, {sequences, kc + kt},
                                            context_index.scalar_type());
  const Tensor context_rows =
      ragged ? empty_like_index(context_index)
             : common::empty(context_index, {sequences, kc}, context_index.scalar_type());
  const Tensor target_rows = empty_like_index(target_index);
  const Indices order = indices(out), rows_c = indices(context_rows), rows_t = indices(target_rows);
  torch::stable::parallel_for(0, sequences, 1, [&](int64_t first, int64_t last) {
    Merge merge;
    for (int64_t s = first; s < last; ++s) {
      const int64_t c = ragged ? context_offsets[s] : s % contexts * kc;
      const int64_t t = ragged ? target_offsets[s] : s * kt;
      const int64_t count_c = ragged ? context_offsets[s + 1] - c : kc;
      const int64_t count_t = ragged ? target_offsets[s + 1] - t : kt;
      // Packed samples follow one another: their places are rows of the whole.
      const int64_t base = ragged ? c + t : 0, begin = ragged ? c + t : s * (kc + kt);
      const int64_t to_c = ragged ? 0 : s * kc - c;
      merge.run(
          context, c, count_c, target, t, count_t,
          [&](int64_t at, int64_t position) { put(order, begin + at, position); },
          [&](int64_t row, int64_t at) { put(rows_c, row + to_c, base + at); },
          [&](int64_t row, int64_t at) { put(rows_t, row, base + at); });
    }
  });
  return {out, context_rows, target_rows};
}

// context [C, Kc, D] in turns, target [D] float32 or [P, Kt, D] -> [P, Kc + Kt, D].
inline Tensor sequence_rows(const Tensor& context, const Tensor& context_index,
                            const Tensor& context_rows, const Tensor& target,
                            const Tensor& target_index, const Tensor& target_rows,
                            const std::optional<Tensor>& positions) {
  const int64_t contexts = context.size(0), kc = context.size(1), dim = context.size(2);
  const int64_t sequences = target_index.size(0), kt = target_index.size(1), all = kc + kt;
  const bool single = target.dim() == 1;
  if (positions) {
    check_index("context_index", indices(context_index), context_index.numel(), positions->size(0));
    check_index("target_index", indices(target_index), target_index.numel(), positions->size(0));
  }
  check_index("context_rows", indices(context_rows), context_rows.numel(), all);
  check_index("target_rows", indices(target_rows), target_rows.numel(), all);
  const ScalarType dtype = context.scalar_type();
  const int64_t bytes = dim * element_bytes(dtype);
  const Tensor out = common::empty(context, {sequences, all, dim}, dtype);
  char* to = static_cast<char*>(out.data_ptr());
  const Source source(context);
  const float* token = single ? static_cast<const float*>(target.const_data_ptr()) : nullptr;
  const std::optional<Source> tokens =
      single ? std::nullopt : std::optional<Source>(Source(target));
  const float* table =
      positions ? static_cast<const float*>(positions->const_data_ptr()) : nullptr;
  const Indices at_c = indices(context_index), at_t = indices(target_index);
  const Indices rows_c = indices(context_rows), rows_t = indices(target_rows);
  std::vector<char> narrow(bytes);
  if (single) write(token, dim, dtype, narrow.data());

  over_rows(sequences * all, 2 * bytes, [&](int64_t first, int64_t last) {
    std::vector<float> scratch(2 * dim), sum(dim);
    for (int64_t i = first; i < last; ++i) {
      const int64_t s = i / all, k = i % all;
      const bool from_context = k < kc;
      const int64_t row = from_context ? s * kc + k : s * kt + k - kc;
      const int64_t place = from_context ? rows_c[row] : rows_t[row];
      char* target_row = to + (s * all + place) * bytes;
      const int64_t offset = from_context ? source.place(s % contexts, k)
                             : single     ? 0
                                          : tokens->place(s, k - kc);
      if (table == nullptr) {
        if (from_context) {
          source.copy(offset, target_row);
        } else if (single) {
          std::memcpy(target_row, narrow.data(), bytes);
        } else {
          tokens->copy(offset, target_row);
        }
        continue;
      }
      const float* own = from_context ? source.read(offset, scratch.data())
                         : single     ? token
                                      : tokens->read(offset, scratch.data());
      const int64_t position = from_context ? at_c[s % contexts * kc + k] : at_t[row];
      float* wide = dtype == ScalarType::Float ? reinterpret_cast<float*>(target_row) : sum.data();
      add_rows(own, table + position * dim, dim, wide);
      write(wide, dim, dtype, target_row);
    }
  });
  return out;
}

// The sum of the rows that `rows` [P, K] names in sequence [P, S, D], float32 [D]. Blocks of 64 rows
// are summed in float32, and their sums in float64, whatever the number of threads.
inline Tensor rows_column_sum(const Tensor& sequence, const Tensor& rows) {
  constexpr int64_t kBlock = 64;
  const int64_t dim = sequence.size(2), count = rows.numel(), each = rows.size(1);
  const Indices row = indices(rows);
  check_index("rows", row, count, sequence.size(1));
  const Tensor out = common::empty(sequence, {dim}, ScalarType::Float);
  const Source source(sequence);
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  std::vector<float> partial(blocks * dim, 0.f);
  over_rows(blocks, kBlock * dim * 4, [&](int64_t first, int64_t last) {
    std::vector<float> scratch(2 * dim);
    for (int64_t b = first; b < last; ++b) {
      for (int64_t r = b * kBlock; r < std::min(count, (b + 1) * kBlock); ++r) {
        add_row(source.read(source.place(r / each, row[r]), scratch.data()), dim,
                partial.data() + b * dim);
      }
    }
  });
  float* target = static_cast<float*>(out.data_ptr());
  for (int64_t j = 0; j < dim; ++j) {
    double sum = 0.0;
    for (int64_t b = 0; b < blocks; ++b) sum += partial[b * dim + j];
    target[j] = static_cast<float>(sum);
  }
  return out;
}

}  // namespace cpu
}  // namespace tokens
