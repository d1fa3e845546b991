// Attention on the CPU: checks, allocation, threads. A thread takes one key sequence and head after
// the other; vlpfast/attention_engine.h attends.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>

#include "vlpfast/attention_types.h"
#include "vlpfast/checks.h"
#include "vlpfast/huge_pages.h"
#include "vlpfast/simd.h"
#include "vlpfast/threads.h"

#define VLPFAST_EACH_TARGET "vlpfast/attention_engine.h"
#include "vlpfast/each_target.h"

namespace vlpfast {
namespace {

constexpr const char* kOp = "attention";

Heads heads_of(const Tensor& tokens, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, kOp, ": ", name,
                  " must be Float or BFloat16, got ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(tokens.scalar_type() == dtype && tokens.dim() == 3 &&
                      (tokens.stride(2) == 1 || tokens.size(2) == 1 || tokens.numel() == 0),
                  kOp, ": ", name, " must be (T, H, E) in the dtype of q, contiguous in E");
  return {tokens.data_ptr(), dtype == ScalarType::BFloat16, tokens.stride(0), tokens.stride(1)};
}

// Checked: every sequence lies in the `num_tokens` tokens.
Spans spans_of(const Tensor& spans, int64_t num_tokens, const char* name) {
  check_argument(spans, ScalarType::Int, kOp, name);
  STD_TORCH_CHECK(spans.dim() == 2 && spans.size(1) == 2, kOp, ": ", name, " must be (., 2)");
  const Spans result{spans.const_data_ptr<int32_t>(), spans.size(0)};
  for (int64_t i = 0; i < result.count; ++i) {
    const int64_t start = result.start(i), length = result.length(i);
    STD_TORCH_CHECK(start >= 0 && length >= 0 && start + length <= num_tokens, kOp, ": ", name, ": ",
                    "sequence ", i, " takes ", length, " tokens from ", start, " on, of ", num_tokens);
  }
  return result;
}

const int32_t* blocks_of(const std::optional<Tensor>& blocks, int64_t num_tokens,
                         const char* name) {
  if (!blocks) return nullptr;
  check_argument(*blocks, ScalarType::Int, kOp, name);
  STD_TORCH_CHECK(blocks->numel() == num_tokens, kOp, ": ", name, " must have ", num_tokens,
                  " elements, got ", blocks->numel());
  return blocks->const_data_ptr<int32_t>();
}

ScoreBias bias_of(const std::optional<Tensor>& bias) {
  if (!bias) return {};
  check_argument(*bias, ScalarType::Float, kOp, "bias");
  const int64_t dim = bias->dim();
  STD_TORCH_CHECK(dim == 3 || dim == 4, kOp, ": bias must be (H, M, N) or (R, H, M, N)");
  return {.data = bias->const_data_ptr<float>(),
          .sequence = dim == 4 ? bias->stride(0) : 0,
          .head = bias->stride(dim - 3),
          .query = bias->stride(dim - 2)};
}

// Sorts the query sequences by the key sequence that they read.
void sort_readers(AttentionBatch& batch, const std::optional<Tensor>& kv_index) {
  const int64_t R = batch.q_spans.count, S = batch.k_spans.count;
  const int64_t* index = nullptr;
  if (kv_index) {
    check_argument(*kv_index, ScalarType::Long, kOp, "kv_index");
    STD_TORCH_CHECK(kv_index->numel() == R, kOp, ": kv_index must have ", R, " elements, got ",
                    kv_index->numel());
    index = kv_index->const_data_ptr<int64_t>();
  } else {
    STD_TORCH_CHECK(R == S, kOp, ": kv_index is needed to read ", S, " sequences from ", R);
  }
  const auto read = [&](int64_t r) { return index ? index[r] : r; };
  batch.reader_starts.assign(S + 1, 0);
  for (int64_t r = 0; r < R; ++r) {
    STD_TORCH_CHECK(read(r) >= 0 && read(r) < S, kOp, ": kv_index must be in [0, ", S, "), got ",
                    read(r), " at ", r);
    ++batch.reader_starts[read(r) + 1];
  }
  for (int64_t s = 0; s < S; ++s) batch.reader_starts[s + 1] += batch.reader_starts[s];
  std::vector<int64_t> next(batch.reader_starts.begin(), batch.reader_starts.end() - 1);
  batch.readers.resize(R);
  for (int64_t r = 0; r < R; ++r) batch.readers[next[read(r)]++] = r;
}

struct Options {
  const std::optional<Tensor>&kv_index, &q_block, &k_block, &bias;
  const Tensor& seed;
  bool causal;
  double dropout_p, scale;
};

AttentionBatch batch_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_spans,
                        const Tensor& k_spans, const Options& options) {
  const ScalarType dtype = q.scalar_type();
  check_argument(options.seed, ScalarType::Long, kOp, "seed");
  AttentionBatch batch{
      .num_heads = q.size(1),
      .head_dim = q.size(2),
      .q = heads_of(q, dtype, "q"),
      .k = heads_of(k, dtype, "k"),
      .v = heads_of(v, dtype, "v"),
      .q_spans = spans_of(q_spans, q.size(0), "q_spans"),
      .k_spans = spans_of(k_spans, k.size(0), "k_spans"),
      .q_block = blocks_of(options.q_block, q.size(0), "q_block"),
      .k_block = blocks_of(options.k_block, k.size(0), "k_block"),
      .causal = options.causal,
      .bias = bias_of(options.bias),
      .seed = *options.seed.const_data_ptr<int64_t>(),
      .drop_below = static_cast<uint32_t>(std::nearbyint(options.dropout_p * 16777216.0)),
      .keep_scale = static_cast<float>(1.0 / (1.0 - options.dropout_p)),
      .scale = static_cast<float>(options.scale)};
  STD_TORCH_CHECK((batch.q_block == nullptr) == (batch.k_block == nullptr), kOp,
                  ": q_block and k_block go together");
  sort_readers(batch, options.kv_index);
  return batch;
}

int64_t num_covered(const Spans& spans) {
  int64_t total = 0;
  for (int64_t i = 0; i < spans.count; ++i) total += spans.length(i);
  return total;
}

// (T, H, E) like `tokens`, zero where no sequence lies.
Tensor new_tokens(const Tensor& tokens, const Spans& spans) {
  Tensor result = on_huge_pages(
      torch::stable::new_empty(tokens, {tokens.size(0), tokens.size(1), tokens.size(2)}));
  if (num_covered(spans) < tokens.size(0)) torch::stable::zero_(result);
  return result;
}

void run(const AttentionBatch& batch, bool backward) {
  on_all_threads(batch.num_tasks(), [&](auto& next) {
    VLPFAST_ON_WIDEST(run_attention(batch, backward, next));
  });
}

std::tuple<Tensor, Tensor> attention_fwd_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_spans,
    const Tensor& k_spans, const std::optional<Tensor>& kv_index,
    const std::optional<Tensor>& q_block, const std::optional<Tensor>& k_block,
    const std::optional<Tensor>& bias, const Tensor& seed, bool causal, double dropout_p,
    double scale) {
  AttentionBatch batch = batch_of(q, k, v, q_spans, k_spans,
                                  {kv_index, q_block, k_block, bias, seed, causal, dropout_p, scale});
  Tensor out = new_tokens(q, batch.q_spans);
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  if (num_covered(batch.q_spans) < q.size(0)) {
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  }
  batch.out = heads_of(out, q.scalar_type(), "out");
  batch.lse = lse.mutable_data_ptr<float>();
  run(batch, false);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd_cpu(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse,
    const Tensor& q_spans, const Tensor& k_spans, const std::optional<Tensor>& kv_index,
    const std::optional<Tensor>& q_block, const std::optional<Tensor>& k_block,
    const std::optional<Tensor>& bias, const Tensor& seed, bool causal, double dropout_p,
    double scale, bool bias_grad) {
  AttentionBatch batch = batch_of(q, k, v, q_spans, k_spans,
                                  {kv_index, q_block, k_block, bias, seed, causal, dropout_p, scale});
  const ScalarType dtype = q.scalar_type();
  check_argument(lse, ScalarType::Float, kOp, "lse");
  Tensor grad_q = new_tokens(q, batch.q_spans);
  Tensor grad_k = new_tokens(k, batch.k_spans), grad_v = new_tokens(v, batch.k_spans);
  Tensor grad_bias = bias_grad ? torch::stable::empty_like(*bias)
                               : torch::stable::new_empty(q, {0}, ScalarType::Float);
  if (bias_grad) {
    torch::stable::zero_(grad_bias);
    batch.bias.grad = grad_bias.mutable_data_ptr<float>();
    batch.by_head = batch.bias.shared();
  }
  batch.grad_out = heads_of(grad_out, dtype, "grad_out");
  batch.grad_q = heads_of(grad_q, dtype, "grad_q");
  batch.grad_k = heads_of(grad_k, dtype, "grad_k");
  batch.grad_v = heads_of(grad_v, dtype, "grad_v");
  batch.lse = lse.mutable_data_ptr<float>();
  run(batch, true);
  return {grad_q, grad_k, grad_v, grad_bias};
}

}  // namespace
}  // namespace vlpfast

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&vlpfast::attention_fwd_cpu));
  m.impl("attention_bwd", TORCH_BOX(&vlpfast::attention_bwd_cpu));
}
