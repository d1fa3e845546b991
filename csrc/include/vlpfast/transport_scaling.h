// Matrix scaling in fp32: IPOT at beta >= 0.1 and balanced Sinkhorn with moderate exponents.
// Included by each_target.h; no include guard.
//
// Both keep a matrix P and factors of its rows and columns: the plan is left_i P_ij right_j. One
// sweep makes the factors new from weights w of the rows:
//     right_j = b_j / sum_i P_ij w_i,    left_i = a_i / sum_j P_ij right_j
// a few columns at a time, so that the second half finds them in L1. Sinkhorn's P is its kernel and
// its weights the last left. IPOT's P is multiplied by the kernel A each step, in the first half of
// the sweep: 3 multiplications an entry, one write. Its factors collect the products of sigma and
// delta over the steps; now and then, before they leave fp32's range, they go into P (kRebase).

namespace vlpfast::VLPFAST_NAMESPACE {

// Products of many factors, one for each of `size` places: mantissas in [1, 2) and exponents.
struct Products {
  explicit Products(int64_t max_size) : mantissa(max_size), exponent(max_size) {}

  VLPFAST_INLINE void begin(int64_t size) {
    std::fill(mantissa + 0, mantissa + padded(size), 1.0f);
    std::fill(exponent + 0, exponent + padded(size), 0);
  }
  VLPFAST_INLINE void multiply(const float* factors, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
      const int32_t bits = std::bit_cast<int32_t>(mantissa[i] * factors[i]);
      const int32_t e = (bits >> 23) - 127;
      exponent[i] += e;
      mantissa[i] = std::bit_cast<float>(bits - (e << 23));
    }
  }
  VLPFAST_INLINE void logarithms(int64_t size, double* to) const {
    for (int64_t i = 0; i < size; i += kLanes) {
      float logs[kLanes];
      store(logs, log(load(mantissa + i)));
      for (int64_t k = 0; k < kLanes && i + k < size; ++k) {
        to[i + k] = 0.69314718055994531 * exponent[i + k] + logs[k];
      }
    }
  }

  Buffer<float> mantissa;
  Buffer<int32_t> exponent;
};

// Columns [begin, end) of a block: whole vectors.
struct Block {
  int64_t begin, end;
};

// Vectors of a block at most, and bytes of its state and kernel: enough sums in flight to hide
// their latency, few blocks (each takes the sums over rows from memory and back), a block in L1.
constexpr int kBlock = kLanes == 16 ? 6 : 4;
constexpr int64_t kBlockBytes = 32 << 10;

struct Scaling {
  Scaling(int64_t max_m, int64_t max_n)
      : state(max_m * padded(max_n)), kernel(max_m * padded(max_n)), left(padded(max_m)),
        weight(padded(max_m)), sigma(padded(max_m)), sigma_before(padded(max_m)),
        inverse(padded(max_m)), target_x(padded(max_m)), row_sums(padded(max_m) * kLanes),
        right(padded(max_n)), target_y(padded(max_n)), outside(padded(max_n)),
        sigmas(padded(max_m)), deltas(padded(max_n)) {}

  // Blocks as nearly equal as can be: a narrow last one would take as long as a full one.
  VLPFAST_INLINE Block block(int64_t k) const {
    const int64_t vectors = ld / kLanes, width = vectors / num_blocks, wider = vectors % num_blocks;
    const int64_t begin = k * width + std::min(k, wider);
    return {begin * kLanes, (begin + width + (k < wider)) * kLanes};
  }

  int64_t m = 0, n = 0, ld = 0, num_blocks = 0;
  Buffer<float> state, kernel;    // P, A: block after block, of each its rows
  Buffer<float> left;             // (m,)
  Buffer<float> weight;           // (m,)
  Buffer<float> sigma;            // (m,): by how much left grew in the last step of IPOT
  Buffer<float> sigma_before;     // (m,): in the step before
  Buffer<float> inverse;          // (m,): of left when the step began
  Buffer<float> target_x;         // (m,): a
  Buffer<float> row_sums;         // (m, kLanes)
  Buffer<float> right, target_y;  // (ld,): right and b
  Buffer<float> outside;          // (ld,): 1 on padding, to be added to its sums
  Products sigmas, deltas;        // over the steps before P's factors were last put into it
};

// Marginals a(i) and b(j).
template <class A, class B>
VLPFAST_INLINE void begin_scaling(Scaling& s, int64_t m, int64_t n, A a, B b) {
  s.m = m, s.n = n, s.ld = padded(n);
  const int64_t fitting = kBlockBytes / (2 * m * static_cast<int64_t>(sizeof(Vec)));
  const int64_t width = std::clamp<int64_t>(fitting, 2, kBlock);
  s.num_blocks = (s.ld / kLanes + width - 1) / width;
  for (int64_t i = 0; i < padded(m); ++i) {
    // Rows outside have 1 everywhere.
    s.target_x[i] = i < m ? a(i) : 1.0f;
    s.weight[i] = s.sigma[i] = s.inverse[i] = 1;
    if (i >= m) store(s.row_sums + i * kLanes, all(1.0f / kLanes));
  }
  for (int64_t j = 0; j < s.ld; ++j) {
    s.target_y[j] = j < n ? b(j) : 0.0f;
    s.outside[j] = j < n ? 0.0f : 1.0f;
  }
}

// Calls visit(i, j, at) for the vector at row i and column j, which P and A have at `at`.
template <class Visit>
VLPFAST_INLINE void each_vector(const Scaling& s, Visit visit) {
  int64_t at = 0;
  for (int64_t k = 0; k < s.num_blocks; ++k) {
    const Block block = s.block(k);
    for (int64_t i = 0; i < s.m; ++i) {
      for (int64_t j = block.begin; j < block.end; j += kLanes, at += kLanes) visit(i, j, at);
    }
  }
}

// What becomes of P first: nothing; A P (a step); A left P right.
enum class Update { kNone, kStep, kRebase };

// What a sweep loads and stores at a time. Half of a register for AVX-512: Zen 4 writes 64 bytes to
// L1 in two vectors of 32 faster than in one of 64, and the rest of a sweep is as fast either way.
constexpr int kPiece = kLanes == 16 ? kLanes / 2 : kLanes, kPieces = kLanes / kPiece;
typedef float Piece __attribute__((vector_size(4 * kPiece)));
typedef Piece UnalignedPiece __attribute__((aligned(4), may_alias));

VLPFAST_INLINE Piece load_piece(const float* p) {
  return *reinterpret_cast<const UnalignedPiece*>(p);
}
VLPFAST_INLINE void store_piece(float* p, Piece v) { *reinterpret_cast<UnalignedPiece*>(p) = v; }

// `first`: no other block of this sweep came before.
template <int V, Update update>
VLPFAST_INLINE void sweep_block(const Scaling& s, int64_t j0, bool is_first) {
  constexpr int kCount = V * kPieces;
  Piece right[kCount], sums[kCount];
  for (int v = 0; v < kCount; ++v) {
    right[v] = load_piece(s.right + j0 + v * kPiece);
    sums[v] = load_piece(s.outside + j0 + v * kPiece);
  }
  const int64_t m = s.m;
  float* state = s.state + j0 * m;
  const float *kernel = s.kernel + j0 * m, *left = s.left, *weight = s.weight;
  for (int64_t i = 0; i < m; ++i, state += V * kLanes, kernel += V * kLanes) {
    for (int v = 0; v < kCount; ++v) {
      Piece p = load_piece(state + v * kPiece);
      if constexpr (update == Update::kRebase) p *= left[i] * right[v];
      if constexpr (update != Update::kNone) {
        p *= load_piece(kernel + v * kPiece);
        store_piece(state + v * kPiece, p);
      }
      sums[v] += weight[i] * p;
    }
  }
  for (int v = 0; v < kCount; ++v) {
    right[v] = load_piece(s.target_y + j0 + v * kPiece) / sums[v];
    store_piece(s.right + j0 + v * kPiece, right[v]);
  }
  static constexpr float kZeros[kLanes] = {};
  float* row_sums = s.row_sums;
  const float* before = is_first ? kZeros : row_sums;
  const int64_t step = is_first ? 0 : kLanes;
  state = s.state + j0 * m;
  for (int64_t i = 0; i < m; ++i, state += V * kLanes, row_sums += kLanes, before += step) {
    Piece sum[kPieces];
    for (int h = 0; h < kPieces; ++h) sum[h] = load_piece(before + h * kPiece);
    for (int v = 0; v < kCount; ++v) {
      sum[v % kPieces] += load_piece(state + v * kPiece) * right[v];
    }
    for (int h = 0; h < kPieces; ++h) store_piece(row_sums + h * kPiece, sum[h]);
  }
}

template <int V, Update update>
VLPFAST_INLINE void sweep_block_of(int64_t width, const Scaling& s, int64_t j0, bool is_first) {
  if constexpr (V > 1) {
    if (width < V) return sweep_block_of<V - 1, update>(width, s, j0, is_first);
  }
  sweep_block<V, update>(s, j0, is_first);
}

// Blocks from the last to the first if `backward`: what a sweep touched last is in L1 still, so
// sweeps that alternate find much of their matrices there.
template <Update update>
VLPFAST_INLINE void sweep(const Scaling& s, bool backward) {
  for (int64_t k = 0; k < s.num_blocks; ++k) {
    const Block block = s.block(backward ? s.num_blocks - 1 - k : k);
    sweep_block_of<kBlock, update>((block.end - block.begin) / kLanes, s, block.begin, k == 0);
  }
  for (int64_t i = 0; i < padded(s.m); i += kLanes) {
    Vec sums[kLanes];
    for (int k = 0; k < kLanes; ++k) sums[k] = load(s.row_sums + (i + k) * kLanes);
    store(s.left + i, load(s.target_x + i) / sums_of(sums));
  }
}

// Sweeps on one P: the weights are the last left.
VLPFAST_INLINE void keep_left(const Scaling& s) {
  for (int64_t i = 0; i < padded(s.m); i += kLanes) store(s.weight + i, load(s.left + i));
}

// A step of IPOT ended: the next begins with this one's sigma, on a P that left is a factor of.
VLPFAST_INLINE void keep_sigma(const Scaling& s) {
  for (int64_t i = 0; i < padded(s.m); i += kLanes) {
    const Vec left = load(s.left + i), sigma = left * load(s.inverse + i);
    store(s.sigma_before + i, load(s.sigma + i));
    store(s.sigma + i, sigma);
    store(s.weight + i, left * sigma);
    store(s.inverse + i, 1.0f / left);
  }
}

// The same where left and right have gone into P.
VLPFAST_INLINE void forget_factors(const Scaling& s) {
  for (int64_t i = 0; i < padded(s.m); i += kLanes) {
    store(s.weight + i, load(s.sigma + i));
    store(s.inverse + i, all(1.0f));
  }
}

// Whether none of `size` factors differs from before by more than `ratio`; a NaN never settles.
VLPFAST_INLINE bool settled(const float* factors, const float* before, int64_t size, float ratio) {
  bool still = true;
  for (int64_t i = 0; i < size; ++i) {
    still &= factors[i] <= before[i] * ratio && before[i] <= factors[i] * ratio;
  }
  return still;
}

// factor * left P right, (m, ld), in the kernel's place.
VLPFAST_INLINE float* scaled_plan(const Scaling& s, float factor) {
  each_vector(s, [&](int64_t i, int64_t j, int64_t at) {
    store(s.kernel + i * s.ld + j, s.left[i] * factor * load(s.state + at) * load(s.right + j));
  });
  return s.kernel;
}

// A = exp((matrix - origin) / unit) and P = factor * A, 0 on padding. Exponents to more than fp32,
// since IPOT raises A to the power of its steps: the difference is exact with its error, and 12
// bits of it times 12 of 1 / unit are exact in fp32.
VLPFAST_INLINE void exponentiate(const Scaling& s, const float* matrix, float origin, double unit,
                                 float factor) {
  const auto head = [](Vec x) { return (Vec)((IntVec)x & ~0xFFF); };
  const double inverse = 1 / unit;
  const Vec high = head(all(static_cast<float>(inverse)));
  const Vec low = all(static_cast<float>(inverse - high[0]));
  each_vector(s, [&](int64_t i, int64_t j, int64_t at) {
    const Vec x = load(matrix + i * s.ld + j), difference = x - origin, back = difference - x;
    const Vec error = (x - (difference - back)) - (origin + back), top = head(difference);
    const Vec rest = (difference - top + error) * (high + low) + top * low;
    Vec value = exp(top * high, rest);
    value = load(s.outside + j) > 0.0f ? Vec{} : value;
    store(s.kernel + at, value);
    store(s.state + at, factor * value);
  });
}

}  // namespace vlpfast::VLPFAST_NAMESPACE
