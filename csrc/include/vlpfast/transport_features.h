// Features to cosines: rows read in place, their norms and products. Included by each_target.h; no
// include guard.

namespace vlpfast::VLPFAST_NAMESPACE {

// The valid rows of one side as floats: where they lie if those are whole vectors of fp32, else in
// `copy` with zeros up to whole vectors.
struct Rows {
  Rows(int64_t max_rows, int64_t dim)
      : ld(padded(dim)), copy(max_rows * ld), row(max_rows), inverse_norm(padded(max_rows)),
        clamped(max_rows) {}

  int64_t ld;
  Buffer<float> copy;          // (rows, ld)
  Buffer<const float*> row;    // (rows,): ld floats each
  Buffer<float> inverse_norm;  // 1 / max(norm, kMinNorm), 0 up to whole vectors
  Buffer<bool> clamped;        // the norm is below kMinNorm
};

// Features from `start` on, as floats.
inline void read_row(Dtype dtype, const void* features, int64_t start, int64_t dim, float* to) {
  const auto convert = [&]<class T>(const T* from) {
    for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<float>(from[start + d]);
  };
  if (dtype == Dtype::kFloat) convert(static_cast<const float*>(features));
  if (dtype == Dtype::kBFloat16) convert(static_cast<const BFloat16*>(features));
  if (dtype == Dtype::kHalf) convert(static_cast<const Half*>(features));
}

// Where a side of a problem has its rows.
struct Source {
  VLPFAST_INLINE Source(const Side& side, Dtype type, int64_t num_features, int64_t problem)
      : data(side.data), start(problem * side.batch_stride), stride(side.token_stride),
        dtype(type), dim(num_features) {}

  VLPFAST_INLINE int64_t row_bytes() const { return dim * (dtype == Dtype::kFloat ? 4 : 2); }
  VLPFAST_INLINE const char* row(int64_t token) const {
    return static_cast<const char*>(data) +
           (start + token * stride) * (dtype == Dtype::kFloat ? 4 : 2);
  }

  const void* data;
  int64_t start, stride;  // in elements
  Dtype dtype;
  int64_t dim;
};

// Row r of `rows`, the valid.index[r] of the source, and its norm.
VLPFAST_INLINE void take_row(const Source& source, const Valid& valid, int64_t r,
                             const Rows& rows) {
  const int32_t token = valid.index[r];
  if (source.dtype == Dtype::kFloat && source.dim == rows.ld) {
    rows.row[r] = reinterpret_cast<const float*>(source.row(token));
  } else {
    float* copy = rows.copy + r * rows.ld;
    read_row(source.dtype, source.data, source.start + token * source.stride, source.dim, copy);
    std::fill(copy + source.dim, copy + rows.ld, 0.0f);
    rows.row[r] = copy;
  }
  Vec squares[4] = {};
  for (int64_t d = 0, k = 0; d < rows.ld; d += kLanes, k = (k + 1) % 4) {
    squares[k] += load(rows.row[r] + d) * load(rows.row[r] + d);
  }
  const float norm = std::sqrt(sum((squares[0] + squares[1]) + (squares[2] + squares[3])));
  rows.clamped[r] = norm < kMinNorm;
  rows.inverse_norm[r] = 1.0f / (norm < kMinNorm ? kMinNorm : norm);
}

// Tile of the product of rows: one accumulator for each pair, as many pairs as a vector has lanes.
constexpr int kTileM = kLanes == 4 ? 2 : kLanes / 4, kTileN = kLanes / kTileM;

// Part `part` of `parts` of the rows that the next tile takes, towards L2.
VLPFAST_INLINE void prefetch_rows(const Source& source, const Valid& valid, int64_t j0,
                                  int64_t part, int64_t parts) {
  constexpr int64_t kLine = 64;
  const int64_t lines = source.row_bytes() / kLine + 1;
  const int64_t begin = lines * part / parts, end = lines * (part + 1) / parts;
  for (int64_t j = j0; j < std::min(j0 + kTileN, valid.size()); ++j) {
    const char* row = source.row(valid.index[j]);
    for (int64_t line = begin; line < end; ++line) __builtin_prefetch(row + line * kLine, 0, 2);
  }
}

// Takes the rows of both sides; similarity (m, ld) = x y^T / (|x| |y|). Products come before norms:
// a row is read from memory while the tile before is multiplied. A tile that juts out repeats the
// last row and drops it, so that the bits of one product do not depend on where it lies.
VLPFAST_INLINE void cosines(const FeaturePair& in, int64_t problem, const Valid& x_valid,
                            const Valid& y_valid, const Rows& x, const Rows& y,
                            float* similarity) {
  const Source from_x(in.x, in.dtype, in.dim, problem), from_y(in.y, in.dtype, in.dim, problem);
  const int64_t m = x_valid.size(), n = y_valid.size(), ld = padded(n);
  const int64_t num_tiles = (m + kTileM - 1) / kTileM;
  for (int64_t i = 0; i < m; ++i) take_row(from_x, x_valid, i, x);
  std::fill(x.inverse_norm + m, x.inverse_norm + padded(m), 0.0f);
  for (int64_t j0 = 0; j0 < n; j0 += kTileN) {
    const float* ys[kTileN];
    for (int64_t j = j0; j < std::min(j0 + kTileN, n); ++j) take_row(from_y, y_valid, j, y);
    for (int b = 0; b < kTileN; ++b) ys[b] = y.row[std::min(j0 + b, n - 1)];
    for (int64_t i0 = 0; i0 < m; i0 += kTileM) {
      prefetch_rows(from_y, y_valid, j0 + kTileN, i0 / kTileM, num_tiles);
      const float* xs[kTileM];
      for (int a = 0; a < kTileM; ++a) xs[a] = x.row[std::min(i0 + a, m - 1)];
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
          similarity[(i0 + a) * ld + j0 + b] =
              sums[a * kTileN + b] * x.inverse_norm[i0 + a] * y.inverse_norm[j0 + b];
        }
      }
    }
  }
  std::fill(y.inverse_norm + n, y.inverse_norm + ld, 0.0f);
  for (int64_t i = 0; i < m; ++i) {
    float* row = similarity + i * ld;
    std::fill(row + n, row + ld, row[0]);  // no extreme of the problem
  }
}

}  // namespace vlpfast::VLPFAST_NAMESPACE
