// How a product's long side is shared out among threads.
#pragma once

#include <algorithm>

#include "common/cpu/products.h"
#include "common/tensors.h"

namespace common {

// A part of the long side, [begin, end), in chunks of `chunk`.
struct Range {
  int64_t begin, end, chunk;
};

// The long side (`length`; the other one is `side`) of each of `planes` independent problems cut
// into at most `most` parts, so that there is a task a thread. Where that would leave threads over,
// or parts too short for a product to be worth it, it stays whole: then all threads work on one task
// after another (run_tasks).
struct Split {
  Split(int64_t side, int64_t length, int64_t planes, int64_t most) : length(length), parts(1) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t wanted = (threads + planes - 1) / std::max<int64_t>(planes, 1);
    if (wanted <= std::min(most, length / 512)) parts = std::max<int64_t>(wanted, 1);
    chunk = chunk_length(side, length, parts);
  }

  Range range(int64_t part) const {
    return {length * part / parts, length * (part + 1) / parts, chunk};
  }

  int64_t length, parts, chunk;
};

// Runs task 0 .. count - 1, a thread each where there is one for every thread; else one after the
// other, each on all threads.
template <typename Task>
void run_tasks(int64_t count, const Task& task) {
  if (count >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) task(i);
    });
  } else {
    for (int64_t i = 0; i < count; ++i) task(i);
  }
}

}  // namespace common
