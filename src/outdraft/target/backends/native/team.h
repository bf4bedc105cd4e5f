// Threads that go through the steps of one layer together.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

class Barrier {
 public:
  void wait(int threads) {
    if (threads == 1) return;
    unsigned turn = turn_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; spins++) {
      if (spins > 4000) std::this_thread::yield();  // another process has the processor
#if defined(__AVX512F__)
      else _mm_pause();
#endif
    }
  }

 private:
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> turn_{0};
};

struct Team {
  int thread, threads;
  Barrier* barrier;
  void wait() const { barrier->wait(threads); }
  int64_t first(int64_t items) const { return items * thread / threads; }
  int64_t last(int64_t items) const { return items * (thread + 1) / threads; }
};

template <class Work>
void together(int threads, Work work) {
  Barrier barrier;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  work(Team{omp_get_thread_num(), omp_get_num_threads(), &barrier});
#else
  work(Team{0, 1, &barrier});
#endif
}

}  // namespace
