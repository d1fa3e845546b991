// Counter-based random numbers: each is a function of (seed, sample id, position) alone. The bits
// are those of vlpfast/ops/reference/counter.py. Free of torch: shared by C++ and CUDA.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define VLPFAST_HD __host__ __device__ __forceinline__
#else
#define VLPFAST_HD inline
#endif

namespace vlpfast {

// A bijection of 32-bit integers with low bias (constants: C. Wellons, hash-prospector, lowbias32).
VLPFAST_HD uint32_t mix32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

VLPFAST_HD uint32_t stream_key(int64_t seed, int64_t sample_id) {
  const auto s = static_cast<uint64_t>(seed);
  const auto id = static_cast<uint64_t>(sample_id);
  uint32_t h = mix32(static_cast<uint32_t>(s));
  h = mix32(h ^ static_cast<uint32_t>(s >> 32));
  h = mix32(h ^ static_cast<uint32_t>(id));
  return mix32(h ^ static_cast<uint32_t>(id >> 32));
}

VLPFAST_HD uint32_t draw(uint32_t key, uint32_t position) { return mix32(key ^ mix32(position)); }

// How many low bits hold an index below n: ceil(log2(n)).
VLPFAST_HD int index_bits(int64_t n) {
  int bits = 0;
  while ((int64_t{1} << bits) < n) ++bits;
  return bits;
}

}  // namespace vlpfast
