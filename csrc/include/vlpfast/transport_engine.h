// One problem of optimal transport after the other, each by one thread from start to end, its
// matrices in that core's caches. Included by each_target.h; no include guard.
//
// Valid rows and columns are gathered first and everything after works on those alone: padding
// costs nothing, and the order of every sum is a function of the problem.
#include "vlpfast/vec.h"
#include "vlpfast/transport_features.h"
#include "vlpfast/transport_gradient.h"
#include "vlpfast/transport_log.h"
#include "vlpfast/transport_scaling.h"
#include "vlpfast/transport_workspace.h"
#include "vlpfast/transport_ipot.h"
#include "vlpfast/transport_sinkhorn.h"

namespace vlpfast::VLPFAST_NAMESPACE {

VLPFAST_INLINE void take_features(Workspace& w, const FeaturePair& in, int64_t problem) {
  cosines(in, problem, w.rows, w.columns, w.x, w.y, w.similarity);
}

// Gradients of upstream * distance; the plan (m, ld) is of the valid rows and columns, 0 on
// padding.
VLPFAST_INLINE void write_gradients(Workspace& w, const FeaturePair& in, const float* plan,
                                    float upstream, const Gradients& out, int64_t problem) {
  const int64_t m = w.rows.size(), n = w.columns.size(), ld = padded(n);
  const auto gradient = [&](void* data, int64_t length) {
    return FeatureGradient{data, in.dtype, in.dim, problem * length, length, out.past_caches};
  };
  if (out.x != nullptr) {
    for (int64_t i = 0; i < m; ++i) {
      Vec along = {};
      for (int64_t j = 0; j < ld; j += kLanes) {
        const Vec p = load(plan + i * ld + j);
        along += p * load(w.similarity + i * ld + j);
        store(w.weight + i * ld + j, p * load(w.y.inverse_norm + j));
      }
      w.along[i] = w.x.clamped[i] ? 0.0f : sum(along) * w.x.inverse_norm[i];
    }
    feature_gradient(w.weight, ld, 1, w.x, w.rows, w.y, n, w.along, upstream, w.mixed,
                     gradient(out.x, in.x.length));
  }
  if (out.y != nullptr) {
    for (int64_t j = 0; j < ld; j += kLanes) {
      Vec along = {};
      for (int64_t i = 0; i < m; ++i) {
        const Vec p = load(plan + i * ld + j);
        along += p * load(w.similarity + i * ld + j);
        store(w.weight + i * ld + j, p * w.x.inverse_norm[i]);
      }
      store(w.along + j, along * load(w.y.inverse_norm + j));
    }
    for (int64_t j = 0; j < n; ++j) w.along[j] = w.y.clamped[j] ? 0.0f : w.along[j];
    feature_gradient(w.weight, 1, ld, w.y, w.columns, w.x, m, w.along, upstream, w.mixed,
                     gradient(out.y, in.y.length));
  }
}

// With more problems left, a thread takes the one after its own in advance and looks ahead to it.
// With fewer, another thread might have none.
constexpr int64_t kPlenty = 64;

VLPFAST_INLINE void look_ahead(const IpotBatch& batch, int64_t problem, Ahead& ahead) {
  const int64_t M = batch.in.x.length, N = batch.in.y.length;
  if (batch.cost != nullptr) {
    ahead.begin(batch.cost + problem * M * N, M * N * sizeof(float), batch.options.iters);
  } else {
    const Source x(batch.in.x, batch.in.dtype, batch.in.dim, problem);
    ahead.begin(x.row(0), M * x.row_bytes(), batch.options.iters);
  }
}

// Takes problems from the counter until none is left.
inline void solve_ipot(const IpotBatch& batch, std::atomic<int64_t>& next) {
  const int64_t M = batch.in.x.length, N = batch.in.y.length;
  const bool on_features = batch.cost == nullptr;
  const double offset = on_features ? 1 : 0;
  Workspace w(M, N, on_features ? batch.in.dim : 0);
  for (int64_t b = next.fetch_add(1), after; b < batch.size; b = after) {
    const bool plenty = batch.size - b > kPlenty;
    if (plenty) {
      after = next.fetch_add(1);
      look_ahead(batch, std::min(after, batch.size - 1), w.ahead);
    }
    w.gather(batch.in.x.mask, batch.in.y.mask, b, M, N);
    Solved solved{nullptr, 0};
    double distance = 0;
    if (w.rows.size() > 0) {
      if (on_features) {
        take_features(w, batch.in, b);
      } else {
        gather_cost(w, batch.cost + b * M * N, N);
      }
      solved = ipot(w, batch.options, offset, batch.out.plan != nullptr);
      distance = plan_cost(w, solved.plan, offset);
    }
    write(w, solved, distance, batch.out, b, M, N);
    const bool minus = batch.matched != nullptr && !batch.matched[b];
    write_gradients(w, batch.in, solved.plan, minus ? -batch.weight : batch.weight,
                    batch.gradients, b);
    if (!plenty) after = next.fetch_add(1);
  }
  if (batch.gradients.past_caches) publish_past_caches();
}

inline void differentiate_ipot(const GradientBatch& batch, std::atomic<int64_t>& next) {
  const int64_t M = batch.in.x.length, N = batch.in.y.length;
  Workspace w(M, N, batch.in.dim);
  for (int64_t b; (b = next.fetch_add(1)) < batch.size;) {
    w.gather(batch.in.x.mask, batch.in.y.mask, b, M, N);
    take_features(w, batch.in, b);
    float* plan = gather_plan(w, batch.plan + b * M * N, N);
    write_gradients(w, batch.in, plan, batch.upstream[b], batch.gradients, b);
  }
  if (batch.gradients.past_caches) publish_past_caches();
}

inline void solve_sinkhorn(const SinkhornBatch& batch, std::atomic<int64_t>& next) {
  const int64_t M = batch.num_sources, N = batch.num_targets;
  Workspace w(M, N, 0);
  for (int64_t b; (b = next.fetch_add(1)) < batch.size;) {
    const Marginals given(batch, b);
    w.gather(given.a, given.b, 0, M, N);
    Solved solved{nullptr, 0};
    double distance = 0, value = 0;
    if (w.rows.size() > 0) {
      gather_cost(w, batch.cost + b * M * N, N);
      solved = sinkhorn(w, given, batch.options);
      distance = plan_cost(w, solved.plan, 0);
      value = sinkhorn_value(w, given, batch.options, solved.plan);
    }
    write(w, solved, distance, batch.out, b, M, N);
    batch.out.value[b] = static_cast<float>(value);
  }
}

}  // namespace vlpfast::VLPFAST_NAMESPACE
