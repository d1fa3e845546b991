// The log domain, for any step and any strength of the entropy: potentials p (m,) and q (n,) in fp64
// and a plan exp(p_i + q_j + s S_ij), where S is the similarity (a negative cost).
// Included by each_target.h; no include guard.

namespace vlpfast::VLPFAST_NAMESPACE {

struct LogDomain {
  LogDomain(int64_t max_m, int64_t max_n)
      : p(padded(max_m)), q(padded(max_n)), log_a(padded(max_m)), log_b(padded(max_n)),
        lse(padded(max_n)), terms(padded(max_n)), plan(max_m * padded(max_n)) {}

  int64_t m = 0, n = 0, ld = 0;
  double s = 0;
  Buffer<double> p, q;          // (m,), (ld,): q is -inf on padding
  Buffer<double> log_a, log_b;  // (m,), (ld,): log_b is -inf on padding
  Buffer<double> lse;           // (ld,)
  Buffer<float> terms;          // (ld,)
  Buffer<float> plan;           // (m, ld); before, the exponents of a few columns
};

// Logarithms of the marginals, log_a(i) and log_b(j).
template <class A, class B>
VLPFAST_INLINE void begin_log(LogDomain& d, int64_t m, int64_t n, A log_a, B log_b) {
  d.m = m, d.n = n, d.ld = padded(n);
  for (int64_t i = 0; i < m; ++i) d.log_a[i] = log_a(i);
  for (int64_t j = 0; j < d.ld; ++j) {
    d.log_b[j] = j < n ? log_b(j) : -std::numeric_limits<double>::infinity();
  }
}

// LSE over i of p_i + s S_ij for every column j, into lse.
VLPFAST_INLINE void columns_lse(const LogDomain& d, const float* similarity) {
  const float s = static_cast<float>(d.s);
  for (int64_t j = 0; j < d.ld; j += kLanes) {
    // A maximum to fp32 will do: it is subtracted and added again.
    Vec top = all(-std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < d.m; ++i) {
      top = max(load(similarity + i * d.ld + j) * s + static_cast<float>(d.p[i]), top);
    }
    float tops[kLanes];
    store(tops, top);
    const DoubleVec tops_low = load_doubles(tops), tops_high = load_doubles(tops + kLanes / 2);
    for (int64_t i = 0; i < d.m; ++i) {
      const float* row = similarity + i * d.ld + j;
      float* to = d.plan + i * kLanes;
      store(to, to_floats(load_doubles(row) * d.s + d.p[i] - tops_low));
      store(to + kLanes / 2, to_floats(load_doubles(row + kLanes / 2) * d.s + d.p[i] - tops_high));
    }
    Vec total = {};
    for (int64_t i = 0; i < d.m; ++i) total += exp(load(d.plan + i * kLanes), Vec{});
    float logs[kLanes];
    store(logs, log(total));
    for (int k = 0; k < kLanes; ++k) d.lse[j + k] = double{tops[k]} + logs[k];
  }
}

// LSE over j of q_j + s S_ij for row i.
VLPFAST_INLINE double row_lse(const LogDomain& d, const float* row) {
  Vec top = all(-std::numeric_limits<float>::infinity());
  for (int64_t j = 0; j < d.ld; j += kLanes / 2) {
    store(d.terms + j, to_floats(load_doubles(row + j) * d.s + load(d.q + j)));
  }
  for (int64_t j = 0; j < d.ld; j += kLanes) top = max(load(d.terms + j), top);
  float largest = -std::numeric_limits<float>::infinity();
  for (int k = 0; k < kLanes; ++k) largest = std::max(largest, top[k]);
  for (int64_t j = 0; j < d.ld; j += kLanes / 2) {
    store(d.terms + j, to_floats(load_doubles(row + j) * d.s + (load(d.q + j) - double{largest})));
  }
  Vec total = {};
  for (int64_t j = 0; j < d.ld; j += kLanes) total += exp(load(d.terms + j), Vec{});
  return largest + std::log(double{sum(total)});
}

// q from p, then p from q. `damp` relaxes a marginal; 1 enforces it.
VLPFAST_INLINE void log_sweep(const LogDomain& d, const float* similarity, double damp_a,
                              double damp_b) {
  columns_lse(d, similarity);
  for (int64_t j = 0; j < d.ld; ++j) d.q[j] = d.log_b[j] - damp_b * d.lse[j];
  for (int64_t i = 0; i < d.m; ++i) {
    d.p[i] = d.log_a[i] - damp_a * row_lse(d, similarity + i * d.ld);
  }
}

// The plan at the potentials, 0 on padding.
VLPFAST_INLINE void log_plan(const LogDomain& d, const float* similarity) {
  for (int64_t i = 0; i < d.m; ++i) {
    const float* row = similarity + i * d.ld;
    float* to = d.plan + i * d.ld;
    for (int64_t j = 0; j < d.ld; j += kLanes / 2) {
      store(to + j, to_floats(load_doubles(row + j) * d.s + (load(d.q + j) + d.p[i])));
    }
    for (int64_t j = 0; j < d.ld; j += kLanes) store(to + j, exp(load(to + j), Vec{}));
  }
}

}  // namespace vlpfast::VLPFAST_NAMESPACE
