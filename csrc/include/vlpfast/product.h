// Small matrix products, summed in fp32, for tiles that lie in the caches. Included by
// each_target.h, after vec.h; no include guard. Where VLPFAST_BF16_PAIRS is defined (by who targets
// AVX512-BF16), factors may also be uint32_t: two bf16 of neighbouring k, the earlier one in the
// low half.

namespace vlpfast::VLPFAST_NAMESPACE {

// A matrix whose element (i, k) is data[i * row + k * step].
template <class T>
struct StridedOf {
  const T* data;
  int64_t row, step;
};
using Strided = StridedOf<float>;

VLPFAST_INLINE Vec add_product(Vec sum, float factor, Vec row) { return sum + factor * row; }

#ifdef VLPFAST_BF16_PAIRS
VLPFAST_INLINE IntVec load(const uint32_t* p) {
  IntVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
VLPFAST_INLINE Vec add_product(Vec sum, uint32_t factor, IntVec row) {
  const IntVec factors = IntVec{} + static_cast<int32_t>(factor);
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)factors, (__m512bh)row);
}
#endif

// Rows of a tile and its vectors of columns: 24 accumulators of 32 registers for AVX-512, 12 of 16
// else.
constexpr int kProductRows = kLanes == 16 ? 6 : 3, kProductVecs = 4;

template <int R, int V, bool kAdd, class T>
VLPFAST_INLINE void product_tile(const StridedOf<T>& a, const T* b, int64_t ldb, int64_t depth,
                                 float* out, int64_t ld) {
  Vec sums[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sums[r][v] = kAdd ? load(out + r * ld + v * kLanes) : Vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    decltype(load(b)) row[V];
    for (int v = 0; v < V; ++v) row[v] = load(b + k * ldb + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const T factor = a.data[r * a.row + k * a.step];
      for (int v = 0; v < V; ++v) sums[r][v] = add_product(sums[r][v], factor, row[v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(out + r * ld + v * kLanes, sums[r][v]);
  }
}

template <int V, bool kAdd, class T>
inline void product_columns(StridedOf<T> a, int64_t rows, const T* b, int64_t ldb, int64_t depth,
                            float* out, int64_t ld) {
  constexpr int kHalf = kProductRows / 2;
  for (; rows >= kProductRows; rows -= kProductRows) {
    product_tile<kProductRows, V, kAdd>(a, b, ldb, depth, out, ld);
    a.data += kProductRows * a.row;
    out += kProductRows * ld;
  }
  for (; kHalf > 1 && rows >= kHalf; rows -= kHalf) {
    product_tile<kHalf, V, kAdd>(a, b, ldb, depth, out, ld);
    a.data += kHalf * a.row;
    out += kHalf * ld;
  }
  for (; rows > 0; --rows) {
    product_tile<1, V, kAdd>(a, b, ldb, depth, out, ld);
    a.data += a.row;
    out += ld;
  }
}

// out (rows, ld) = a b, or += with kAdd; a is (rows, depth), b (depth, ldb). Both b and out have
// `columns` columns, whole vectors.
template <bool kAdd, class T>
inline void product_of(const StridedOf<T>& a, int64_t rows, const T* b, int64_t ldb,
                       int64_t depth, int64_t columns, float* out, int64_t ld) {
  constexpr int64_t kWide = kProductVecs * kLanes;
  for (; columns >= kWide; columns -= kWide, b += kWide, out += kWide) {
    product_columns<kProductVecs, kAdd>(a, rows, b, ldb, depth, out, ld);
  }
  switch (columns / kLanes) {
    case 3: return product_columns<3, kAdd>(a, rows, b, ldb, depth, out, ld);
    case 2: return product_columns<2, kAdd>(a, rows, b, ldb, depth, out, ld);
    case 1: return product_columns<1, kAdd>(a, rows, b, ldb, depth, out, ld);
  }
}

template <bool kAdd>
inline void product(const Strided& a, int64_t rows, const float* b, int64_t ldb, int64_t depth,
                    int64_t columns, float* out, int64_t ld) {
  product_of<kAdd>(a, rows, b, ldb, depth, columns, out, ld);
}

}  // namespace vlpfast::VLPFAST_NAMESPACE
