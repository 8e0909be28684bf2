// Runs one CUDA kernel launch on one CPU thread: blocks one after the other, the threads of a block
// as fibers that switch only where CUDA threads can wait.
//
// Blocks run in an order shuffled by EMULATOR_SEED, and so do the warps of a block and the threads
// of a warp; a warp runs on until all of its threads wait at a barrier of the block, so that one
// warp is as far ahead of the others as it can be. A result that depends on such an order differs
// between seeds. Shared memory is allocated anew for
// every block, with its exact size and filled with 0xFF (NaN, or -1), so that AddressSanitizer sees
// an access out of bounds and a read before a write gives NaN. A wait that cannot end (a barrier
// that some threads of the block reach on another line, or never) throws an error that says who
// waits where.
//
// Not modelled: weak memory order between blocks, block clusters, streams (a launch is done when it
// returns), asynchronous copies, textures, tensor-core instructions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// What a kernel reads; the scheduler sets them before it resumes a fiber.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr size_t kStaticShared = 48 * 1024;  // bytes of shared memory without opting in to more
constexpr size_t kMaximalShared = 227 * 1024;

inline uint64_t setting(const char* name, uint64_t fallback) {
  const char* text = std::getenv(name);
  return text == nullptr || *text == '\0' ? fallback : std::strtoull(text, nullptr, 10);
}

enum class Wait { kNone, kBlock, kWarp, kDone };

struct Thread {
  std::unique_ptr<Fiber> fiber;
  Wait wait = Wait::kNone;
  const char* file = "";
  int line = 0;
  unsigned mask = 0;  // of the warp operation it waits in
  bool vote = true;   // at the block's barrier it waits at
};

// What the lanes of a warp hand each other.
struct Warp {
  uint64_t given[kWarp];
  uint64_t taken[kWarp];
};

struct SharedArray {
  const void* key;
  std::unique_ptr<void, decltype(&std::free)> memory;
};

class Scheduler {
 public:
  static Scheduler& instance() {
    static Scheduler scheduler;
    return scheduler;
  }

  void launch(dim3 grid, dim3 block, size_t dynamic, const std::function<void()>& body) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    const uint64_t threads = uint64_t{block.x} * block.y * block.z;
    if (blocks == 0 || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535 || threads == 0 ||
        threads > 1024 || block.z > 64 || dynamic > kMaximalShared) {
      throw std::runtime_error("emulator: invalid launch configuration");
    }
    gridDim = grid;
    blockDim = block;
    body_ = &body;
    dynamic_ = dynamic;
    random_.seed(setting("EMULATOR_SEED", 0));
    std::vector<uint64_t> order(blocks);
    for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_);
    prepare(threads);
    for (const uint64_t i : order) {
      blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                  static_cast<unsigned>(i / grid.x / grid.y)};
      run_block();
    }
  }


  // Returns whether every thread of the block voted for.
  bool wait_block(const char* file, int line, bool vote = true) {
    threads_[current_].vote = vote;
    wait(Wait::kBlock, 0, file, line);
    return agreed_;
  }

  // Every lane of `mask` gives a value; returns what each of them gave, by lane.
  const uint64_t* exchange(unsigned mask, uint64_t value, const char* file, int line) {
    const unsigned lane = current_ % kWarp;
    Warp& warp = warps_[current_ / kWarp];
    warp.given[lane] = value;
    wait(Wait::kWarp, mask, file, line);
    return warp.taken;
  }

  unsigned lane() const { return current_ % kWarp; }

  void* shared(const void* key, size_t bytes) {
    for (const SharedArray& array : shared_) {
      if (array.key == key) return array.memory.get();
    }
    void* memory = std::malloc(bytes);
    std::memset(memory, 0xFF, bytes);
    shared_.push_back({key, {memory, &std::free}});
    shared_bytes_ += bytes;
    if (shared_bytes_ - dynamic_used_ > kStaticShared) {
      fail("more than 48 KiB of static shared memory");
    }
    return memory;
  }

  void* dynamic_shared() {
    dynamic_used_ = dynamic_;
    return dynamic_ == 0 ? nullptr : shared(this, dynamic_);
  }

 private:
  void prepare(size_t threads) {
    while (threads_.size() < threads) {
      threads_.emplace_back();
      threads_.back().fiber = std::make_unique<Fiber>([this] {
        (*body_)();
        threads_[current_].wait = Wait::kDone;
      });
    }
    count_ = threads;
    warps_.resize((threads + kWarp - 1) / kWarp);
  }

  void run_block() {
    shared_.clear();
    shared_bytes_ = dynamic_used_ = 0;
    for (unsigned t = 0; t < count_; ++t) threads_[t].wait = Wait::kNone;
    std::vector<size_t> order(warps_.size());
    for (size_t w = 0; w < order.size(); ++w) {
      std::memset(&warps_[w], 0xFF, sizeof(Warp));
      order[w] = w;
    }
    size_t done = 0;
    for (;;) {
      std::shuffle(order.begin(), order.end(), random_);
      for (const size_t w : order) {
        do {
          done += run_warp(w);
        } while (release_warp(w));
      }
      if (done == count_) break;
      if (!release_block(done)) {
        error_ = "divergent barrier" + waiting();
        abandon();
      }
    }
    shared_.clear();
  }

  // Runs the lanes that can run, each up to its next wait. Returns how many came to their end.
  size_t run_warp(size_t w) {
    unsigned lanes[kWarp];
    for (unsigned lane = 0; lane < kWarp; ++lane) lanes[lane] = lane;
    std::shuffle(lanes, lanes + kWarp, random_);
    size_t done = 0;
    for (const unsigned lane : lanes) {
      const size_t t = w * kWarp + lane;
      if (t >= count_ || threads_[t].wait != Wait::kNone) continue;
      resume(static_cast<unsigned>(t));
      if (!error_.empty()) abandon();
      done += threads_[t].wait == Wait::kDone;
    }
    return done;
  }

  void resume(unsigned t) {
    current_ = t;
    threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
    threads_[t].fiber->resume();
  }

  void wait(Wait kind, unsigned mask, const char* file, int line) {
    Thread& thread = threads_[current_];
    thread.wait = kind;
    thread.mask = mask;
    thread.file = file;
    thread.line = line;
    thread.fiber->suspend();
  }

  bool release_block(size_t done) {
    if (done > 0) return false;
    const Thread& first = threads_[0];
    for (unsigned t = 0; t < count_; ++t) {
      const Thread& thread = threads_[t];
      if (thread.wait != Wait::kBlock || thread.line != first.line ||
          std::strcmp(thread.file, first.file) != 0) {
        return false;
      }
    }
    agreed_ = true;
    for (unsigned t = 0; t < count_; ++t) {
      agreed_ = agreed_ && threads_[t].vote;
      threads_[t].wait = Wait::kNone;
    }
    return true;
  }

  bool release_warp(size_t w) {
    bool any = false;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      const size_t t = w * kWarp + lane;
      if (t < count_ && threads_[t].wait == Wait::kWarp) any |= release_mask(w, threads_[t]);
    }
    return any;
  }

  // Releases the lanes of one warp operation once all of them wait in it. Lanes that the block does
  // not have are not waited for, and give 0xFF.
  bool release_mask(size_t w, const Thread& asking) {
    const unsigned mask = asking.mask;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      const size_t t = w * kWarp + lane;
      if (!(mask >> lane & 1u) || t >= count_) continue;
      const Thread& thread = threads_[t];
      if (thread.wait != Wait::kWarp || thread.mask != mask || thread.line != asking.line ||
          std::strcmp(thread.file, asking.file) != 0) {
        return false;
      }
    }
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      const size_t t = w * kWarp + lane;
      if (!(mask >> lane & 1u)) continue;
      warps_[w].taken[lane] = t < count_ ? warps_[w].given[lane] : ~uint64_t{0};
      if (t < count_) threads_[t].wait = Wait::kNone;
    }
    return true;
  }

  std::string waiting() const {
    std::ostringstream out;
    out << " in block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << "):";
    for (unsigned t = 0; t < count_;) {
      unsigned end = t + 1;
      while (end < count_ && threads_[end].wait == threads_[t].wait &&
             (threads_[t].wait == Wait::kDone || threads_[end].line == threads_[t].line)) {
        ++end;
      }
      out << " threads " << t << " to " << end - 1;
      if (threads_[t].wait == Wait::kDone) {
        out << " have returned;";
      } else {
        out << (threads_[t].wait == Wait::kBlock ? " wait at __syncthreads, "
                                                  : " wait in a warp operation, ")
            << threads_[t].file << ":" << threads_[t].line << ";";
      }
      t = end;
    }
    return out.str();
  }

  // From a fiber: stops the launch with an error.
  void fail(const std::string& message) {
    error_ = message;
    threads_[current_].fiber->suspend();
  }

  [[noreturn]] void abandon() {
    threads_.clear();  // their fibers stand in the middle of the kernel
    shared_.clear();
    const std::string message = "emulator: " + error_;
    error_.clear();
    throw std::runtime_error(message);
  }

  std::mutex mutex_;
  std::mt19937_64 random_;
  const std::function<void()>* body_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<SharedArray> shared_;
  size_t count_ = 0, dynamic_ = 0, dynamic_used_ = 0, shared_bytes_ = 0;
  unsigned current_ = 0;
  bool agreed_ = true;
  std::string error_;
};

// Static shared memory: one array a block for every key.
template <typename T>
T* shared_array(const void* key, size_t count) {
  return static_cast<T*>(Scheduler::instance().shared(key, count * sizeof(T)));
}

}  // namespace emulator
