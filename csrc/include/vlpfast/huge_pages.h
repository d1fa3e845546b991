// Large results on huge pages: touching 4 KiB pages for the first time costs more than what is
// written there (docs/facts.md).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vlpfast {

// Asks for huge pages under fresh memory. It is advice: all works without.
inline void prefer_huge_pages(void* data, int64_t num_bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (begin + num_bytes) & ~(kHugePage - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// `fresh`, a new tensor that is about to be written, on huge pages if it is so large that they pay.
inline torch::stable::Tensor on_huge_pages(torch::stable::Tensor fresh) {
  constexpr int64_t kLarge = int64_t{4} << 20;
  const int64_t num_bytes = fresh.numel() * static_cast<int64_t>(fresh.element_size());
  if (num_bytes >= kLarge) prefer_huge_pages(fresh.mutable_data_ptr(), num_bytes);
  return fresh;
}

}  // namespace vlpfast
