// Small optimal transport problems, one block of 16 warps each, from features or cost to plan.
//
// E is the cosine of two rows, or -cost. It is in shared memory, [column][row], until the iterations
// are over; nothing but the plan is in device memory. A lane has rows 16 r + 4 t .. + 3 of column
// 8 c + g (lane = 8 t + g) and a warp has the columns c = warp, warp + 16, ...: sums over rows end
// within the warp, sums over columns meet in shared memory, in an order given by m and n alone.
//
// Scaling form: A = exp(rate E) in shared memory, Q in registers: 80 a lane hold 64 x 577, where A and
// Q would need 2 x 148 KiB (a 2-block cluster would hold them too, but not on sm_80). One block of 512
// threads and 128 registers fills an SM's registers. A second kernel of the same code with
// at most 20 values a lane and 64 registers, 2 blocks on an SM, takes 32 x 196. Which of the two runs
// does not show in the result: the number of rows a lane has depends on m alone.
// Log form: E in shared memory, potentials in fp64, nothing else.
#include <algorithm>

#include "vlpfast/transport_dots.cuh"

namespace vlpfast {
namespace {

constexpr int kColumnsPerStep = 8 * kTransportWarps;

// Rows of Q a lane holds, so that 4 lanes hold m; 0 where no layout does.
__host__ __device__ constexpr int rows_per_lane(int m) {
  return m <= 16 ? 4 : m <= 32 ? 8 : m <= 64 ? 16 : m <= 160 ? 40 : 0;
}

// Columns of Q a lane holds beside that many rows.
__host__ __device__ constexpr int columns_per_lane(int rows) {
  return rows == 4 ? 12 : rows == 8 ? 8 : rows == 16 ? 5 : 2;
}

// Floats between columns of E: an odd multiple of 4, so that 8 lanes' vectors meet no bank twice.
__host__ __device__ constexpr int leading(int m, bool log) {
  return log ? (m + 7) / 8 * 8 + 4 : 4 * rows_per_lane(m) + 4;
}

__host__ __device__ constexpr int round_up(int n, int multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Bytes of shared memory before E: vectors of the iterations (norms before them), then the lists.
__host__ __device__ constexpr int vector_bytes(int M, int N, bool log) {
  const int rows = 4 * rows_per_lane(M);
  const int norms = 4 * (M + N);
  const int iterations =
      log ? 8 * (3 * M + N) : 4 * (3 * rows + kTransportWarps * (rows + 2));
  return round_up(norms > iterations ? norms : iterations, 16);
}

__host__ __device__ constexpr int header_bytes(int M, int N, bool log) {
  return vector_bytes(M, N, log) + round_up(2 * (M + N), 16) + 4 * kWarp;
}

struct Shared {
  float *x_scales, *y_scales;               // the squared norms, then 1 / norm
  float *sigma, *f, *log_sigma, *partials;  // scaling form; f: sum of log sigma
  double *p, *start, *f_log, *q;            // log form
  uint16_t *rows, *cols;
  float *reduced, *e;

  __device__ Shared(char* base, int M, int N, bool log) {
    x_scales = reinterpret_cast<float*>(base);
    y_scales = x_scales + M;
    const int padded = 4 * rows_per_lane(M);
    sigma = reinterpret_cast<float*>(base);
    f = sigma + padded;
    log_sigma = f + padded;
    partials = log_sigma + padded;
    p = reinterpret_cast<double*>(base);
    start = p + M;
    f_log = start + M;
    q = f_log + M;
    rows = reinterpret_cast<uint16_t*>(base + vector_bytes(M, N, log));
    cols = rows + M;
    reduced = reinterpret_cast<float*>(base + header_bytes(M, N, log) - 4 * kWarp);
    e = reduced + kWarp;
  }
};

// One problem as a block sees it.
struct Problem {
  int m, n, leading;
  float shift;          // cost = shift - E
  int M, N;

  __device__ int place(const Shared& shared, int i, int j) const {
    return shared.rows[i] * N + shared.cols[j];
  }
};

// Results of this block's problem; worked out where they are used, so that no register holds the
// pointers while the iterations need them all.
struct Output {
  float *plan, *f, *g, *scales, *along;  // the last two nullable

  __device__ Output(const TransportResults& results, int M, int N) {
    const int64_t b = opaque(blockIdx.x);
    plan = results.plan + b * M * N;
    f = results.f + b * M;
    g = results.g + b * N;
    scales = results.stats ? results.stats + b * 2 * (M + N) : nullptr;
    along = scales ? scales + M + N : nullptr;
  }
};

__device__ int lane_id() { return threadIdx.x % kWarp; }
__device__ int warp_id() { return threadIdx.x / kWarp; }

// Calls visit(i, j) for every column and `rows` rows, each time in the same threads.
template <typename Visit>
__device__ void for_each(const Problem& problem, int rows, const Visit& visit) {
  const int thread = opaque(threadIdx.x);
  const int g = thread % 8, t = thread / 8 % 4;
  for (int c = thread / kWarp; 8 * c < problem.n; c += kTransportWarps) {
    const int j = 8 * c + g;
    if (j >= problem.n) continue;
    for (int i0 = 4 * t; i0 < rows; i0 += 16) {
#pragma unroll 1
      for (int i = i0; i < min(i0 + 4, rows); ++i) visit(i, j);
    }
  }
}

// Sum over the block, the same in all threads.
template <typename T>
__device__ T block_sum(T value, float* memory) {
  T* reduced = reinterpret_cast<T*>(memory);  // 32 floats hold 16 of either type
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  __syncthreads();  // an earlier sum has been read
  if (lane_id() == 0) reduced[warp_id()] = value;
  __syncthreads();
  T total = 0;
  for (int w = 0; w < kTransportWarps; ++w) total += reduced[w];
  return total;
}

// Over the lanes of a column: those with the same lane % 8.
template <typename T>
__device__ T column_sum(T value) {
  value += __shfl_xor_sync(kAll, value, 8);
  return value + __shfl_xor_sync(kAll, value, 16);
}

// exp(e * rate) with the rounding of the product made up for; the plan repeats an error 50 times.
__device__ float exp_of_product(float e, float rate) {
  const float high = __fmul_rn(e, rate);
  return expf(high) * (1.0f + fmaf(e, rate, -high));
}

__device__ float inverse_norm(float square) {
  return 1.0f / (square < kNormEps * kNormEps ? kNormEps : sqrtf(square));  // NaN stays
}

// E of the problem into shared memory; the rows of a column that no token has are 0.
template <int TILES>
__device__ void make_e(const TransportProblems& problems, const Problem& problem,
                       const Shared& shared, int64_t b) {
  const int m = problem.m, n = problem.n, ld = problem.leading;
  const auto products = [&](auto type) {
    using T = decltype(type);
    const int block = opaque(static_cast<int>(b));
    const Rows<T> x(problems.x, block, problems.D), y(problems.y, block, problems.D);
    const DotsTarget to{opaque(m),   opaque(n), opaque(ld),      shared.rows,
                        shared.cols, shared.e,  shared.x_scales, shared.y_scales};
    if (x.aligned && y.aligned) {
      dots<T, TILES, true>(x, y, to);
    } else {
      dots<T, 1, false>(x, y, to);
    }
  };
  if (!problems.cost) {
    if (problems.type == FeatureType::kFloat) {
      products(float());
    } else if (problems.type == FeatureType::kBFloat16) {
      products(__nv_bfloat16());
    } else {
      products(__half());
    }
    __syncthreads();
    for (int i = threadIdx.x; i < m + n; i += kTransportThreads) {
      float* scale = i < m ? shared.x_scales + i : shared.y_scales + i - m;
      *scale = inverse_norm(*scale);
    }
    __syncthreads();
  }
  for_each(problem, ld - 4, [&](int i, int j) {
    float& e = shared.e[j * ld + i];
    if (i >= m) {
      e = 0.0f;
    } else if (problems.cost) {
      e = -problems.cost[b * problem.M * problem.N + problem.place(shared, i, j)];
    } else {
      e *= shared.x_scales[i] * shared.y_scales[j];
    }
  });
  __syncthreads();
}

// The scaling form; returns this thread's part of the distance. E in shared memory becomes A, and at
// the end plan * E; in between, E waits in the plan's memory, each thread's own elements.
template <int R, int S>
__device__ float solve_scaling(const Problem& problem, const Shared& shared,
                               const TransportSchedule& schedule, const TransportResults& results,
                               int* num_iters) {
  const int m = opaque(problem.m), n = opaque(problem.n), ld = leading(4 * R, false);
  const int thread = opaque(threadIdx.x);
  const int g = thread % 8, t = thread / 8 % 4, warp = thread / kWarp;
  constexpr int kStridePartials = 4 * R + 2;
  const float rate = static_cast<float>(schedule.rate);
  float q[S][R], delta[S], log_delta[(S + 3) / 4] = {};
  const auto column = [&](int s) { return 8 * (s * kTransportWarps + warp) + g; };

  {
    const Output output(results, problem.M, problem.N);
    for_each(problem, m, [&](int i, int j) {
      float& e = shared.e[j * ld + i];
      output.plan[problem.place(shared, i, j)] = e;
      e = exp_of_product(e, rate);
    });
  }
#pragma unroll
  for (int s = 0; s < S; ++s) {
    delta[s] = static_cast<float>(m);  // with sigma = 1 / m it makes T = 1
#pragma unroll
    for (int r = 0; r < R; ++r) {
      q[s][r] = 16 * (r / 4) + 4 * t + r % 4 < m && column(s) < n ? 1.0f : 0.0f;
    }
  }
  for (int i = threadIdx.x; i < 4 * R; i += kTransportThreads) {
    shared.sigma[i] = i < m ? 1.0f / m : 0.0f;
    shared.log_sigma[i] = -logf(static_cast<float>(m));
    shared.f[i] = 0.0f;
  }
  __syncthreads();

  int step = 0;
  bool moving = true;
  while (step < schedule.iters && moving) {
    for (int k = 0; k < schedule.inner; ++k) {
      const bool last = k == schedule.inner - 1;
      // delta = 1 / (n Q^T sigma); first Q = A T, T = sigma Q delta.
#pragma unroll
      for (int s = 0; s < S; ++s) {
        const int j = column(s);
        if (j - g >= n) continue;  // the same for the whole warp
        float total = 0.0f;
#pragma unroll
        for (int r = 0; r < R; r += 4) {
          const int i = 4 * r + 4 * t;
          const float4 sigma4 = *reinterpret_cast<const float4*>(shared.sigma + i);
          const float sigma[4] = {sigma4.x, sigma4.y, sigma4.z, sigma4.w};
          if (k == 0) {
            float4 a4 = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (j < n) a4 = *reinterpret_cast<const float4*>(shared.e + j * ld + i);
            const float a[4] = {a4.x, a4.y, a4.z, a4.w};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              q[s][r + e] = q[s][r + e] * delta[s] * sigma[e] * a[e];
            }
          }
#pragma unroll
          for (int e = 0; e < 4; ++e) total = fmaf(q[s][r + e], sigma[e], total);
        }
        total = column_sum(total);
        delta[s] = j < n ? 1.0f / (n * total) : 0.0f;
      }
      if (last) {
        // Lane t of a column takes the logarithms of every fourth.
#pragma unroll
        for (int s = 0; s < S; s += 4) {
          float mine = delta[s];
#pragma unroll
          for (int e = 1; e < 4; ++e) {
            if (s + e < S && t == e) mine = delta[min(s + e, S - 1)];
          }
          log_delta[s / 4] += logf(mine);
        }
      }
      // sigma = 1 / (m Q delta): over the warp's columns, the 8 lanes of a row, then the warps.
#pragma unroll
      for (int r = 0; r < R; r += 4) {
        float total[4] = {};
#pragma unroll
        for (int s = 0; s < S; ++s) {
#pragma unroll
          for (int e = 0; e < 4; ++e) total[e] = fmaf(q[s][r + e], delta[s], total[e]);
        }
        // Four sums over 8 lanes by exchanging halves: a lane ends with the sum of row 2 * (g / 4)
        // + g / 2 % 2 of the four.
        const bool upper = g & 4, odd = g & 2;
        float keep0 = upper ? total[2] : total[0], give0 = upper ? total[0] : total[2];
        float keep1 = upper ? total[3] : total[1], give1 = upper ? total[1] : total[3];
        keep0 += __shfl_xor_sync(kAll, give0, 4);
        keep1 += __shfl_xor_sync(kAll, give1, 4);
        float keep = odd ? keep1 : keep0;
        keep += __shfl_xor_sync(kAll, odd ? keep0 : keep1, 2);
        keep += __shfl_xor_sync(kAll, keep, 1);
        if (g % 2 == 0) {
          shared.partials[warp * kStridePartials + 4 * r + 4 * t + g / 2] = keep;
        }
      }
      __syncthreads();
      bool moved = false;
      for (int i = threadIdx.x / 4; i < 4 * R; i += kTransportThreads / 4) {
        const int quarter = threadIdx.x % 4;
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < kTransportWarps / 4; ++w) {
          total += shared.partials[(kTransportWarps / 4 * quarter + w) * kStridePartials + i];
        }
        total += __shfl_xor_sync(kAll, total, 1);
        total += __shfl_xor_sync(kAll, total, 2);
        if (quarter == 0 && i < m) {
          const float sigma = 1.0f / (m * total);
          shared.sigma[i] = sigma;
          if (last) {
            const float log_sigma = logf(sigma);
            moved |= fabsf(log_sigma - shared.log_sigma[i]) > schedule.tol * schedule.rate;
            shared.log_sigma[i] = log_sigma;
            shared.f[i] += log_sigma;
          }
        }
      }
      const bool any_moved = __syncthreads_or(moved);
      if (last && schedule.tol >= 0) moving = any_moved;
    }
    ++step;
  }
  *num_iters = step;

  // The plan by way of shared memory, each element in the thread that has it in `for_each` as well.
#pragma unroll
  for (int s = 0; s < S; ++s) {
    const int j = column(s);
#pragma unroll
    for (int r = 0; r < R; r += 4) {
      const int i = 4 * r + 4 * t;
      const float4 sigma = *reinterpret_cast<const float4*>(shared.sigma + i);
      if (j < n) {
        *reinterpret_cast<float4*>(shared.e + j * ld + i) =
            make_float4(q[s][r] * delta[s] * sigma.x, q[s][r + 1] * delta[s] * sigma.y,
                        q[s][r + 2] * delta[s] * sigma.z, q[s][r + 3] * delta[s] * sigma.w);
      }
    }
  }
  const Output output(results, problem.M, problem.N);
  float distance = 0.0f;
  for_each(problem, m, [&](int i, int j) {
    float* plan = output.plan + problem.place(shared, i, j);
    float& shared_e = shared.e[j * ld + i];
    const float e = *plan, transported = shared_e;
    *plan = transported;
    shared_e = transported * e;
    distance = fmaf(problem.shift - e, transported, distance);
  });
  const float eps = static_cast<float>(1.0 / (schedule.rate * step));
  const float log_n = logf(static_cast<float>(n)), log_m = logf(static_cast<float>(m));
#pragma unroll
  for (int s = 0; s < S; ++s) {
    const int j = column(s);
    if (s % 4 == t && j < n) {
      output.g[shared.cols[j]] = eps * (log_delta[s / 4] + log_n) + problem.shift;
    }
  }
  for (int i = threadIdx.x; i < m; i += kTransportThreads) {
    output.f[shared.rows[i]] = eps * (shared.f[i] + log_m);
  }
  return distance;
}

// The layout for m rows, whatever rows the batch has.
__device__ float solve_by_rows(const Problem& problem, const Shared& shared,
                               const TransportSchedule& schedule, const TransportResults& results,
                               int* num_iters) {
  switch (rows_per_lane(problem.m)) {
    case 4:
      return solve_scaling<4, columns_per_lane(4)>(problem, shared, schedule, results,
                                                    num_iters);
    case 8:
      return solve_scaling<8, columns_per_lane(8)>(problem, shared, schedule, results,
                                                    num_iters);
    case 16:
      return solve_scaling<16, columns_per_lane(16)>(problem, shared, schedule, results,
                                                    num_iters);
    default:
      return solve_scaling<40, columns_per_lane(40)>(problem, shared, schedule, results,
                                                    num_iters);
  }
}

// Logarithm of a row's weight: Sinkhorn's, or one over their number.
__device__ double log_weight(const float* weights, const uint16_t* ids, int i, double uniform) {
  return weights ? log(static_cast<double>(weights[ids[i]])) : uniform;
}

// The log form: g_j = -damp_b log sum_i a_i exp(f_i + s E_ij), then f by g the same way. In shared
// memory p = f + log a and q = g + log b. IPOT's step begins at 2 f - (f before), which is where its
// warm sigma puts it; `start` is that f. Returns parts of distance, mass and, for Sinkhorn, value.
struct LogResult {
  float distance;
  double mass, dual, sum_a, sum_b;  // these nearly cancel
};

__device__ LogResult solve_log(const TransportProblems& problems, const Problem& problem,
                               const Shared& shared, const TransportSchedule& schedule,
                               const TransportResults& results, int64_t block, int* num_iters) {
  const float* a = problems.a ? problems.a + block * problem.M : nullptr;
  const float* b = problems.b ? problems.b + block * problem.N : nullptr;
  const float* f_init = problems.f_init ? problems.f_init + block * problem.M : nullptr;
  const int m = problem.m, n = problem.n, ld = problem.leading;
  const int lane = lane_id(), g = lane % 8, t = lane / 8;
  const double log_m = log(static_cast<double>(m)), log_n = log(static_cast<double>(n));
  for (int i = threadIdx.x; i < m; i += kTransportThreads) {
    const double start = f_init ? f_init[shared.rows[i]] * schedule.rate : 0.0;
    shared.start[i] = start;
    shared.f_log[i] = log_m;  // so that the first log sigma is -log m
    shared.p[i] = start + log_weight(a, shared.rows, i, -log_m);
  }
  __syncthreads();

  int step = 0;
  double s = schedule.rate;
  bool moving = true;
  while (step < schedule.iters && moving) {
    if (!schedule.sinkhorn) s = (step + 1) * schedule.rate;
    for (int k = 0; k < schedule.inner; ++k) {
      const bool last = k == schedule.inner - 1;
      for (int c = warp_id(); 8 * c < n; c += kTransportWarps) {
        const int j = 8 * c + g;
        const float* column = shared.e + min(j, n - 1) * ld;
        double top = -INFINITY;
        for (int i = 4 * t; i < m; i += 16) {
          const float4 e4 = *reinterpret_cast<const float4*>(column + i);
          const float e[4] = {e4.x, e4.y, e4.z, e4.w};
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            if (i + k < m) top = fmax(top, shared.p[i + k] + s * e[k]);
          }
        }
        top = fmax(top, __shfl_xor_sync(kAll, top, 8));
        top = fmax(top, __shfl_xor_sync(kAll, top, 16));
        double total = 0;
        for (int i = 4 * t; i < m; i += 16) {
          const float4 e4 = *reinterpret_cast<const float4*>(column + i);
          const float e[4] = {e4.x, e4.y, e4.z, e4.w};
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            if (i + k < m) total += expf(static_cast<float>(shared.p[i + k] + s * e[k] - top));
          }
        }
        total = column_sum(total);
        if (t == 0 && j < n) {
          shared.q[j] = -schedule.damp_b * (top + log(total)) +
                        log_weight(b, shared.cols, j, -log_n);
        }
      }
      __syncthreads();
      bool moved = false;
      for (int i = warp_id(); i < m; i += kTransportWarps) {
        double top = -INFINITY;
        for (int j = lane; j < n; j += kWarp) top = fmax(top, shared.q[j] + s * shared.e[j * ld + i]);
        for (int x = 16; x > 0; x /= 2) top = fmax(top, __shfl_xor_sync(kAll, top, x));
        double total = 0;
        for (int j = lane; j < n; j += kWarp) {
          total += expf(static_cast<float>(shared.q[j] + s * shared.e[j * ld + i] - top));
        }
        for (int x = 16; x > 0; x /= 2) total += __shfl_xor_sync(kAll, total, x);
        if (lane == 0) {
          const double f = -schedule.damp_a * (top + log(total));
          double next = f;
          if (last) {
            moved |= fabs(f - shared.start[i]) > schedule.tol * schedule.rate;
            if (!schedule.sinkhorn) next = 2 * f - shared.f_log[i];
            shared.start[i] = next;
            shared.f_log[i] = f;
          }
          shared.p[i] = next + log_weight(a, shared.rows, i, -log_m);
        }
      }
      const bool any_moved = __syncthreads_or(moved);
      if (last && schedule.tol >= 0) moving = any_moved;
    }
    ++step;
  }
  *num_iters = step;

  LogResult result = {};
  const Output output(results, problem.M, problem.N);
  const double eps = 1.0 / (schedule.sinkhorn ? schedule.rate : schedule.rate * step);
  // phi(f; tau) of the dual objective.
  const auto phi = [](double f, double tau) { return tau > 0 ? -tau * expm1(-f / tau) : f; };
  for (int i = threadIdx.x; i < m; i += kTransportThreads) {
    const double f = eps * shared.f_log[i];
    output.f[shared.rows[i]] = static_cast<float>(f);
    shared.p[i] = shared.f_log[i] + log_weight(a, shared.rows, i, -log_m);
    if (schedule.sinkhorn) {
      const float weight = a[shared.rows[i]];
      result.dual += weight * phi(f, schedule.tau_a);
      result.sum_a += weight;
    }
  }
  for (int j = threadIdx.x; j < n; j += kTransportThreads) {
    const double q = shared.q[j] - log_weight(b, shared.cols, j, -log_n);
    const double value = eps * q + problem.shift;
    output.g[shared.cols[j]] = static_cast<float>(value);
    if (schedule.sinkhorn) {
      const float weight = b[shared.cols[j]];
      result.dual += weight * phi(value, schedule.tau_b);
      result.sum_b += weight;
    }
  }
  __syncthreads();
  for_each(problem, m, [&](int i, int j) {
    float& e = shared.e[j * ld + i];
    const float transported = expf(static_cast<float>(shared.p[i] + shared.q[j] + s * e));
    output.plan[problem.place(shared, i, j)] = transported;
    result.distance = fmaf(problem.shift - e, transported, result.distance);
    result.mass += transported;
    e *= transported;
  });
  return result;
}

// Sums of plan * cosine, which lies in shared memory, over columns and over rows.
__device__ void sum_along(const Problem& problem, const Shared& shared,
                          const TransportResults& results) {
  float* along = Output(results, problem.M, problem.N).along;
  const int m = problem.m, n = problem.n, ld = problem.leading;
  const int lane = lane_id(), g = lane % 8, t = lane / 8;
  __syncthreads();
  for (int c = warp_id(); 8 * c < n; c += kTransportWarps) {
    const int j = 8 * c + g;
    float total = 0.0f;
    for (int i0 = 4 * t; i0 < m && j < n; i0 += 16) {
      for (int i = i0; i < min(i0 + 4, m); ++i) total += shared.e[j * ld + i];
    }
    total = column_sum(total);
    if (t == 0 && j < n) along[problem.M + shared.cols[j]] = total;
  }
  for (int i = warp_id(); i < m; i += kTransportWarps) {
    float total = 0.0f;
    for (int j = lane; j < n; j += kWarp) total += shared.e[j * ld + i];
    for (int x = 16; x > 0; x /= 2) total += __shfl_xor_sync(kAll, total, x);
    if (lane == 0) along[shared.rows[i]] = total;
  }
}

// 1 / norm of every row, before the iterations take the norms' place.
__device__ void write_scales(const Problem& problem, const Shared& shared,
                             const TransportResults& results) {
  float* scales = Output(results, problem.M, problem.N).scales;
  for (int i = threadIdx.x; i < problem.m; i += kTransportThreads) {
    scales[shared.rows[i]] = shared.x_scales[i];
  }
  for (int j = threadIdx.x; j < problem.n; j += kTransportThreads) {
    scales[problem.M + shared.cols[j]] = shared.y_scales[j];
  }
  __syncthreads();
}

// Lists the problem's rows; true if both sides have some.
__device__ bool begin(const TransportProblems& problems, bool log, const Shared& shared,
                      Problem* problem) {
  const int64_t b = blockIdx.x;
  const int M = problems.M, N = problems.N;
  int* counts = reinterpret_cast<int*>(shared.reduced);
  if (warp_id() < 2) {
    const bool y = warp_id() == 1;
    const int size = y ? N : M;
    const bool* mask = y ? problems.y_mask : problems.x_mask;
    const float* weights = y ? problems.b : problems.a;
    const int count = compact(mask ? mask + b * size : nullptr,
                              weights ? weights + b * size : nullptr, size,
                              y ? shared.cols : shared.rows);
    if (lane_id() == 0) counts[y] = count;
  }
  __syncthreads();
  const int m = counts[0], n = counts[1];
  __syncthreads();
  *problem = {m, n, leading(m, log), problems.cost ? 0.0f : 1.0f, M, N};
  return m > 0 && n > 0;
}

// 0 where no token takes part.
__device__ void clear(const TransportResults& results, const Problem& problem) {
  if (problem.m == problem.M && problem.n == problem.N) return;
  const Output output(results, problem.M, problem.N);
  for (int i = threadIdx.x; i < problem.M * problem.N; i += kTransportThreads) {
    output.plan[i] = 0.0f;
  }
  for (int i = threadIdx.x; i < problem.M; i += kTransportThreads) output.f[i] = 0.0f;
  for (int j = threadIdx.x; j < problem.N; j += kTransportThreads) output.g[j] = 0.0f;
  __syncthreads();
}

__global__ void __launch_bounds__(kTransportThreads, 1)
    transport_scaling_kernel(TransportProblems problems, TransportSchedule schedule,
                             TransportResults results) {
  extern __shared__ __align__(16) char memory[];
  const Shared shared(memory, problems.M, problems.N, false);
  const int64_t b = blockIdx.x;
  Problem problem;
  const bool solvable = begin(problems, false, shared, &problem);
  clear(results, problem);
  int num_iters = 0;
  float distance = 0.0f;
  if (solvable) {
    make_e<4>(problems, problem, shared, b);
    if (results.stats) write_scales(problem, shared, results);
    distance = solve_by_rows(problem, shared, schedule, results, &num_iters);
    distance = block_sum(distance, shared.reduced);
    if (results.stats) sum_along(problem, shared, results);
  }
  if (threadIdx.x == 0) {
    results.distance[b] = distance;
    results.num_iters[b] = num_iters;
  }
}

// IPOT below kTransportLogBeta and Sinkhorn; with no iterations, only the statistics of a given plan.
__global__ void __launch_bounds__(kTransportThreads, 1)
    transport_log_kernel(TransportProblems problems, TransportSchedule schedule,
                         TransportResults results) {
  extern __shared__ __align__(16) char memory[];
  const Shared shared(memory, problems.M, problems.N, true);
  const int64_t b = blockIdx.x;
  Problem problem;
  const bool solvable = begin(problems, true, shared, &problem);
  if (schedule.iters > 0) clear(results, problem);
  int num_iters = 0;
  float distance = 0.0f, value = 0.0f;
  if (solvable) {
    make_e<4>(problems, problem, shared, b);
    if (results.stats) write_scales(problem, shared, results);
    if (schedule.iters > 0) {
      const LogResult part = solve_log(problems, problem, shared, schedule, results, b,
                                       &num_iters);
      distance = block_sum(part.distance, shared.reduced);
      if (schedule.sinkhorn) {
        const double dual = block_sum(part.dual, shared.reduced);
        const double mass = block_sum(part.mass, shared.reduced);
        const double sum_a = block_sum(part.sum_a, shared.reduced);
        const double sum_b = block_sum(part.sum_b, shared.reduced);
        value = static_cast<float>(dual - (mass - sum_a * sum_b) / schedule.rate);
      }
    } else {
      const Output output(results, problem.M, problem.N);
      for_each(problem, problem.m, [&](int i, int j) {
        shared.e[j * problem.leading + i] *= output.plan[problem.place(shared, i, j)];
      });
    }
    if (results.stats) sum_along(problem, shared, results);
  }
  if (threadIdx.x == 0 && schedule.iters > 0) {
    results.distance[b] = distance;
    if (results.value) results.value[b] = value;
    results.num_iters[b] = num_iters;
  }
}

int64_t shared_bytes(int M, int N, bool log, bool with_slab) {
  const int ld = leading(M, log);
  int64_t floats = int64_t{N} * ld;
  if (with_slab) floats = std::max<int64_t>(floats, slab_end(M, N, ld));
  // Fewer rows can mean a longer slab.
  if (with_slab && M > 32) floats = std::max<int64_t>(floats, slab_end(32, N, leading(32, log)));
  return header_bytes(M, N, log) + 4 * floats;
}

void launch(const TransportProblems& problems, const TransportSchedule& schedule,
            const TransportResults& results, cudaStream_t stream) {
  const bool with_slab = !problems.cost && problems.type == FeatureType::kFloat;
  const int64_t bytes = shared_bytes(problems.M, problems.N, schedule.log, with_slab);
  const auto kernel = schedule.log ? transport_log_kernel : transport_scaling_kernel;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(bytes));
  kernel<<<static_cast<unsigned>(problems.batch), kTransportThreads, bytes, stream>>>(
      problems, schedule, results);
}

}  // namespace

int64_t transport_shared_bytes(int M, int N, bool sinkhorn, bool log) {
  if (!log) {
    const int rows = rows_per_lane(M);
    if (rows == 0 || N > kColumnsPerStep * columns_per_lane(rows)) return 0;
  }
  return shared_bytes(M, N, log, !sinkhorn);
}

int64_t max_shared_bytes() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

void launch_transport(const TransportProblems& problems, const TransportSchedule& schedule,
                      const TransportResults& results, cudaStream_t stream) {
  launch(problems, schedule, results, stream);
}

void launch_transport_stats(const TransportProblems& problems, const float* plan, float* stats,
                            cudaStream_t stream) {
  TransportSchedule schedule = {};
  schedule.log = true;  // its layout takes any problem
  TransportResults results = {};
  results.plan = const_cast<float*>(plan);  // without iterations it is only read
  results.stats = stats;
  launch(problems, schedule, results, stream);
}

}  // namespace vlpfast
