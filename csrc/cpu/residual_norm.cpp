// Dropout, residual sum and LayerNorm or RMSNorm on the CPU: one pass over the rows forward, one
// backward. The mask is recomputed; statistics are fp32.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "vlpfast/checks.h"
#include "vlpfast/huge_pages.h"
#include "vlpfast/rows.h"

namespace vlpfast {
namespace {

struct Forward {
  int64_t D;
  Rows x, residual, total, normed;
  const float* weight;  // nullable, as is bias
  const float* bias;
  float* mean;
  float* rstd;
  float eps;
  bool rms;
};

VLPFAST_CLONES
void norm_rows(const Forward& f, const RowDropout& dropout, int64_t begin, int64_t end) {
  const int64_t D = f.D;
  std::vector<float> buffer(4 * D);
  float* centred = buffer.data();
  float* total_buffer = centred + D;
  float* normed_buffer = total_buffer + D;
  float* zeros = normed_buffer + D;
  const float* __restrict__ weight = f.weight;
  const float* __restrict__ bias = f.bias != nullptr ? f.bias : zeros;
  for (int64_t row = begin; row < end; ++row) {
    float* __restrict__ total = row_or_buffer(f.total, row, D, total_buffer);
    load_row(f.x, row, D, total);
    dropout.apply(row, D, total);
    if (f.residual.data != nullptr) add_row(f.residual, row, D, total);
    store_row(f.total, row, D, total);
    const float mean = f.rms ? 0.0f : sum(total, D) / D;
    for (int64_t d = 0; d < D; ++d) centred[d] = total[d] - mean;
    const float rstd = 1.0f / std::sqrt(dot(centred, centred, D) / D + f.eps);
    float* __restrict__ normed = row_or_buffer(f.normed, row, D, normed_buffer);
    if (weight != nullptr) {
      for (int64_t d = 0; d < D; ++d) normed[d] = centred[d] * rstd * weight[d] + bias[d];
    } else {
      for (int64_t d = 0; d < D; ++d) normed[d] = centred[d] * rstd + bias[d];
    }
    store_row(f.normed, row, D, normed);
    f.mean[row] = mean;
    f.rstd[row] = rstd;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm_fwd_cpu(
    const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const Tensor& seed, bool rms, double dropout_p, double eps) {
  constexpr const char* kOp = "residual_norm";
  const int64_t num_rows = x.size(0), D = x.size(1);
  check_argument(seed, ScalarType::Long, kOp, "seed");
  if (weight) check_argument(*weight, ScalarType::Float, kOp, "weight");
  if (bias) check_argument(*bias, ScalarType::Float, kOp, "bias");
  const Rows in = rows_of(x, kOp, "x");
  const Rows added = residual ? rows_of(*residual, kOp, "residual") : Rows{};
  const bool total_is_bf16 = in.is_bf16 && (!residual || added.is_bf16);
  const auto total_type = total_is_bf16 ? ScalarType::BFloat16 : ScalarType::Float;
  Tensor normed = on_huge_pages(torch::stable::empty_like(x));
  Tensor total = on_huge_pages(torch::stable::new_empty(x, {num_rows, D}, total_type));
  Tensor mean = torch::stable::new_empty(x, {num_rows}, ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(x, {num_rows}, ScalarType::Float);
  const Forward f{D,
                  in,
                  added,
                  rows_of(total, kOp, "total"),
                  rows_of(normed, kOp, "normed"),
                  weight ? weight->const_data_ptr<float>() : nullptr,
                  bias ? bias->const_data_ptr<float>() : nullptr,
                  mean.mutable_data_ptr<float>(),
                  rstd.mutable_data_ptr<float>(),
                  static_cast<float>(eps),
                  rms};
  const RowDropout dropout(dropout_p, *seed.const_data_ptr<int64_t>(), D);
  torch::stable::parallel_for(0, num_rows, row_grain(D), [&](int64_t begin, int64_t end) {
    norm_rows(f, dropout, begin, end);
  });
  return {normed, total, mean, rstd};
}

struct Backward {
  int64_t D;
  Rows grad_normed, grad_total_in, total, grad_total, grad_x;
  const float* weight;
  const float* mean;
  const float* rstd;
  float* partial;  // (blocks, 2, D): gradients of weight and bias
  bool rms;
};

// d(total) = rstd (g w - mean(g w) - x^ mean(g w x^)) + the gradient that reached the sum itself;
// the RMS norm has no first mean.
VLPFAST_CLONES
void norm_rows_backward(const Backward& b, const RowDropout& dropout, const RowBlocks& blocks,
                        int64_t first, int64_t last) {
  const int64_t D = b.D;
  std::vector<float> buffer(5 * D);
  float* __restrict__ xhat = buffer.data();
  float* __restrict__ grad = xhat + D;
  float* sum_buffer = grad + D;
  float* x_buffer = sum_buffer + D;
  float* ones = x_buffer + D;
  std::fill_n(ones, D, 1.0f);
  const float* __restrict__ weight = b.weight != nullptr ? b.weight : ones;
  for (int64_t block = first; block < last; ++block) {
    float* __restrict__ grad_weight = b.partial + block * 2 * D;
    float* __restrict__ grad_bias = grad_weight + D;
    std::fill_n(grad_weight, 2 * D, 0.0f);
    for (int64_t row = blocks.begin(block); row < blocks.end(block); ++row) {
      const float mean = b.mean[row], rstd = b.rstd[row];
      load_row(b.total, row, D, xhat);
      load_row(b.grad_normed, row, D, grad);
      for (int64_t d = 0; d < D; ++d) {
        xhat[d] = (xhat[d] - mean) * rstd;
        grad_weight[d] += grad[d] * xhat[d];
        grad_bias[d] += grad[d];
        grad[d] *= weight[d];
      }
      const float centre = b.rms ? 0.0f : sum(grad, D) / D;
      const float along = dot(grad, xhat, D) / D;
      float* __restrict__ out = row_or_buffer(b.grad_total, row, D, sum_buffer);
      for (int64_t d = 0; d < D; ++d) out[d] = rstd * (grad[d] - centre - xhat[d] * along);
      if (b.grad_total_in.data != nullptr) add_row(b.grad_total_in, row, D, out);
      if (b.grad_x.data != nullptr) {
        float* __restrict__ grad_x = row_or_buffer(b.grad_x, row, D, x_buffer);
        std::memcpy(grad_x, out, sizeof(float) * D);
        dropout.apply(row, D, grad_x);
        store_row(b.grad_x, row, D, grad_x);
      }
      store_row(b.grad_total, row, D, out);
    }
  }
}

VLPFAST_CLONES
void sum_pair(const float* partial, int64_t count, int64_t D, float* weight, float* bias) {
  sum_blocks(partial, count, D, 2 * D, weight);
  sum_blocks(partial + D, count, D, 2 * D, bias);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm_bwd_cpu(
    const Tensor& grad_normed, const std::optional<Tensor>& grad_total, const Tensor& total,
    const std::optional<Tensor>& weight, const Tensor& mean, const Tensor& rstd,
    const Tensor& seed, bool rms, double dropout_p, bool split) {
  constexpr const char* kOp = "residual_norm";
  const int64_t num_rows = total.size(0), D = total.size(1);
  check_argument(seed, ScalarType::Long, kOp, "seed");
  check_argument(mean, ScalarType::Float, kOp, "mean");
  check_argument(rstd, ScalarType::Float, kOp, "rstd");
  if (weight) check_argument(*weight, ScalarType::Float, kOp, "weight");
  const RowBlocks blocks(num_rows);
  Tensor grad_sum = on_huge_pages(torch::stable::empty_like(total));
  Tensor grad_x = on_huge_pages(torch::stable::new_empty(grad_normed, {split ? num_rows : 0, D}));
  Tensor grad_weight = torch::stable::new_empty(total, {D}, ScalarType::Float);
  Tensor grad_bias = torch::stable::new_empty(total, {D}, ScalarType::Float);
  std::vector<float> partial(blocks.count() * 2 * D);
  const Backward b{D,
                   rows_of(grad_normed, kOp, "grad_normed"),
                   grad_total ? rows_of(*grad_total, kOp, "grad_total") : Rows{},
                   rows_of(total, kOp, "total"),
                   rows_of(grad_sum, kOp, "grad_sum"),
                   split ? rows_of(grad_x, kOp, "grad_x") : Rows{},
                   weight ? weight->const_data_ptr<float>() : nullptr,
                   mean.const_data_ptr<float>(),
                   rstd.const_data_ptr<float>(),
                   partial.data(),
                   rms};
  const RowDropout dropout(dropout_p, *seed.const_data_ptr<int64_t>(), D);
  const int64_t grain = std::max<int64_t>(1, row_grain(D) / blocks.block);
  torch::stable::parallel_for(0, blocks.count(), grain, [&](int64_t first, int64_t last) {
    norm_rows_backward(b, dropout, blocks, first, last);
  });
  sum_pair(partial.data(), blocks.count(), D, grad_weight.mutable_data_ptr<float>(),
           grad_bias.mutable_data_ptr<float>());
  return {grad_sum, grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace vlpfast

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
  m.impl("residual_norm_fwd", TORCH_BOX(&vlpfast::residual_norm_fwd_cpu));
  m.impl("residual_norm_bwd", TORCH_BOX(&vlpfast::residual_norm_bwd_cpu));
}
