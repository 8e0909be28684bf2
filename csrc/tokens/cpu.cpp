// The tokens ops on the CPU.
//
// Memory, with R rows of D elements kept of [B, T, D]: gather reads and writes R D elements, scatter
// reads R D and writes B T D, the loss reads 2 R D forward and reads 2 R D and writes R D backward,
// assembly reads and writes its sequence once. All are bound by it: a row is worked on in cache.
// Threads take rows; what a row gives never depends on how they are shared out, and sums over rows
// are added up in the order of the rows. Indices are checked before anything is allocated.
#include "tokens/cpu/assembly.h"
#include "tokens/cpu/loss.h"
#include "tokens/cpu/rows.h"
#include "tokens/tokens.h"

namespace tokens {

using namespace cpu;

namespace {

const int64_t* offsets_of(const std::optional<Tensor>& offsets) {
  return offsets ? static_cast<const int64_t*>(offsets->const_data_ptr()) : nullptr;
}

void check_rows(const Samples& rows, const Indices& index, int64_t length) {
  check_offsets("offsets", rows.offsets, rows.batch.by, rows.count);
  check_index("index", index, rows.count, length);
}

// The rows that name each of batch x length tokens, ascending: head, then next, until -1.
struct Chains {
  std::vector<int64_t> head, next;
};

Chains chains(const Samples& rows, const Indices& index, int64_t length, bool whole, bool unique) {
  Chains made;
  made.head.assign((whole ? 1 : rows.batch.by) * length, -1);
  made.next.resize(rows.count);
  for (int64_t r = rows.count - 1; r >= 0; --r) {
    int64_t& head = made.head[(whole ? 0 : rows.of(r)) * length + index[r]];
    if (unique && head >= 0) {
      refuse("index: got ", index[r], " twice in one sample, takes each token once");
    }
    made.next[r] = head;
    head = r;
  }
  return made;
}

struct LossRows {
  LossRows(const Tensor& pred, const Tensor& teacher, const Tensor& index,
           const std::optional<Tensor>& offsets)
      : rows(samples(index, offsets, teacher.size(0))),
        tokens(indices(index)),
        dim(teacher.size(2)),
        pred(pred),
        teacher(teacher) {}

  // Row r of both; scratch: 4 D floats.
  Row read(int64_t r, float* scratch) const {
    Row row = {};
    row.p = pred.read(pred.place(r), scratch);
    row.t = teacher.read(teacher.place(rows.of(r), tokens[r]), scratch + 2 * dim);
    row.count = dim;
    row.rstd = 1.f;
    return row;
  }

  Samples rows;
  Indices tokens;
  int64_t dim;
  Source pred, teacher;
};

void set_beta(Row& row, double beta) {
  row.beta = static_cast<float>(beta);
  row.inverse_beta = beta > 0.0 ? static_cast<float>(1.0 / beta) : 0.f;
}

}  // namespace

Tensor gather(Tensor x, Tensor index, std::optional<Tensor> offsets) {
  const Samples rows = samples(index, offsets, x.size(0));
  const Indices token = indices(index);
  check_rows(rows, token, x.size(1));
  const Tensor out = empty_rows(index, x, x.scalar_type());
  const Source source(x);
  const int64_t bytes = x.size(2) * element_bytes(x.scalar_type());
  char* target = static_cast<char*>(out.data_ptr());
  over_rows(rows.count, bytes, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      source.copy(source.place(rows.of(r), token[r]), target + r * bytes);
    }
  });
  return out;
}

Tensor scatter(Tensor rows, Tensor index, std::optional<Tensor> offsets, int64_t batch,
               int64_t length, double fill, bool accumulate, bool reduce) {
  const Samples all = samples(index, offsets, batch);
  const Indices token = indices(index);
  check_rows(all, token, length);
  const Chains chain = chains(all, token, length, reduce, !accumulate);
  const ScalarType dtype = rows.scalar_type();
  const int64_t dim = rows.size(rows.dim() - 1), bytes = dim * element_bytes(dtype);
  const Tensor out = reduce ? common::empty(rows, {length, dim}, dtype)
                            : common::empty(rows, {batch, length, dim}, dtype);
  const Source source(rows);
  char* target = static_cast<char*>(out.data_ptr());
  std::vector<float> filling(dim, static_cast<float>(fill));
  std::vector<char> filled(bytes);
  write(filling.data(), dim, dtype, filled.data());
  over_rows(static_cast<int64_t>(chain.head.size()), bytes, [&](int64_t first, int64_t last) {
    std::vector<float> sum(dim), scratch(2 * dim);
    for (int64_t slot = first; slot < last; ++slot) {
      const int64_t head = chain.head[slot];
      if (head < 0) {
        std::memcpy(target + slot * bytes, filled.data(), bytes);
      } else if (chain.next[head] < 0) {
        source.copy(source.place(head), target + slot * bytes);
      } else {
        std::fill(sum.begin(), sum.end(), 0.f);
        for (int64_t r = head; r >= 0; r = chain.next[r]) {
          add_row(source.read(source.place(r), scratch.data()), dim, sum.data());
        }
        write(sum.data(), dim, dtype, target + slot * bytes);
      }
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> loss_forward(Tensor pred, Tensor teacher, Tensor index,
                                        std::optional<Tensor> offsets, int64_t kind, bool normalize,
                                        double beta, double eps) {
  const LossRows all(pred, teacher, index, offsets);
  check_rows(all.rows, all.tokens, teacher.size(1));
  const int64_t count = all.rows.count, width = saved_floats(kind), dim = all.dim;
  const Tensor loss = torch::stable::new_empty(pred, {}, ScalarType::Float);
  const Tensor saved = common::empty(pred, {count, width}, ScalarType::Float);
  float* stats = static_cast<float*>(saved.data_ptr());
  std::vector<double> sums(count);
  over_rows(count, 8 * dim, [&](int64_t first, int64_t last) {
    std::vector<float> scratch(4 * dim);
    for (int64_t r = first; r < last; ++r) {
      Row row = all.read(r, scratch.data());
      set_beta(row, beta);
      if (normalize) {
        row.mean = static_cast<float>(sum_of(row.t, dim) / dim);
        const double square = scatter_of(row.t, dim, row.mean) / dim + eps;
        row.rstd = static_cast<float>(inverse_deviation(square));
      }
      float* own = stats + r * width;
      own[0] = row.mean;
      own[1] = row.rstd;
      if (kind == kCosine) {
        double products[3];
        row_products(row, products);
        const Cosine c = cosine(static_cast<float>(products[0]), static_cast<float>(products[1]),
                                static_cast<float>(products[2]));
        own[2] = c.toward;
        own[3] = c.along;
        sums[r] = c.loss;
      } else {
        sums[r] = row_loss(kind, row);
      }
    }
  });
  double total = 0.0;
  for (int64_t r = 0; r < count; ++r) total += sums[r];
  const double terms = static_cast<double>(count) * (kind == kCosine ? 1 : dim);
  *static_cast<float*>(loss.data_ptr()) = static_cast<float>(total / terms);
  return {loss, saved};
}

Tensor loss_backward(Tensor grad, Tensor pred, Tensor teacher, Tensor index,
                     std::optional<Tensor> offsets, Tensor saved, int64_t kind, bool normalize,
                     double beta) {
  const LossRows all(pred, teacher, index, offsets);
  check_rows(all.rows, all.tokens, teacher.size(1));
  const int64_t count = all.rows.count, width = saved_floats(kind), dim = all.dim;
  const ScalarType dtype = pred.scalar_type();
  const int64_t bytes = dim * element_bytes(dtype);
  const Tensor out = empty_rows(index, pred, dtype);
  char* target = static_cast<char*>(out.data_ptr());
  const float* stats = static_cast<const float*>(saved.const_data_ptr());
  const double terms = static_cast<double>(count) * (kind == kCosine ? 1 : dim);
  const float scale =
      static_cast<float>(*static_cast<const float*>(grad.const_data_ptr()) / terms);
  over_rows(count, 8 * dim, [&](int64_t first, int64_t last) {
    std::vector<float> scratch(5 * dim);
    for (int64_t r = first; r < last; ++r) {
      Row row = all.read(r, scratch.data());
      set_beta(row, beta);
      const float* own = stats + r * width;
      if (normalize) {
        row.mean = own[0];
        row.rstd = own[1];
      }
      char* to = target + r * bytes;
      float* wide = dtype == ScalarType::Float ? reinterpret_cast<float*>(to)
                                               : scratch.data() + 4 * dim;
      if (kind == kCosine) {
        row_combine(row, own[2] * scale, own[3] * scale, wide);
      } else {
        row_slope(kind, row, scale + unknown(row.mean, row.rstd), wide);
      }
      write(wide, dim, dtype, to);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> order(Tensor context_index, Tensor target_index,
                                         std::optional<Tensor> context_offsets,
                                         std::optional<Tensor> target_offsets) {
  return sequence_order(context_index, target_index, offsets_of(context_offsets),
                        offsets_of(target_offsets),
                        context_offsets ? context_offsets->numel() - 1 : 0);
}

Tensor assemble(Tensor context, Tensor context_index, Tensor context_rows, Tensor target,
                Tensor target_index, Tensor target_rows, std::optional<Tensor> positions) {
  return sequence_rows(context, context_index, context_rows, target, target_index, target_rows,
                       positions);
}

Tensor column_sum(Tensor sequence, Tensor rows) { return rows_column_sum(sequence, rows); }

}  // namespace tokens
