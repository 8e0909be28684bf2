// What a call asks for: checked, its samples, its tiles, and the tasks that threads take.
#pragma once

#include <atomic>
#include <optional>
#include <vector>

#include "attention/attention.h"
#include "attention/cpu/tokens.h"

namespace attention {
namespace {  // included by cpu.cpp alone
namespace cpu {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// Fewer (sample, head) pairs than this are cut into parts, of at least kLeastTiles tiles. The cut
// does not depend on the number of threads, so that the results do not either.
constexpr int64_t kTasks = 32;
constexpr int64_t kLeastTiles = 4;

// A part of the queries of one sample and head. keys: the kept keys that they see lie in there.
struct Task {
  int64_t sample, head, part, parts;
  int first_tile, last_tile;
  Interval keys;
  int64_t work;
};

// A frame longer than any sample is the whole of it.
inline int at_most_tokens(int64_t count) {
  return static_cast<int>(std::min(count, kMostTokens));
}

inline const int* integers(const Optional& tensor) {
  return tensor ? static_cast<const int*>(tensor->const_data_ptr()) : nullptr;
}

// Checks offsets up to `total` tokens; the longest sample.
inline int check_offsets(const char* name, const Tensor& offsets, int64_t total) {
  const int* values = static_cast<const int*>(offsets.const_data_ptr());
  const int64_t samples = offsets.size(0) - 1;
  STD_TORCH_CHECK(values[0] == 0, name, ": got offsets from ", values[0], ", takes offsets from 0");
  int longest = 0;
  for (int64_t s = 0; s < samples; ++s) {
    STD_TORCH_CHECK(values[s] <= values[s + 1], name,
                    ": got offsets that decrease, takes offsets that never decrease");
    longest = std::max(longest, values[s + 1] - values[s]);
  }
  STD_TORCH_CHECK(values[samples] == total, name, ": got offsets up to ", values[samples],
                  ", takes ", total, ", the tokens");
  return longest;
}

// Checks one side's places; index null: places 0 to longest - 1.
inline void check_places(const char* name, const Tensor* index, const std::vector<int64_t>& grid,
                         int64_t longest) {
  const int64_t places = grid[0] * grid[1] * grid[2];
  if (index == nullptr) {
    STD_TORCH_CHECK(longest <= places, "grid: got (", grid[0], ", ", grid[1], ", ", grid[2], "), ",
                    places, " places, takes at least the ", longest,
                    " tokens of a sample, or an index");
    return;
  }
  if (index->numel() == 0) return;
  const int* values = static_cast<const int*>(index->const_data_ptr());
  const auto [least, most] = std::minmax_element(values, values + index->numel());
  STD_TORCH_CHECK(*least >= 0 && *most < places, name, ": got places ", *least, " to ", *most,
                  ", takes 0 to ", places - 1, " in a grid of (", grid[0], ", ", grid[1], ", ",
                  grid[2], ")");
}

struct Problem {
  Problem(const Tensor& q, const Tensor& k, const Optional& q_offsets, const Optional& k_offsets,
          const Optional& lengths, const Optional& keep, const Optional& bounds,
          int64_t tokens_per_frame, int64_t window, const Optional& table, const Optional& q_index,
          const Optional& k_index, const std::vector<int64_t>& grid)
      : kernel(kernels()),
        heads(q.size(1)),
        q_tokens(q.size(2)),
        k_tokens(k.size(2)),
        dim(static_cast<int>(q.size(3))),
        padded((dim + kernel.lanes - 1) / kernel.lanes * kernel.lanes) {
    make_samples(q.size(0), q_offsets, k_offsets, lengths, keep, bounds,
                 at_most_tokens(tokens_per_frame), at_most_tokens(window));
    if (table) make_rotaries(*table, q_index, k_index, grid);
    make_tasks();
  }

  // Calls make() for a worker a thread, and worker(task's number) for every task, largest first.
  template <typename Make>
  void run(const Make& make) const {
    const int64_t count = static_cast<int64_t>(tasks.size());
    const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, std::min(threads, count), 1, [&](int64_t first, int64_t last) {
      for (int64_t thread = first; thread < last; ++thread) {
        auto worker = make();
        for (int64_t i = next++; i < count; i = next++) worker(i);
      }
    });
  }

  const Rotary& key_rotary() const { return same_rotary ? q_rotary : k_rotary; }
  int vectors() const { return padded / kernel.lanes; }
  int64_t most_queries() const {
    int most = 0;
    for (const Task& task : tasks) most = std::max(most, size(queries(task)));
    return most;
  }
  Interval queries(const Task& task) const {
    if (task.first_tile == task.last_tile) return {0, 0};
    const auto& own = tiles[task.sample];
    return {own[task.first_tile].begin, own[task.last_tile - 1].end};
  }
  // Packed keys of the largest task, whole panels.
  int64_t most_keys() const {
    int most = 0;
    for (const Task& task : tasks) most = std::max(most, size(task.keys));
    return (most + kernel.panel - 1) / kernel.panel * kernel.panel;
  }

  const Kernels& kernel;
  int64_t heads, q_tokens, k_tokens;
  int dim, padded;
  std::vector<Sample> samples;
  std::vector<std::vector<Tile>> tiles;  // by sample
  std::vector<Task> tasks;
  Rotary q_rotary, k_rotary;
  bool same_rotary = false;

 private:
  void make_samples(int64_t batch, const Optional& q_offsets, const Optional& k_offsets,
                    const Optional& lengths, const Optional& keep, const Optional& bounds,
                    int frame, int window) {
    const int *q_at = integers(q_offsets), *k_at = integers(k_offsets);
    const bool packed = q_at != nullptr, same = q_at == k_at;
    longest_q_ = static_cast<int>(q_tokens);
    longest_k_ = static_cast<int>(k_tokens);
    if (packed) {
      batch = q_offsets->size(0) - 1;
      longest_q_ = check_offsets("offsets", *q_offsets, q_tokens);
      longest_k_ = check_offsets(same ? "offsets" : "key_offsets", *k_offsets, k_tokens);
    }
    const int* length = integers(lengths);
    for (int64_t s = 0; length != nullptr && s < batch; ++s) {
      STD_TORCH_CHECK(length[s] >= 0, "lengths: got ", length[s], ", takes integers >= 0");
      STD_TORCH_CHECK(length[s] <= k_tokens, "lengths: got ", length[s], ", takes at most ",
                      k_tokens, " (Tk)");
    }
    const int blocks = bounds ? static_cast<int>(bounds->size(1)) : 0;
    const int64_t bound_rows = bounds ? bounds->size(0) : 0;
    const int* bound = integers(bounds);
    for (int64_t row = 0; row < bound_rows; ++row) {
      for (int m = 0, before = 0; m < blocks; before = bound[row * blocks + m++]) {
        const int end = bound[row * blocks + m];
        STD_TORCH_CHECK(end >= before, m == 0 ? "context" : "sizes", ": got ",
                        int64_t{end} - before, ", takes integers >= 0");
        STD_TORCH_CHECK(end <= longest_q_, "sizes: got blocks up to token ", end,
                        ", takes at most ", longest_q_);
      }
    }
    const bool* kept = keep ? static_cast<const bool*>(keep->const_data_ptr()) : nullptr;
    if (kept != nullptr) {
      index_.resize(batch * k_tokens);
      before_.resize(batch * (k_tokens + 1));
    }
    for (int64_t s = 0; s < batch; ++s) {
      Sample sample = {};
      sample.batch = packed ? 0 : s;
      sample.query_token = packed ? q_at[s] : 0;
      sample.key_token = packed ? k_at[s] : 0;
      sample.queries = packed ? q_at[s + 1] - q_at[s] : longest_q_;
      sample.keys = sample.kept = packed ? k_at[s + 1] - k_at[s] : longest_k_;
      sample.rules = {length != nullptr ? std::min(length[s], sample.keys) : sample.keys, frame,
                      window, blocks - 1,
                      bound == nullptr ? nullptr : bound + (bound_rows > 1 ? s * blocks : 0)};
      if (kept != nullptr) {
        int* index = index_.data() + s * k_tokens;
        int* before = before_.data() + s * (k_tokens + 1);
        int count = 0;
        for (int j = 0; j < sample.keys; ++j) {
          before[j] = count;
          if (kept[s * k_tokens + j]) index[count++] = j;
        }
        before[sample.keys] = sample.kept = count;
        sample.index = index;
        sample.before = before;
      }
      samples.push_back(sample);
    }
  }

  void make_rotaries(const Tensor& table, const Optional& q_index, const Optional& k_index,
                     const std::vector<int64_t>& grid) {
    const Tensor* own = q_index ? &*q_index : nullptr;
    const Tensor* keys = k_index ? &*k_index : nullptr;
    same_rotary = integers(q_index) == integers(k_index) && (own != nullptr || keys == nullptr);
    check_places("index", own, grid, longest_q_);
    check_places(same_rotary ? "index" : "key_index", keys, grid, longest_k_);
    const int longest = same_rotary ? std::max(longest_q_, longest_k_) : longest_q_;
    q_rotary = Rotary(table, own, grid, longest);
    if (!same_rotary) k_rotary = Rotary(table, keys, grid, longest_k_);
  }

  void make_tasks() {
    const int64_t units = static_cast<int64_t>(samples.size()) * heads;
    for (const Sample& sample : samples) {
      std::vector<Tile> own;
      cut(sample, 0, sample.queries, false, [&](const Tile& tile) { own.push_back(tile); });
      tiles.push_back(std::move(own));
    }
    for (size_t s = 0; s < samples.size(); ++s) {
      const auto& own = tiles[s];
      const int64_t count = static_cast<int64_t>(own.size());
      int64_t total = 0;
      for (const Tile& tile : own) total += tile.work();
      const int64_t wanted = units < kTasks ? (kTasks + units - 1) / units : 1;
      const int64_t parts = std::max<int64_t>(1, std::min(wanted, count / kLeastTiles));
      int64_t done = 0, at = 0;
      for (int64_t part = 0; part < parts; ++part) {
        Task task = {static_cast<int64_t>(s), 0, part, parts, static_cast<int>(at), 0, {0, 0}, 0};
        while (at < count && (part + 1 == parts || done * parts < total * (part + 1))) {
          const Tile& tile = own[at++];
          task.keys = hull(task.keys, hull(tile.keys.first, tile.keys.second));
          task.work += tile.work();
          done += tile.work();
        }
        task.last_tile = static_cast<int>(at);
        for (task.head = 0; task.head < heads; ++task.head) tasks.push_back(task);
      }
    }
    std::stable_sort(tasks.begin(), tasks.end(),
                     [](const Task& a, const Task& b) { return a.work > b.work; });
  }

  int longest_q_ = 0, longest_k_ = 0;
  std::vector<int> index_, before_;
};

inline Intervals shifted(const Intervals& a, int by) {
  const auto one = [by](Interval i) { return i.empty() ? i : Interval{i.begin - by, i.end - by}; };
  return {one(a.first), one(a.second)};
}

KERNELS_VECTOR inline void scale_row(const float* in, int64_t count, float factor, float* out) {
  for (int64_t j = 0; j < count; ++j) out[j] = in[j] * factor;
}

// The rows of a tile of queries or of their gradients, [rows, dim] of a given stride, zero up to
// `padded`; `rotary` null: not turned. Returns the bits of the largest (largest_bits).
inline int32_t load_tile(const Problem& p, const Tokens& x, const Sample& sample, int64_t head,
                         const Tile& tile, const Rotary* rotary, float factor, float* to,
                         int64_t stride) {
  int32_t largest = 0;
  for (int row = tile.begin; row < tile.end; ++row, to += stride) {
    const int64_t token = sample.query_token + row;
    x.copy(sample.batch, head, token, to);
    if (rotary != nullptr && rotary->any()) rotary->apply(to, sample.batch, token, row, false);
    if (factor != 1.f) scale_row(to, p.dim, factor, to);
    largest = std::max(largest, largest_bits(to, p.dim));
    std::memset(to + p.dim, 0, (p.padded - p.dim) * sizeof(float));
  }
  return largest;
}

// Calls use(tile) once, or where numbers are not finite once for every run of queries that see the
// same keys: a weight of 0 does not hide them.
template <typename Use>
void split_unless_finite(const Sample& sample, const Tile& tile, bool finite, const Use& use) {
  if (finite || tile.uniform) {
    use(tile);
  } else {
    cut(sample, tile.begin, tile.end, true, use);
  }
}

}  // namespace cpu
}  // namespace
}  // namespace attention
