// IPOT on one problem. With S the similarity and F, G the summed logarithms of sigma and delta,
// T = exp(F_i + G_j + t S_ij / beta) after t steps. Included by each_target.h; no include guard.

namespace vlpfast::VLPFAST_NAMESPACE {

// f, g from F, G. The offset between cost and similarity is G's.
template <class F, class G>
VLPFAST_INLINE void ipot_potentials(Workspace& w, double eps, double offset, F sum_f, G sum_g) {
  const int64_t m = w.rows.size(), n = w.columns.size();
  for (int64_t i = 0; i < m; ++i) w.f[i] = eps * (sum_f(i) + std::log(double(m)));
  for (int64_t j = 0; j < n; ++j) w.g[j] = eps * (sum_g(j) + std::log(double(n))) + offset;
}

template <bool kPotentials>
VLPFAST_INLINE Solved ipot_scaling(Workspace& w, const IpotOptions& o, double offset) {
  Scaling& s = w.scaling;
  const int64_t m = w.rows.size(), n = w.columns.size();
  const auto a = [m](int64_t) { return 1.0f / m; };
  begin_scaling(s, m, n, a, [n](int64_t) { return 1.0f / n; });
  for (int64_t i = 0; i < padded(m); ++i) s.sigma[i] = i < m ? 1.0f / m : 0.0f;
  keep_sigma(s);
  // Times m, because a sweep begins by multiplying with the sigma before.
  exponentiate(s, w.similarity, 0.0f, o.beta, static_cast<float>(m));
  if constexpr (kPotentials) s.sigmas.begin(m), s.deltas.begin(n);
  const float ratio = static_cast<float>(std::exp(o.tol / o.beta));
  int64_t t = 0;
  for (bool stop = false; t < o.iters && !stop;) {
    ++t;
    for (int64_t k = 1; k < o.inner; ++k) sweep<Update::kNone>(s);
    if (t == o.iters) {
      sweep<Update::kPlan>(s);
    } else {
      sweep<Update::kStep>(s);
      stop = o.tol >= 0 && settled(s, s.scale, ratio);
    }
    if constexpr (kPotentials) s.sigmas.multiply(s.sigma, m), s.deltas.multiply(s.delta, n);
    keep_sigma(s);
  }
  for (int64_t i = 0; i < m; ++i) {
    float* row = s.state + i * s.ld;
    const float* kernel = s.kernel + i * s.ld;
    // A step that turned out to be the last has multiplied by the kernel once too often.
    for (int64_t j = 0; t < o.iters && j < n; ++j) row[j] /= kernel[j];
    for (int64_t j = 0; j < s.ld; j += kLanes) store(row + j, s.sigma[i] * load(row + j));
  }
  if constexpr (kPotentials) {
    ipot_potentials(w, o.beta / t, offset, [&](int64_t i) { return s.sigmas.log(i); },
                    [&](int64_t j) { return s.deltas.log(j); });
  }
  return {s.state, t};
}

VLPFAST_INLINE Solved ipot_log(Workspace& w, const IpotOptions& o, double offset) {
  LogDomain& d = w.log;
  const int64_t m = w.rows.size(), n = w.columns.size();
  begin_log(d, m, n, [m](int64_t) { return -std::log(double(m)); },
            [n](int64_t) { return -std::log(double(n)); });
  // F of this step and of the one before: sigma is kept, so a step starts from 2 F - F before.
  double *sums = w.f, *sums_before = w.last;
  for (int64_t i = 0; i < m; ++i) {
    sums[i] = 0, sums_before[i] = -d.log_a[i];
  }
  int64_t t = 0;
  for (bool stop = false; t < o.iters && !stop;) {
    d.s = ++t / o.beta;
    for (int64_t i = 0; i < m; ++i) d.p[i] = 2 * sums[i] - sums_before[i];
    for (int64_t k = 0; k < o.inner; ++k) log_sweep(d, w.similarity, 1, 1);
    double moved = 0;
    for (int64_t i = 0; i < m; ++i) {
      const double change = o.beta * std::abs(d.p[i] - 2 * sums[i] + sums_before[i]);
      moved = change <= moved ? moved : change;  // NaN counts
      sums_before[i] = sums[i];
      sums[i] = d.p[i];
    }
    stop = moved <= o.tol;
  }
  log_plan(d, w.similarity);
  ipot_potentials(w, o.beta / t, offset, [&](int64_t i) { return d.p[i]; },
                  [&](int64_t j) { return d.q[j]; });
  return {d.plan, t};
}

// C = offset - similarity. Potentials cost the scaling form some percent.
VLPFAST_INLINE Solved ipot(Workspace& w, const IpotOptions& o, double offset, bool potentials) {
  if (o.beta < kLogDomainBeta) return ipot_log(w, o, offset);
  return potentials ? ipot_scaling<true>(w, o, offset) : ipot_scaling<false>(w, o, offset);
}

}  // namespace vlpfast::VLPFAST_NAMESPACE
