// Cross-entropy of rows of logits on the CPU: loss, and the gradient in the logits' place. A row
// goes through fp32 scratch that stays in cache, so logits are read once and written once.
// Letters: N rows, V vocabulary.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "vlpfast/checks.h"
#include "vlpfast/lanes_bf16.h"

namespace vlpfast {
namespace {

// Threads are worth their start from about this many logits on (some 20 us of work).
constexpr int64_t kGrainLogits = 32768;
// Columns are summed in blocks, and blocks then: rounding does not grow with the vocabulary.
constexpr int64_t kBlock = 1024;
// What stands behind the last column: so far below the maximum that its exponential is nothing.
constexpr float kBelow = 200.0f;

// A matrix of logits, fp32 or bf16, unit column stride.
struct Logits {
  void* data = nullptr;
  int64_t stride = 0;
  bool is_bf16 = false;
};

struct Problem {
  Logits logits, teacher;           // teacher.data is nullable
  const float *bias, *teacher_bias; // nullable
  const int64_t* target;
  const float* exact;  // nullable: the target's logit without bias, unrounded
  float* loss;
  int64_t N, V, ignore_index;
  float hard, smooth, alpha;  // weight of the target, of every column, of the teacher
  bool write_grad;
  std::atomic<int64_t>* bad_row;
};

VLPFAST_INLINE int64_t padded(int64_t V) { return (V + kLaneCount - 1) / kLaneCount * kLaneCount; }

// out = in + bias, -inf behind column V; returns the maximum.
template <class T>
VLPFAST_INLINE float load_row(const T* in, const float* bias, int64_t V, float* out) {
  const int64_t whole = V / kLaneCount * kLaneCount;
  F16 top = splat(-std::numeric_limits<float>::infinity());
  for (int64_t v = 0; v < whole; v += kLaneCount) {
    F16 z = load16(in + v);
    if (bias) z += load16(bias + v);
    store16(out + v, z);
    top = max16(z, top);
  }
  if (whole == V) return max_lanes(top);
  T logits[kLaneCount] = {};
  std::memcpy(logits, in + whole, sizeof(T) * (V - whole));
  store16(out + whole, load16(logits));
  for (int64_t v = whole; v < V && bias; ++v) out[v] += bias[v];
  std::fill(out + V, out + padded(V), -std::numeric_limits<float>::infinity());
  return max_lanes(max16(load16(out + whole), top));
}

// The largest logit of a row, which `out` receives in fp32.
VLPFAST_INLINE float load_row(const Logits& logits, const float* bias, int64_t row, int64_t V,
                              float* out) {
  const int64_t at = row * logits.stride;
  if (logits.is_bf16) return load_row(static_cast<uint16_t*>(logits.data) + at, bias, V, out);
  return load_row(static_cast<float*>(logits.data) + at, bias, V, out);
}

struct Sums {
  float exp;      // sum of exp(z - top)
  float teacher;  // sum of exp(z_m - top_m)
  float cross;    // sum of exp(z_m - top_m) (z - top)
};

template <bool kTeacher>
VLPFAST_INLINE Sums sum_row(const float* z, const float* z_m, int64_t size, float top,
                            float top_m) {
  F16 total{}, total_m{}, total_cross{};
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, size);
    F16 sum{}, sum_m{}, cross{};
    for (int64_t v = begin; v < end; v += kLaneCount) {
      const F16 below = load16(z + v) - top;
      sum += exp16(below);
      if (kTeacher) {
        const F16 e = exp16(load16(z_m + v) - top_m);
        sum_m += e;
        cross += e * below;
      }
    }
    total += sum;
    total_m += sum_m;
    total_cross += cross;
  }
  return {sum_lanes(total), sum_lanes(total_m), sum_lanes(total_cross)};
}

// Sum of z - top over the V columns.
VLPFAST_INLINE float sum_below(const float* z, int64_t V, float top) {
  const int64_t whole = V / kLaneCount * kLaneCount;
  F16 total{};
  for (int64_t begin = 0; begin < whole; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, whole);
    F16 sum{};
    for (int64_t v = begin; v < end; v += kLaneCount) sum += load16(z + v) - top;
    total += sum;
  }
  float rest = 0;
  for (int64_t v = whole; v < V; ++v) rest += z[v] - top;
  return sum_lanes(total) + rest;
}

// log-sum-exp of a row in two parts, top + log_sum, and the teacher's.
struct Normaliser {
  float top, log_sum, top_m, log_sum_m;
};

// exp(x), 0 where that is no normal number: a word that is ruled out gets no gradient at all, and
// the products that follow meet no denormals.
VLPFAST_INLINE F16 probability16(F16 x) { return x < -87.3f ? F16{} : exp16(x); }

template <bool kTeacher>
VLPFAST_INLINE F16 gradient16(F16 z, F16 z_m, const Problem& p, const Normaliser& n) {
  F16 g = probability16((z - n.top) - n.log_sum) - p.smooth;
  if (kTeacher) g -= probability16((z_m - n.top_m) - n.log_sum_m) * p.alpha;
  return g;
}

template <bool kTeacher, class T>
VLPFAST_INLINE void write_gradient(const Problem& p, int64_t target, const Normaliser& n,
                                   const float* z, const float* z_m, T* out) {
  const int64_t whole = p.V / kLaneCount * kLaneCount;
  for (int64_t v = 0; v < whole; v += kLaneCount) {
    const F16 teacher = kTeacher ? load16(z_m + v) : F16{};
    store16(out + v, gradient16<kTeacher>(load16(z + v), teacher, p, n));
  }
  T last[kLaneCount];
  if (whole < p.V) {
    const F16 teacher = kTeacher ? load16(z_m + whole) : F16{};
    store16(last, gradient16<kTeacher>(load16(z + whole), teacher, p, n));
    std::memcpy(out + whole, last, sizeof(T) * (p.V - whole));
  }
  const F16 teacher = kTeacher ? splat(z_m[target]) : F16{};
  store16(last, gradient16<kTeacher>(splat(z[target]), teacher, p, n) - p.hard);
  out[target] = last[0];
}

template <bool kTeacher>
VLPFAST_INLINE void one_row(const Problem& p, int64_t row, float* z, float* z_m) {
  const int64_t target = p.target[row], size = padded(p.V);
  Normaliser n{load_row(p.logits, p.bias, row, p.V, z), 0, 0, 0};
  if (p.exact) {
    z[target] = p.exact[row] + (p.bias ? p.bias[target] : 0.0f);
    // The rounded value may have been the maximum: one that is too large by rounding does no harm.
    n.top = std::max(n.top, z[target]);
  }
  std::fill(z + p.V, z + size, n.top - kBelow);
  if (kTeacher) {
    n.top_m = load_row(p.teacher, p.teacher_bias, row, p.V, z_m);
    std::fill(z_m + p.V, z_m + size, n.top_m - kBelow);
  }
  const Sums sums = sum_row<kTeacher>(z, z_m, size, n.top, n.top_m);
  n.log_sum = std::log(sums.exp);
  // The weights of the targets sum to 1, so that `top` cancels.
  float loss = n.log_sum;
  if (p.hard != 0) loss -= p.hard * (z[target] - n.top);
  if (p.smooth != 0) loss -= p.smooth * sum_below(z, p.V, n.top);
  if (kTeacher) {
    n.log_sum_m = std::log(sums.teacher);
    loss -= p.alpha * (sums.cross / sums.teacher);
  }
  p.loss[row] = loss;
  if (!p.write_grad) return;
  const int64_t at = row * p.logits.stride;
  if (p.logits.is_bf16) {
    write_gradient<kTeacher>(p, target, n, z, z_m, static_cast<uint16_t*>(p.logits.data) + at);
  } else {
    write_gradient<kTeacher>(p, target, n, z, z_m, static_cast<float*>(p.logits.data) + at);
  }
}

VLPFAST_CLONES
void cross_entropy_rows(const Problem& p, int64_t begin, int64_t end) {
  std::vector<float> z(padded(p.V)), z_m(p.teacher.data ? padded(p.V) : 0);
  const int64_t width = p.logits.is_bf16 ? sizeof(uint16_t) : sizeof(float);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t target = p.target[row];
    if (target == p.ignore_index) {
      p.loss[row] = 0;
      char* logits = static_cast<char*>(p.logits.data) + row * p.logits.stride * width;
      if (p.write_grad) std::memset(logits, 0, p.V * width);
    } else if (target < 0 || target >= p.V) {
      p.bad_row->store(row);
    } else if (p.teacher.data) {
      one_row<true>(p, row, z.data(), z_m.data());
    } else {
      one_row<false>(p, row, z.data(), z_m.data());
    }
  }
}

// out_v = sum over rows i, in their order, of scale_i g_iv, for columns [begin, end).
template <class T>
VLPFAST_INLINE void column_sums(const T* g, int64_t stride, const float* scale, int64_t N,
                                int64_t begin, int64_t end, float* out) {
  constexpr int64_t kWidth = 4 * kLaneCount;
  for (int64_t v = begin; v < end; v += kWidth) {
    const int64_t count = std::min(kWidth, end - v);
    F16 sum[4] = {};
    T row[kWidth] = {};
    for (int64_t i = 0; i < N; ++i) {
      const T* in = g + i * stride + v;
      if (count < kWidth) in = static_cast<T*>(std::memcpy(row, in, sizeof(T) * count));
      for (int k = 0; k < 4; ++k) sum[k] += load16(in + k * kLaneCount) * scale[i];
    }
    std::memcpy(out + v, sum, sizeof(float) * count);
  }
}

VLPFAST_CLONES
void sum_columns(const Logits& g, const float* scale, int64_t N, int64_t begin, int64_t end,
                 float* out) {
  if (g.is_bf16) {
    column_sums(static_cast<const uint16_t*>(g.data), g.stride, scale, N, begin, end, out);
  } else {
    column_sums(static_cast<const float*>(g.data), g.stride, scale, N, begin, end, out);
  }
}

constexpr const char* kOp = "linear_cross_entropy";

Logits logits_of(const Tensor& logits, const char* name) {
  const ScalarType dtype = logits.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, kOp, ": ", name,
                  " must be Float or BFloat16, got ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(logits.dim() == 2, kOp, ": ", name, " must be a matrix");
  STD_TORCH_CHECK(logits.stride(1) == 1 || logits.size(1) == 1, kOp, ": ", name,
                  " must have unit column stride");
  return {logits.data_ptr(), logits.stride(0), dtype == ScalarType::BFloat16};
}

float* vector_of(const Tensor& vector, int64_t size, const char* name) {
  check_argument(vector, ScalarType::Float, kOp, name);
  STD_TORCH_CHECK(vector.numel() == size, kOp, ": ", name, " must have ", size,
                  " elements, got ", vector.numel());
  return vector.mutable_data_ptr<float>();
}

float* vector_of(const std::optional<Tensor>& vector, int64_t size, const char* name) {
  return vector ? vector_of(*vector, size, name) : nullptr;
}

void linear_cross_entropy_pass_cpu(const Tensor& logits, const std::optional<Tensor>& bias,
                                   const Tensor& target, const std::optional<Tensor>& exact,
                                   const std::optional<Tensor>& teacher_logits,
                                   const std::optional<Tensor>& teacher_bias,
                                   double label_smoothing, double alpha, int64_t ignore_index,
                                   bool write_grad, const Tensor& loss) {
  const int64_t N = logits.size(0), V = logits.size(1);
  check_argument(target, ScalarType::Long, kOp, "target");
  STD_TORCH_CHECK(target.numel() == N, kOp, ": target must have one element for each row");
  Logits teacher;
  if (teacher_logits) {
    teacher = logits_of(*teacher_logits, "teacher_logits");
    STD_TORCH_CHECK(teacher_logits->size(0) == N && teacher_logits->size(1) == V, kOp,
                    ": teacher_logits must have the shape of logits");
  }
  std::atomic<int64_t> bad_row{-1};
  const Problem problem{logits_of(logits, "logits"),
                        teacher,
                        vector_of(bias, V, "bias"),
                        vector_of(teacher_bias, V, "teacher_bias"),
                        target.const_data_ptr<int64_t>(),
                        vector_of(exact, N, "exact"),
                        vector_of(loss, N, "loss"),
                        N,
                        V,
                        ignore_index,
                        static_cast<float>((1 - alpha) * (1 - label_smoothing)),
                        static_cast<float>((1 - alpha) * label_smoothing / V),
                        static_cast<float>(alpha),
                        write_grad,
                        &bad_row};
  const int64_t grain = std::max<int64_t>(1, kGrainLogits / std::max<int64_t>(1, V));
  torch::stable::parallel_for(0, N, grain, [&](int64_t begin, int64_t end) {
    cross_entropy_rows(problem, begin, end);
  });
  const int64_t row = bad_row.load();
  STD_TORCH_CHECK(row < 0, kOp, ": target ", problem.target[row],
                  " is out of bounds: expected 0 <= target < V = ", V, ", or ignore_index = ",
                  ignore_index);
}

void linear_cross_entropy_bias_grad_cpu(const Tensor& dlogits, const Tensor& scale,
                                        const Tensor& out) {
  const int64_t N = dlogits.size(0), V = dlogits.size(1);
  const Logits g = logits_of(dlogits, "dlogits");
  const float* factor = vector_of(scale, N, "scale");
  float* sums = vector_of(out, V, "out");
  const int64_t grain = std::max<int64_t>(1, kGrainLogits / std::max<int64_t>(1, N));
  torch::stable::parallel_for(0, V, grain, [&](int64_t begin, int64_t end) {
    sum_columns(g, factor, N, begin, end, sums);
  });
}

}  // namespace
}  // namespace vlpfast

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
  m.impl("linear_cross_entropy_pass", TORCH_BOX(&vlpfast::linear_cross_entropy_pass_cpu));
  m.impl("linear_cross_entropy_bias_grad",
         TORCH_BOX(&vlpfast::linear_cross_entropy_bias_grad_cpu));
}
