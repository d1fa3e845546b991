// Vectors of VLPFAST_LANES floats, for files that each_target.h includes; no include guard.
// IEEE throughout: no reassociation, so a sum's order is what the code says.

namespace vlpfast::VLPFAST_NAMESPACE {

constexpr int kLanes = VLPFAST_LANES;

typedef float Vec __attribute__((vector_size(4 * VLPFAST_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * VLPFAST_LANES)));
typedef Vec UnalignedVec __attribute__((aligned(4), may_alias));
// As many doubles as fill a register, and as many floats.
typedef float HalfVec __attribute__((vector_size(2 * VLPFAST_LANES)));
typedef HalfVec UnalignedHalfVec __attribute__((aligned(4), may_alias));
typedef double DoubleVec __attribute__((vector_size(4 * VLPFAST_LANES)));
typedef DoubleVec UnalignedDoubleVec __attribute__((aligned(8), may_alias));

VLPFAST_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
VLPFAST_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
VLPFAST_INLINE void store(float* p, HalfVec v) { *reinterpret_cast<UnalignedHalfVec*>(p) = v; }
VLPFAST_INLINE DoubleVec load(const double* p) {
  return *reinterpret_cast<const UnalignedDoubleVec*>(p);
}
VLPFAST_INLINE void store(double* p, DoubleVec v) { *reinterpret_cast<UnalignedDoubleVec*>(p) = v; }
VLPFAST_INLINE DoubleVec load_doubles(const float* p) {
  return __builtin_convertvector(*reinterpret_cast<const UnalignedHalfVec*>(p), DoubleVec);
}
VLPFAST_INLINE HalfVec to_floats(DoubleVec v) { return __builtin_convertvector(v, HalfVec); }
VLPFAST_INLINE Vec all(float x) { return Vec{} + x; }
VLPFAST_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

// Whole vectors that n floats take, in floats.
VLPFAST_INLINE int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Lane l of step Q of sums_of: where its summand comes from, of the lanes of a and then b.
constexpr int source_lane(int l, int q, int upper) {
  const int segment = l / (2 * q) * (2 * q), place = l % (2 * q);
  return segment + place % q + upper * q + (place < q ? 0 : kLanes);
}

template <int Q, int... L>
VLPFAST_INLINE Vec fold(Vec a, Vec b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, source_lane(L, Q, 0)...) +
         __builtin_shufflevector(a, b, source_lane(L, Q, 1)...);
}

template <int Q>
VLPFAST_INLINE void fold_all(Vec (&v)[kLanes]) {
  for (int k = 0; k < Q; ++k) {
    v[k] = fold<Q>(v[k], v[k + Q], std::make_integer_sequence<int, kLanes>{});
  }
  if constexpr (Q > 1) fold_all<Q / 2>(v);
}

// Lane k of the result: the sum over the lanes of v[k], by halves.
VLPFAST_INLINE Vec sums_of(Vec (&v)[kLanes]) {
  fold_all<kLanes / 2>(v);
  return v[0];
}

// Lane l of step Q of transpose: what row a or, kUpper, row b takes of the lanes of a and then b.
template <bool kUpper>
constexpr int crossed_lane(int l, int q) {
  const bool from_b = (l & q) != 0;
  return from_b ? kLanes + l - (kUpper ? 0 : q) : l + (kUpper ? q : 0);
}

template <int Q, int... L>
VLPFAST_INLINE void cross(Vec& a, Vec& b, std::integer_sequence<int, L...>) {
  const Vec lower = __builtin_shufflevector(a, b, crossed_lane<false>(L, Q)...);
  b = __builtin_shufflevector(a, b, crossed_lane<true>(L, Q)...);
  a = lower;
}

// Lane i of v[k] becomes lane k of v[i].
template <int Q = kLanes / 2>
VLPFAST_INLINE void transpose(Vec (&v)[kLanes]) {
  for (int k = 0; k < kLanes; ++k) {
    if ((k & Q) == 0) cross<Q>(v[k], v[k + Q], std::make_integer_sequence<int, kLanes>{});
  }
  if constexpr (Q > 1) transpose<Q / 2>(v);
}

VLPFAST_INLINE float sum(Vec v) {
  float parts[kLanes];
  store(parts, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) parts[l] += parts[l + width];
  }
  return parts[0];
}

// exp(x + low), |low| << 1, to about one ulp; 0 below the normal range, NaN stays. x <= 88.
VLPFAST_INLINE Vec exp(Vec x, Vec low) {
  constexpr float kLowest = -87.33f, kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const Vec inside = x < kLowest ? all(kLowest) : x;
  const Vec shifted = inside * 1.44269504088896341f + kRound;
  const Vec n = shifted - kRound;
  const Vec r = (inside - n * kLn2High) - n * kLn2Low + low;
  Vec y = r * (1.0f / 5040) + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * (r * r) + r + 1.0f;
  const IntVec exponent = (IntVec)shifted - (IntVec)all(kRound) + 127;
  return x < kLowest ? Vec{} : y * (Vec)(exponent << 23);
}

// log(x) for normal x > 0, to about one ulp (polynomial: Cephes, logf); NaN for NaN and infinity.
VLPFAST_INLINE Vec log(Vec x) {
  IntVec bits = (IntVec)x;
  // Mantissa in [sqrt(1/2), sqrt(2)).
  IntVec exponent = (bits - 0x3F3504F3) >> 23;
  const Vec m = (Vec)(bits - (exponent << 23)) - 1.0f;
  Vec y = m * 7.0376836292e-2f - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  const Vec n = __builtin_convertvector(exponent, Vec), square = m * m;
  y = y * m * square + n * -2.12194440e-4f - 0.5f * square;
  return m + y + n * 0.693359375f + (x - x);
}

}  // namespace vlpfast::VLPFAST_NAMESPACE
