// Random kept patches: one warp per sample, its keys in shared memory. The largest kept key is found
// by bitwise radix selection with ballots, then the kept patches are compacted in raster order.
#include <algorithm>

#include "vlpfast/counter.h"
#include "vlpfast/launch.h"

namespace vlpfast {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xFFFFFFFFu;

template <bool HAS_VALID>
__global__ void keep_ids_kernel(const int64_t* __restrict__ seed,
                                const int64_t* __restrict__ sample_ids,
                                const bool* __restrict__ valid, int64_t* __restrict__ ids,
                                int64_t* __restrict__ inverse, int64_t num_samples,
                                int num_patches, int num_keep) {
  extern __shared__ uint32_t shared_keys[];
  const int lane = threadIdx.x;
  const int64_t sample = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (sample >= num_samples) return;
  // A lane reads back only what it wrote, so the warp needs no barrier.
  uint32_t* keys = shared_keys + threadIdx.y * num_patches;
  if (HAS_VALID) valid += sample * num_patches;
  ids += sample * num_keep;
  inverse += sample * num_patches;

  const uint32_t stream = stream_key(*seed, sample_ids[sample]);
  const uint32_t index_mask = (1u << index_bits(num_patches)) - 1;
  int candidates = num_patches;
  if (HAS_VALID) candidates = 0;
  for (int base = 0; base < num_patches; base += kWarp) {
    const int p = base + lane;
    bool ok = false;
    if (p < num_patches) {
      keys[p] = (draw(stream, p) & ~index_mask) | p;
      ok = !HAS_VALID || valid[p];
    }
    if (HAS_VALID) candidates += __popc(__ballot_sync(kAll, ok));
  }

  int wanted = min(num_keep, candidates);
  int fill = num_keep - wanted;  // invalid patches to add, the lowest index first
  uint32_t prefix = 0;
  int bit = 32;
  while (candidates != wanted) {  // the same for all lanes
    --bit;
    prefix <<= 1;
    int zeros = 0;
    for (int base = 0; base < num_patches; base += kWarp) {
      const int p = base + lane;
      const bool match =
          p < num_patches && (keys[p] >> bit) == prefix && (!HAS_VALID || valid[p]);
      zeros += __popc(__ballot_sync(kAll, match));
    }
    if (wanted <= zeros) {
      candidates = zeros;
    } else {
      wanted -= zeros;
      candidates -= zeros;
      prefix |= 1;
    }
  }
  const uint64_t threshold = (uint64_t{prefix} << bit) | ((uint64_t{1} << bit) - 1);

  int slot_base = 0;
  const unsigned lanes_below = (1u << lane) - 1;
  for (int base = 0; base < num_patches; base += kWarp) {
    const int p = base + lane;
    const bool inside = p < num_patches;
    const bool ok = inside && (!HAS_VALID || valid[p]);
    bool keep = ok && keys[p] <= threshold;
    if (HAS_VALID) {
      const unsigned invalid = __ballot_sync(kAll, inside && !ok);
      keep = keep || (inside && !ok && __popc(invalid & lanes_below) < fill);
      fill -= min(fill, __popc(invalid));
    }
    const unsigned kept = __ballot_sync(kAll, keep);
    const int slot = slot_base + __popc(kept & lanes_below);
    if (keep) ids[slot] = p;
    if (inside) inverse[p] = keep ? slot : -1;
    slot_base += __popc(kept);
  }
}

}  // namespace

void launch_keep_ids(const int64_t* seed, const int64_t* sample_ids, const bool* valid, int64_t* ids,
                     int64_t* inverse, int64_t num_samples, int num_patches, int num_keep,
                     cudaStream_t stream) {
  const int warps = std::clamp<int>(kKeepIdsMaxPatches / num_patches, 1, 4);
  const dim3 block(kWarp, warps);
  const auto grid = static_cast<unsigned>((num_samples + warps - 1) / warps);
  const size_t shared_bytes = sizeof(uint32_t) * warps * num_patches;
  const auto kernel = valid ? keep_ids_kernel<true> : keep_ids_kernel<false>;
  kernel<<<grid, block, shared_bytes, stream>>>(seed, sample_ids, valid, ids, inverse, num_samples,
                                                num_patches, num_keep);
}

}  // namespace vlpfast
