// Threads that take tasks of unequal size from one counter.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace vlpfast {

// Subnormal results are 0 while this lives. The smallest weights of a plan or of an attention
// row are subnormal, which costs some CPUs a hundred cycles each and means nothing.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

// Calls `work` on every thread with the counter from which to take tasks.
template <class Work>
inline void on_all_threads(int64_t num_tasks, Work work) {
  std::atomic<int64_t> next = 0;
  const int64_t num_threads =
      std::min<int64_t>(num_tasks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t, int64_t) {
    const FlushSubnormals flush;
    work(next);
  });
}

}  // namespace vlpfast
