// Adaptive layer norm on the CPU.
//
// Memory, with N tokens of D elements: the norm reads and writes N D forward, reads 2 N D and writes
// N D backward; the gate reads 2 N D and writes N D either way. All are bound by it: a token is
// worked on in cache, and nothing of the tokens' size is made beside results. A task is up to 128
// tokens of a frame, whatever the number of threads; it adds up their part of the vectors'
// gradients in order, and the parts of a frame are added up in order.
#include "adaln/adaln.h"
#include "adaln/cpu/rows.h"
#include "common/cpu/rows.h"

namespace adaln {

using common::Rows, common::ScalarType;

namespace {

constexpr int64_t kTask = 128;
constexpr int64_t kGrainBytes = 65536;

struct Frames {
  explicit Frames(const Tensor& z)
      : frames(z.size(0)), tokens(z.size(1)), dim(z.size(2)), parts((tokens + kTask - 1) / kTask) {}

  // run(frame, part, first token, past the last one, scratch): over all tasks, on all threads;
  // scratch: `rows` rows of D floats.
  template <typename Run>
  void each(int64_t rows, const Run& run) const {
    const int64_t bytes = 4 * dim * std::min(tokens, kTask);
    const int64_t grain = std::max<int64_t>(1, kGrainBytes / bytes);
    torch::stable::parallel_for(0, frames * parts, grain, [&](int64_t first, int64_t last) {
      std::vector<float> scratch(rows * dim);
      for (int64_t task = first; task < last; ++task) {
        const int64_t frame = task / parts, part = task % parts, begin = part * kTask;
        run(frame, part, begin, std::min(tokens, begin + kTask), scratch.data());
      }
    });
  }

  int64_t frames, tokens, dim, parts;
};

// Contiguous rows of D elements that are written as float32 and stored in their own dtype.
class Target {
 public:
  explicit Target(const Tensor& z)
      : data_(z.data_ptr()), dtype_(z.scalar_type()), dim_(z.size(z.dim() - 1)) {}

  // Where row `at` is to be written: in place, or in `scratch`.
  float* row(int64_t at, float* scratch) const {
    return dtype_ == ScalarType::Float ? static_cast<float*>(data_) + at * dim_ : scratch;
  }
  void store(const float* row, int64_t at) const {
    if (dtype_ != ScalarType::Float) common::write_row(row, dim_, dtype_, data_, at * dim_);
  }

 private:
  void* data_;
  ScalarType dtype_;
  int64_t dim_;
};

// Gradients of `count` vectors: sums over tokens, kept apart by part where a frame has several.
class Sums {
 public:
  Sums(const Frames& q, const Tensor& like, int64_t count)
      : q_(q), count_(count),
        parts_(common::empty(like, {q.parts > 1 ? q.frames * q.parts : 0, count, q.dim},
                             ScalarType::Float)) {}

  // Zeros for vector `i`: in the frame's part, or in `scratch`.
  float* begin(int64_t frame, int64_t part, int64_t i, float* scratch) const {
    float* sum = q_.parts == 1 ? scratch : of(frame, part, i);
    std::fill_n(sum, q_.dim, 0.f);
    return sum;
  }

  // After a task: a frame of one part is done.
  void end(const float* sum, int64_t frame, const Tensor& out) const {
    if (q_.parts > 1) return;
    const Target target(out);
    float* to = target.row(frame, const_cast<float*>(sum));
    if (to != sum) std::copy_n(sum, q_.dim, to);
    target.store(sum, frame);
  }

  // After all tasks: the others' parts, in order.
  void finish(int64_t i, const Tensor& out) const {
    if (q_.parts == 1) return;
    torch::stable::parallel_for(0, q_.frames, 1, [&](int64_t first, int64_t last) {
      const Target target(out);
      for (int64_t frame = first; frame < last; ++frame) {
        float* sum = of(frame, 0, i);
        for (int64_t part = 1; part < q_.parts; ++part) {
          cpu::add_row(of(frame, part, i), q_.dim, sum);
        }
        float* to = target.row(frame, sum);
        if (to != sum) std::copy_n(sum, q_.dim, to);
        target.store(sum, frame);
      }
    });
  }

 private:
  float* of(int64_t frame, int64_t part, int64_t i) const {
    return static_cast<float*>(parts_.mutable_data_ptr()) +
           ((frame * q_.parts + part) * count_ + i) * q_.dim;
  }

  const Frames& q_;
  int64_t count_;
  Tensor parts_;
};

Tensor empty_tokens(const Tensor& z, bool needed = true) {
  if (!needed) return common::empty(z, {0}, z.scalar_type());
  return common::empty(z, {z.size(0), z.size(1), z.size(2)}, z.scalar_type());
}

Tensor empty_vector(const Tensor& z, bool needed) {
  if (!needed) return common::empty(z, {0}, z.scalar_type());
  return common::empty(z, {z.size(0), z.size(1)}, z.scalar_type());
}

}  // namespace

std::tuple<Tensor, Tensor> norm_forward(Tensor x, Tensor shift, Tensor scale, double eps) {
  const Frames q(x);
  const Tensor out = empty_tokens(x);
  const Tensor saved = common::empty(x, {q.frames, q.tokens, 2}, ScalarType::Float);
  const Rows from(x), moved(shift), factors(scale);
  const Target target(out);
  float* stats = static_cast<float*>(saved.data_ptr());
  const double inverse_dim = 1.0 / static_cast<double>(q.dim);
  q.each(4, [&](int64_t frame, int64_t, int64_t begin, int64_t end, float* scratch) {
    const int64_t dim = q.dim;
    const float* shift_row = moved.read(0, frame, 0, dim, scratch);
    const float* scale_row = factors.read(0, frame, 0, dim, scratch + dim);
    for (int64_t t = begin; t < end; ++t) {
      const float* row = from.read(frame, t, 0, dim, scratch + 2 * dim);
      const int64_t at = frame * q.tokens + t;
      const float mean = static_cast<float>(cpu::sum_of(row, dim) * inverse_dim);
      const float rstd =
          rstd_of(cpu::scatter_of(row, dim, mean), inverse_dim, static_cast<float>(eps));
      stats[2 * at] = mean;
      stats[2 * at + 1] = rstd;
      float* to = target.row(at, scratch + 3 * dim);
      cpu::modulate_row(row, shift_row, scale_row, mean, rstd, dim, to);
      target.store(to, at);
    }
  });
  return {out, saved};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(Tensor grad, Tensor x, Tensor scale, Tensor saved,
                                                 bool need_x, bool need_vectors) {
  const Frames q(x);
  const Tensor grad_x = empty_tokens(x, need_x);
  const Tensor grad_shift = empty_vector(scale, need_vectors);
  const Tensor grad_scale = empty_vector(scale, need_vectors);
  const Rows from(x), incoming(grad), factors(scale);
  const Target target(grad_x);
  const Sums sums(q, x, need_vectors ? 2 : 0);
  const float* stats = static_cast<const float*>(saved.const_data_ptr());
  q.each(6, [&](int64_t frame, int64_t part, int64_t begin, int64_t end, float* scratch) {
    const int64_t dim = q.dim;
    float *to_shift = nullptr, *to_scale = nullptr;
    if (need_vectors) {
      to_shift = sums.begin(frame, part, 0, scratch);
      to_scale = sums.begin(frame, part, 1, scratch + dim);
    }
    cpu::Token token = {};
    token.count = dim;
    token.scale = factors.read(0, frame, 0, dim, scratch + 2 * dim);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = frame * q.tokens + t;
      token.mean = stats[2 * at];
      token.rstd = stats[2 * at + 1];
      token.g = incoming.read(frame, t, 0, dim, scratch + 3 * dim);
      token.x = from.read(frame, t, 0, dim, scratch + 4 * dim);
      cpu::read_row(token, need_x, to_shift, to_scale);
      if (need_x) {
        float* to = target.row(at, scratch + 5 * dim);
        cpu::slope_row(token, to);
        target.store(to, at);
      }
    }
    if (need_vectors) {
      sums.end(to_shift, frame, grad_shift);
      sums.end(to_scale, frame, grad_scale);
    }
  });
  if (need_vectors) {
    sums.finish(0, grad_shift);
    sums.finish(1, grad_scale);
  }
  return {grad_x, grad_shift, grad_scale};
}

Tensor gate_forward(Tensor x, Tensor y, Tensor gate) {
  const Frames q(x);
  const Tensor out = empty_tokens(x);
  const Rows from(x), branch(y), gates(gate);
  const Target target(out);
  q.each(4, [&](int64_t frame, int64_t, int64_t begin, int64_t end, float* scratch) {
    const int64_t dim = q.dim;
    const float* open = gates.read(0, frame, 0, dim, scratch);
    for (int64_t t = begin; t < end; ++t) {
      const float* own = from.read(frame, t, 0, dim, scratch + dim);
      const float* other = branch.read(frame, t, 0, dim, scratch + 2 * dim);
      const int64_t at = frame * q.tokens + t;
      float* to = target.row(at, scratch + 3 * dim);
      cpu::gate_row(own, open, other, dim, to);
      target.store(to, at);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> gate_backward(Tensor grad, Tensor y, Tensor gate, bool need_y,
                                         bool need_gate) {
  const Frames q(y);
  const Tensor grad_y = empty_tokens(y, need_y), grad_gate = empty_vector(gate, need_gate);
  const Rows incoming(grad), branch(y), gates(gate);
  const Target target(grad_y);
  const Sums sums(q, y, need_gate ? 1 : 0);
  q.each(5, [&](int64_t frame, int64_t part, int64_t begin, int64_t end, float* scratch) {
    const int64_t dim = q.dim;
    float* to_gate = need_gate ? sums.begin(frame, part, 0, scratch) : nullptr;
    const float* open = gates.read(0, frame, 0, dim, scratch + dim);
    for (int64_t t = begin; t < end; ++t) {
      const float* g = incoming.read(frame, t, 0, dim, scratch + 2 * dim);
      const int64_t at = frame * q.tokens + t;
      if (need_gate) {
        cpu::add_products(g, branch.read(frame, t, 0, dim, scratch + 3 * dim), dim, to_gate);
      }
      if (need_y) {
        float* to = target.row(at, scratch + 4 * dim);
        cpu::multiply_row(g, open, dim, to);
        target.store(to, at);
      }
    }
    if (need_gate) sums.end(to_gate, frame, grad_gate);
  });
  if (need_gate) sums.finish(0, grad_gate);
  return {grad_y, grad_gate};
}

}  // namespace adaln
