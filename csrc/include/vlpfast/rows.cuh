// Rows of features read in place by a CUDA kernel: 16 bytes a lane where they are aligned, element by
// element where they are not; lists of the rows that take part; tensor-core products.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>


#include <cstdint>

#include "vlpfast/launch.h"

namespace vlpfast {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr float kNormEps = 1e-5f;

// The same value, of which the compiler knows nothing: what is derived from it is not shared between
// the alternatives of a kernel, where it would cost registers in all of them.
__device__ inline int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

__device__ inline uint32_t element_bits(float x) { return __float_as_uint(x); }
__device__ inline uint32_t element_bits(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }
__device__ inline uint32_t element_bits(__half x) { return __half_as_ushort(x); }

template <typename T>
struct Rows {
  const T* data;  // of one problem
  int64_t stride;
  int width;
  bool aligned;  // every row begins at a multiple of 16 bytes and is a multiple of 16 bytes long

  __device__ Rows(const FeatureRows& rows, int64_t problem, int width)
      : data(static_cast<const T*>(rows.data) + problem * rows.stride_batch),
        stride(rows.stride_row),
        width(width) {
    constexpr int kVector = 16 / sizeof(T);
    aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kVector == 0 &&
              width % kVector == 0;
  }

  // 16 bytes of a row from element k on, which is a multiple of their number; 0 past the width.
  template <bool ALIGNED>
  __device__ uint4 load16(int row, int k) const {
    constexpr int kVector = 16 / sizeof(T);
    const T* source = data + row * stride + k;
    if constexpr (ALIGNED) {
      return k < width ? __ldg(reinterpret_cast<const uint4*>(source)) : make_uint4(0, 0, 0, 0);
    }
    // Rolled and in two halves: little code, and nothing that is indexed at run time.
    const auto half = [&](int first) {
      uint64_t bits = 0;
#pragma unroll 1
      for (int e = 0; e < kVector / 2 && k + first + e < width; ++e) {
        bits |= static_cast<uint64_t>(element_bits(source[first + e])) << (64 / (kVector / 2) * e);
      }
      return make_uint2(static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32));
    };
    const uint2 low = half(0), high = half(kVector / 2);
    return make_uint4(low.x, low.y, high.x, high.y);
  }

  __device__ float at(int row, int k) const {
    return k < width ? static_cast<float>(data[row * stride + k]) : 0.0f;
  }
};

__device__ inline float2 unpack(uint32_t pair, __nv_bfloat16) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}

__device__ inline float2 unpack(uint32_t pair, __half) {
  __half2 halves;
  memcpy(&halves, &pair, 4);
  return __half22float2(halves);
}

// Lists the entries that are valid (mask) or positive (weights), or all, by one warp; their number.
__device__ inline int compact(const bool* mask, const float* weights, int size, uint16_t* ids) {
  const int lane = threadIdx.x % kWarp;
  int count = 0;
  for (int base = 0; base < size; base += kWarp) {
    const int i = base + lane;
    bool valid = i < size;
    if (valid && mask) valid = mask[i];
    if (valid && weights) valid = weights[i] > 0;
    const unsigned bits = __ballot_sync(kAll, valid);
    if (valid) ids[count + __popc(bits & ((1u << lane) - 1))] = static_cast<uint16_t>(i);
    count += __popc(bits);
  }
  return count;
}

// c (16 x 8) += a (16 x 16) b (16 x 8). Lane 4 g + t has of c the elements (g, 2t), (g, 2t + 1),
// (g + 8, 2t), (g + 8, 2t + 1); of a the pairs k = (2t, 2t + 1) of rows g and g + 8 (a0, a1) and
// k + 8 of the same (a2, a3); of b the same k of column g (b0, b1).
#ifndef VLPFAST_CUDA_ON_HOST
__device__ inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                           uint32_t b0, uint32_t b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                           uint32_t b0, uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif

}  // namespace vlpfast
