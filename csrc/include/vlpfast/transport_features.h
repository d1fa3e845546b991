// Features to cosines and back: normalised rows, their products, and the gradient at a fixed plan.
// Included by each_target.h; no include guard.

namespace vlpfast::VLPFAST_NAMESPACE {

// The valid rows of one side, in fp32 and divided by their norms, with zeros up to whole vectors.
struct Rows {
  Rows(int64_t max_rows, int64_t dim)
      : ld(padded(dim)), unit(max_rows * ld), inverse_norm(max_rows), clamped(max_rows) {}

  int64_t ld;
  Buffer<float> unit;          // (rows, ld)
  Buffer<float> inverse_norm;  // 1 / max(norm, kMinNorm)
  Buffer<bool> clamped;        // the norm is below kMinNorm
};

// Features from `start` on, as floats, and floats as features.
inline void read_row(Dtype dtype, const void* features, int64_t start, int64_t dim, float* to) {
  const auto convert = [&]<class T>(const T* from) {
    for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<float>(from[start + d]);
  };
  if (dtype == Dtype::kFloat) convert(static_cast<const float*>(features));
  if (dtype == Dtype::kBFloat16) convert(static_cast<const BFloat16*>(features));
  if (dtype == Dtype::kHalf) convert(static_cast<const Half*>(features));
}

inline void write_row(Dtype dtype, const float* from, void* features, int64_t start, int64_t dim) {
  const auto convert = [&]<class T>(T* to) {
    for (int64_t d = 0; d < dim; ++d) to[start + d] = static_cast<T>(from[d]);
  };
  if (dtype == Dtype::kFloat) convert(static_cast<float*>(features));
  if (dtype == Dtype::kBFloat16) convert(static_cast<BFloat16*>(features));
  if (dtype == Dtype::kHalf) convert(static_cast<Half*>(features));
}

VLPFAST_INLINE void normalise_rows(const Side& side, Dtype dtype, int64_t problem, int64_t dim,
                                   const Valid& valid, const Rows& rows) {
  for (int64_t r = 0; r < valid.size(); ++r) {
    float* to = rows.unit + r * rows.ld;
    const int64_t start = problem * side.batch_stride + valid.index[r] * side.token_stride;
    read_row(dtype, side.data, start, dim, to);
    std::fill(to + dim, to + rows.ld, 0.0f);
    Vec squares[4] = {};
    for (int64_t d = 0, k = 0; d < rows.ld; d += kLanes, k = (k + 1) % 4) {
      squares[k] += load(to + d) * load(to + d);
    }
    const float norm = std::sqrt(sum((squares[0] + squares[1]) + (squares[2] + squares[3])));
    rows.clamped[r] = norm < kMinNorm;
    rows.inverse_norm[r] = 1.0f / (norm < kMinNorm ? kMinNorm : norm);
    for (int64_t d = 0; d < rows.ld; d += kLanes) {
      store(to + d, load(to + d) * rows.inverse_norm[r]);
    }
  }
}

// Tile of the product of rows: one accumulator for each pair, as many pairs as a vector has lanes.
constexpr int kTileM = kLanes == 4 ? 2 : kLanes / 4, kTileN = kLanes / kTileM;

// similarity (m, ld) = x y^T. A tile that juts out repeats the last row and drops it, so that the
// bits of one product do not depend on where it lies.
VLPFAST_INLINE void cosines(const Rows& x, const Rows& y, int64_t m, int64_t n,
                            float* similarity) {
  const int64_t ld = padded(n);
  for (int64_t j0 = 0; j0 < n; j0 += kTileN) {
    const float* ys[kTileN];
    for (int b = 0; b < kTileN; ++b) ys[b] = y.unit + std::min(j0 + b, n - 1) * y.ld;
    for (int64_t i0 = 0; i0 < m; i0 += kTileM) {
      const float* xs[kTileM];
      for (int a = 0; a < kTileM; ++a) xs[a] = x.unit + std::min(i0 + a, m - 1) * x.ld;
      Vec products[kLanes] = {};
      for (int64_t d = 0; d < x.ld; d += kLanes) {
        for (int b = 0; b < kTileN; ++b) {
          const Vec yv = load(ys[b] + d);
          for (int a = 0; a < kTileM; ++a) products[a * kTileN + b] += load(xs[a] + d) * yv;
        }
      }
      float sums[kLanes];
      store(sums, sums_of(products));
      for (int a = 0; a < kTileM && i0 + a < m; ++a) {
        for (int b = 0; b < kTileN && j0 + b < n; ++b) {
          similarity[(i0 + a) * ld + j0 + b] = sums[a * kTileN + b];
        }
      }
    }
  }
  for (int64_t i = 0; i < m; ++i) {
    float* row = similarity + i * ld;
    std::fill(row + n, row + ld, row[0]);  // no extreme of the problem
  }
}

// Tile of plan times rows: kTileRows rows and V vectors of features. 24 accumulators of 32 for
// AVX-512, 12 of 16 else.
constexpr int kTileRows = kLanes == 16 ? 6 : 3;

template <int V>
VLPFAST_INLINE void mix_tile(const float* const (&weights)[kTileRows], int64_t step,
                             const float* from, int64_t ld, int64_t count, float* to) {
  Vec mixed[kTileRows][V] = {};
  for (int64_t k = 0; k < count; ++k) {
    Vec row[V];
    for (int v = 0; v < V; ++v) row[v] = load(from + k * ld + v * kLanes);
    for (int r = 0; r < kTileRows; ++r) {
      const float weight = weights[r][k * step];
      for (int v = 0; v < V; ++v) mixed[r][v] += weight * row[v];
    }
  }
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < V; ++v) store(to + r * ld + v * kLanes, mixed[r][v]);
  }
}

// The gradient of upstream * sum_ij C_ij T_ij in the rows of one side, T constant: 0 where a row is
// not valid. T_rk lies at plan[r * row_step + k * step]; `mixed` holds kTileRows rows.
inline void feature_gradient(const float* plan, int64_t row_step, int64_t step, const Rows& own,
                             const Valid& valid, const Rows& other, int64_t num_other,
                             float upstream, float* mixed, const FeatureGradient& out) {
  const int64_t ld = own.ld, num_rows = valid.size();
  int64_t next = 0;  // the first row that is not written
  for (int64_t r0 = 0; r0 < num_rows; r0 += kTileRows) {
    const float* weights[kTileRows];
    for (int a = 0; a < kTileRows; ++a) {
      weights[a] = plan + std::min(r0 + a, num_rows - 1) * row_step;
    }
    int64_t d = 0;
    for (; d + 4 * kLanes <= ld; d += 4 * kLanes) {
      mix_tile<4>(weights, step, other.unit + d, ld, num_other, mixed + d);
    }
    for (; d < ld; d += kLanes) {
      mix_tile<1>(weights, step, other.unit + d, ld, num_other, mixed + d);
    }
    for (int64_t r = r0; r < std::min(r0 + kTileRows, num_rows); ++r) {
      const float* unit = own.unit + r * ld;
      float* row = mixed + (r - r0) * ld;
      Vec along[2] = {};
      for (int64_t e = 0, k = 0; e < ld; e += kLanes, k ^= 1) {
        along[k] += load(row + e) * load(unit + e);
      }
      // A clamped norm is a constant: nothing is projected out.
      const float projection = own.clamped[r] ? 0.0f : sum(along[0] + along[1]);
      const float factor = -upstream * own.inverse_norm[r];
      for (int64_t e = 0; e < ld; e += kLanes) {
        store(row + e, factor * (load(row + e) - projection * load(unit + e)));
      }
      out.zero(next, valid.index[r]);
      next = valid.index[r] + 1;
      write_row(out.dtype, row, out.data, (out.first_row + valid.index[r]) * out.dim, out.dim);
    }
  }
  out.zero(next, out.length);
}

}  // namespace vlpfast::VLPFAST_NAMESPACE
