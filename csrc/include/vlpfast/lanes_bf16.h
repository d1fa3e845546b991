// 16 bf16 values in memory as fp32 lanes: overloads of lanes.h's load16 and store16.
#pragma once

#include <cstdint>
#include <cstring>

#include "vlpfast/lanes.h"

namespace vlpfast {

typedef uint16_t H16 __attribute__((vector_size(32)));

VLPFAST_INLINE F16 load16(const uint16_t* p) {
  H16 half;
  std::memcpy(&half, p, sizeof half);
  return bits_as<F16>(__builtin_convertvector(half, U16) << 16);
}

// Rounds to nearest even; a NaN stays one.
VLPFAST_INLINE void store16(uint16_t* p, F16 x) {
  const U16 bits = bits_as<U16>(x);
  const U16 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const I16 is_nan = x != x;
  const H16 half = __builtin_convertvector(is_nan ? (bits >> 16) | 0x40u : rounded, H16);
  std::memcpy(p, &half, sizeof half);
}

}  // namespace vlpfast
