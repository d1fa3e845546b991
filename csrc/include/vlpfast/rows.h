// Rows of fp32 or bf16 read into and written from an fp32 buffer, sums over a row, dropout by counter:
// what the elementwise ops of a block share. Everything is inlined into a VLPFAST_CLONES function.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vlpfast/counter.h"
#include "vlpfast/lanes.h"

namespace vlpfast {

// A matrix of rows without its dtype; data is null where the tensor is absent.
struct Rows {
  void* data = nullptr;
  bool is_bf16 = false;
};

VLPFAST_INLINE float widen(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Round to nearest even; a NaN stays one.
VLPFAST_INLINE uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 0x40u : rounded);
}

VLPFAST_INLINE void load_row(const Rows& rows, int64_t row, int64_t D, float* __restrict__ out) {
  if (rows.is_bf16) {
    const auto* in = static_cast<const uint16_t*>(rows.data) + row * D;
    for (int64_t d = 0; d < D; ++d) out[d] = widen(in[d]);
  } else {
    std::memcpy(out, static_cast<const float*>(rows.data) + row * D, sizeof(float) * D);
  }
}

VLPFAST_INLINE void add_row(const Rows& rows, int64_t row, int64_t D, float* __restrict__ out) {
  if (rows.is_bf16) {
    const auto* in = static_cast<const uint16_t*>(rows.data) + row * D;
    for (int64_t d = 0; d < D; ++d) out[d] += widen(in[d]);
  } else {
    const auto* __restrict__ in = static_cast<const float*>(rows.data) + row * D;
    for (int64_t d = 0; d < D; ++d) out[d] += in[d];
  }
}

// Where a row is computed: in place if it is fp32, else in `buffer`, from which store_row writes it.
VLPFAST_INLINE float* row_or_buffer(const Rows& rows, int64_t row, int64_t D, float* buffer) {
  return rows.is_bf16 ? buffer : static_cast<float*>(rows.data) + row * D;
}

// Rounds `values` to the row's dtype in place, and writes them unless they are the row.
VLPFAST_INLINE void store_row(const Rows& rows, int64_t row, int64_t D,
                              float* __restrict__ values) {
  if (!rows.is_bf16) {
    float* out = static_cast<float*>(rows.data) + row * D;
    if (out != values) std::memcpy(out, values, sizeof(float) * D);
    return;
  }
  auto* __restrict__ out = static_cast<uint16_t*>(rows.data) + row * D;
  for (int64_t d = 0; d < D; ++d) {
    out[d] = narrow(values[d]);
    values[d] = widen(out[d]);
  }
}

VLPFAST_INLINE float dot(const float* a, const float* b, int64_t D) {
  F16 even{}, odd{};
  int64_t d = 0;
  for (; d + 2 * kLaneCount <= D; d += 2 * kLaneCount) {
    even += load16(a + d) * load16(b + d);
    odd += load16(a + d + kLaneCount) * load16(b + d + kLaneCount);
  }
  even += odd;
  for (; d < D; ++d) even[d % kLaneCount] += a[d] * b[d];
  return sum_lanes(even);
}

VLPFAST_INLINE float sum(const float* a, int64_t D) {
  F16 even{}, odd{};
  int64_t d = 0;
  for (; d + 2 * kLaneCount <= D; d += 2 * kLaneCount) {
    even += load16(a + d);
    odd += load16(a + d + kLaneCount);
  }
  even += odd;
  for (; d < D; ++d) even[d % kLaneCount] += a[d];
  return sum_lanes(even);
}

// Dropout whose mask is a function of (seed, row, column): ops/reference/residual_norm.py.
class RowDropout {
 public:
  RowDropout(double dropout_p, int64_t seed, int64_t D)
      : threshold_(static_cast<uint32_t>(std::nearbyint(dropout_p * 16777216.0))),
        scale_(static_cast<float>(1.0 / (1.0 - dropout_p))),
        seed_(seed),
        position_hash_(dropout_p > 0 ? D : 0) {
    for (size_t d = 0; d < position_hash_.size(); ++d) {
      position_hash_[d] = mix32(static_cast<uint32_t>(d));
    }
  }

  VLPFAST_INLINE void apply(int64_t row, int64_t D, float* __restrict__ values) const {
    if (position_hash_.empty()) return;
    const uint32_t stream = stream_key(seed_, row);
    const uint32_t* __restrict__ hash = position_hash_.data();
    // Members in locals and a mask of bits in place of a branch: the loop becomes SIMD.
    const uint32_t threshold = threshold_;
    const float scale = scale_;
    for (int64_t d = 0; d < D; ++d) {
      const uint32_t keep = 0u - ((mix32(stream ^ hash[d]) >> 8) >= threshold);
      const float scaled = values[d] * scale;
      uint32_t bits;
      std::memcpy(&bits, &scaled, sizeof bits);
      bits &= keep;
      std::memcpy(&values[d], &bits, sizeof bits);
    }
  }

 private:
  uint32_t threshold_;
  float scale_;
  int64_t seed_;
  std::vector<uint32_t> position_hash_;
};

// A backward pass that also sums over rows splits them into blocks by their number alone, so that
// the order of the sums does not depend on threads.
struct RowBlocks {
  int64_t num_rows, block;
  explicit RowBlocks(int64_t rows) : num_rows(rows), block(std::max<int64_t>(16, (rows + 63) / 64)) {}
  int64_t count() const { return (num_rows + block - 1) / block; }
  int64_t begin(int64_t i) const { return i * block; }
  int64_t end(int64_t i) const { return std::min(num_rows, (i + 1) * block); }
};

// out[d] = sum over blocks of partial (count, D), in their order.
VLPFAST_INLINE void sum_blocks(const float* partial, int64_t count, int64_t D, int64_t stride,
                               float* __restrict__ out) {
  std::fill_n(out, D, 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    const float* __restrict__ part = partial + i * stride;
    for (int64_t d = 0; d < D; ++d) out[d] += part[d];
  }
}

// Rows a thread takes at least: some 16,384 elements.
inline int64_t row_grain(int64_t D) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(D, 1)); }

// Checks dtype and layout, then forgets the dtype.
inline Rows rows_of(const torch::stable::Tensor& tensor, const char* op, const char* name) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op, ": ", name,
                  " must be Float or BFloat16, got ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
  return {tensor.data_ptr(), dtype == ScalarType::BFloat16};
}

}  // namespace vlpfast
