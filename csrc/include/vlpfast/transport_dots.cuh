// Raw dot products and squared norms of the rows of one transport problem, into shared memory, by
// the 16 warps of one block. Rows are addressed through lists of those that take part.
//
// bf16 and fp16: tensor cores, fp32 sums. Fragments come straight from device memory, 16 bytes a
// lane: the two operands may share any order of k. fp32: fused multiply-adds in order of k. TF32
// would round the features, and tensor cores truncate their sums: three passes of TF32 stay near
// 4e-6 relative at 768 features, where 1e-6 is promised.
#pragma once

#include <algorithm>

#include "vlpfast/rows.cuh"

namespace vlpfast {

constexpr int kTransportWarps = 16;
constexpr int kTransportThreads = kTransportWarps * kWarp;

// The problem's rows, and where results go: dot (i, j) to dots[j * leading + i].
struct DotsTarget {
  int m, n, leading;
  const uint16_t *rows, *cols;
  float *dots, *x_squares, *y_squares;
};

// Rows of x that a warp multiplies at a time: 8 tiles of 8 are 32 accumulators a lane.
template <typename T, int TILES, bool ALIGNED>
__device__ void dots_mma(const Rows<T>& x, const Rows<T>& y, const DotsTarget& to) {
  const int thread = opaque(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int g = lane / 4, t = lane % 4;
  const int num_tiles = (to.n + 15) / 16;
  const auto squares = [](const uint4& v) {
    float sum = 0.0f;
    for (const uint32_t pair : {v.x, v.y, v.z, v.w}) {
      const float2 f = unpack(pair, T());
      sum = fmaf(f.x, f.x, fmaf(f.y, f.y, sum));
    }
    return sum;
  };
  const auto sum_of_four = [](float v) {
    v += __shfl_xor_sync(kAll, v, 1);
    return v + __shfl_xor_sync(kAll, v, 2);
  };

  for (int tile = warp; tile < num_tiles; tile += kTransportWarps) {
    const int j = tile * 16 + g;
    // A row that does not exist is stood for by the last one; its products go nowhere.
    const int col_low = to.cols[min(j, to.n - 1)], col_high = to.cols[min(j + 8, to.n - 1)];
    for (int i0 = 0; i0 < to.m; i0 += 8 * TILES) {
      float c[TILES][4] = {};
      float x_square[TILES] = {}, low_square = 0.0f, high_square = 0.0f;
      for (int k0 = 0; k0 < x.width; k0 += 32) {
        const int k = k0 + 8 * t;
        const uint4 low = y.template load16<ALIGNED>(col_low, k), high = y.template load16<ALIGNED>(col_high, k);
        if (i0 == 0) {
          low_square += squares(low);
          high_square += squares(high);
        }
#pragma unroll
        for (int q = 0; q < TILES; ++q) {
          const int first = i0 + 8 * q;
          if (first >= to.m) continue;  // the same for the whole warp
          const uint4 b = x.template load16<ALIGNED>(to.rows[min(first + g, to.m - 1)], k);
          mma(c[q], low.x, high.x, low.y, high.y, b.x, b.y, T());
          mma(c[q], low.z, high.z, low.w, high.w, b.z, b.w, T());
          // The norms of a tile of x are one warp's work.
          if (first / 8 % num_tiles == tile) x_square[q] += squares(b);
        }
      }
#pragma unroll
      for (int q = 0; q < TILES; ++q) {
        const int first = i0 + 8 * q;
        if (first >= to.m) continue;
        if (first / 8 % num_tiles == tile) {
          const float square = sum_of_four(x_square[q]);
          if (t == 0 && first + g < to.m) to.x_squares[first + g] = square;
        }
        float* out = to.dots + j * to.leading + first + 2 * t;
        if (j < to.n) *reinterpret_cast<float2*>(out) = make_float2(c[q][0], c[q][1]);
        out += 8 * to.leading;
        if (j + 8 < to.n) *reinterpret_cast<float2*>(out) = make_float2(c[q][2], c[q][3]);
      }
      if (i0 == 0) {
        low_square = sum_of_four(low_square);
        high_square = sum_of_four(high_square);
        if (t == 0 && j < to.n) to.y_squares[j] = low_square;
        if (t == 0 && j + 8 < to.n) to.y_squares[j + 8] = high_square;
      }
    }
  }
}

// fp32 goes in blocks of BI x BJ products, 4 x 4 a thread, eight features at a time through a slab
// of shared memory, stored [k][row].
constexpr int kSlabDepth = 8;

// BI, by the rows of x; BJ follows.
__host__ __device__ constexpr int dots_block(int m) { return m <= 32 ? 32 : 64; }

// The slab lies where the last block of columns will be written after the slab's last use; with
// several blocks of rows that moment comes too late, and it lies behind all products.
__host__ __device__ constexpr int slab_offset(int m, int n, int leading) {
  const int block_j = 16 * kTransportThreads / dots_block(m);
  return m <= 64 ? (n - 1) / block_j * block_j * leading : n * leading;
}

// Floats from the first product to the end of the slab.
__host__ __device__ constexpr int slab_end(int m, int n, int leading) {
  const int block_i = dots_block(m), block_j = 16 * kTransportThreads / block_i;
  return slab_offset(m, n, leading) + kSlabDepth * (block_i + 4 + block_j + 4);
}

template <int BI, bool ALIGNED>
__device__ void dots_fma(const Rows<float>& x, const Rows<float>& y, const DotsTarget& to) {
  constexpr int BJ = 16 * kTransportThreads / BI;
  constexpr int kStrideX = BI + 4, kStrideY = BJ + 4;  // a slab's store meets no bank twice
  constexpr int kVectors = (2 * (BI + BJ) + kTransportThreads - 1) / kTransportThreads;
  const int thread = opaque(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  // A warp covers 16 x 32 products.
  const int i_in = 16 * (warp % (BI / 16)) + 4 * (lane % 4);
  const int j_in = 32 * (warp / (BI / 16)) + 4 * (lane / 4);
  float* slab_x = to.dots + slab_offset(to.m, to.n, to.leading);
  float* slab_y = slab_x + kSlabDepth * kStrideX;

  for (int j0 = 0; j0 < to.n; j0 += BJ) {
    for (int i0 = 0; i0 < to.m; i0 += BI) {
      // Vector v is half (4 features) of row v / 2 of the slab, x before y; two neighbouring lanes
      // have the halves of one row.
      uint4 next[kVectors];
      float square[kVectors] = {};
      const auto load = [&](int u, int k0) {
        const int v = thread + u * kTransportThreads, row = v / 2, k = k0 + 4 * (v % 2);
        const int i = i0 + row, j = j0 + row - BI;
        next[u] = make_uint4(0, 0, 0, 0);
        if (row < BI && i < to.m) next[u] = x.template load16<ALIGNED>(to.rows[i], k);
        if (row >= BI && row < BI + BJ && j < to.n) next[u] = y.template load16<ALIGNED>(to.cols[j], k);
      };
#pragma unroll
      for (int u = 0; u < kVectors; ++u) load(u, 0);
      float c[4][4] = {};
      const bool busy = j0 + j_in - j_in % 32 < to.n && i0 + i_in - i_in % 16 < to.m;
      for (int k0 = 0; k0 < x.width; k0 += kSlabDepth) {
        __syncthreads();  // the slab before this one is done with
#pragma unroll
        for (int u = 0; u < kVectors; ++u) {
          const int v = thread + u * kTransportThreads, row = v / 2, k = 4 * (v % 2);
          const float f[4] = {__uint_as_float(next[u].x), __uint_as_float(next[u].y),
                              __uint_as_float(next[u].z), __uint_as_float(next[u].w)};
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            square[u] = fmaf(f[e], f[e], square[u]);
            if (row < BI) {
              slab_x[(k + e) * kStrideX + row] = f[e];
            } else if (row < BI + BJ) {
              slab_y[(k + e) * kStrideY + row - BI] = f[e];
            }
          }
        }
        __syncthreads();
#pragma unroll
        for (int u = 0; u < kVectors; ++u) load(u, k0 + kSlabDepth);
        if (!busy) continue;
#pragma unroll
        for (int k = 0; k < kSlabDepth; ++k) {
          const float4 a = *reinterpret_cast<const float4*>(slab_x + k * kStrideX + i_in);
          const float4 b = *reinterpret_cast<const float4*>(slab_y + k * kStrideY + j_in);
          const float xs[4] = {a.x, a.y, a.z, a.w}, ys[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
          for (int q = 0; q < 4; ++q) {
#pragma unroll
            for (int e = 0; e < 4; ++e) c[q][e] = fmaf(ys[q], xs[e], c[q][e]);
          }
        }
      }
      __syncthreads();  // the products may take the slab's place
#pragma unroll
      for (int u = 0; u < kVectors; ++u) {
        const int v = thread + u * kTransportThreads, row = v / 2;
        const float total = square[u] + __shfl_xor_sync(kAll, square[u], 1);
        const int i = i0 + row, j = j0 + row - BI;
        if (v % 2 == 0 && row < BI && j0 == 0 && i < to.m) to.x_squares[i] = total;
        if (v % 2 == 0 && row >= BI && row < BI + BJ && i0 == 0 && j < to.n) {
          to.y_squares[j] = total;
        }
      }
      const int i = i0 + i_in, j = j0 + j_in;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        if (j + q < to.n && i < to.m) {
          *reinterpret_cast<float4*>(to.dots + (j + q) * to.leading + i) =
              make_float4(c[q][0], c[q][1], c[q][2], c[q][3]);
        }
      }
    }
  }
}

template <typename T, int TILES, bool ALIGNED>
__device__ void dots(const Rows<T>& x, const Rows<T>& y, const DotsTarget& to) {
  if constexpr (sizeof(T) == 2) {
    dots_mma<T, TILES, ALIGNED>(x, y, to);
  } else if (to.m <= 32) {
    dots_fma<32, ALIGNED>(x, y, to);
  } else {
    dots_fma<64, ALIGNED>(x, y, to);
  }
}

}  // namespace vlpfast
