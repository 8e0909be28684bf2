// The backward pass of one task: scores and weights anew, tile by tile, from the saved logarithms.
//
// With P the weights, g the output's gradient and delta = g . out a query:
// dV = P^T g, dS = P (g V^T - delta), dQ = scale dS K, dK = scale dS^T Q.
#pragma once

#include <cmath>
#include <limits>

#include "attention/cpu_problem.h"

namespace attention {
namespace cpu {

struct Inputs {
  Tokens q, k, v, out, grad;
  const float* lse;
  float scale;
};

struct Gradients {
  const Result *q, *k, *v;  // null where not needed
};

// Sums over a task's queries, [keys, padded]: of gradients of keys and values.
struct Sums {
  Floats keys, values;
};

VICREG_VECTOR inline float row_product(const float* a, const float* b, int64_t count) {
  float lanes[8] = {};  // count is a multiple of 8
  for (int64_t j = 0; j < count; j += 8) {
    for (int64_t i = 0; i < 8; ++i) lanes[i] += a[j + i] * b[j + i];
  }
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
         ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

class Backward {
 public:
  Backward(const Problem& p, const Inputs& in, const Gradients& to, std::vector<Sums>& partial)
      : p_(p),
        in_(in),
        to_(to),
        partial_(partial),
        scores_needed_(to.q != nullptr || to.k != nullptr),
        key_panels_(p.most_keys() * p.dim),
        key_rows_(to.q != nullptr ? p.most_keys() * p.padded : 0),
        value_panels_(scores_needed_ ? p.most_keys() * p.dim : 0),
        queries_(kTileRows * kTileRow),
        grads_(kTileRows * kTileRow),
        weights_(kTileRows * kScoreRow),
        slopes_(kTileRows * kScoreRow),
        query_sums_(kTileRows * kTileRow),
        own_(make_sums(p.most_keys())) {}

  void operator()(int64_t number) {
    const Task& task = p_.tasks[number];
    const Sample& sample = p_.samples[task.sample];
    const Interval keys = task.keys;
    const int64_t count = keys.end - keys.begin;
    Sums* sums = &own_;
    if (task.parts > 1) {
      partial_[number] = make_sums(count);
      sums = &partial_[number];
    }
    if (to_.k != nullptr) std::fill_n(sums->keys.get(), count * p_.padded, 0.f);
    if (to_.v != nullptr) std::fill_n(sums->values.get(), count * p_.padded, 0.f);
    bool finite = pack(in_.k, sample, task.head, keys.begin, keys.end, p_.dim, p_.padded, p_.kernel,
                       p_.key_rotary(),
                       {key_panels_.get(), to_.q != nullptr ? key_rows_.get() : nullptr});
    if (scores_needed_) {
      finite = pack(in_.v, sample, task.head, keys.begin, keys.end, p_.dim, p_.padded, p_.kernel,
                    Rotary(), {value_panels_.get(), nullptr}) &&
               finite;
    }
    for (int t = task.first_tile; t < task.last_tile; ++t) {
      const Tile& tile = p_.tiles[task.sample][t];
      const bool all = load(task, sample, tile) && finite;
      if (all || tile.uniform) {
        run(task, sample, tile, *sums);
      } else {
        cut(sample, tile.begin, tile.end, true, [&](const Tile& part) {
          load(task, sample, part);
          run(task, sample, part, *sums);
        });
      }
    }
    if (task.parts == 1) finish(p_, in_, to_, sample, task.head, {{keys, sums}});
  }

  struct Part {
    Interval keys;
    const Sums* sums;
  };

  // Writes the gradients of a sample's keys and values: the sum of its parts, in their order.
  static void finish(const Problem& p, const Inputs& in, const Gradients& to, const Sample& sample,
                     int64_t head, const std::vector<Part>& parts) {
    alignas(64) float row[128];
    int kept = 0;
    for (int place = 0; place < sample.keys; ++place) {
      const int64_t token = sample.key_token + place;
      const bool seen = sample.index == nullptr ||
                        (kept < sample.kept && sample.index[kept] == place);
      for (const Result* result : {to.k, to.v}) {
        if (result == nullptr) continue;
        const bool keys = result == to.k;
        std::memset(row, 0, p.dim * sizeof(float));
        for (const Part& part : parts) {
          if (!seen || !part.keys.has(kept)) continue;
          const float* sums = (keys ? part.sums->keys : part.sums->values).get();
          add_row(sums + static_cast<int64_t>(kept - part.keys.begin) * p.padded, p.dim, row);
        }
        if (keys) {
          // the queries were scaled for 2^x
          scale_row(row, p.dim, static_cast<float>(kLn2), row);
          if (p.key_rotary().any()) p.key_rotary().apply(row, sample.batch, token, place, true);
        }
        result->write(sample.batch, head, token, row);
      }
      kept += seen;
    }
  }

 private:
  VICREG_VECTOR static void add_row(const float* from, int64_t count, float* to) {
    for (int64_t j = 0; j < count; ++j) to[j] += from[j];
  }

  Sums make_sums(int64_t keys) const {
    return {Floats(to_.k != nullptr ? keys * p_.padded : 0),
            Floats(to_.v != nullptr ? keys * p_.padded : 0)};
  }

  // A tile's queries, gradients, and for each query its shift and delta; whether all are finite.
  bool load(const Task& task, const Sample& sample, const Tile& tile) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    bool finite = load_tile(p_, in_.q, sample, task.head, tile, &p_.q_rotary,
                            in_.scale * static_cast<float>(kLog2E), queries_.get());
    finite = load_tile(p_, in_.grad, sample, task.head, tile, nullptr, 1.f, grads_.get()) && finite;
    alignas(64) float scratch[128];
    for (int i = 0; i < tile.end - tile.begin; ++i) {
      const int64_t token = sample.query_token + tile.begin + i;
      const float* out = in_.out.read(sample.batch, task.head, token, scratch);
      const float lse = in_.lse[(sample.batch * p_.heads + task.head) * p_.q_tokens + token];
      delta_[i] = row_product(grads_.get() + i * kTileRow, out, p_.dim);
      // where no key is seen the scores are all -inf, and so 2^(-inf - inf) = 0
      shift_[i] = lse == -kInfinity ? kInfinity : lse * static_cast<float>(kLog2E);
      finite = finite && std::isfinite(delta_[i]) && (std::isfinite(lse) || lse == -kInfinity);
    }
    return finite;
  }

  void run(const Task& task, const Sample& sample, const Tile& tile, Sums& sums) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const Kernels& kernel = p_.kernel;
    const int rows = tile.end - tile.begin, origin = task.keys.begin;
    bool first = true;
    chunks(shifted(tile.keys, origin), kernel.panel, [&](int begin, int end) {
      const int start = begin / kernel.panel * kernel.panel, count = end - begin;
      const int panels = (end - start + kernel.panel - 1) / kernel.panel;
      const int columns = panels * kernel.panel;
      const int64_t at = static_cast<int64_t>(start) * p_.dim;
      kernel.scores(queries_.get(), rows, key_panels_.get() + at, panels, p_.dim, weights_.get());
      if (scores_needed_) {
        kernel.scores(grads_.get(), rows, value_panels_.get() + at, panels, p_.dim, slopes_.get());
      }
      for (int i = 0; i < rows; ++i) {
        float* row = weights_.get() + i * kScoreRow;
        const Intervals seen = tile.uniform ? tile.keys : sample.seen(tile.begin + i);
        const Intervals own = shifted(seen, origin);
        fill_unseen({clip(own.first, {begin, end}), clip(own.second, {begin, end})}, start, columns,
                    -kInfinity, row);
        if (scores_needed_) {
          kernel.differentiate(row, slopes_.get() + i * kScoreRow, columns, shift_[i], delta_[i]);
        } else {
          kernel.exponentiate(row, columns, shift_[i]);
        }
      }
      const int64_t key = static_cast<int64_t>(begin) * p_.padded;
      const float* weights = weights_.get() + (begin - start);
      const float* slopes = slopes_.get() + (begin - start);
      if (to_.v != nullptr) {
        kernel.collect(weights, rows, count, grads_.get(), p_.vectors(), sums.values.get() + key,
                       p_.padded);
      }
      if (to_.k != nullptr) {
        kernel.collect(slopes, rows, count, queries_.get(), p_.vectors(), sums.keys.get() + key,
                       p_.padded);
      }
      if (to_.q != nullptr) {
        kernel.weigh(slopes, rows, key_rows_.get() + key, p_.padded, count, p_.vectors(), !first,
                     query_sums_.get());
      }
      first = false;
    });
    if (to_.q == nullptr) return;
    for (int i = 0; i < rows; ++i) {
      float* row = query_sums_.get() + i * kTileRow;
      const int place = tile.begin + i;
      const int64_t token = sample.query_token + place;
      if (first) {
        std::fill_n(row, p_.dim, 0.f);
      } else {
        scale_row(row, p_.dim, in_.scale, row);
        if (p_.q_rotary.any()) p_.q_rotary.apply(row, sample.batch, token, place, true);
      }
      to_.q->write(sample.batch, task.head, token, row);
    }
  }

  const Problem& p_;
  const Inputs& in_;
  const Gradients& to_;
  std::vector<Sums>& partial_;
  const bool scores_needed_;
  // Packed keys as panels and as rows, values as panels; a tile's queries, gradients, weights,
  // gradients of scores, and sums for the queries' gradient.
  Floats key_panels_, key_rows_, value_panels_;
  Floats queries_, grads_, weights_, slopes_, query_sums_;
  Sums own_;
  float shift_[kTileRows], delta_[kTileRows];
};

// The gradients of keys and values where several tasks share a sample and head.
inline void finish_parts(const Problem& p, const Inputs& in, const Gradients& to,
                         const std::vector<Sums>& partial) {
  std::vector<std::vector<Backward::Part>> parts(p.samples.size() * p.heads);
  std::vector<int64_t> pending;
  for (size_t i = 0; i < p.tasks.size(); ++i) {
    const Task& task = p.tasks[i];
    if (task.parts == 1) continue;
    const int64_t unit = task.sample * p.heads + task.head;
    if (parts[unit].empty()) pending.push_back(unit);
    parts[unit].resize(task.parts);
    parts[unit][task.part] = {task.keys, &partial[i]};
  }
  torch::stable::parallel_for(0, static_cast<int64_t>(pending.size()), 1,
                              [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t unit = pending[i];
      Backward::finish(p, in, to, p.samples[unit / p.heads], unit % p.heads, parts[unit]);
    }
  });
}

}  // namespace cpu
}  // namespace attention
