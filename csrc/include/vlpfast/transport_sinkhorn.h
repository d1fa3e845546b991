// Sinkhorn on one problem: a plan a_i b_j exp((f_i + g_j - C_ij) / eps), g and f by turns.
// Included by each_target.h; no include guard.

namespace vlpfast::VLPFAST_NAMESPACE {

// The part of a batch that one problem is; `index` of the workspace says which rows count.
struct Marginals {
  Marginals(const SinkhornBatch& batch, int64_t problem)
      : a(batch.a + problem * batch.num_sources), b(batch.b + problem * batch.num_targets),
        f_init(batch.f_init == nullptr ? nullptr : batch.f_init + problem * batch.num_sources) {}

  VLPFAST_INLINE double start(int32_t i) const { return f_init == nullptr ? 0.0 : f_init[i]; }

  const float *a, *b, *f_init;
};

VLPFAST_INLINE Range starts(const Workspace& w, const Marginals& given) {
  Range range;
  for (int32_t i : w.rows.index) range.take(given.start(i));
  return range;
}

// Whether all that the scaling form computes stays inside of fp32.
VLPFAST_INLINE bool fits_scaling(const Workspace& w, const Marginals& given,
                                 const SinkhornOptions& o, const Range& similarity,
                                 const Range& start) {
  Range weights;
  for (int32_t i : w.rows.index) weights.take(given.a[i]);
  for (int32_t j : w.columns.index) weights.take(given.b[j]);
  return o.damp_a == 1 && o.damp_b == 1 && similarity.width() <= kSinkhornScaling * o.eps &&
         start.width() <= kSinkhornScaling * o.eps &&
         weights.high <= kScalingWeights * weights.low;
}

// left = a exp((f - top) / eps), right = b exp((g + top + highest S) / eps): all near 1 at best.
VLPFAST_INLINE Solved sinkhorn_scaling(Workspace& w, const Marginals& given,
                                       const SinkhornOptions& o, double highest, double top) {
  Scaling& s = w.scaling;
  const int64_t m = w.rows.size(), n = w.columns.size();
  begin_scaling(s, m, n, [&](int64_t i) { return given.a[w.rows.index[i]]; },
                [&](int64_t j) { return given.b[w.columns.index[j]]; });
  for (int64_t i = 0; i < m; ++i) {
    const double f = given.start(w.rows.index[i]);
    s.left[i] = s.target_x[i] * static_cast<float>(std::exp((f - top) / o.eps));
  }
  exponentiate(s, w.similarity, static_cast<float>(highest), o.eps, 1.0f);
  const float ratio = static_cast<float>(std::exp(o.tol / o.eps));
  int64_t t = 0;
  for (bool stop = false; t < o.iters && !stop; ++t) {
    keep_left(s);
    sweep<Update::kNone>(s, t % 2 == 1);
    stop = o.tol >= 0 && settled(s.left, s.weight, m, ratio);
  }
  for (int64_t i = 0; i < m; ++i) {
    w.f[i] = o.eps * std::log(double{s.left[i]} / s.target_x[i]) + top;
  }
  for (int64_t j = 0; j < n; ++j) {
    w.g[j] = o.eps * std::log(double{s.right[j]} / s.target_y[j]) - highest - top;
  }
  return {scaled_plan(s, 1), t};
}

VLPFAST_INLINE Solved sinkhorn_log(Workspace& w, const Marginals& given,
                                   const SinkhornOptions& o) {
  LogDomain& d = w.log;
  const int64_t m = w.rows.size(), n = w.columns.size();
  begin_log(d, m, n, [&](int64_t i) { return std::log(double{given.a[w.rows.index[i]]}); },
            [&](int64_t j) { return std::log(double{given.b[w.columns.index[j]]}); });
  d.s = 1 / o.eps;
  for (int64_t i = 0; i < m; ++i) {
    w.f[i] = given.start(w.rows.index[i]);
    d.p[i] = d.log_a[i] + w.f[i] / o.eps;
  }
  int64_t t = 0;
  for (bool stop = false; t < o.iters && !stop; ++t) {
    log_sweep(d, w.similarity, o.damp_a, o.damp_b);
    double moved = 0;
    for (int64_t i = 0; i < m; ++i) {
      const double f = o.eps * (d.p[i] - d.log_a[i]), change = std::abs(f - w.f[i]);
      moved = change <= moved ? moved : change;  // a NaN counts
      w.f[i] = f;
    }
    stop = moved <= o.tol;
  }
  for (int64_t j = 0; j < n; ++j) w.g[j] = o.eps * (d.q[j] - d.log_b[j]);
  log_plan(d, w.similarity);
  return {d.plan, t};
}

VLPFAST_INLINE Solved sinkhorn(Workspace& w, const Marginals& given, const SinkhornOptions& o) {
  const Range similarity = similarities(w), start = starts(w, given);
  if (!fits_scaling(w, given, o, similarity, start)) return sinkhorn_log(w, given, o);
  return sinkhorn_scaling(w, given, o, similarity.high, start.high);
}

// The dual objective: sum_i a_i phi(f_i) + sum_j b_j phi(g_j) - eps (sum plan - sum a sum b).
VLPFAST_INLINE double sinkhorn_value(const Workspace& w, const Marginals& given,
                                     const SinkhornOptions& o, const float* plan) {
  const auto phi = [](double f, double tau) {
    return std::isinf(tau) ? f : -tau * std::expm1(-f / tau);
  };
  const int64_t m = w.rows.size(), n = w.columns.size(), ld = padded(n);
  double dual = 0, mass_a = 0, mass_b = 0, mass = 0;
  for (int64_t i = 0; i < m; ++i) {
    const double a = given.a[w.rows.index[i]];
    dual += a * phi(w.f[i], o.tau_a), mass_a += a;
  }
  for (int64_t j = 0; j < n; ++j) {
    const double b = given.b[w.columns.index[j]];
    dual += b * phi(w.g[j], o.tau_b), mass_b += b;
  }
  for (int64_t i = 0; i < m; ++i) {
    Vec row = {};
    for (int64_t j = 0; j < ld; j += kLanes) row += load(plan + i * ld + j);
    mass += sum(row);
  }
  return dual - o.eps * (mass - mass_a * mass_b);
}

}  // namespace vlpfast::VLPFAST_NAMESPACE
