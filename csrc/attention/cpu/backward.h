// The backward pass of one task: scores and weights anew, tile by tile, from the saved logarithms.
//
// With P the weights, g the output's gradient and delta = g . out a query:
// dV = P^T g, dS = P (g V^T - delta), dQ = scale dS K, dK = scale dS^T Q.
#pragma once

#include <cmath>
#include <limits>

#include "attention/cpu/problem.h"

namespace attention {
namespace {  // included by cpu.cpp alone
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

KERNELS_VECTOR inline float row_product(const float* a, const float* b, int64_t count) {
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
        queries_(p.most_queries() * p.padded),
        grads_(p.most_queries() * p.padded),
        query_sums_(to.q != nullptr ? p.most_queries() * p.padded : 0),
        tile_queries_(kTileRows * kTileRow),
        tile_grads_(kTileRows * kTileRow),
        weights_(kTileRows * kScoreRow),
        slopes_(kTileRows * kScoreRow),
        own_(make_sums(p.most_keys())),
        shift_(p.most_queries()),
        delta_(p.most_queries()) {}

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
    const int32_t key = pack(in_.k, sample, task.head, keys.begin, keys.end, p_.dim, p_.padded,
                             p_.kernel, p_.key_rotary(),
                             {key_panels_.get(), to_.q != nullptr ? key_rows_.get() : nullptr});
    int32_t value = 0;
    if (scores_needed_) {
      value = pack(in_.v, sample, task.head, keys.begin, keys.end, p_.dim, p_.padded, p_.kernel,
                   Rotary(), {value_panels_.get(), nullptr});
    }
    load(task, sample, key, is_finite(key) && is_finite(value));
    for (const Tile& tile : tiles_) refine(sample, keys.begin, tile);
    // Chunk by chunk, so that what belongs to its keys stays in cache while the queries pass by.
    const int chunk = chunk_of(count);
    for (int begin = 0; begin < count; begin += chunk) {
      for (const Tile& tile : tiles_) {
        const Intervals own = shifted(tile.keys, keys.begin);
        const Interval part = {begin, std::min<int>(begin + chunk, count)};
        chunks({clip(own.first, part), clip(own.second, part)}, p_.kernel.panel, chunk,
               [&](int first, int last) { run(sample, keys.begin, tile, first, last, *sums); });
      }
    }
    if (to_.q != nullptr) finish_queries(task, sample);
    if (task.parts == 1) finish(p_, to_, sample, task.head, {{keys, sums}});
  }

  struct Part {
    Interval keys;
    const Sums* sums;
  };

  // Writes the gradients of a sample's keys and values: the sum of its parts, in their order.
  static void finish(const Problem& p, const Gradients& to, const Sample& sample, int64_t head,
                     const std::vector<Part>& parts) {
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
  KERNELS_VECTOR static void add_row(const float* from, int64_t count, float* to) {
    for (int64_t j = 0; j < count; ++j) to[j] += from[j];
  }

  Sums make_sums(int64_t keys) const {
    return {Floats(to_.k != nullptr ? keys * p_.padded : 0),
            Floats(to_.v != nullptr ? keys * p_.padded : 0)};
  }

  // Keys at a time: their packed rows, panels and sums take about half of a core's cache.
  int chunk_of(int64_t count) const {
    constexpr int64_t kCached = 24576;
    const int panel = p_.kernel.panel;
    const int64_t most = std::min<int64_t>(kCached / p_.padded / panel * panel, kChunk);
    const int64_t chunks = std::max<int64_t>(1, (count + most - 1) / most);
    return static_cast<int>(((count + chunks - 1) / chunks + panel - 1) / panel * panel);
  }

  // The task's queries, gradients, and for each query its shift and delta; tiles_, cut finer where
  // numbers are not finite: a weight of 0 does not hide them.
  void load(const Task& task, const Sample& sample, int32_t key, bool finite_keys) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    alignas(64) float scratch[128];
    tiles_.clear();
    wide_ = false;
    first_query_ = p_.queries(task).begin;
    for (int t = task.first_tile; t < task.last_tile; ++t) {
      const Tile& tile = p_.tiles[task.sample][t];
      const int64_t at = tile.begin - first_query_;
      float* grads = grads_.get() + at * p_.padded;
      const int32_t query = load_tile(p_, in_.q, sample, task.head, tile, &p_.q_rotary,
                                      in_.scale * static_cast<float>(kLog2E),
                                      queries_.get() + at * p_.padded, p_.padded);
      const int32_t grad =
          load_tile(p_, in_.grad, sample, task.head, tile, nullptr, 1.f, grads, p_.padded);
      bool finite = finite_keys && is_finite(query) && is_finite(grad);
      wide_ = wide_ || may_pass(query, key, p_.dim);
      for (int i = tile.begin; i < tile.end; ++i, grads += p_.padded) {
        const int64_t token = sample.query_token + i;
        const float* out = in_.out.read(sample.batch, task.head, token, scratch);
        const float lse = in_.lse[(sample.batch * p_.heads + task.head) * p_.q_tokens + token];
        const float delta = row_product(grads, out, p_.dim);
        delta_[i - first_query_] = delta;
        // where no key is seen the scores are all -inf, and so 2^(-inf - inf) = 0
        shift_[i - first_query_] = lse == -kInfinity ? kInfinity : lse;
        finite = finite && std::isfinite(delta) && (std::isfinite(lse) || lse == -kInfinity);
      }
      if (finite || tile.uniform) {
        tiles_.push_back(tile);
      } else {
        cut(sample, tile.begin, tile.end, true, [&](const Tile& part) { tiles_.push_back(part); });
      }
    }
    const Interval queries = p_.queries(task);
    if (to_.q != nullptr) std::fill_n(query_sums_.get(), size(queries) * p_.padded, 0.f);
  }

  // Beyond kFar a float32 holds the logarithm of a row's sum too coarsely for its weights to add up
  // to one. There they are formed from the largest score, and the row's gradient and delta, in which
  // everything is linear, are divided by their sum.
  static constexpr float kFar = 1024.f;

  void refine(const Sample& sample, int origin, const Tile& tile) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const Kernels& kernel = p_.kernel;
    const int rows = tile.end - tile.begin;
    float* const shift = shift_.data() + (tile.begin - first_query_);
    const auto far = [](float x) { return std::isfinite(x) && std::fabs(x) > kFar; };
    if (std::none_of(shift, shift + rows, far)) return;
    const int64_t query = tile.begin - first_query_;
    float most[kTileRows], total[kTileRows];
    std::fill_n(most, rows, -kInfinity);
    std::fill_n(total, rows, 0.f);
    chunks(shifted(tile.keys, origin), kernel.panel, kChunk, [&](int begin, int end) {
      const int start = begin / kernel.panel * kernel.panel;
      const int panels = (end - start + kernel.panel - 1) / kernel.panel;
      const int columns = panels * kernel.panel;
      make_scores(query, rows, start, panels);
      for (int i = 0; i < rows; ++i) {
        float* row = weights_.get() + i * kScoreRow;
        const Intervals own =
            shifted(tile.uniform ? tile.keys : sample.seen(tile.begin + i), origin);
        fill_unseen({clip(own.first, {begin, end}), clip(own.second, {begin, end})}, start,
                    columns, -kInfinity, row);
        const float before = most[i];
        most[i] = std::max(before, kernel.largest(row, columns));
        if (most[i] == -kInfinity) continue;
        total[i] = total[i] * std::exp2(before - most[i]) +
                   kernel.exponentiate(row, columns, most[i]);
      }
    });
    for (int i = 0; i < rows; ++i) {
      if (!far(shift[i]) || !(total[i] > 0.f)) continue;
      float* grad = grads_.get() + (query + i) * p_.padded;
      shift[i] = most[i];
      scale_row(grad, p_.padded, 1.f / total[i], grad);
      delta_[query + i] /= total[i];
    }
  }

  // The scores of `rows` queries and `panels` of keys from `start` on, to weights_; the queries, to
  // tile_queries_.
  void make_scores(int64_t query, int rows, int start, int panels) {
    const float* keys = key_panels_.get() + static_cast<int64_t>(start) * p_.dim;
    spaced(queries_, query, rows, tile_queries_);
    if (!wide_) {
      p_.kernel.scores(tile_queries_.get(), rows, keys, panels, p_.dim, weights_.get());
      return;
    }
    Power powers[kTileRows];
    shrink_rows(tile_queries_.get(), rows, p_.dim, kTileRow, powers);
    p_.kernel.scores(tile_queries_.get(), rows, keys, panels, p_.dim, weights_.get());
    for (int i = 0; i < rows; ++i) {
      grow_scores(weights_.get() + i * kScoreRow, panels * p_.kernel.panel, powers[i]);
    }
    spaced(queries_, query, rows, tile_queries_);
  }

  // A tile's queries against packed keys [begin, end); the first one packed is kept key `origin`.
  void run(const Sample& sample, int origin, const Tile& tile, int begin, int end, Sums& sums) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const Kernels& kernel = p_.kernel;
    const int rows = tile.end - tile.begin, padded = p_.padded;
    const int64_t query = tile.begin - first_query_;
    const int start = begin / kernel.panel * kernel.panel, count = end - begin;
    const int panels = (end - start + kernel.panel - 1) / kernel.panel;
    const int columns = panels * kernel.panel;
    const int64_t at = static_cast<int64_t>(start) * p_.dim;
    const float* grads = spaced(grads_, query, rows, tile_grads_);
    make_scores(query, rows, start, panels);
    if (scores_needed_) {
      kernel.scores(grads, rows, value_panels_.get() + at, panels, p_.dim, slopes_.get());
    }
    for (int i = 0; i < rows; ++i) {
      float* row = weights_.get() + i * kScoreRow;
      const Intervals own =
          shifted(tile.uniform ? tile.keys : sample.seen(tile.begin + i), origin);
      fill_unseen({clip(own.first, {begin, end}), clip(own.second, {begin, end})}, start, columns,
                  -kInfinity, row);
      if (scores_needed_) {
        kernel.differentiate(row, slopes_.get() + i * kScoreRow, columns, shift_[query + i],
                             delta_[query + i]);
      } else {
        kernel.exponentiate(row, columns, shift_[query + i]);
      }
    }
    const int64_t key = static_cast<int64_t>(begin) * padded;
    const float* weights = weights_.get() + (begin - start);
    const float* slopes = slopes_.get() + (begin - start);
    if (to_.v != nullptr) {
      kernel.collect(weights, rows, count, grads, p_.vectors(), sums.values.get() + key, padded);
    }
    if (to_.k != nullptr) {
      kernel.collect(slopes, rows, count, tile_queries_.get(), p_.vectors(),
                     sums.keys.get() + key, padded);
    }
    if (to_.q != nullptr) {
      kernel.weigh(slopes, rows, key_rows_.get() + key, padded, count, p_.vectors(), true,
                   query_sums_.get() + query * padded, padded);
    }
  }

  // A tile's rows at the stride that the products take.
  const float* spaced(const Floats& all, int64_t query, int rows, const Floats& to) const {
    const float* from = all.get() + query * p_.padded;
    for (int i = 0; i < rows; ++i) {
      std::memcpy(to.get() + i * kTileRow, from + i * p_.padded, p_.padded * sizeof(float));
    }
    return to.get();
  }

  void finish_queries(const Task& task, const Sample& sample) {
    const Interval queries = p_.queries(task);
    for (int place = queries.begin; place < queries.end; ++place) {
      float* row = query_sums_.get() + static_cast<int64_t>(place - first_query_) * p_.padded;
      const int64_t token = sample.query_token + place;
      scale_row(row, p_.dim, in_.scale, row);
      if (p_.q_rotary.any()) p_.q_rotary.apply(row, sample.batch, token, place, true);
      to_.q->write(sample.batch, task.head, token, row);
    }
  }

  const Problem& p_;
  const Inputs& in_;
  const Gradients& to_;
  std::vector<Sums>& partial_;
  const bool scores_needed_;
  // Packed keys as panels and as rows, values as panels.
  Floats key_panels_, key_rows_, value_panels_;
  // The task's queries, gradients and sums for the queries' gradient, [queries, padded]; a tile's
  // queries and gradients, its weights and the gradients of its scores.
  Floats queries_, grads_, query_sums_, tile_queries_, tile_grads_, weights_, slopes_;
  Sums own_;
  std::vector<float> shift_, delta_;  // [queries]
  std::vector<Tile> tiles_;
  int first_query_ = 0;
  bool wide_ = false;  // whether a score's products may pass float32 (range.h)
};

// The gradients of keys and values where several tasks share a sample and head.
inline void finish_parts(const Problem& p, const Gradients& to,
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
      Backward::finish(p, to, p.samples[unit / p.heads], unit % p.heads, parts[unit]);
    }
  });
}

}  // namespace cpu
}  // namespace
}  // namespace attention
