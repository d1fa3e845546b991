// Sigmoid and hinge passes of the contrastive losses: pairs do not compete, so one read of a tile gives
// its loss and, in place, its gradient.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "vlpfast/contrastive_tile.h"

namespace vlpfast {
namespace {

// -1 in lanes that hold a column, else 0.
VLPFAST_INLINE I16 columns16(const Strip& strip, int j) { return load16(strip.pad + j) == 0.0f; }

// A strip's share of each row's sums, added up in the strips' order afterwards.
struct RowSums {
  int64_t M;
  std::vector<float> values;  // (strips, 3, M)
  RowSums(int64_t M, int64_t strips) : M(M), values(strips * 3 * M) {}
  VLPFAST_INLINE float& at(int64_t strip, int which, int64_t row) {
    return values[(strip * 3 + which) * M + row];
  }
  void add_to(float* total, int which, int64_t strips) {
    for (int64_t t = 0; t < strips; ++t) {
      for (int64_t row = 0; row < M; ++row) total[row] += at(t, which, row);
    }
  }
};

// Sums of a strip's columns over `kBlockRows` rows, then over blocks.
struct ColumnSums {
  float total[kStripCols], block[kStripCols];
  VLPFAST_INLINE void load(const float* from, int n) {
    std::fill_n(total, kStripCols, 0.0f);
    std::fill_n(block, kStripCols, 0.0f);
    std::memcpy(total, from, sizeof(float) * n);
  }
  VLPFAST_INLINE void add(int j, F16 x) { store16(block + j, load16(block + j) + x); }
  VLPFAST_INLINE void end_of_row(int64_t row, int64_t M) {
    if ((row + 1) % kBlockRows != 0 && row + 1 != M) return;
    for (int j = 0; j < kStripCols; j += kLaneCount) {
      store16(total + j, load16(total + j) + load16(block + j));
      store16(block + j, F16{});
    }
  }
  VLPFAST_INLINE void store(float* to, int n) const { std::memcpy(to, total, sizeof(float) * n); }
};

enum { kLoss, kDot, kGrad };

struct Sigmoid {
  Sims sims, teacher;
  Pairs pairs;
  int64_t M, N;
  float scale, bias, positive, negative, alpha;
  bool write_grad;
  float* col_loss;  // nullable
  RowSums* rows;
};

// sigmoid(z) from e = exp(-|z|).
VLPFAST_INLINE F16 sigmoid16(F16 z, F16 e) {
  const F16 r = 1.0f / (e + 1.0f);
  return z >= 0.0f ? r : e * r;
}

VLPFAST_CLONES
void sigmoid_strips(const Sigmoid& p, int64_t begin, int64_t end) {
  float s[kStripCols], teacher[kStripCols], g[kStripCols];
  ColumnSums cols;
  Strip strip;
  for (int64_t index = begin; index < end; ++index) {
    set_strip(strip, index, p.N, p.pairs);
    if (p.col_loss) cols.load(p.col_loss + strip.begin, strip.n);
    for (int64_t row = 0; row < p.M; ++row) {
      load_strip(p.sims, strip, p.pairs, row, s);
      if (p.teacher.data) load_strip(p.teacher, strip, row, teacher);
      const int own = p.pairs.row_ids ? -1 : diagonal_in(strip, p.pairs, row);
      const RowId id(p.pairs, row, strip);
      F16 loss{}, dot{}, sum{};
      for (int j = 0; j < strip.padded; j += kLaneCount) {
        const F16 value = load16(s + j);
        const F16 z = value * p.scale + p.bias;
        const F16 e = exp16(-abs16(z));
        F16 target = splat(p.negative);
        if (id.may_match) target = id.equals(strip, j) ? splat(p.positive) : target;
        if (p.teacher.data) {
          const F16 zt = load16(teacher + j) * p.scale + p.bias;
          target += sigmoid16(zt, exp16(-abs16(zt))) * p.alpha;
        }
        const I16 is_column = columns16(strip, j);
        const F16 l = is_column ? max16(z, F16{}) + log1p16(e) - target * z : F16{};
        const F16 grad = is_column ? sigmoid16(z, e) - target : F16{};
        store16(g + j, grad);
        loss += l;
        sum += grad;
        dot += grad * value;
        if (p.col_loss) cols.add(j, l);
      }
      float row_loss = sum_lanes(loss), row_dot = sum_lanes(dot), row_grad = sum_lanes(sum);
      if (own >= 0) {
        const float more = p.positive - p.negative, z = s[own] * p.scale + p.bias;
        row_loss -= more * z;
        row_dot -= more * s[own];
        row_grad -= more;
        g[own] -= more;
        if (p.col_loss) cols.block[own] -= more * z;
      }
      if (p.col_loss) cols.end_of_row(row, p.M);
      p.rows->at(index, kLoss, row) = row_loss;
      p.rows->at(index, kDot, row) = row_dot;
      p.rows->at(index, kGrad, row) = row_grad;
      if (p.write_grad) store_strip(p.sims, strip, row, g);
    }
    if (p.col_loss) cols.store(p.col_loss + strip.begin, strip.n);
  }
}

struct Hinge {
  Sims sims;
  Pairs pairs;
  int64_t M, N;
  float margin;
  const float *row_pair, *col_pair;
  float* col_count;
  RowSums* rows;
};

VLPFAST_CLONES
void hinge_strips(const Hinge& p, int64_t begin, int64_t end) {
  float s[kStripCols], g[kStripCols], col_pair[kStripCols] = {};
  ColumnSums cols;
  Strip strip;
  const F16 one = splat(1.0f);
  for (int64_t index = begin; index < end; ++index) {
    set_strip(strip, index, p.N, p.pairs);
    cols.load(p.col_count + strip.begin, strip.n);
    std::memcpy(col_pair, p.col_pair + strip.begin, sizeof(float) * strip.n);
    for (int64_t row = 0; row < p.M; ++row) {
      load_strip(p.sims, strip, row, s);
      // The pair itself is no negative: far below every margin.
      const int own = p.pairs.row_ids ? -1 : diagonal_in(strip, p.pairs, row);
      if (own >= 0) s[own] = -kInfinity;
      const RowId id(p.pairs, row, strip);
      F16 loss{}, count{};
      for (int j = 0; j < strip.padded; j += kLaneCount) {
        I16 is_negative = columns16(strip, j);
        if (id.may_match) is_negative &= ~id.equals(strip, j);
        const F16 value = is_negative ? load16(s + j) + p.margin : splat(-kInfinity);
        const F16 text = value - p.row_pair[row], image = value - load16(col_pair + j);
        // Not max16(x, 0): a NaN must stay one.
        loss += (text <= 0.0f ? F16{} : text) + (image <= 0.0f ? F16{} : image);
        const F16 text_active = text > 0.0f ? one : F16{}, image_active = image > 0.0f ? one : F16{};
        count += text_active;
        cols.add(j, image_active);
        store16(g + j, text_active + image_active);
      }
      cols.end_of_row(row, p.M);
      p.rows->at(index, kLoss, row) = sum_lanes(loss);
      p.rows->at(index, kDot, row) = sum_lanes(count);
      store_strip(p.sims, strip, row, g);
    }
    cols.store(p.col_count + strip.begin, strip.n);
  }
}

template <class Problem>
void over_strips(void (*run)(const Problem&, int64_t, int64_t), const Problem& problem) {
  torch::stable::parallel_for(0, num_strips(problem.N), strip_grain(problem.M),
                              [&](int64_t begin, int64_t end) { run(problem, begin, end); });
}

void contrastive_sigmoid_cpu(const Tensor& sims, const std::optional<Tensor>& teacher_sims,
                             const Tensor& scale, const Tensor& bias,
                             const std::optional<Tensor>& row_ids,
                             const std::optional<Tensor>& col_ids,
                             const std::optional<Tensor>& diag, int64_t diag_offset,
                             double positive, double negative, double alpha, bool write_grad,
                             const Tensor& row_loss, const std::optional<Tensor>& col_loss,
                             const Tensor& row_dot, const Tensor& row_grad) {
  constexpr const char* op = "contrastive_sigmoid";
  const Sims tile = sims_of(sims, op, "sims");
  const int64_t M = sims.size(0), N = sims.size(1), strips = num_strips(N);
  RowSums rows(M, strips);
  const Sigmoid problem{tile,
                        teacher_of(teacher_sims, sims, op),
                        pairs_of(sims, row_ids, col_ids, diag, diag_offset, op),
                        M,
                        N,
                        scalar_of(scale, op, "scale"),
                        scalar_of(bias, op, "bias"),
                        static_cast<float>(positive),
                        static_cast<float>(negative),
                        static_cast<float>(alpha),
                        write_grad,
                        vector_of(col_loss, N, op, "col_loss"),
                        &rows};
  float* const loss = vector_of(row_loss, M, op, "row_loss");
  float* const dot = vector_of(row_dot, M, op, "row_dot");
  float* const grad = vector_of(row_grad, M, op, "row_grad");
  over_strips(sigmoid_strips, problem);
  rows.add_to(loss, kLoss, strips);
  rows.add_to(dot, kDot, strips);
  rows.add_to(grad, kGrad, strips);
}

void contrastive_hinge_cpu(const Tensor& sims, const std::optional<Tensor>& row_ids,
                           const std::optional<Tensor>& col_ids, int64_t diag_offset,
                           const Tensor& row_pair, const Tensor& col_pair, double margin,
                           const Tensor& row_loss, const Tensor& row_count,
                           const Tensor& col_count) {
  constexpr const char* op = "contrastive_hinge";
  const Sims tile = sims_of(sims, op, "sims");
  const int64_t M = sims.size(0), N = sims.size(1), strips = num_strips(N);
  RowSums rows(M, strips);
  const Hinge problem{tile,
                      pairs_of(sims, row_ids, col_ids, std::nullopt, diag_offset, op),
                      M,
                      N,
                      static_cast<float>(margin),
                      vector_of(row_pair, M, op, "row_pair"),
                      vector_of(col_pair, N, op, "col_pair"),
                      vector_of(col_count, N, op, "col_count"),
                      &rows};
  float* const loss = vector_of(row_loss, M, op, "row_loss");
  float* const count = vector_of(row_count, M, op, "row_count");
  over_strips(hinge_strips, problem);
  rows.add_to(loss, kLoss, strips);
  rows.add_to(count, kDot, strips);
}

}  // namespace
}  // namespace vlpfast

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
  m.impl("contrastive_sigmoid", TORCH_BOX(&vlpfast::contrastive_sigmoid_cpu));
  m.impl("contrastive_hinge", TORCH_BOX(&vlpfast::contrastive_hinge_cpu));
}
