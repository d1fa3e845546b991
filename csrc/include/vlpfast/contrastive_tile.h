// Tiles of a similarity matrix for the passes of `contrastive`: strips of columns that one thread walks
// from the first row to the last, so that column sums need no other thread and have one order.
// Letters: M rows (queries) and N columns (candidates) of the matrix a pass is given.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>

#include "vlpfast/checks.h"
#include "vlpfast/lanes.h"

namespace vlpfast {

// Columns of a strip and rows handled together: 8 KiB of fp32, which stay in L1.
constexpr int kStripCols = 256;
constexpr int kBlockRows = 8;
// Threads are worth their start from about this many similarities on (some 20 us of work).
constexpr int64_t kGrainSims = 32768;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A similarity matrix (M, N): fp32 or bf16, unit column stride.
struct Sims {
  void* data = nullptr;
  int64_t stride = 0;
  bool is_bf16 = false;
};

// positive(i, j) = row_ids[i] == col_ids[j], or j == i + offset where there are no ids. diag[i], if
// given, is the exact value of column i + offset.
struct Pairs {
  const int64_t* row_ids = nullptr;
  const int64_t* col_ids = nullptr;
  const float* diag = nullptr;
  int64_t offset = 0;
};

// Columns [begin, begin + n) of the matrix, padded to whole vectors.
struct Strip {
  int64_t begin;
  int n, padded;
  // Halves of the columns' ids: 16 lanes compare at once.
  int32_t id_low[kStripCols], id_high[kStripCols];
  // One bit per hash of an id: most rows find that no column can have theirs.
  uint64_t seen[64];
  // 0, and -inf where there is no column.
  float pad[kStripCols];
};

// 12 bits: a word of `seen` and a bit of it.
VLPFAST_INLINE uint32_t hash_id(int64_t id) {
  return static_cast<uint32_t>((static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u) >> 52);
}

VLPFAST_INLINE int64_t num_strips(int64_t N) { return (N + kStripCols - 1) / kStripCols; }

inline int64_t strip_grain(int64_t M) { return std::max<int64_t>(1, kGrainSims / (M * kStripCols)); }

VLPFAST_INLINE void set_strip(Strip& strip, int64_t index, int64_t N, const Pairs& pairs) {
  strip.begin = index * kStripCols;
  strip.n = static_cast<int>(std::min<int64_t>(kStripCols, N - strip.begin));
  strip.padded = (strip.n + kLaneCount - 1) / kLaneCount * kLaneCount;
  std::fill_n(strip.seen, 64, uint64_t{0});
  for (int j = 0; j < strip.n && pairs.col_ids; ++j) {
    const uint32_t hash = hash_id(pairs.col_ids[strip.begin + j]);
    strip.seen[hash >> 6] |= uint64_t{1} << (hash & 63);
  }
  for (int j = 0; j < strip.padded; ++j) {
    const bool is_column = j < strip.n;
    const int64_t id = is_column && pairs.col_ids ? pairs.col_ids[strip.begin + j] : 0;
    strip.id_low[j] = static_cast<int32_t>(id);
    strip.id_high[j] = static_cast<int32_t>(id >> 32);
    strip.pad[j] = is_column ? 0.0f : -kInfinity;
  }
}

// Place in the strip of row's own column, or -1.
VLPFAST_INLINE int diagonal_in(const Strip& strip, const Pairs& pairs, int64_t row) {
  const int64_t j = row + pairs.offset - strip.begin;
  return j >= 0 && j < strip.n ? static_cast<int>(j) : -1;
}

// A row's id against those of a strip's columns, if the pairs have ids.
struct RowId {
  int32_t low = 0, high = 0;
  bool may_match = false;  // false: no column has this id
  VLPFAST_INLINE RowId(const Pairs& pairs, int64_t row, const Strip& strip) {
    if (pairs.row_ids == nullptr) return;
    const int64_t id = pairs.row_ids[row];
    const uint32_t hash = hash_id(id);
    low = static_cast<int32_t>(id);
    high = static_cast<int32_t>(id >> 32);
    may_match = (strip.seen[hash >> 6] >> (hash & 63)) & 1;
  }
  VLPFAST_INLINE I16 equals(const Strip& strip, int j) const {
    I16 col_low, col_high;
    std::memcpy(&col_low, strip.id_low + j, sizeof col_low);
    std::memcpy(&col_high, strip.id_high + j, sizeof col_high);
    return (col_low == low) & (col_high == high);
  }
};

VLPFAST_INLINE F16 widen16(const uint16_t* p) {
  typedef uint16_t H16 __attribute__((vector_size(32)));
  H16 half;
  std::memcpy(&half, p, sizeof half);
  return bits_as<F16>(__builtin_convertvector(half, U16) << 16);
}

// Rounds to nearest even; a NaN stays one.
VLPFAST_INLINE void narrow16(uint16_t* p, F16 x) {
  typedef uint16_t H16 __attribute__((vector_size(32)));
  const U16 bits = bits_as<U16>(x);
  const U16 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const I16 is_nan = x != x;
  const H16 half = __builtin_convertvector(is_nan ? (bits >> 16) | 0x40u : rounded, H16);
  std::memcpy(p, &half, sizeof half);
}

// The strip of a row in fp32; 0 where there is no column.
VLPFAST_INLINE void load_strip(const Sims& sims, const Strip& strip, int64_t row, float* out) {
  const int whole = strip.n / kLaneCount * kLaneCount;
  const int64_t at = row * sims.stride + strip.begin;
  float tail[kLaneCount] = {};
  if (sims.is_bf16) {
    const auto* in = static_cast<const uint16_t*>(sims.data) + at;
    for (int j = 0; j < whole; j += kLaneCount) store16(out + j, widen16(in + j));
    uint16_t bits[kLaneCount] = {};
    if (whole < strip.n) std::memcpy(bits, in + whole, sizeof(uint16_t) * (strip.n - whole));
    store16(tail, widen16(bits));
  } else {
    const auto* in = static_cast<const float*>(sims.data) + at;
    std::memcpy(out, in, sizeof(float) * whole);
    if (whole < strip.n) std::memcpy(tail, in + whole, sizeof(float) * (strip.n - whole));
  }
  if (whole < strip.n) std::memcpy(out + whole, tail, sizeof tail);
}

// As `load_strip`, with the row's own column exact.
VLPFAST_INLINE void load_strip(const Sims& sims, const Strip& strip, const Pairs& pairs,
                               int64_t row, float* out) {
  load_strip(sims, strip, row, out);
  if (pairs.diag == nullptr) return;
  const int j = diagonal_in(strip, pairs, row);
  if (j >= 0) out[j] = pairs.diag[row];
}

VLPFAST_INLINE void store_strip(const Sims& sims, const Strip& strip, int64_t row,
                                const float* values) {
  const int64_t at = row * sims.stride + strip.begin;
  if (!sims.is_bf16) {
    std::memcpy(static_cast<float*>(sims.data) + at, values, sizeof(float) * strip.n);
    return;
  }
  const int whole = strip.n / kLaneCount * kLaneCount;
  auto* out = static_cast<uint16_t*>(sims.data) + at;
  for (int j = 0; j < whole; j += kLaneCount) narrow16(out + j, load16(values + j));
  if (whole == strip.n) return;
  uint16_t bits[kLaneCount];
  narrow16(bits, load16(values + whole));
  std::memcpy(out + whole, bits, sizeof(uint16_t) * (strip.n - whole));
}

// What follows turns arguments of an operator into the above, checked.

inline Sims sims_of(const Tensor& sims, const char* op, const char* name) {
  const ScalarType dtype = sims.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op, ": ", name,
                  " must be Float or BFloat16, got ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(sims.dim() == 2 && sims.size(0) > 0 && sims.size(1) > 0, op, ": ", name,
                  " must be a matrix that is not empty");
  STD_TORCH_CHECK(sims.stride(1) == 1, op, ": ", name, " must have unit column stride");
  return {sims.data_ptr(), sims.stride(0), dtype == ScalarType::BFloat16};
}

inline Sims teacher_of(const std::optional<Tensor>& teacher, const Tensor& sims, const char* op) {
  if (!teacher) return {};
  STD_TORCH_CHECK(teacher->scalar_type() == sims.scalar_type() && teacher->dim() == 2 &&
                      teacher->size(0) == sims.size(0) && teacher->size(1) == sims.size(1),
                  op, ": teacher_sims must have dtype and shape of sims");
  return sims_of(*teacher, op, "teacher_sims");
}

inline float* vector_of(const Tensor& vector, int64_t size, const char* op, const char* name) {
  check_argument(vector, ScalarType::Float, op, name);
  STD_TORCH_CHECK(vector.numel() == size, op, ": ", name, " must have ", size, " elements, got ",
                  vector.numel());
  return vector.mutable_data_ptr<float>();
}

inline float* vector_of(const std::optional<Tensor>& vector, int64_t size, const char* op,
                        const char* name) {
  return vector ? vector_of(*vector, size, op, name) : nullptr;
}

inline float scalar_of(const Tensor& scalar, const char* op, const char* name) {
  return *vector_of(scalar, 1, op, name);
}

inline Pairs pairs_of(const Tensor& sims, const std::optional<Tensor>& row_ids,
                      const std::optional<Tensor>& col_ids, const std::optional<Tensor>& diag,
                      int64_t diag_offset, const char* op) {
  STD_TORCH_CHECK(row_ids.has_value() == col_ids.has_value(), op,
                  ": row_ids and col_ids must be given together");
  Pairs pairs{nullptr, nullptr, vector_of(diag, sims.size(0), op, "diag"), diag_offset};
  if (row_ids) {
    check_argument(*row_ids, ScalarType::Long, op, "row_ids");
    check_argument(*col_ids, ScalarType::Long, op, "col_ids");
    STD_TORCH_CHECK(row_ids->numel() == sims.size(0) && col_ids->numel() == sims.size(1), op,
                    ": row_ids and col_ids must have one element for each row and column");
    pairs.row_ids = row_ids->const_data_ptr<int64_t>();
    pairs.col_ids = col_ids->const_data_ptr<int64_t>();
  }
  return pairs;
}

}  // namespace vlpfast
