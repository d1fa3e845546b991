// IPOT on one problem. With S the similarity and F, G the summed logarithms of sigma and delta,
// T = exp(F_i + G_j + t S_ij / beta) after t steps. Included by each_target.h; no include guard.

namespace vlpfast::VLPFAST_NAMESPACE {

// f, g from the F, G that are in their place.
VLPFAST_INLINE void ipot_potentials(Workspace& w, double eps, double offset) {
  const int64_t m = w.rows.size(), n = w.columns.size();
  const double log_m = std::log(double(m)), log_n = std::log(double(n));
  for (int64_t i = 0; i < m; ++i) w.f[i] = eps * (w.f[i] + log_m);
  for (int64_t j = 0; j < n; ++j) w.g[j] = eps * (w.g[j] + log_n) + offset;
}

// How the scaling form keeps a plan inside of fp32, of which an entry that is once 0 never returns.
// P is held times `scale`. Before the factors of rows and columns go into P, `steps` of them, they
// and A^steps move an entry of P by no more than exp(15) from scale * T; in one step an entry of T
// grows by no more than exp(span), span being the kernel's (0.91 of it was the most seen). So in
// `period` steps none comes from where it is flushed to where it counts, 1e-10, and then P is
// computed anew from F and G.
struct StateRange {
  explicit StateRange(double span)
      : log_scale(std::floor(std::min(80.0, 122 - 2.6 * span)) * 0.69314718055994531),
        scale(static_cast<float>(std::exp(log_scale))),
        steps(static_cast<int64_t>(std::max(1.0, 10 / std::max(span, 1e-9)))),
        period(static_cast<int64_t>(
            std::max(1.0, (87 + log_scale - 23 - 15) / std::max(span, 1e-9)))) {}

  double log_scale;
  float scale;
  int64_t steps, period;
};

// log sigma and log delta, summed over t steps, into the place of f and g. The scaling form has
// m sigma and, after the first step, delta / m: near 1, so that their products are.
VLPFAST_INLINE void summed_logarithms(Workspace& w, int64_t t) {
  Scaling& s = w.scaling;
  const double log_m = std::log(double(s.m)), log_n = std::log(double(s.n));
  s.sigmas.logarithms(s.m, w.f), s.deltas.logarithms(s.n, w.g);
  for (int64_t i = 0; i < s.m; ++i) w.f[i] -= t * log_m;
  for (int64_t j = 0; j < s.n; ++j) w.g[j] += (t - 1) * log_m - log_n;
}

// P after t steps, from F and G: scale * T.
VLPFAST_INLINE void refresh(Workspace& w, const StateRange& range, int64_t t, double beta,
                            double origin) {
  Scaling& s = w.scaling;
  summed_logarithms(w, t);
  std::fill(w.g + s.n, w.g + s.ld, 0.0);
  const double factor = t / beta;
  each_vector(s, [&](int64_t i, int64_t j, int64_t at) {
    const double own = w.f[i] + range.log_scale - factor * origin;
    float exponents[kLanes];
    for (int k = 0; k < kLanes; k += kLanes / 2) {
      const DoubleVec similarity = load_doubles(w.similarity + i * s.ld + j + k);
      store(exponents + k, to_floats(similarity * factor + (load(w.g + j + k) + own)));
    }
    const Vec value = exp(load(exponents), Vec{});
    store(s.state + at, load(s.outside + j) > 0.0f ? Vec{} : value);
  });
}

template <bool kPotentials>
VLPFAST_INLINE Solved ipot_scaling(Workspace& w, const IpotOptions& o, double offset, float origin,
                                   const StateRange& range) {
  Scaling& s = w.scaling;
  const int64_t m = w.rows.size(), n = w.columns.size();
  // P and marginals times the same: the factors are what they would be without.
  const float a = range.scale / m, b = range.scale / n;
  begin_scaling(s, m, n, [a](int64_t) { return a; }, [b](int64_t) { return b; });
  exponentiate(s, w.similarity, origin, o.beta, range.scale / m / n);
  const auto collect = [&] {
    if constexpr (kPotentials) s.sigmas.multiply(s.left, m), s.deltas.multiply(s.right, n);
  };
  if constexpr (kPotentials) s.sigmas.begin(m), s.deltas.begin(n);
  const float ratio = static_cast<float>(std::exp(o.tol / o.beta));
  int64_t t = 0, steps = 0;  // steps: since left and right were last put into P
  for (bool stop = false, backward = false; t < o.iters && !stop; backward = !backward) {
    if (t == 0) {
      sweep<Update::kNone>(s, backward);
    } else if (steps < range.steps) {
      sweep<Update::kStep>(s, backward);
    } else {
      collect();
      forget_factors(s);
      sweep<Update::kRebase>(s, backward);
      steps = 0;
    }
    ++t, ++steps;
    w.ahead.fetch();
    for (int64_t k = 1; k < o.inner; ++k) {
      keep_left(s);
      sweep<Update::kNone>(s, backward = !backward);
    }
    keep_sigma(s);
    stop = o.tol >= 0 && settled(s.sigma, s.sigma_before, m, ratio);
    if (kPotentials && t % range.period == 0 && t < o.iters && !stop) {
      collect();
      forget_factors(s);
      refresh(w, range, t, o.beta, origin);
      steps = 0;
    }
  }
  float* plan = scaled_plan(s, 1 / range.scale);
  if constexpr (kPotentials) {
    collect();
    summed_logarithms(w, t);
    ipot_potentials(w, o.beta / t, offset - origin);
  }
  return {plan, t};
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
    const float middle = static_cast<float>(0.5 * (similarity.low + similarity.high));
    const Solved solved = potentials || range.period < o.iters
                              ? ipot_scaling<true>(w, o, offset, middle, range)
                              : ipot_scaling<false>(w, o, offset, middle, range);
    // What is not finite here may have overflowed.
    if (std::isfinite(plan_cost(w, solved.plan, offset))) return solved;
  }
  return ipot_log(w, o, offset);
}

}  // namespace vlpfast::VLPFAST_NAMESPACE
