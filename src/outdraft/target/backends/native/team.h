// Threads that go through the steps of one layer together.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

inline int64_t nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

class Barrier {
 public:
  void wait(int threads) {
    unsigned turn = turn_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    int64_t start = 0;
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; spins++) {
      if (spins < SPINS) {
#if defined(__AVX512F__)
        _mm_pause();
#endif
        continue;
      }
      if (spins == SPINS) start = nanoseconds();
      std::this_thread::yield();  // another process has the processor
    }
    if (start) lost.fetch_add(nanoseconds() - start, std::memory_order_relaxed);
  }

  std::atomic<int64_t> lost{0};  // nanoseconds of long waits, of all threads

 private:
  static constexpr int SPINS = 4000;
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> turn_{0};
};

struct Team {
  int thread, threads;
  Barrier* barrier;
  void wait() const {
    if (threads > 1) barrier->wait(threads);
  }
  int64_t first(int64_t items) const { return items * thread / threads; }
  int64_t last(int64_t items) const { return items * (thread + 1) / threads; }
};

// Number of threads to use. Where other processes compute, threads that wait for each other take a time slice a step, a
// hundred times as long as one thread takes alone; so after some such calls fewer threads go on for a while.
class Crowding {
 public:
  int threads(int wanted) {
    if (rest_ > 0 && --rest_ == 0) fewer_ = 0;
    return std::max(1, wanted - fewer_ * std::max(1, wanted / 4));
  }

  void told(int64_t lost, int64_t whole, int threads) {
    if (threads == 1) return;
    if (lost * 5 < whole * 2 * (threads - 1)) {
      bad_ = std::max(0, bad_ - 1);
      if (++good_ > 2048) pause_ = 64;
    } else if (++bad_ >= 6) {
      fewer_++;
      rest_ = pause_;
      pause_ = std::min(2 * pause_, 8192);
      bad_ = good_ = 0;
    }
  }

 private:
  int bad_ = 0, good_ = 0, fewer_ = 0, rest_ = 0, pause_ = 64;
};

template <class Work>
void together(int wanted, Work work) {
#if defined(_OPENMP)
  static thread_local Crowding crowding;
  int threads = crowding.threads(wanted);
  if (threads > 1) {
    Barrier barrier;
    int64_t start = nanoseconds();
#pragma omp parallel num_threads(threads)
    work(Team{omp_get_thread_num(), omp_get_num_threads(), &barrier});
    crowding.told(barrier.lost, nanoseconds() - start, threads);
    return;
  }
#endif
  work(Team{0, 1, nullptr});
}

}  // namespace
