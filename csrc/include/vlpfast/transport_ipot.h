// IPOT on one problem. With S the similarity and F, G the summed logarithms of sigma and delta,
// T = exp(F_i + G_j + t S_ij / beta) after t steps. Included by each_target.h; no include guard.

namespace vlpfast::VLPFAST_NAMESPACE {

// f, g from the F, G that are in their place.
VLPFAST_INLINE void ipot_potentials(Workspace& w, double eps, double offset) {
  const int64_t m = w.rows.size(), n = w.columns.size();
  for (int64_t i = 0; i < m; ++i) w.f[i] = eps * (w.f[i] + std::log(double(m)));
  for (int64_t j = 0; j < n; ++j) w.g[j] = eps * (w.g[j] + std::log(double(n))) + offset;
}

// How the scaling form keeps a plan inside of fp32, of which an entry that is once 0 never returns.
// The state is held times `scale`. In one step an entry grows by no more than exp(span), span being
// the kernel's (0.91 of it was the most seen); so in `period` steps none comes from where it is
// flushed to where it counts, 1e-10, and then the state is computed anew from F and G.
struct StateRange {
  explicit StateRange(double span)
      : log_scale(std::floor(std::min(80.0, 122 - 2.6 * span)) * 0.69314718055994531),
        scale(static_cast<float>(std::exp(log_scale))),
        period(static_cast<int64_t>(std::max(1.0, (87 + log_scale - 23) / std::max(span, 1e-9)))) {}

  double log_scale;
  float scale;
  int64_t period;
};

// The state after t steps, from F and G: scale * A T / sigma.
VLPFAST_INLINE void refresh(Workspace& w, const StateRange& range, double steps, double beta,
                            double origin) {
  Scaling& s = w.scaling;
  s.sigmas.logarithms(s.m, w.f);
  s.deltas.logarithms(s.n, w.g);
  std::fill(w.g + s.n, w.g + s.ld, 0.0);
  const double factor = (steps + 1) / beta;
  for (int64_t i = 0; i < s.m; ++i) {
    const double own = w.f[i] - std::log(double{s.sigma[i]}) + range.log_scale - factor * origin;
    const float* row = w.similarity + i * s.ld;
    float* to = s.state + i * s.ld;
    for (int64_t j = 0; j < s.ld; j += kLanes / 2) {
      store(to + j, to_floats(load_doubles(row + j) * factor + (load(w.g + j) + own)));
    }
    for (int64_t j = 0; j < s.ld; j += kLanes) {
      const Vec value = exp(load(to + j), Vec{});
      store(to + j, load(s.outside + j) > 0.0f ? Vec{} : value);
    }
  }
}

template <bool kPotentials>
VLPFAST_INLINE Solved ipot_scaling(Workspace& w, const IpotOptions& o, double offset,
                                   double origin, const StateRange& range) {
  Scaling& s = w.scaling;
  const int64_t m = w.rows.size(), n = w.columns.size();
  // State and marginals times the same: sigma and delta are what they would be without.
  begin_scaling(s, m, n, [&](int64_t) { return range.scale / m; },
                [&](int64_t) { return range.scale / n; });
  for (int64_t i = 0; i < padded(m); ++i) s.sigma[i] = i < m ? 1.0f / m : 0.0f;
  keep_sigma(s);
  // Times m, because a sweep begins by multiplying with the sigma before.
  exponentiate(s, w.similarity, origin, o.beta, range.scale * m);
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
    if (kPotentials && t % range.period == 0 && t < o.iters) refresh(w, range, t, o.beta, origin);
    keep_sigma(s);
  }
  for (int64_t i = 0; i < m; ++i) {
    float* row = s.state + i * s.ld;
    const float* kernel = s.kernel + i * s.ld;
    // A step that turned out to be the last has multiplied by the kernel once too often.
    for (int64_t j = 0; t < o.iters && j < n; ++j) row[j] /= kernel[j];
    for (int64_t j = 0; j < s.ld; j += kLanes) {
      store(row + j, s.sigma[i] * (load(row + j) * (1 / range.scale)));
    }
  }
  if constexpr (kPotentials) {
    s.sigmas.logarithms(m, w.f), s.deltas.logarithms(n, w.g);
    ipot_potentials(w, o.beta / t, offset - origin);
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
  std::copy_n(d.q + 0, n, w.g + 0);
  ipot_potentials(w, o.beta / t, offset);
  return {d.plan, t};
}

// C = offset - similarity. The logarithms' sums are left out where nothing needs them.
VLPFAST_INLINE Solved ipot(Workspace& w, const IpotOptions& o, double offset, bool potentials) {
  const Range similarity = similarities(w);
  const StateRange range(similarity.width() / o.beta);
  if (similarity.width() <= kIpotScaling * o.beta) {
    const double middle = 0.5 * (similarity.low + similarity.high);
    const Solved solved = potentials || range.period < o.iters
                              ? ipot_scaling<true>(w, o, offset, middle, range)
                              : ipot_scaling<false>(w, o, offset, middle, range);
    // What is not finite here may have overflowed.
    if (std::isfinite(plan_cost(w, solved.plan, offset))) return solved;
  }
  return ipot_log(w, o, offset);
}

}  // namespace vlpfast::VLPFAST_NAMESPACE
