// The VICRegL ops on the CPU.
//
// match: 2 L1 L2 C additions and multiplications a sample and pair of views serve both directions; the
// distances of four rows at a time are all of them that ever exist. They are summed from
// differences: a product would save a third of the operations, and lose the digits that near ties
// are decided by. At 64 x 49 x 49 x 512 that is 79 M differences, 1.6 ms of a core at four 8-lane
// operations a cycle; the maps, 12.8 MB, are read from cache but the first time.
// pairs: memory-bound. Forward reads both maps once, backward reads them and writes both gradients
// once; a sample's maps and gradients stay in the second-level cache while its matches are added.
//
// Threads take whole samples, so a gradient's additions have one order.
#include <algorithm>
#include <vector>

#include "common/tensors.h"
#include "vicregl/cpu/rows.h"
#include "vicregl/vicregl.h"

namespace vicregl {
namespace {

using common::ScalarType;
using cpu::Views;

const int32_t* integers(const Tensor& z) { return static_cast<const int32_t*>(z.const_data_ptr()); }

// One thread's search of one pair of maps after another.
class Search {
 public:
  Search(const Views& a, const Views& b)
      : a_(a),
        b_(b),
        short_(a.dim < cpu::kLanes),
        rows_a_(a),
        rows_b_(b),
        transposed_(short_ ? a.dim * b.length : 0),
        distances_(cpu::kTileA * b.length),
        least_a_(a.length),
        least_b_(b.length),
        order_(std::max(a.length, b.length)) {}

  void run(int64_t u, int64_t v, int64_t sample, int32_t* nearest_a, int32_t* rank_a,
           int32_t* nearest_b, int32_t* rank_b) {
    rows_a_.read(u, sample);
    rows_b_.read(v, sample);
    for (int64_t c = 0; short_ && c < b_.dim; ++c) {
      for (int64_t j = 0; j < b_.length; ++j) transposed_[c * b_.length + j] = rows_b_[j][c];
    }
    for (int64_t begin = 0; begin < a_.length; begin += cpu::kTileA) {
      const int64_t count = std::min(cpu::kTileA, a_.length - begin);
      measure(begin, count);
      for (int64_t i = 0; i < count; ++i) {
        float* d = distances_.data() + i * b_.length;
        cpu::take_columns(d, b_.length, static_cast<int32_t>(begin + i), least_b_.data(),
                          nearest_b);
        nearest_a[begin + i] = cpu::first_least(d, b_.length);
        least_a_[begin + i] = d[nearest_a[begin + i]];
      }
    }
    cpu::ranks(least_a_.data(), a_.length, order_.data(), rank_a);
    cpu::ranks(least_b_.data(), b_.length, order_.data(), rank_b);
  }

 private:
  // The distances of rows [begin, begin + count) of a.
  void measure(int64_t begin, int64_t count) {
    if (short_) {
      for (int64_t i = 0; i < count; ++i) {
        cpu::short_distances(rows_a_[begin + i], transposed_.data(), b_.length, b_.dim,
                             distances_.data() + i * b_.length);
      }
      return;
    }
    const float* rows[cpu::kTileA];  // the last one again where there are fewer
    for (int64_t i = 0; i < cpu::kTileA; ++i) rows[i] = rows_a_[begin + std::min(i, count - 1)];
    cpu::distances(rows, rows_b_.rows(), b_.length, b_.dim, distances_.data());
  }

  const Views &a_, &b_;
  bool short_;
  Views::Sample rows_a_, rows_b_;
  std::vector<float> transposed_, distances_, least_a_, least_b_;
  std::vector<int32_t> order_;
};

// What one direction keeps of `length` positions, and where its matches are, of `other` positions.
struct Direction {
  const int32_t *nearest, *rank;
  Kept kept;
  int64_t length, other;

  // each(i, nearest of i, factor, inside) for the matches that are kept, in the order of positions.
  // One out of range (not `inside`) is not followed: it gives i, and it alone, NaN.
  template <typename Each>
  void over(int64_t pair, const Each& each) const {
    for (int64_t i = 0; kept.sets > 0 && i < length; ++i) {
      const int64_t at = pair * length + i;
      const float factor = kept.factor(rank[at]);
      if (factor == 0.f) continue;
      const bool inside = nearest[at] >= 0 && nearest[at] < other;
      each(i, inside ? int64_t{nearest[at]} : 0, inside ? factor : NAN, inside);
    }
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> match(Tensor a, Tensor b) {
  const Views views_a(a), views_b(b);
  const int64_t U = views_a.views, V = views_b.views, B = views_a.batch;
  const auto make = [&](int64_t length) {
    return common::empty(a, {U, V, B, length}, ScalarType::Int);
  };
  const Tensor nearest_a = make(views_a.length), rank_a = make(views_a.length);
  const Tensor nearest_b = make(views_b.length), rank_b = make(views_b.length);
  const auto to = [](const Tensor& z, int64_t at) {
    return static_cast<int32_t*>(z.data_ptr()) + at;
  };
  torch::stable::parallel_for(0, U * V * B, 1, [&](int64_t first, int64_t last) {
    Search search(views_a, views_b);
    for (int64_t pair = first; pair < last; ++pair) {
      const int64_t at_a = pair * views_a.length, at_b = pair * views_b.length;
      search.run(pair / (V * B), pair / B % V, pair % B, to(nearest_a, at_a), to(rank_a, at_a),
                 to(nearest_b, at_b), to(rank_b, at_b));
    }
  });
  return {nearest_a, rank_a, nearest_b, rank_b};
}

Tensor pairs_forward(Tensor a, Tensor b, Tensor nearest_a, Tensor rank_a, Tensor nearest_b,
                     Tensor rank_b, std::vector<int64_t> counts_a, std::vector<double> weights_a,
                     std::vector<int64_t> counts_b, std::vector<double> weights_b) {
  const Views views_a(a), views_b(b);
  const int64_t U = views_a.views, V = views_b.views, B = views_a.batch, dim = views_a.dim;
  const Direction from_a = {integers(nearest_a), integers(rank_a), kept(a, counts_a, weights_a),
                            views_a.length, views_b.length};
  const Direction from_b = {integers(nearest_b), integers(rank_b), kept(b, counts_b, weights_b),
                            views_b.length, views_a.length};
  std::vector<double> sums(U * V * B);
  torch::stable::parallel_for(0, U * V * B, 1, [&](int64_t first, int64_t last) {
    Views::Sample rows_a(views_a), rows_b(views_b);
    for (int64_t pair = first; pair < last; ++pair) {
      rows_a.read(pair / (V * B), pair % B);
      rows_b.read(pair / B % V, pair % B);
      double sum = 0.0;
      from_a.over(pair, [&](int64_t i, int64_t j, float factor, bool) {
        sum += static_cast<double>(factor) * cpu::squared_distance(rows_a[i], rows_b[j], dim);
      });
      from_b.over(pair, [&](int64_t j, int64_t i, float factor, bool) {
        sum += static_cast<double>(factor) * cpu::squared_distance(rows_b[j], rows_a[i], dim);
      });
      sums[pair] = sum;
    }
  });
  double total = 0.0;
  for (const double sum : sums) total += sum;
  const Tensor out = common::empty(a, {}, ScalarType::Float);
  *static_cast<float*>(out.data_ptr()) = static_cast<float>(total);
  return out;
}

namespace {

// The gradient of one side, and a thread's room for a sample of it where it is not float32.
class Gradient {
 public:
  Gradient(const Views& of, const Tensor& like, bool need)
      : of_(of),
        need_(need),
        dtype_(like.scalar_type()),
        out(need ? common::empty(like, {of.views, of.batch, of.length, of.dim}, dtype_)
                 : common::empty(like, {0}, dtype_)) {}

  class Sample {
   public:
    explicit Sample(const Gradient& of)
        : of_(of),
          area_(of.of_.length * of.of_.dim),
          sums_(of.in_float() || !of.need_ ? 0 : of.of_.views * area_),
          base_(static_cast<char*>(of.out.data_ptr())) {}

    void clear(int64_t sample) {
      for (int64_t v = 0; of_.need_ && v < of_.of_.views; ++v) {
        std::fill_n(map(v, sample), area_, 0.f);
      }
    }

    // Row i of view v, or null.
    float* row(int64_t v, int64_t sample, int64_t i) {
      return of_.need_ ? map(v, sample) + i * of_.of_.dim : nullptr;
    }

    void write(int64_t sample) {
      if (!of_.need_ || of_.in_float()) return;
      for (int64_t v = 0; v < of_.of_.views; ++v) {
        common::write_row(map(v, sample), area_, of_.dtype_, base_, place(v, sample));
      }
    }

   private:
    int64_t place(int64_t v, int64_t sample) const { return (v * of_.of_.batch + sample) * area_; }

    float* map(int64_t v, int64_t sample) {
      return of_.in_float() ? reinterpret_cast<float*>(base_) + place(v, sample)
                            : sums_.data() + v * area_;
    }

    const Gradient& of_;
    int64_t area_;
    std::vector<float> sums_;
    char* base_;
  };

 private:
  bool in_float() const { return dtype_ == ScalarType::Float; }

  const Views& of_;
  bool need_;
  ScalarType dtype_;

 public:
  Tensor out;
};

}  // namespace

std::tuple<Tensor, Tensor> pairs_backward(Tensor grad, Tensor a, Tensor b, Tensor nearest_a,
                                          Tensor rank_a, Tensor nearest_b, Tensor rank_b,
                                          bool need_a, bool need_b, std::vector<int64_t> counts_a,
                                          std::vector<double> weights_a,
                                          std::vector<int64_t> counts_b,
                                          std::vector<double> weights_b) {
  const Views views_a(a), views_b(b);
  const int64_t U = views_a.views, V = views_b.views, B = views_a.batch, dim = views_a.dim;
  const Direction from_a = {integers(nearest_a), integers(rank_a), kept(a, counts_a, weights_a),
                            views_a.length, views_b.length};
  const Direction from_b = {integers(nearest_b), integers(rank_b), kept(b, counts_b, weights_b),
                            views_b.length, views_a.length};
  const float scale = *static_cast<const float*>(grad.const_data_ptr());
  const Gradient grad_a(views_a, a, need_a), grad_b(views_b, b, need_b);
  if (!need_a && !need_b) return {grad_a.out, grad_b.out};
  torch::stable::parallel_for(0, B, 1, [&](int64_t first, int64_t last) {
    Views::Sample rows_a(views_a), rows_b(views_b);
    Gradient::Sample to_a(grad_a), to_b(grad_b);
    for (int64_t s = first; s < last; ++s) {
      to_a.clear(s);
      to_b.clear(s);
      for (int64_t u = 0; u < U; ++u) {
        rows_a.read(u, s);
        for (int64_t v = 0; v < V; ++v) {
          rows_b.read(v, s);
          const int64_t pair = (u * V + v) * B + s;
          from_a.over(pair, [&](int64_t i, int64_t j, float factor, bool inside) {
            cpu::step(rows_a[i], rows_b[j], slope(scale, factor), dim, to_a.row(u, s, i),
                      inside ? to_b.row(v, s, j) : nullptr);
          });
          from_b.over(pair, [&](int64_t j, int64_t i, float factor, bool inside) {
            cpu::step(rows_a[i], rows_b[j], slope(scale, factor), dim,
                      inside ? to_a.row(u, s, i) : nullptr, to_b.row(v, s, j));
          });
        }
      }
      to_a.write(s);
      to_b.write(s);
    }
  });
  return {grad_a.out, grad_b.out};
}

}  // namespace vicregl
