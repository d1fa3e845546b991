// 16 fp32 lanes at a time with exp, log and log1p, by the compilers' vector extension. Lanes are explicit,
// so sums have one order whatever the machine's vectors are. Everything is inlined into a
// VLPFAST_CLONES function.
#pragma once

#include <cstdint>
#include <cstring>

#include "vlpfast/simd.h"

// All of this is inlined: how a vector would be passed between functions does not matter.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace vlpfast {

constexpr int kLaneCount = 16;
typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));

VLPFAST_INLINE F16 splat(float x) { return x - F16{}; }
VLPFAST_INLINE U16 splat_bits(uint32_t x) { return x - U16{}; }

VLPFAST_INLINE F16 load16(const float* p) {
  F16 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

VLPFAST_INLINE void store16(float* p, F16 x) { std::memcpy(p, &x, sizeof x); }

template <class To, class From>
VLPFAST_INLINE To bits_as(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

VLPFAST_INLINE F16 max16(F16 a, F16 b) { return a > b ? a : b; }
VLPFAST_INLINE F16 abs16(F16 x) { return bits_as<F16>(bits_as<U16>(x) & 0x7FFFFFFFu); }

VLPFAST_INLINE float sum_lanes(F16 x) {
  float lane[kLaneCount];
  store16(lane, x);
  for (int width = kLaneCount / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) lane[l] += lane[l + width];
  }
  return lane[0];
}

VLPFAST_INLINE float max_lanes(F16 x) {
  float lane[kLaneCount];
  store16(lane, x);
  for (int width = kLaneCount / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) lane[l] = lane[l] > lane[l + width] ? lane[l] : lane[l + width];
  }
  return lane[0];
}

// exp(x) within 2 ulp for x in [-87.3, 88]; at most 2e-38 below, NaN stays. Not for x above 88.
VLPFAST_INLINE F16 exp16(F16 x) {
  constexpr float kLog2e = 1.44269504088896341f;
  // ln 2 in two parts: the first has few enough bits that n * kLn2High is exact.
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  // Adding 1.5 * 2^23 rounds to the nearest integer n; the low bits of the sum are then n + 127,
  // the exponent of 2^n.
  constexpr float kRound = 12582912.0f + 127.0f;
  x = x < -87.3f ? splat(-87.3f) : x;
  const F16 shifted = x * kLog2e + kRound;
  const F16 n = shifted - kRound;
  const F16 r = (x - n * kLn2High) - n * kLn2Low;
  // exp(r) on |r| <= ln(2) / 2 (coefficients: Cephes, expf).
  F16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * bits_as<F16>(bits_as<U16>(shifted) << 23);
}

// log(x) within 2 ulp for normal x > 0, also close to 1 (coefficients: Cephes, logf).
VLPFAST_INLINE F16 log16(F16 x) {
  constexpr float kSqrtHalf = 0.707106781186547524f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const U16 bits = bits_as<U16>(x);
  F16 m = bits_as<F16>((bits & 0x007FFFFFu) | 0x3F000000u);  // in [1/2, 1)
  const I16 exponent = bits_as<I16>(bits >> 23) - 126;
  F16 e = __builtin_convertvector(exponent, F16);
  const I16 low = m < kSqrtHalf;
  e = low ? e - 1.0f : e;
  m = (low ? m + m : m) - 1.0f;
  F16 p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const F16 square = m * m;
  const F16 tail = p * m * square + e * kLn2Low - square * 0.5f;
  return (m + tail) + e * kLn2High;
}

// log(1 + x) for x in [0, 1], accurate for small x too: 2 atanh(x / (2 + x)) by its series.
VLPFAST_INLINE F16 log1p16(F16 x) {
  const F16 y = x / (x + 2.0f);  // at most 1/3: the first term left out is below 4e-9 of the sum
  const F16 square = y * y;
  F16 p = square * (1.0f / 15) + 1.0f / 13;
  p = p * square + 1.0f / 11;
  p = p * square + 1.0f / 9;
  p = p * square + 1.0f / 7;
  p = p * square + 1.0f / 5;
  p = p * square + 1.0f / 3;
  return (y * square * p + y) * 2.0f;
}

}  // namespace vlpfast
