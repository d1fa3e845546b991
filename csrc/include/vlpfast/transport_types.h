// What the CPU engine of optimal transport is given, whatever the target; no tensor in it.
//
// Letters: m, n = valid rows of the two sides of one problem; D = features; ld = n or D rounded up
// to whole vectors.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "vlpfast/buffer.h"

namespace vlpfast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// A cosine's vectors are divided by at least this (torch.nn.functional.normalize in UNITER).
constexpr float kMinNorm = 1e-5f;
// The scaling form of IPOT is taken while its kernel spans no more than exp(this); at beta = 0.5
// that of cosines spans exp(4) at most.
constexpr double kIpotScaling = 20.0;
// The scaling form of Sinkhorn is taken while its kernel spans no more than exp(this): what it
// computes then stays inside of fp32.
constexpr double kSinkhornScaling = 40.0;
constexpr double kScalingWeights = 1e12;  // and while weights differ by no more than that

// One side of a batch: rows of features, read in place.
struct Side {
  const void* data;      // (B, length, D), the last dimension contiguous
  int64_t batch_stride;  // in elements, as token_stride
  int64_t token_stride;
  int64_t length;
  const bool* mask;      // (B, length) or null: which rows are valid
};

enum class Dtype { kFloat, kBFloat16, kHalf };

struct FeaturePair {
  Side x, y;  // on lengths M and N
  Dtype dtype;
  int64_t dim;
};

struct IpotOptions {
  double beta;
  int64_t iters;
  int64_t inner;
  double tol;  // negative: never stop early
};

struct SinkhornOptions {
  double eps;
  int64_t iters;
  double tol;    // negative: never stop early
  double damp_a;  // tau / (tau + eps); 1: the marginal is enforced
  double damp_b;
  double tau_a;  // infinite: the marginal is enforced
  double tau_b;
};

// Results of a batch, in padded tensors; null where they are not asked for.
struct Solutions {
  float* distance;      // (B,)
  float* value;         // (B,)
  float* plan;          // (B, M, N)
  float* f;             // (B, M)
  float* g;             // (B, N)
  int64_t* num_iters;   // (B,)
};

// Gradients in the features, in their dtype and contiguous; null where they are not asked for.
struct Gradients {
  void* x;  // (B, M, D)
  void* y;  // (B, N, D)
  bool past_caches;  // written without a place in the caches, which could not keep them
};

// One problem's part of a gradient.
struct FeatureGradient {
  int64_t row_bytes() const { return dim * (dtype == Dtype::kFloat ? 4 : 2); }
  void* row(int64_t r) const { return static_cast<char*>(data) + (first_row + r) * row_bytes(); }
  // Rows [begin, end) are 0.
  void zero(int64_t begin, int64_t end) const {
    if (begin < end) std::memset(row(begin), 0, (end - begin) * row_bytes());
  }

  void* data;
  Dtype dtype;
  int64_t dim;
  int64_t first_row;  // of `length`
  int64_t length;
  bool past_caches;
};

// IPOT on features, or on `cost` where it is given.
struct IpotBatch {
  int64_t size;
  FeaturePair in;
  const float* cost;  // (B, M, N) or null
  IpotOptions options;
  Solutions out;
  // What backward would write for an upstream gradient of weight or, unmatched, -weight.
  Gradients gradients;
  const bool* matched;
  float weight;
};

// The gradient in the features of sum_b upstream_b sum_ij C_ij plan_ij.
struct GradientBatch {
  int64_t size;
  FeaturePair in;
  const float* plan;      // (B, M, N)
  const float* upstream;  // (B,)
  Gradients gradients;
};

struct SinkhornBatch {
  int64_t size, num_sources, num_targets;
  const float* cost;    // (B, M, N)
  const float* a;       // (B, M)
  const float* b;       // (B, N)
  const float* f_init;  // (B, M) or null
  SinkhornOptions options;
  Solutions out;
};

// The indices of the valid rows of one problem.
struct Valid {
  std::vector<int32_t> index;

  // Where row `problem` of a mask is true, or of weights positive; everywhere if there is neither.
  template <class T>
  void gather(const T* mask, int64_t problem, int64_t length) {
    index.clear();
    for (int32_t i = 0; i < length; ++i) {
      if (mask == nullptr || mask[problem * length + i] > 0) index.push_back(i);
    }
  }
  int64_t size() const { return static_cast<int64_t>(index.size()); }
  // Whether there is no hole between the first and the last.
  bool contiguous() const { return size() > 0 && index.back() - index.front() + 1 == size(); }
};

}  // namespace vlpfast
