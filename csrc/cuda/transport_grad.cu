// Gradients of transport distances at a constant plan, and the alignment loss. With T the plan of a
// problem, u its upstream and z_i = sum_k T_ik other_k / |other_k|:
//
//   grad_i = -u (z_i - own_i / |own_i| along_i) / |own_i|,  along_i = <own_i / |own_i|, z_i>
//
// 1 / norm and `along` come from the kernel before. A block makes 32 rows of one side, 256 features
// of them: a warp 64, all 32 rows. bf16: tensor cores, T / |other_k| as a sum of two bf16 (16 bits).
// fp32 and fp16: fused multiply-adds, since fp16 has no room for entries of a plan.
#include <algorithm>
#include <type_traits>

#include "vlpfast/rows.cuh"

namespace vlpfast {
namespace {

constexpr int kTileRows = 32;
constexpr int kWarpFeatures = 64;
constexpr int kGradWarps = 4;
constexpr int kGradThreads = kGradWarps * kWarp;
constexpr int kBlockFeatures = kGradWarps * kWarpFeatures;
constexpr int kDepth = 64;            // entries of a row of T at a time
constexpr int kStrideT = kDepth + 4;  // floats between rows of T

struct GradArguments {
  FeatureRows x, y;
  const bool *x_mask, *y_mask;
  int M, N, D;
  const float *plan, *stats, *grad_distance;
  const bool* matched;
  float weight;
  void *grad_x, *grad_y;
};

// What a block works on: `own` rows get a gradient, `other` rows are summed.
struct Side {
  int64_t b;
  bool y;
  int num_own, num_other;  // before compaction
  int first_row, first_feature;
};

__device__ uint32_t pack(__nv_bfloat16 low, __nv_bfloat16 high) {
  return element_bits(low) | element_bits(high) << 16;
}

// The sum of two bf16 that is nearest to each of two floats: high parts, then low parts.
__device__ uint2 split(float a, float b) {
  const __nv_bfloat16 ah = __float2bfloat16(a), bh = __float2bfloat16(b);
  return make_uint2(pack(ah, bh), pack(__float2bfloat16(a - __bfloat162float(ah)),
                                       __float2bfloat16(b - __bfloat162float(bh))));
}

// z of the warp's 64 features: c[tile][e][.] of rows 16 tile + g (and + 8) and features 16 t + e (and
// 16 t + 8 + e), by 16 other rows at a time; lane 4 g + t loads features 8 g .. of rows 4 t .. + 3.
template <bool ALIGNED>
__device__ void multiply(const Rows<__nv_bfloat16>& other, const float* plan, const uint16_t* ids,
                         int count, int feature, float (&c)[2][8][4]) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  for (int k0 = 0; k0 < count; k0 += 16) {
    uint4 rows[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      // Beyond `count` the plan is 0 and any row will do.
      rows[q] = other.load16<ALIGNED>(ids[min(k0 + 4 * t + q, count - 1)], feature + 8 * g);
    }
    uint32_t low[8], high[8];  // of feature 8 g + e: rows 4 t and 4 t + 1, then the two after
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const auto word = [&](int q) {
        return w == 0 ? rows[q].x : w == 1 ? rows[q].y : w == 2 ? rows[q].z : rows[q].w;
      };
      low[2 * w] = __byte_perm(word(0), word(1), 0x5410);
      low[2 * w + 1] = __byte_perm(word(0), word(1), 0x7632);
      high[2 * w] = __byte_perm(word(2), word(3), 0x5410);
      high[2 * w + 1] = __byte_perm(word(2), word(3), 0x7632);
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const float* row = plan + (16 * tile + g) * kStrideT + k0 + 4 * t;
      const float4 p = *reinterpret_cast<const float4*>(row);
      const float4 q = *reinterpret_cast<const float4*>(row + 8 * kStrideT);
      const uint2 p0 = split(p.x, p.y), p1 = split(p.z, p.w);
      const uint2 q0 = split(q.x, q.y), q1 = split(q.z, q.w);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        mma(c[tile][e], p0.x, q0.x, p1.x, q1.x, low[e], high[e], __nv_bfloat16());
        mma(c[tile][e], p0.y, q0.y, p1.y, q1.y, low[e], high[e], __nv_bfloat16());
      }
    }
  }
}

// z of the lane's two features, all 32 rows.
template <typename T>
__device__ void multiply(const Rows<T>& other, const float* plan, const uint16_t* ids, int count,
                         int feature, float (&z)[kTileRows][2]) {
  for (int k0 = 0; k0 < count; k0 += 4) {
    float a[4], b[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int row = ids[min(k0 + q, count - 1)];
      a[q] = other.at(row, feature);
      b[q] = other.at(row, feature + 1);
    }
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      const float4 p4 = *reinterpret_cast<const float4*>(plan + r * kStrideT + k0);
      const float p[4] = {p4.x, p4.y, p4.z, p4.w};
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        z[r][0] = fmaf(p[q], a[q], z[r][0]);
        z[r][1] = fmaf(p[q], b[q], z[r][1]);
      }
    }
  }
}

// Entries of the plan over |other|, 32 rows by kDepth, 0 where there are none.
__device__ void load_plan(const GradArguments& arguments, const Side& side, const uint16_t* ids,
                          int count, unsigned valid, float* to) {
  const float* plan = arguments.plan + side.b * arguments.M * arguments.N;
  const float* scales = arguments.stats + side.b * 2 * (arguments.M + arguments.N) +
                        (side.y ? 0 : arguments.M);
  for (int v = threadIdx.x; v < kTileRows * kDepth; v += kGradThreads) {
    // Neighbouring threads read neighbouring entries.
    const int r = side.y ? v % kTileRows : v / kDepth, k = side.y ? v / kTileRows : v % kDepth;
    float value = 0.0f;
    if (k < count && (valid >> r & 1)) {
      const int own = side.first_row + r, other = ids[k];
      value = plan[side.y ? other * arguments.N + own : own * arguments.N + other] * scales[other];
    }
    to[r * kStrideT + k] = value;
  }
}

// The gradient of one element; `scale` is 1 / |own|.
__device__ float gradient(float u, float z, float own, float scale, float along) {
  // A clamped norm is a constant: nothing to project.
  const float projected = scale < 1.0f / kNormEps ? own * scale * along : 0.0f;
  return -u * scale * (z - projected);
}

__device__ void store(float* to, float value) { *to = value; }
__device__ void store(__half* to, float value) { *to = __float2half(value); }
__device__ void store(__nv_bfloat16* to, float value) { *to = __float2bfloat16(value); }

template <typename T, bool ALIGNED>
__device__ void block_gradient(const GradArguments& arguments, const Side& side, const Rows<T>& own,
                               const Rows<T>& other, T* out, float* plan, const uint16_t* ids,
                               int num_other, unsigned valid) {
  constexpr bool kTensorCores = std::is_same_v<T, __nv_bfloat16>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int first = side.first_feature + warp * kWarpFeatures;
  float z[kTileRows][2] = {};
  float c[2][8][4] = {};
  for (int k0 = 0; k0 < num_other; k0 += kDepth) {
    const int count = min(kDepth, num_other - k0);
    __syncthreads();  // the entries before these are done with
    load_plan(arguments, side, ids + k0, count, valid, plan);
    __syncthreads();
    if (first >= arguments.D) continue;
    if constexpr (kTensorCores) {
      multiply<ALIGNED>(other, plan, ids + k0, count, first, c);
    } else {
      multiply(other, plan, ids + k0, count, first + 2 * lane, z);
    }
  }

  const float* scales = arguments.stats + side.b * 2 * (arguments.M + arguments.N) +
                        (side.y ? arguments.M : 0);
  const float* along = scales + arguments.M + arguments.N;
  const float u = arguments.matched ? (arguments.matched[side.b] ? arguments.weight
                                                                 : -arguments.weight)
                                    : arguments.grad_distance[side.b];
  const auto write = [&](int r, int feature, float value) {
    const int row = side.first_row + r;
    if (row >= side.num_own || feature >= arguments.D) return;
    float result = 0.0f;
    if (valid >> r & 1) {
      result = gradient(u, value, own.at(row, feature), scales[row], along[row]);
    }
    store(out + (side.b * side.num_own + row) * arguments.D + feature, result);
  };
  if constexpr (kTensorCores) {
#pragma unroll
    for (int part = 0; part < 8; ++part) {
      const int tile = part / 4, corner = part % 4;  // one of the four elements of every c[tile][e]
      const int r = 16 * tile + 8 * (corner / 2) + g, row = side.first_row + r;
      const int feature = first + 16 * t + 8 * (corner % 2);
      if (!own.aligned) {
#pragma unroll
        for (int e = 0; e < 8; ++e) write(r, feature + e, c[tile][e][corner]);
        continue;
      }
      if (row >= side.num_own || feature >= arguments.D) continue;
      uint4 packed = make_uint4(0, 0, 0, 0);
      if (valid >> r & 1) {
        const uint4 loaded = own.template load16<true>(row, feature);
        const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
        uint32_t results[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float2 pair = unpack(words[w], T());
          const float low = c[tile][2 * w][corner], high = c[tile][2 * w + 1][corner];
          results[w] = pack(
              __float2bfloat16(gradient(u, low, pair.x, scales[row], along[row])),
              __float2bfloat16(gradient(u, high, pair.y, scales[row], along[row])));
        }
        packed = make_uint4(results[0], results[1], results[2], results[3]);
      }
      // Rows of the result are 16 bytes long or a multiple of that, as the features' are.
      T* to = out + (side.b * side.num_own + row) * arguments.D + feature;
      *reinterpret_cast<uint4*>(to) = packed;
    }
  } else {
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      write(r, first + 2 * lane, z[r][0]);
      write(r, first + 2 * lane + 1, z[r][1]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kGradThreads, 3)
    transport_grad_kernel(GradArguments arguments, int tiles_x, int tiles_y) {
  __shared__ __align__(16) float plan[kTileRows * kStrideT];
  __shared__ int num_other;
  extern __shared__ uint16_t ids[];  // the other side's rows that take part
  const int parts = (arguments.D + kBlockFeatures - 1) / kBlockFeatures;
  const int64_t unit = blockIdx.x / parts;
  const int tile = static_cast<int>(unit % (tiles_x + tiles_y));
  Side side;
  side.b = unit / (tiles_x + tiles_y);
  side.y = tile >= tiles_x;
  side.num_own = side.y ? arguments.N : arguments.M;
  side.num_other = side.y ? arguments.M : arguments.N;
  side.first_row = kTileRows * (side.y ? tile - tiles_x : tile);
  side.first_feature = static_cast<int>(blockIdx.x % parts) * kBlockFeatures;

  const bool* own_mask = side.y ? arguments.y_mask : arguments.x_mask;
  const bool* other_mask = side.y ? arguments.x_mask : arguments.y_mask;
  if (threadIdx.x < kWarp) {
    const int count = compact(other_mask ? other_mask + side.b * side.num_other : nullptr, nullptr,
                              side.num_other, ids);
    if (threadIdx.x == 0) num_other = count;
  }
  const int row = side.first_row + threadIdx.x % kWarp;
  bool takes_part = row < side.num_own;
  if (takes_part && own_mask) takes_part = own_mask[side.b * side.num_own + row];
  const unsigned own_valid = __ballot_sync(kAll, takes_part);  // the same in every warp
  __syncthreads();
  const unsigned valid = num_other > 0 ? own_valid : 0;
  const int count = valid ? num_other : 0;

  const FeatureRows own_rows{side.y ? arguments.y.data : arguments.x.data,
                             side.y ? arguments.y.stride_batch : arguments.x.stride_batch,
                             side.y ? arguments.y.stride_row : arguments.x.stride_row};
  const FeatureRows other_rows{side.y ? arguments.x.data : arguments.y.data,
                               side.y ? arguments.x.stride_batch : arguments.y.stride_batch,
                               side.y ? arguments.x.stride_row : arguments.y.stride_row};
  const Rows<T> own(own_rows, side.b, arguments.D), other(other_rows, side.b, arguments.D);
  T* out = static_cast<T*>(side.y ? arguments.grad_y : arguments.grad_x);
  if (other.aligned) {
    block_gradient<T, true>(arguments, side, own, other, out, plan, ids, count, valid);
  } else {
    block_gradient<T, false>(arguments, side, own, other, out, plan, ids, count, valid);
  }
}

// One block; every thread its own terms in order, then a tree.
__global__ void wra_loss_kernel(const float* distance, const bool* matched, float* loss,
                                int64_t batch, float weight) {
  __shared__ float sums[kWarp];
  float total = 0.0f;
  for (int64_t b = threadIdx.x; b < batch; b += blockDim.x) {
    total += matched[b] ? distance[b] : -distance[b];
  }
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(kAll, total, step);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < static_cast<int>(blockDim.x) / kWarp; ++w) total += sums[w];
    *loss = weight * total;
  }
}

}  // namespace

void launch_transport_grad(const TransportProblems& problems, const float* plan, const float* stats,
                           const float* grad_distance, const bool* matched, float weight,
                           void* grad_x, void* grad_y, cudaStream_t stream) {
  const GradArguments arguments{problems.x, problems.y, problems.x_mask, problems.y_mask,
                                problems.M, problems.N, problems.D,      plan,
                                stats,      grad_distance, matched,      weight,
                                grad_x,     grad_y};
  const int tiles_x = grad_x ? (problems.M + kTileRows - 1) / kTileRows : 0;
  const int tiles_y = grad_y ? (problems.N + kTileRows - 1) / kTileRows : 0;
  const int parts = (problems.D + kBlockFeatures - 1) / kBlockFeatures;
  const auto blocks = static_cast<unsigned>(problems.batch * (tiles_x + tiles_y) * parts);
  const size_t bytes = sizeof(uint16_t) * std::max(problems.M, problems.N);
  const auto kernel = problems.type == FeatureType::kFloat       ? transport_grad_kernel<float>
                      : problems.type == FeatureType::kBFloat16 ? transport_grad_kernel<__nv_bfloat16>
                                                                : transport_grad_kernel<__half>;
  kernel<<<blocks, kGradThreads, bytes, stream>>>(arguments, tiles_x, tiles_y);
}

void launch_wra_loss(const float* distance, const bool* matched, float* loss, int64_t batch,
                     float weight, cudaStream_t stream) {
  wra_loss_kernel<<<1, 256, 0, stream>>>(distance, matched, loss, batch, weight);
}

}  // namespace vlpfast
