// Which keys the queries of a sample see, tile by tile; keys that a boolean mask drops are gone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention/cpu/width.h"
#include "attention/formula.h"

namespace attention {
namespace {  // included by cpu.cpp alone
namespace cpu {

// One sample's rules. Keys are counted among those that are kept, `kept` of them.
struct Sample {
  int64_t batch, query_token, key_token;  // its row of q, k, v and its first tokens there
  int queries, keys, kept;
  Rules rules;
  const int* index;   // [kept] the keys that a boolean mask keeps; null: all
  const int* before;  // [keys + 1] how many are kept before each key; null where index is

  int key(int kept_key) const { return index == nullptr ? kept_key : index[kept_key]; }

  // Empty intervals are {0, 0}.
  Intervals seen(int query) const {
    const Intervals all = key_intervals(rules, query);
    return {mapped(all.first), mapped(all.second)};
  }

 private:
  Interval mapped(Interval a) const {
    if (a.empty()) return {0, 0};
    if (before != nullptr) a = {before[a.begin], before[a.end]};
    return a.empty() ? Interval{0, 0} : a;
  }
};

inline bool same(const Intervals& a, const Intervals& b) {
  return a.first.begin == b.first.begin && a.first.end == b.first.end &&
         a.second.begin == b.second.begin && a.second.end == b.second.end;
}

inline int size(Interval a) { return a.empty() ? 0 : a.end - a.begin; }

// Queries [begin, end), and the keys that any of them sees: those of `keys`. uniform: they all see
// the same.
struct Tile {
  int begin, end;
  Intervals keys;
  bool uniform;

  int64_t work() const {
    return static_cast<int64_t>(end - begin) * (size(keys.first) + size(keys.second));
  }
};

inline Interval hull(Interval a, Interval b) {
  if (a.empty()) return b;
  if (b.empty()) return a;
  return {std::min(a.begin, b.begin), std::max(a.end, b.end)};
}

// Cuts queries [begin, end) into tiles of at most kTileRows. A tile that is at least half full ends
// where what its queries see changes; with `exact` every tile does.
template <typename Use>
void cut(const Sample& sample, int begin, int end, bool exact, const Use& use) {
  while (begin < end) {
    const int limit = std::min(end, begin + kTileRows);
    const Intervals first = sample.seen(begin);
    Tile tile = {begin, begin + 1, first, true};
    Intervals last = first;
    for (int row = begin + 1; row < limit; ++row) {
      const Intervals own = sample.seen(row);
      if (!same(own, last)) {
        if (exact || row - begin >= kTileRows / 2) break;
        tile.uniform = false;
        tile.keys = {hull(tile.keys.first, own.first), hull(tile.keys.second, own.second)};
        last = own;
      }
      tile.end = row + 1;
    }
    Intervals& keys = tile.keys;
    const bool meet = keys.first.begin <= keys.second.end && keys.second.begin <= keys.first.end;
    if (!keys.first.empty() && !keys.second.empty() && meet) {
      keys = {hull(keys.first, keys.second), {0, 0}};
    }
    use(tile);
    begin = tile.end;
  }
}

// Calls use(first key, end) for the keys of a tile, at most `most` (whole panels) columns a time.
// Panels begin at multiples of `panel` from key 0.
template <typename Use>
void chunks(const Intervals& keys, int panel, int most, const Use& use) {
  for (const Interval& part : {keys.first, keys.second}) {
    for (int begin = part.begin; begin < part.end;) {
      const int end = std::min(part.end, begin / panel * panel + most);
      use(begin, end);
      begin = end;
    }
  }
}

// Sets to `value` the columns [0, count) of a row, column 0 being key `origin`, that a query does
// not see.
inline void fill_unseen(const Intervals& seen, int origin, int count, float value, float* row) {
  int at = 0;
  for (const Interval& part : {seen.first, seen.second}) {
    const int begin = std::min(std::max(part.begin - origin, at), count);
    const int end = std::min(std::max(part.end - origin, at), count);
    if (end <= begin) continue;
    std::fill(row + at, row + begin, value);
    at = end;
  }
  std::fill(row + at, row + count, value);
}

}  // namespace cpu
}  // namespace
}  // namespace attention
