// Softmax passes of the contrastive loss over one tile of similarities: log-sum-exp of rows and columns,
// the teacher's, and the gradient in place. Each is one read of the tile; the matrix products around
// them are torch's (vlpfast/ops/_contrastive_chunked.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "vlpfast/contrastive_tile.h"

namespace vlpfast {
namespace {

// One strip's share of a row's running sums.
struct RowPartials {
  int64_t M, padded;
  std::vector<float> max, sum, dot;  // (strips, padded)
  RowPartials(int64_t M, int64_t strips)
      : M(M),
        padded((M + kLaneCount - 1) / kLaneCount * kLaneCount),
        max(padded * strips, -kInfinity),
        sum(padded * strips),
        dot(padded * strips) {}
};

struct RowState {
  float *max, *sum, *dot;
  bool rescales_dot;  // dot is weighted by exp(z - max), as sum is
};

struct Softmax {
  Sims sims, teacher;
  Pairs pairs;
  int64_t M, N;
  float scale;
  RowPartials* rows;
  float *col_max, *col_sum, *col_pos;  // nullable, all or none
};

// Merges the strips of rows [begin, end), 16 rows at a time, in the strips' order.
VLPFAST_CLONES
void merge_rows(const RowPartials& rows, const RowState& state, int64_t strips) {
  for (int64_t row = 0; row < rows.M; row += kLaneCount) {
    const size_t count = sizeof(float) * std::min<int64_t>(kLaneCount, rows.M - row);
    F16 max = splat(-kInfinity), sum{}, dot{};
    std::memcpy(&max, state.max + row, count);
    std::memcpy(&sum, state.sum + row, count);
    std::memcpy(&dot, state.dot + row, count);
    F16 top = max;
    for (int64_t t = 0; t < strips; ++t) top = max16(load16(&rows.max[t * rows.padded + row]), top);
    F16 factor = exp16(max - top);
    sum *= factor;
    if (state.rescales_dot) dot *= factor;
    for (int64_t t = 0; t < strips; ++t) {
      const int64_t at = t * rows.padded + row;
      factor = exp16(load16(&rows.max[at]) - top);
      sum += load16(&rows.sum[at]) * factor;
      dot += load16(&rows.dot[at]) * (state.rescales_dot ? factor : splat(1.0f));
    }
    std::memcpy(state.max + row, &top, count);
    std::memcpy(state.sum + row, &sum, count);
    std::memcpy(state.dot + row, &dot, count);
  }
}

// Running maxima and sums of a strip's columns; in padding NaN, which nothing reads.
struct ColumnState {
  float max[kStripCols], sum[kStripCols], pos[kStripCols];
  float block_max[kStripCols], block_sum[kStripCols];
};

// Turns a row of similarities into z and returns the largest; raises `col_max` to z, if given.
VLPFAST_INLINE float scale_row(float* s, const Strip& strip, float scale, float* col_max) {
  F16 top = splat(-kInfinity);
  for (int j = 0; j < strip.padded; j += kLaneCount) {
    const F16 z = load16(s + j) * scale + load16(strip.pad + j);
    store16(s + j, z);
    top = max16(z, top);
    if (col_max) store16(col_max + j, max16(z, load16(col_max + j)));
  }
  return max_lanes(top);
}

// Sum over positives of s; adds each to its column's, if given.
VLPFAST_INLINE float positives_of_row(const float* s, const Strip& strip, const Pairs& pairs,
                                      int64_t row, float* col_pos) {
  if (pairs.row_ids == nullptr) {
    const int j = diagonal_in(strip, pairs, row);
    if (j >= 0 && col_pos) col_pos[j] += s[j];
    return j >= 0 ? s[j] : 0.0f;
  }
  const RowId id(pairs, row, strip);
  if (!id.may_match) return 0.0f;
  F16 sum{};
  for (int j = 0; j < strip.padded; j += kLaneCount) {
    const F16 positive = id.equals(strip, j) ? load16(s + j) : F16{};
    sum += positive;
    if (col_pos) store16(col_pos + j, load16(col_pos + j) + positive);
  }
  return sum_lanes(sum);
}

// Sum of exp(z - row_max); adds exp(z - col_max) to each column's sum, if given.
VLPFAST_INLINE float sum_row(const float* z, const Strip& strip, float row_max,
                             const float* col_max, float* col_sum) {
  F16 sum{};
  for (int j = 0; j < strip.padded; j += kLaneCount) {
    const F16 value = load16(z + j);
    sum += exp16(value - row_max);
    if (col_max) store16(col_sum + j, load16(col_sum + j) + exp16(value - load16(col_max + j)));
  }
  return sum_lanes(sum);
}

VLPFAST_CLONES
void stats_strips(const Softmax& p, int64_t begin, int64_t end) {
  float s[kBlockRows][kStripCols];
  Strip strip;
  ColumnState cols;
  for (int64_t index = begin; index < end; ++index) {
    set_strip(strip, index, p.N, p.pairs);
    const size_t width = sizeof(float) * strip.n;
    if (p.col_max) {
      std::fill_n(cols.max, kStripCols, -kInfinity);
      std::fill_n(cols.sum, kStripCols, 0.0f);
      std::fill_n(cols.pos, kStripCols, 0.0f);
      std::memcpy(cols.max, p.col_max + strip.begin, width);
      std::memcpy(cols.sum, p.col_sum + strip.begin, width);
      std::memcpy(cols.pos, p.col_pos + strip.begin, width);
    }
    for (int64_t row0 = 0; row0 < p.M; row0 += kBlockRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kBlockRows, p.M - row0));
      const int64_t at = index * p.rows->padded + row0;
      float* col_max = p.col_max ? cols.block_max : nullptr;
      if (col_max) std::memcpy(col_max, cols.max, sizeof cols.max);
      for (int r = 0; r < rows; ++r) {
        load_strip(p.sims, strip, p.pairs, row0 + r, s[r]);
        p.rows->dot[at + r] = positives_of_row(s[r], strip, p.pairs, row0 + r,
                                               p.col_max ? cols.pos : nullptr);
        p.rows->max[at + r] = scale_row(s[r], strip, p.scale, col_max);
      }
      std::fill_n(cols.block_sum, kStripCols, 0.0f);
      for (int r = 0; r < rows; ++r) {
        p.rows->sum[at + r] =
            sum_row(s[r], strip, p.rows->max[at + r], col_max, cols.block_sum);
      }
      if (col_max == nullptr) continue;
      for (int j = 0; j < strip.padded; j += kLaneCount) {
        const F16 factor = exp16(load16(cols.max + j) - load16(col_max + j));
        store16(cols.sum + j, load16(cols.sum + j) * factor + load16(cols.block_sum + j));
      }
      std::memcpy(cols.max, col_max, sizeof cols.max);
    }
    if (p.col_max == nullptr) continue;
    std::memcpy(p.col_max + strip.begin, cols.max, width);
    std::memcpy(p.col_sum + strip.begin, cols.sum, width);
    std::memcpy(p.col_pos + strip.begin, cols.pos, width);
  }
}

VLPFAST_CLONES
void teacher_strips(const Softmax& p, int64_t begin, int64_t end) {
  float s[kStripCols], t[kStripCols];
  Strip strip;
  for (int64_t index = begin; index < end; ++index) {
    set_strip(strip, index, p.N, p.pairs);
    for (int64_t row = 0; row < p.M; ++row) {
      load_strip(p.sims, strip, p.pairs, row, s);
      load_strip(p.teacher, strip, row, t);
      const float top = scale_row(t, strip, p.scale, nullptr);
      F16 sum{}, dot{};
      for (int j = 0; j < strip.padded; j += kLaneCount) {
        const F16 e = exp16(load16(t + j) - top);
        sum += e;
        dot += e * load16(s + j);
      }
      const int64_t at = index * p.rows->padded + row;
      p.rows->max[at] = top;
      p.rows->sum[at] = sum_lanes(sum);
      p.rows->dot[at] = sum_lanes(dot);
    }
  }
}

struct Gradient {
  Sims sims, teacher;
  Pairs pairs;
  int64_t M, N;
  float scale, smoothing, alpha;
  const float *row_max, *row_sum, *row_weight;
  const float *teacher_max, *teacher_sum;          // nullable
  const float *col_max, *col_sum, *col_weight;  // nullable, all or none
  RowPartials* rows;
};

// Maxima, reciprocal sums and weights of a strip's columns.
struct ColumnSoftmax {
  float max[kStripCols] = {}, factor[kStripCols] = {}, weight[kStripCols] = {};
  VLPFAST_INLINE void load(const Gradient& p, const Strip& strip) {
    const size_t width = sizeof(float) * strip.n;
    std::memcpy(max, p.col_max + strip.begin, width);
    std::memcpy(weight, p.col_weight + strip.begin, width);
    for (int j = 0; j < strip.n; ++j) factor[j] = 1.0f / p.col_sum[strip.begin + j];
  }
};

VLPFAST_CLONES
void gradient_strips(const Gradient& p, int64_t begin, int64_t end) {
  float s[kStripCols], t[kStripCols], g[kStripCols];
  ColumnSoftmax cols;
  Strip strip;
  for (int64_t index = begin; index < end; ++index) {
    set_strip(strip, index, p.N, p.pairs);
    if (p.col_max) cols.load(p, strip);
    for (int64_t row = 0; row < p.M; ++row) {
      load_strip(p.sims, strip, p.pairs, row, s);
      if (p.teacher.data) load_strip(p.teacher, strip, row, t);
      const float row_max = p.row_max[row], row_factor = 1.0f / p.row_sum[row];
      const float teacher_max = p.teacher.data ? p.teacher_max[row] : 0.0f;
      const float teacher_factor = p.teacher.data ? p.alpha / p.teacher_sum[row] : 0.0f;
      const float row_weight = p.row_weight[row];
      const RowId id(p.pairs, row, strip);
      F16 dot{};
      for (int j = 0; j < strip.padded; j += kLaneCount) {
        const F16 value = load16(s + j), z = value * p.scale;
        F16 grad = exp16(z - row_max) * row_factor - p.smoothing;
        if (p.col_max) grad += exp16(z - load16(cols.max + j)) * load16(cols.factor + j);
        if (p.teacher.data) grad -= exp16(load16(t + j) * p.scale - teacher_max) * teacher_factor;
        if (id.may_match) {
          grad -= id.equals(strip, j) ? load16(cols.weight + j) + row_weight : F16{};
        }
        store16(g + j, grad);
        dot += grad * value;
      }
      float row_dot = sum_lanes(dot);
      const int own = p.pairs.row_ids ? -1 : diagonal_in(strip, p.pairs, row);
      if (own >= 0) {
        const float weight = row_weight + cols.weight[own];
        g[own] -= weight;
        row_dot -= weight * s[own];
      }
      p.rows->dot[index * p.rows->padded + row] = row_dot;
      store_strip(p.sims, strip, row, g);
    }
  }
}

template <class Problem>
void over_strips(void (*run)(const Problem&, int64_t, int64_t), const Problem& problem) {
  torch::stable::parallel_for(0, num_strips(problem.N), strip_grain(problem.M),
                              [&](int64_t begin, int64_t end) { run(problem, begin, end); });
}

void contrastive_stats_cpu(const Tensor& sims, const Tensor& scale,
                           const std::optional<Tensor>& row_ids,
                           const std::optional<Tensor>& col_ids, const std::optional<Tensor>& diag,
                           int64_t diag_offset, const Tensor& row_max, const Tensor& row_sum,
                           const Tensor& row_pos, const std::optional<Tensor>& col_max,
                           const std::optional<Tensor>& col_sum,
                           const std::optional<Tensor>& col_pos) {
  constexpr const char* op = "contrastive_stats";
  const Sims tile = sims_of(sims, op, "sims");
  const int64_t M = sims.size(0), N = sims.size(1);
  RowPartials rows(M, num_strips(N));
  const Softmax problem{tile,
                        {},
                        pairs_of(sims, row_ids, col_ids, diag, diag_offset, op),
                        M,
                        N,
                        scalar_of(scale, op, "scale"),
                        &rows,
                        vector_of(col_max, N, op, "col_max"),
                        vector_of(col_sum, N, op, "col_sum"),
                        vector_of(col_pos, N, op, "col_pos")};
  STD_TORCH_CHECK(!problem.col_max == !problem.col_sum && !problem.col_max == !problem.col_pos, op,
                  ": col_max, col_sum and col_pos must be given together");
  over_strips(stats_strips, problem);
  const RowState state{vector_of(row_max, M, op, "row_max"), vector_of(row_sum, M, op, "row_sum"),
                       vector_of(row_pos, M, op, "row_pos"), false};
  merge_rows(rows, state, num_strips(N));
}

void contrastive_teacher_cpu(const Tensor& sims, const Tensor& teacher_sims, const Tensor& scale,
                             const std::optional<Tensor>& diag, int64_t diag_offset,
                             const Tensor& row_max, const Tensor& row_sum, const Tensor& row_dot) {
  constexpr const char* op = "contrastive_teacher";
  const Sims tile = sims_of(sims, op, "sims");
  const int64_t M = sims.size(0), N = sims.size(1);
  RowPartials rows(M, num_strips(N));
  const Softmax problem{tile,
                        teacher_of(teacher_sims, sims, op),
                        pairs_of(sims, std::nullopt, std::nullopt, diag, diag_offset, op),
                        M,
                        N,
                        scalar_of(scale, op, "scale"),
                        &rows,
                        nullptr,
                        nullptr,
                        nullptr};
  over_strips(teacher_strips, problem);
  const RowState state{vector_of(row_max, M, op, "row_max"), vector_of(row_sum, M, op, "row_sum"),
                       vector_of(row_dot, M, op, "row_dot"), true};
  merge_rows(rows, state, num_strips(N));
}

void contrastive_grad_cpu(const Tensor& sims, const std::optional<Tensor>& teacher_sims,
                          const Tensor& scale, const std::optional<Tensor>& row_ids,
                          const std::optional<Tensor>& col_ids, const std::optional<Tensor>& diag,
                          int64_t diag_offset, const Tensor& row_max, const Tensor& row_sum,
                          const std::optional<Tensor>& col_max,
                          const std::optional<Tensor>& col_sum, const Tensor& row_weight,
                          const std::optional<Tensor>& col_weight, double smoothing,
                          const std::optional<Tensor>& teacher_max,
                          const std::optional<Tensor>& teacher_sum, double alpha,
                          const Tensor& row_dot) {
  constexpr const char* op = "contrastive_grad";
  const Sims tile = sims_of(sims, op, "sims");
  const int64_t M = sims.size(0), N = sims.size(1), strips = num_strips(N);
  RowPartials rows(M, strips);
  const Gradient problem{tile,
                         teacher_of(teacher_sims, sims, op),
                         pairs_of(sims, row_ids, col_ids, diag, diag_offset, op),
                         M,
                         N,
                         scalar_of(scale, op, "scale"),
                         static_cast<float>(smoothing),
                         static_cast<float>(alpha),
                         vector_of(row_max, M, op, "row_max"),
                         vector_of(row_sum, M, op, "row_sum"),
                         vector_of(row_weight, M, op, "row_weight"),
                         vector_of(teacher_max, M, op, "teacher_max"),
                         vector_of(teacher_sum, M, op, "teacher_sum"),
                         vector_of(col_max, N, op, "col_max"),
                         vector_of(col_sum, N, op, "col_sum"),
                         vector_of(col_weight, N, op, "col_weight"),
                         &rows};
  STD_TORCH_CHECK(!problem.col_max == !problem.col_sum && !problem.col_max == !problem.col_weight,
                  op, ": col_max, col_sum and col_weight must be given together");
  STD_TORCH_CHECK(!problem.teacher.data == !problem.teacher_max &&
                      !problem.teacher.data == !problem.teacher_sum,
                  op, ": teacher_sims, teacher_max and teacher_sum must be given together");
  float* total = vector_of(row_dot, M, op, "row_dot");
  over_strips(gradient_strips, problem);
  for (int64_t t = 0; t < strips; ++t) {
    for (int64_t row = 0; row < M; ++row) total[row] += rows.dot[t * rows.padded + row];
  }
}

}  // namespace
}  // namespace vlpfast

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
  m.impl("contrastive_stats", TORCH_BOX(&vlpfast::contrastive_stats_cpu));
  m.impl("contrastive_teacher", TORCH_BOX(&vlpfast::contrastive_teacher_cpu));
  m.impl("contrastive_grad", TORCH_BOX(&vlpfast::contrastive_grad_cpu));
}
