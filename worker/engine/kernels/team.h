// Threads that go through the phases of a step together.
//
// A step has hundreds of phases of some microseconds, so threads wait for one another by looking, not by sleeping; after
// a while they yield the core, for other processes may share it. Work is handed out piece by piece: a thread that loses
// its core for a moment delays the piece in its hands and no other.
#pragma once

#include <atomic>
#include <cstdint>

#include <sched.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace torchrelay {

class Team {
 public:
  explicit Team(int size) : size_(size) {}

  int size() const { return size_.load(std::memory_order_relaxed); }

  // By every thread before its first phase, all with the same number.
  void set_size(int size) { size_.store(size, std::memory_order_relaxed); }

  // The next piece of the phase: counts from 0, each number given once.
  int64_t next() { return next_.fetch_add(1, std::memory_order_relaxed); }

  // What the calling thread's next piece will probably be: the others take one each before.
  int64_t likely_next() const { return next_.load(std::memory_order_relaxed) + size() - 1; }

  // Ends the phase: returns when all threads are here. What they wrote before is then visible.
  void wait() {
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size() - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int looks = 0; phase_.load(std::memory_order_acquire) == phase; looks++) {
      if (looks < kLooks)
        pause();
      else
        sched_yield();
    }
  }

 private:
  static constexpr int kLooks = 2000;  // some tens of microseconds

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
  }

  std::atomic<int> size_;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

}  // namespace torchrelay
