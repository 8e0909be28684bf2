// The forward pass of one task: tiles of queries against chunks of keys, with running maxima.
#pragma once

#include <cmath>
#include <limits>

#include "attention/cpu/problem.h"

namespace attention {
namespace {  // included by cpu.cpp alone
namespace cpu {

class Forward {
 public:
  Forward(const Problem& p, const Tokens& q, const Tokens& k, const Tokens& v, float scale,
          const Result& out, float* lse)
      : p_(p),
        q_(q),
        k_(k),
        v_(v),
        scale_(scale),
        out_(out),
        lse_(lse),
        keys_(p.most_keys() * p.dim),
        values_(p.most_keys() * p.padded),
        queries_(kTileRows * kTileRow),
        scores_(kTileRows * kScoreRow),
        sums_(kTileRows * kTileRow) {}

  void operator()(int64_t number) {
    const Task& task = p_.tasks[number];
    const Sample& sample = p_.samples[task.sample];
    const Interval keys = task.keys;
    largest_key_ = pack(k_, sample, task.head, keys.begin, keys.end, p_.dim, p_.padded, p_.kernel,
                        p_.key_rotary(), {keys_.get(), nullptr});
    const int32_t value = pack(v_, sample, task.head, keys.begin, keys.end, p_.dim, p_.padded,
                               p_.kernel, Rotary(), {nullptr, values_.get()});
    const bool finite = is_finite(largest_key_) && is_finite(value);
    for (int t = task.first_tile; t < task.last_tile; ++t) {
      split_unless_finite(sample, p_.tiles[task.sample][t], finite,
                          [&](const Tile& tile) { run(task, sample, tile); });
    }
  }

 private:
  void run(const Task& task, const Sample& sample, const Tile& tile) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const Kernels& kernel = p_.kernel;
    const int rows = tile.end - tile.begin, origin = task.keys.begin;
    const int32_t largest =
        load_tile(p_, q_, sample, task.head, tile, &p_.q_rotary,
                  scale_ * static_cast<float>(kLog2E), queries_.get(), kTileRow);
    const bool wide = may_pass(largest, largest_key_, p_.dim);
    Power powers[kTileRows];
    if (wide) shrink_rows(queries_.get(), rows, p_.dim, kTileRow, powers);
    float most[kTileRows], total[kTileRows];
    std::fill_n(most, rows, -kInfinity);
    std::fill_n(total, rows, 0.f);
    bool first = true;
    chunks(shifted(tile.keys, origin), kernel.panel, kChunk, [&](int begin, int end) {
      const int start = begin / kernel.panel * kernel.panel;
      const int panels = (end - start + kernel.panel - 1) / kernel.panel;
      const float* keys = keys_.get() + static_cast<int64_t>(start) * p_.dim;
      kernel.scores(queries_.get(), rows, keys, panels, p_.dim, scores_.get());
      const int columns = panels * kernel.panel;
      for (int i = 0; i < rows; ++i) {
        float* row = scores_.get() + i * kScoreRow;
        if (wide) grow_scores(row, columns, powers[i]);
        const Intervals seen = tile.uniform ? tile.keys : sample.seen(tile.begin + i);
        fill_unseen(clipped(shifted(seen, origin), begin, end), start, columns, -kInfinity, row);
        const float before = most[i];
        most[i] = std::max(before, kernel.largest(row, columns));
        const float shift = most[i] == -kInfinity ? 0.f : most[i];
        const float kept = first ? 0.f : std::exp2(before - shift);
        total[i] = total[i] * kept + kernel.exponentiate(row, columns, shift);
        if (!first && kept != 1.f) {
          float* sum = sums_.get() + i * kTileRow;
          scale_row(sum, p_.padded, kept, sum);
        }
      }
      kernel.weigh(scores_.get() + (begin - start), rows,
                   values_.get() + static_cast<int64_t>(begin) * p_.padded, p_.padded, end - begin,
                   p_.vectors(), !first, sums_.get(), kTileRow);
      first = false;
    });
    for (int i = 0; i < rows; ++i) {
      float* sum = sums_.get() + i * kTileRow;
      const int64_t token = sample.query_token + tile.begin + i;
      const Intervals seen = sample.seen(tile.begin + i);
      float lse = -kInfinity;
      if (seen.first.empty() && seen.second.empty()) {
        std::fill_n(sum, p_.dim, 0.f);
      } else {
        // 0 / 0 where every score is -inf, as in the formula
        lse = most[i] + std::log2(total[i]);
        if (total[i] == 0.f) lse = std::numeric_limits<float>::quiet_NaN();
        scale_row(sum, p_.dim, total[i] == 0.f ? lse : 1.f / total[i], sum);
      }
      out_.write(sample.batch, task.head, token, sum);
      lse_[(sample.batch * p_.heads + task.head) * p_.q_tokens + token] = lse;
    }
  }

  static Intervals clipped(const Intervals& a, int begin, int end) {
    return {clip(a.first, {begin, end}), clip(a.second, {begin, end})};
  }

  const Problem& p_;
  const Tokens &q_, &k_, &v_;
  const float scale_;
  const Result& out_;
  float* const lse_;
  // Packed keys [panels, dim, panel] and values [keys, padded]; a tile's queries, scores and
  // weighted sums of values.
  Floats keys_, values_, queries_, scores_, sums_;
  int32_t largest_key_ = 0;
};

}  // namespace cpu
}  // namespace
}  // namespace attention
