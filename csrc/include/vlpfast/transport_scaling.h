// Matrix scaling in fp32: IPOT at beta >= 0.1 and balanced Sinkhorn with moderate exponents.
// Included by each_target.h; no include guard.
//
// One sweep over the matrix Q, a few columns at a time so that its second half finds them in L1:
//     delta_j = b_j / sum_i Q_ij sigma_i,    sigma_i = a_i / sum_j Q_ij delta_j
// IPOT's step Q <- A sigma Q delta needs the sigma that ends the sweep. It is left out and put right
// by the next sweep, so that a step takes no pass of its own: Q_ij = scale_i state_ij.

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

struct Scaling {
  Scaling(int64_t max_m, int64_t max_n)
      : state(max_m * padded(max_n)), kernel(max_m * padded(max_n)), sigma(padded(max_m)),
        scale(padded(max_m)), weight(padded(max_m)), target_x(padded(max_m)),
        row_sums(padded(max_m) * kLanes), delta(padded(max_n)), target_y(padded(max_n)),
        outside(padded(max_n)), sigmas(padded(max_m)), deltas(padded(max_n)) {}

  int64_t m = 0, n = 0, ld = 0;
  Buffer<float> state, kernel;   // (m, ld)
  Buffer<float> sigma, scale;    // (m,)
  Buffer<float> weight;          // (m,): scale * sigma
  Buffer<float> target_x;        // (m,): a
  Buffer<float> row_sums;        // (m, kLanes)
  Buffer<float> delta, target_y; // (ld,): delta and b
  Buffer<float> outside;         // (ld,): 1 on padding, to be added to its sums
  Products sigmas, deltas;       // over the steps
};

// Marginals a(i) and b(j).
template <class A, class B>
VLPFAST_INLINE void begin_scaling(Scaling& s, int64_t m, int64_t n, A a, B b) {
  s.m = m, s.n = n, s.ld = padded(n);
  for (int64_t i = 0; i < padded(m); ++i) {
    s.target_x[i] = i < m ? a(i) : 0.0f;
    // Rows outside sum to something, so that their sigma is 0 and not NaN.
    if (i >= m) store(s.row_sums + i * kLanes, all(1.0f));
  }
  for (int64_t j = 0; j < s.ld; ++j) {
    s.target_y[j] = j < n ? b(j) : 0.0f;
    s.outside[j] = j < n ? 0.0f : 1.0f;
  }
}

// What becomes of the state in a sweep: nothing; A scale Q delta (a step); scale Q delta (the plan
// but for sigma).
enum class Update { kNone, kStep, kPlan };

template <int V, Update update>
VLPFAST_INLINE void sweep_columns(const Scaling& s, int64_t j0) {
  Vec delta[V];
  for (int v = 0; v < V; ++v) delta[v] = load(s.outside + j0 + v * kLanes);
  for (int64_t i = 0; i < s.m; ++i) {
    const float* state = s.state + i * s.ld + j0;
    for (int v = 0; v < V; ++v) delta[v] += s.weight[i] * load(state + v * kLanes);
  }
  for (int v = 0; v < V; ++v) {
    delta[v] = load(s.target_y + j0 + v * kLanes) / delta[v];
    store(s.delta + j0 + v * kLanes, delta[v]);
  }
  for (int64_t i = 0; i < s.m; ++i) {
    float* state = s.state + i * s.ld + j0;
    const float* kernel = s.kernel + i * s.ld + j0;
    Vec row_sum = load(s.row_sums + i * kLanes);
    for (int v = 0; v < V; ++v) {
      Vec q = load(state + v * kLanes) * delta[v];
      row_sum += q;
      if constexpr (update == Update::kNone) continue;
      q *= s.scale[i];
      if constexpr (update == Update::kStep) q *= load(kernel + v * kLanes);
      store(state + v * kLanes, q);
    }
    store(s.row_sums + i * kLanes, row_sum);
  }
}

template <Update update>
VLPFAST_INLINE void sweep(const Scaling& s) {
  for (int64_t i = 0; i < padded(s.m); i += kLanes) {
    store(s.weight + i, load(s.scale + i) * load(s.sigma + i));
  }
  for (int64_t i = 0; i < s.m; ++i) store(s.row_sums + i * kLanes, Vec{});
  int64_t j = 0;
  // 4 vectors at a time: enough sums in flight to hide their latency.
  for (; j + 4 * kLanes <= s.ld; j += 4 * kLanes) sweep_columns<4, update>(s, j);
  if (j + 2 * kLanes <= s.ld) sweep_columns<2, update>(s, j), j += 2 * kLanes;
  if (j < s.ld) sweep_columns<1, update>(s, j);
  for (int64_t i = 0; i < padded(s.m); i += kLanes) {
    Vec sums[kLanes];
    for (int k = 0; k < kLanes; ++k) sums[k] = load(s.row_sums + (i + k) * kLanes);
    store(s.sigma + i, load(s.target_x + i) / (load(s.scale + i) * sums_of(sums)));
  }
}

// Whether no sigma differs from `before` by more than a factor of `ratio`; a NaN never settles.
VLPFAST_INLINE bool settled(const Scaling& s, const float* before, float ratio) {
  bool still = true;
  for (int64_t i = 0; i < s.m; ++i) {
    still &= s.sigma[i] <= before[i] * ratio && before[i] <= s.sigma[i] * ratio;
  }
  return still;
}

// kernel = exp((matrix - origin) / unit) and state = factor * kernel, 0 on padding. Exponents to more
// than fp32, since IPOT raises the kernel to the power of its steps.
VLPFAST_INLINE void exponentiate(const Scaling& s, const float* matrix, double origin, double unit,
                                 float factor) {
  const double inverse = 1 / unit;
  for (int64_t i = 0; i < s.m; ++i) {
    const float* row = matrix + i * s.ld;
    float *high = s.kernel + i * s.ld, *low = s.state + i * s.ld;
    for (int64_t j = 0; j < s.ld; j += kLanes / 2) {
      const DoubleVec exact = (load_doubles(row + j) - origin) * inverse;
      const HalfVec rounded = to_floats(exact);
      store(high + j, rounded);
      store(low + j, to_floats(exact - __builtin_convertvector(rounded, DoubleVec)));
    }
    for (int64_t j = 0; j < s.ld; j += kLanes) {
      Vec value = exp(load(high + j), load(low + j));
      value = load(s.outside + j) > 0.0f ? Vec{} : value;
      store(high + j, value);
      store(low + j, factor * value);
    }
  }
}

// The sigma that ended a step goes into the next.
VLPFAST_INLINE void keep_sigma(const Scaling& s) {
  for (int64_t i = 0; i < padded(s.m); i += kLanes) store(s.scale + i, load(s.sigma + i));
}

}  // namespace vlpfast::VLPFAST_NAMESPACE
