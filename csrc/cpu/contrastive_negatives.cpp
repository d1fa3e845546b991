// Hard negatives of the contrastive losses: the k best scores of each row and column of a tile, with or
// without Gumbel noise, so that the best are draws from the softmax without replacement.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "vlpfast/contrastive_tile.h"
#include "vlpfast/counter.h"

namespace vlpfast {
namespace {

// Running k best of one row or column, best first; of equal scores the one that came first.
struct Best {
  float* score = nullptr;
  int64_t* index = nullptr;
  int64_t k = 0;
  VLPFAST_INLINE float worst(int64_t i) const { return score[i * k + k - 1]; }
  VLPFAST_INLINE void insert(int64_t i, float value, int64_t place) const {
    float* const s = score + i * k;
    int64_t* const at = index + i * k;
    int64_t slot = k - 1;
    for (; slot > 0 && s[slot - 1] < value; --slot) {
      s[slot] = s[slot - 1];
      at[slot] = at[slot - 1];
    }
    s[slot] = value;
    at[slot] = place;
  }
};

struct Negatives {
  Sims sims;
  Pairs pairs;
  int64_t M, N;
  float scale;
  bool has_noise;
  int64_t seed, first_row, row_offset, side;
  Best rows, cols;
};

// -log(-log u) of 16 random words.
VLPFAST_INLINE F16 gumbel16(U16 bits) {
  // 23 bits and a half: u is neither 0 nor 1.
  const F16 u = (__builtin_convertvector(bits >> 9, F16) + 0.5f) * 0x1p-23f;
  return -log16(-log16(u));
}

VLPFAST_INLINE U16 mix16(U16 x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

VLPFAST_INLINE U16 load_bits(const uint32_t* p) {
  U16 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// Scores of one row's strip: z plus the noise of random words mix(a ^ b[j]); -inf for positives.
VLPFAST_INLINE void score_row(const Negatives& p, const Strip& strip, int64_t row, const float* s,
                              uint32_t a, const uint32_t* b, float* score) {
  const RowId id(p.pairs, row, strip);
  for (int j = 0; j < strip.padded; j += kLaneCount) {
    F16 x = load16(s + j) * p.scale;
    if (p.has_noise) x += gumbel16(mix16(load_bits(b + j) ^ a));
    if (id.may_match) x = id.equals(strip, j) ? splat(-kInfinity) : x;
    store16(score + j, x);
  }
  const int own = p.pairs.row_ids ? -1 : diagonal_in(strip, p.pairs, row);
  if (own >= 0) score[own] = -kInfinity;
}

VLPFAST_CLONES
void best_of_rows(const Negatives& p, int64_t begin, int64_t end) {
  float s[kStripCols], score[kStripCols];
  uint32_t position[kStripCols];
  Strip strip;
  for (int64_t index = 0; index < num_strips(p.N); ++index) {
    set_strip(strip, index, p.N, p.pairs);
    for (int j = 0; j < kStripCols; ++j) position[j] = mix32(static_cast<uint32_t>(strip.begin + j));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t stream = 2 * (p.first_row + p.row_offset + row) + p.side;
      load_strip(p.sims, strip, row, s);
      score_row(p, strip, row, s, stream_key(p.seed, stream), position, score);
      float worst = p.rows.worst(row);
      for (int j = 0; j < strip.n; ++j) {
        if (!(score[j] > worst)) continue;
        p.rows.insert(row, score[j], strip.begin + j);
        worst = p.rows.worst(row);
      }
    }
  }
}

VLPFAST_CLONES
void best_of_cols(const Negatives& p, int64_t begin, int64_t end) {
  float s[kStripCols], score[kStripCols], worst[kStripCols];
  uint32_t stream[kStripCols] = {};
  Strip strip;
  for (int64_t index = begin; index < end; ++index) {
    set_strip(strip, index, p.N, p.pairs);
    for (int j = 0; j < strip.n; ++j) {
      const int64_t col = strip.begin + j;
      stream[j] = stream_key(p.seed, 2 * (p.first_row + col) + 1 - p.side);
      worst[j] = p.cols.worst(col);
    }
    for (int64_t row = 0; row < p.M; ++row) {
      const uint32_t position = mix32(static_cast<uint32_t>(p.row_offset + row));
      load_strip(p.sims, strip, row, s);
      score_row(p, strip, row, s, position, stream, score);
      for (int j = 0; j < strip.n; ++j) {
        if (!(score[j] > worst[j])) continue;
        p.cols.insert(strip.begin + j, score[j], p.row_offset + row);
        worst[j] = p.cols.worst(strip.begin + j);
      }
    }
  }
}

Best best_of(const Tensor& score, const Tensor& index, int64_t size, const char* op) {
  check_argument(score, ScalarType::Float, op, "best");
  check_argument(index, ScalarType::Long, op, "index");
  STD_TORCH_CHECK(score.dim() == 2 && index.dim() == 2 && score.size(0) == size &&
                      index.size(0) == size && score.size(1) == index.size(1) && score.size(1) > 0,
                  op, ": best and index must be (", size, ", k) with k > 0");
  return {score.mutable_data_ptr<float>(), index.mutable_data_ptr<int64_t>(), score.size(1)};
}

void contrastive_negatives_cpu(const Tensor& sims, const Tensor& scale,
                               const std::optional<Tensor>& seed, int64_t first_row,
                               int64_t row_offset, int64_t side,
                               const std::optional<Tensor>& row_ids,
                               const std::optional<Tensor>& col_ids, int64_t diag_offset,
                               const Tensor& row_best, const Tensor& row_index,
                               const std::optional<Tensor>& col_best,
                               const std::optional<Tensor>& col_index) {
  constexpr const char* op = "contrastive_negatives";
  const Sims tile = sims_of(sims, op, "sims");
  const int64_t M = sims.size(0), N = sims.size(1);
  if (seed) check_argument(*seed, ScalarType::Long, op, "seed");
  STD_TORCH_CHECK(col_best.has_value() == col_index.has_value(), op,
                  ": col_best and col_index must be given together");
  const Negatives problem{tile,
                          pairs_of(sims, row_ids, col_ids, std::nullopt, diag_offset, op),
                          M,
                          N,
                          scalar_of(scale, op, "scale"),
                          seed.has_value(),
                          seed ? *seed->const_data_ptr<int64_t>() : 0,
                          first_row,
                          row_offset,
                          side,
                          best_of(row_best, row_index, M, op),
                          col_best ? best_of(*col_best, *col_index, N, op) : Best{}};
  torch::stable::parallel_for(
      0, M, std::max<int64_t>(1, kGrainSims / N),
      [&](int64_t begin, int64_t end) { best_of_rows(problem, begin, end); });
  if (!col_best) return;
  torch::stable::parallel_for(
      0, num_strips(N), strip_grain(M),
      [&](int64_t begin, int64_t end) { best_of_cols(problem, begin, end); });
}

}  // namespace
}  // namespace vlpfast

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
  m.impl("contrastive_negatives", TORCH_BOX(&vlpfast::contrastive_negatives_cpu));
}
