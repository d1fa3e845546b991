// Gradients in the features at a fixed plan. Included by each_target.h; no include guard.
//
// With unit rows xh, yh and the plan T, the gradient of upstream * sum_ij C_ij T_ij in row r is
//     -upstream / |own_r| (sum_k T_rk other_k / |other_k| - own_r / |own_r| sum_k T_rk S_rk),
// the last term left out where the norm is clamped, which is a constant: a mixture of rows as they
// are, weighted with T_rk / |other_k|, that starts from the row's own.

namespace vlpfast::VLPFAST_NAMESPACE {

// A vector, to where vectors are aligned, without a place in the caches.
VLPFAST_INLINE void store_past_caches(float* p, Vec v) {
#if !defined(__x86_64__)
  store(p, v);
#elif VLPFAST_LANES == 16
  _mm512_stream_ps(p, (__m512)v);
#elif VLPFAST_LANES == 8
  _mm256_stream_ps(p, (__m256)v);
#else
  _mm_stream_ps(p, (__m128)v);
#endif
}

// Other threads see what went past the caches.
VLPFAST_INLINE void publish_past_caches() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Floats as features.
inline void write_row(Dtype dtype, const float* from, void* features, int64_t start, int64_t dim) {
  const auto convert = [&]<class T>(T* to) {
    for (int64_t d = 0; d < dim; ++d) to[start + d] = static_cast<T>(from[d]);
  };
  if (dtype == Dtype::kFloat) convert(static_cast<float*>(features));
  if (dtype == Dtype::kBFloat16) convert(static_cast<BFloat16*>(features));
  if (dtype == Dtype::kHalf) convert(static_cast<Half*>(features));
}

// Tile of a mixture: rows and vectors of features. 24 accumulators of 32 registers for AVX-512, 12
// of 16 else.
constexpr int kMixedRows = kLanes == 16 ? 8 : 4, kMixedVecs = 3;

// Rows out_r = factor_r (sum_k weight_rk other_k - along_r own_r) of up to kMixedRows rows.
struct Mixture {
  const float* weight;  // weight_rk at weight[r * row_step + k * step]
  int64_t row_step, step;
  const float* const* other;  // (count,)
  int64_t count;
  const float* const* own;  // (rows,), as the following
  const float* along;
  float factor[kMixedRows];
  float* out[kMixedRows];
};

template <int R, int V, bool kPastCaches>
inline void mix_tile(const Mixture& tile, int64_t d) {
  Vec mixed[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      mixed[r][v] = load(tile.own[r] + d + v * kLanes) * -tile.along[r];
    }
  }
  const float* weight = tile.weight;
  for (int64_t k = 0; k < tile.count; ++k, weight += tile.step) {
    Vec row[V];
    for (int v = 0; v < V; ++v) row[v] = load(tile.other[k] + d + v * kLanes);
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) mixed[r][v] += weight[r * tile.row_step] * row[v];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      float* to = tile.out[r] + d + v * kLanes;
      const Vec value = tile.factor[r] * mixed[r][v];
      if constexpr (kPastCaches) {
        store_past_caches(to, value);
      } else {
        store(to, value);
      }
    }
  }
}

template <int R, bool kPastCaches>
inline void mix_features(const Mixture& tile, int64_t ld) {
  int64_t d = 0;
  for (; d + kMixedVecs * kLanes <= ld; d += kMixedVecs * kLanes) {
    mix_tile<R, kMixedVecs, kPastCaches>(tile, d);
  }
  for (; d < ld; d += kLanes) mix_tile<R, 1, kPastCaches>(tile, d);
}

// The next rows of a mixture, as many as are left and one tile takes: their number.
template <bool kPastCaches, int R = kMixedRows>
VLPFAST_INLINE int mix_rows(const Mixture& tile, int64_t left, int64_t ld) {
  if constexpr (R > 1) {
    if (left < R) return mix_rows<kPastCaches, R / 2>(tile, left, ld);
  }
  mix_features<R, kPastCaches>(tile, ld);
  return R;
}

// The gradient in the rows of one side, 0 where a row is not valid: weights T_rk / |other_k| at
// weight[r * row_step + k * step], along_r = sum_k T_rk S_rk / |own_r|, 0 if the norm is clamped.
// `room` holds kMixedRows rows.
inline void feature_gradient(const float* weight, int64_t row_step, int64_t step, const Rows& own,
                             const Valid& valid, const Rows& other, int64_t num_other,
                             const float* along, float upstream, float* room,
                             const FeatureGradient& out) {
  const int64_t ld = own.ld, num_rows = valid.size();
  const bool in_place = out.dtype == Dtype::kFloat && out.dim == ld;
  const bool past_caches =
      in_place && out.past_caches && reinterpret_cast<uintptr_t>(out.data) % sizeof(Vec) == 0;
  Mixture tile{.row_step = row_step, .step = step, .other = other.row, .count = num_other};
  int64_t written = 0;  // rows
  for (int64_t r0 = 0, taken; r0 < num_rows; r0 += taken) {
    const int64_t left = std::min<int64_t>(num_rows - r0, kMixedRows);
    tile.weight = weight + r0 * row_step, tile.own = own.row + r0, tile.along = along + r0;
    for (int64_t r = 0; r < left; ++r) {
      tile.factor[r] = -upstream * own.inverse_norm[r0 + r];
      tile.out[r] = in_place ? static_cast<float*>(out.row(valid.index[r0 + r])) : room + r * ld;
    }
    taken = past_caches ? mix_rows<true>(tile, left, ld) : mix_rows<false>(tile, left, ld);
    for (int64_t r = r0; r < r0 + taken; ++r) {
      out.zero(written, valid.index[r]);
      written = valid.index[r] + 1;
      if (!in_place) write_row(out.dtype, tile.out[r - r0], out.row(valid.index[r]), 0, out.dim);
    }
  }
  out.zero(written, out.length);
}

}  // namespace vlpfast::VLPFAST_NAMESPACE
