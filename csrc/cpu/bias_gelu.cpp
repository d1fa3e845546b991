// Bias, GELU and dropout between the two matrices of an MLP on the CPU: one pass forward, one
// backward that recomputes everything from the input.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "vlpfast/checks.h"
#include "vlpfast/huge_pages.h"
#include "vlpfast/rows.h"

namespace vlpfast {
namespace {

struct Gate {
  F16 value;  // what y is multiplied by
  F16 slope;  // its derivative in y
};

// exp(x) for x <= 0; 0 where that is no normal number, so that nothing infinite times it is left.
VLPFAST_INLINE F16 decay16(F16 x) { return x < -87.3f ? F16{} : exp16(x); }

// Phi(y) = erfc(-y / sqrt(2)) / 2 and the normal density. The smaller tail is computed without
// cancellation: erfc(z) = exp(-z^2) t p(t), t = 1 / (1 + 0.35 z), p minimax of degree 9 on
// z in [0, 9.4], relative error 7e-9.
VLPFAST_INLINE Gate normal16(F16 y) {
  constexpr float kRoot = 0.70710678f, kDensity = 0.39894228f;
  constexpr float kP[] = {0.197489247f,  0.19703991f,   0.188665196f,     0.147846356f,
                          0.15515998f,   0.0708994716f, -0.00922161899f,  0.168181971f,
                          -0.153495759f, 0.0374352597f};
  const F16 z = abs16(y) * kRoot;
  const F16 t = 1.0f / (z * 0.35f + 1.0f);
  F16 p = splat(kP[9]);
  for (int i = 8; i >= 0; --i) p = p * t + kP[i];
  const F16 e = decay16(-z * z);
  const F16 tail = e * 0.5f * (t * p);
  return {y < 0.0f ? tail : 1.0f - tail, e * kDensity};
}

// quick_gelu: y sigmoid(1.702 y), the activation of CLIP. The smaller of the two exponentials.
VLPFAST_INLINE Gate sigmoid16(F16 y) {
  constexpr float kSlope = 1.702f;
  const F16 e = decay16(abs16(y) * -kSlope);
  const F16 large = 1.0f / (e + 1.0f), small = e * large;
  return {y < 0.0f ? small : large, large * small * kSlope};
}

VLPFAST_INLINE Gate gate16(F16 y, bool quick) { return quick ? sigmoid16(y) : normal16(y); }

// Rows are padded to whole vectors; what stands behind column D is never read back.
inline int64_t padded(int64_t D) { return (D + kLaneCount - 1) / kLaneCount * kLaneCount; }

struct Problem {
  int64_t D;
  Rows x, grad_output, out;  // backward: out is the gradient of x
  const float* bias;         // nullable
  float* partial;            // (blocks, D): gradient of the bias
  bool quick;
};

VLPFAST_INLINE void load_biased(const Problem& p, int64_t row, float* __restrict__ y) {
  load_row(p.x, row, p.D, y);
  const float* __restrict__ bias = p.bias;
  for (int64_t d = 0; bias != nullptr && d < p.D; ++d) y[d] += bias[d];
}

VLPFAST_CLONES
void gelu_rows(const Problem& p, const RowDropout& dropout, int64_t begin, int64_t end) {
  const int64_t D = p.D;
  std::vector<float> buffer(padded(D));
  float* y = buffer.data();
  for (int64_t row = begin; row < end; ++row) {
    load_biased(p, row, y);
    for (int64_t d = 0; d < D; d += kLaneCount) {
      const F16 value = load16(y + d);
      store16(y + d, value * gate16(value, p.quick).value);
    }
    dropout.apply(row, D, y);
    store_row(p.out, row, D, y);
  }
}

VLPFAST_CLONES
void gelu_rows_backward(const Problem& p, const RowDropout& dropout, const RowBlocks& blocks,
                        int64_t first, int64_t last) {
  const int64_t D = p.D;
  std::vector<float> buffer(2 * padded(D));
  float* y = buffer.data();
  float* grad = y + padded(D);
  for (int64_t block = first; block < last; ++block) {
    float* __restrict__ grad_bias = p.partial + block * D;
    std::fill_n(grad_bias, D, 0.0f);
    for (int64_t row = blocks.begin(block); row < blocks.end(block); ++row) {
      load_biased(p, row, y);
      load_row(p.grad_output, row, D, grad);
      dropout.apply(row, D, grad);
      for (int64_t d = 0; d < D; d += kLaneCount) {
        const F16 value = load16(y + d);
        const Gate gate = gate16(value, p.quick);
        // The slope is 0 far out, where the value may be infinite.
        const F16 along = gate.slope == 0.0f ? F16{} : value * gate.slope;
        store16(grad + d, load16(grad + d) * (gate.value + along));
      }
      for (int64_t d = 0; d < D; ++d) grad_bias[d] += grad[d];
      store_row(p.out, row, D, grad);
    }
  }
}

VLPFAST_CLONES
void sum_partial(const float* partial, int64_t count, int64_t D, float* out) {
  sum_blocks(partial, count, D, D, out);
}

constexpr const char* kOp = "bias_gelu";

const float* bias_pointer(const std::optional<Tensor>& bias) {
  if (!bias) return nullptr;
  check_argument(*bias, ScalarType::Float, kOp, "bias");
  return bias->const_data_ptr<float>();
}

Tensor bias_gelu_fwd_cpu(const Tensor& x, const std::optional<Tensor>& bias, const Tensor& seed,
                         bool quick, double dropout_p) {
  check_argument(seed, ScalarType::Long, kOp, "seed");
  const int64_t num_rows = x.size(0), D = x.size(1);
  Tensor out = on_huge_pages(torch::stable::empty_like(x));
  const Problem p{D,       rows_of(x, kOp, "x"), Rows{}, rows_of(out, kOp, "out"),
                  bias_pointer(bias), nullptr,   quick};
  const RowDropout dropout(dropout_p, *seed.const_data_ptr<int64_t>(), D);
  torch::stable::parallel_for(0, num_rows, row_grain(D), [&](int64_t begin, int64_t end) {
    gelu_rows(p, dropout, begin, end);
  });
  return out;
}

std::tuple<Tensor, Tensor> bias_gelu_bwd_cpu(const Tensor& grad_output, const Tensor& x,
                                             const std::optional<Tensor>& bias, const Tensor& seed,
                                             bool quick, double dropout_p) {
  check_argument(seed, ScalarType::Long, kOp, "seed");
  const int64_t num_rows = x.size(0), D = x.size(1);
  const RowBlocks blocks(num_rows);
  Tensor grad_x = on_huge_pages(torch::stable::empty_like(x));
  Tensor grad_bias = torch::stable::new_empty(x, {D}, ScalarType::Float);
  std::vector<float> partial(blocks.count() * D);
  const Problem p{D,
                  rows_of(x, kOp, "x"),
                  rows_of(grad_output, kOp, "grad_output"),
                  rows_of(grad_x, kOp, "grad_x"),
                  bias_pointer(bias),
                  partial.data(),
                  quick};
  const RowDropout dropout(dropout_p, *seed.const_data_ptr<int64_t>(), D);
  const int64_t grain = std::max<int64_t>(1, row_grain(D) / blocks.block);
  torch::stable::parallel_for(0, blocks.count(), grain, [&](int64_t first, int64_t last) {
    gelu_rows_backward(p, dropout, blocks, first, last);
  });
  sum_partial(partial.data(), blocks.count(), D, grad_bias.mutable_data_ptr<float>());
  return {grad_x, grad_bias};
}

}  // namespace
}  // namespace vlpfast

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
  m.impl("bias_gelu_fwd", TORCH_BOX(&vlpfast::bias_gelu_fwd_cpu));
  m.impl("bias_gelu_bwd", TORCH_BOX(&vlpfast::bias_gelu_bwd_cpu));
}
