// Random kept patches on the CPU. Each patch of a sample has a unique 32-bit key, and the num_keep
// smallest keys are kept: a bitwise radix selection finds the largest kept key, no sort.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "vlpfast/checks.h"
#include "vlpfast/counter.h"
#include "vlpfast/simd.h"

namespace vlpfast {
namespace {

// Threads are worth their start from about this many patches on (some 25 us of work).
constexpr int64_t kGrainPatches = 16384;

struct Problem {
  int64_t seed, num_patches, num_keep;
  const int64_t* sample_ids;
  const bool* valid;  // nullable
  int64_t* ids;
  int64_t* inverse;
};

// A threshold that exactly the `wanted` smallest of n unique keys do not exceed; wanted in 1..n.
VLPFAST_INLINE uint32_t select_threshold(const uint32_t* keys, int64_t n, int64_t wanted) {
  uint32_t prefix = 0;  // the threshold's bits down to `bit`
  int64_t candidates = n;
  int bit = 32;
  while (candidates != wanted) {
    --bit;
    prefix <<= 1;
    uint32_t zeros = 0;
    for (int64_t i = 0; i < n; ++i) zeros += (keys[i] >> bit) == prefix;
    if (wanted <= zeros) {
      candidates = zeros;
    } else {
      wanted -= zeros;
      candidates -= zeros;
      prefix |= 1;
    }
  }
  const uint64_t low = (uint64_t{1} << bit) - 1;
  return static_cast<uint32_t>((uint64_t{prefix} << bit) | low);
}

// Compaction step without a branch, which half of the patches would mispredict: the slot after p.
VLPFAST_INLINE int64_t put(bool keep, int64_t p, int64_t slot, int64_t* kept_ids,
                           int64_t* inverse) {
  kept_ids[slot] = p;
  inverse[p] = slot | -static_cast<int64_t>(!keep);  // -1 where dropped
  return slot + keep;
}

VLPFAST_CLONES
void keep_samples(const Problem& problem, int64_t begin, int64_t end) {
  const int64_t P = problem.num_patches, K = problem.num_keep;
  const uint32_t index_mask = (uint32_t{1} << index_bits(P)) - 1;
  std::vector<uint32_t> position_hash(P), keys(P), valid_keys(problem.valid ? P : 0);
  // One slot more than patches: the compaction writes before it knows whether to advance.
  std::vector<int64_t> kept_ids(P + 1);
  for (int64_t p = 0; p < P; ++p) position_hash[p] = mix32(static_cast<uint32_t>(p));

  for (int64_t b = begin; b < end; ++b) {
    const uint32_t stream = stream_key(problem.seed, problem.sample_ids[b]);
    for (int64_t p = 0; p < P; ++p) {
      keys[p] = (mix32(stream ^ position_hash[p]) & ~index_mask) | static_cast<uint32_t>(p);
    }
    int64_t* inverse = problem.inverse + b * P;
    int64_t slot = 0;
    if (problem.valid == nullptr) {
      const uint32_t threshold = select_threshold(keys.data(), P, K);
      for (int64_t p = 0; p < P; ++p) {
        const bool keep = keys[p] <= threshold;
        slot = put(keep, p, slot, kept_ids.data(), inverse);
      }
    } else {
      const bool* valid = problem.valid + b * P;
      int64_t num_valid = 0;
      for (int64_t p = 0; p < P; ++p) {
        valid_keys[num_valid] = keys[p];
        num_valid += valid[p];
      }
      const int64_t wanted = std::min(K, num_valid);
      // Invalid patches fill up what the valid ones leave, the lowest index first.
      int64_t fill = K - wanted;
      const uint32_t threshold =
          wanted > 0 ? select_threshold(valid_keys.data(), num_valid, wanted) : 0;
      for (int64_t p = 0; p < P; ++p) {
        const bool fills = !valid[p] & (fill > 0);
        const bool keep = fills | (valid[p] & (keys[p] <= threshold));
        fill -= fills;
        slot = put(keep, p, slot, kept_ids.data(), inverse);
      }
    }
    std::copy_n(kept_ids.data(), K, problem.ids + b * K);
  }
}

std::tuple<Tensor, Tensor> keep_ids_cpu(const Tensor& seed, const Tensor& sample_ids,
                                        int64_t num_patches, int64_t num_keep,
                                        const std::optional<Tensor>& valid) {
  check_argument(seed, ScalarType::Long, "keep_ids", "seed");
  check_argument(sample_ids, ScalarType::Long, "keep_ids", "sample_ids");
  if (valid) check_argument(*valid, ScalarType::Bool, "keep_ids", "valid");
  STD_TORCH_CHECK(1 <= num_keep && num_keep <= num_patches,
                  "keep_ids: num_keep must be in 1..num_patches");
  const int64_t num_samples = sample_ids.size(0);
  Tensor ids = torch::stable::new_empty(sample_ids, {num_samples, num_keep});
  Tensor inverse = torch::stable::new_empty(sample_ids, {num_samples, num_patches});
  const Problem problem{*seed.const_data_ptr<int64_t>(),
                        num_patches,
                        num_keep,
                        sample_ids.const_data_ptr<int64_t>(),
                        valid ? valid->const_data_ptr<bool>() : nullptr,
                        ids.mutable_data_ptr<int64_t>(),
                        inverse.mutable_data_ptr<int64_t>()};
  const int64_t grain = std::max<int64_t>(1, kGrainPatches / num_patches);
  torch::stable::parallel_for(0, num_samples, grain, [&](int64_t begin, int64_t end) {
    keep_samples(problem, begin, end);
  });
  return {ids, inverse};
}

}  // namespace
}  // namespace vlpfast

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
  m.impl("keep_ids", TORCH_BOX(&vlpfast::keep_ids_cpu));
}
