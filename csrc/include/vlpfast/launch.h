// Launchers of the CUDA kernels: pointers, sizes and a stream, so that neither side needs the other's
// headers. They return at once and report nothing; the caller checks the launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace vlpfast {

// Largest num_patches that fits one warp's keys into the default 48 KiB of shared memory.
constexpr int64_t kKeepIdsMaxPatches = 12288;

// seed: one int64 on the device; valid (num_samples, num_patches): nullable.
void launch_keep_ids(const int64_t* seed, const int64_t* sample_ids, const bool* valid, int64_t* ids,
                     int64_t* inverse, int64_t num_samples, int num_patches, int num_keep,
                     cudaStream_t stream);

// transport: small optimal transport problems, one block each. M, N: rows and columns of a problem;
// what is said of the plan, f and g is in vlpfast/ops/transport.py.
enum class FeatureType { kFloat, kBFloat16, kHalf };

// Token i of problem b begins at element b * stride_batch + i * stride_row; features are contiguous.
struct FeatureRows {
  const void* data;
  int64_t stride_batch, stride_row;
};

struct TransportProblems {
  int64_t batch;
  int M, N, D;
  FeatureType type;
  FeatureRows x, y;             // without data: `cost` is given
  const float* cost;            // (batch, M, N)
  const bool *x_mask, *y_mask;  // (batch, M), (batch, N); nullable
  const float *a, *b, *f_init;  // Sinkhorn's weights and nullable start
};

struct TransportSchedule {
  double rate;  // 1 / beta or 1 / eps
  int iters, inner;
  double tol;             // < 0: none
  double damp_a, damp_b;  // tau / (tau + eps)
  double tau_a, tau_b;    // 0: balanced
  bool sinkhorn, log;     // Sinkhorn is always on logarithms
};

struct TransportResults {
  float *distance, *value, *plan, *f, *g;  // value: Sinkhorn's
  int64_t* num_iters;
  float* stats;  // nullable (batch, 2, M + N): 1 / norm, and sum of plan * cosine, of every row
};

// The scaling form is right from here on; below, fp32 flushes entries of the plan.
constexpr double kTransportLogBeta = 0.1;
constexpr int kTransportMaxTokens = 65535;  // of one side

// Shared memory a problem takes, 0 where its plan does not fit the registers of a block either.
int64_t transport_shared_bytes(int M, int N, bool sinkhorn, bool log);

// Shared memory a block may have on the current device.
int64_t max_shared_bytes();

void launch_transport(const TransportProblems& problems, const TransportSchedule& schedule,
                      const TransportResults& results, cudaStream_t stream);

// Fills `stats` from a plan.
void launch_transport_stats(const TransportProblems& problems, const float* plan, float* stats,
                            cudaStream_t stream);

// Gradients of sum_b u_b distance_b in the features, (batch, M, D) and (batch, N, D), each nullable;
// u = grad_distance, or +-weight by `matched` where that is null.
void launch_transport_grad(const TransportProblems& problems, const float* plan, const float* stats,
                           const float* grad_distance, const bool* matched, float weight,
                           void* grad_x, void* grad_y, cudaStream_t stream);

// loss = weight * sum_b (matched ? distance : -distance), in a fixed order.
void launch_wra_loss(const float* distance, const bool* matched, float* loss, int64_t batch,
                     float weight, cudaStream_t stream);

}  // namespace vlpfast
