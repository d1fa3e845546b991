// One problem of optimal transport after the other, each by one thread from start to end, its
// matrices in that core's caches. Included by each_target.h; no include guard.
//
// Valid rows and columns are gathered first and everything after works on those alone: padding
// costs nothing, and the order of every sum is a function of the problem.
#include "vlpfast/vec.h"
#include "vlpfast/transport_features.h"
#include "vlpfast/transport_log.h"
#include "vlpfast/transport_scaling.h"
#include "vlpfast/transport_workspace.h"
#include "vlpfast/transport_ipot.h"
#include "vlpfast/transport_sinkhorn.h"

namespace vlpfast::VLPFAST_NAMESPACE {

VLPFAST_INLINE void gather_features(Workspace& w, const FeaturePair& in, int64_t problem) {
  normalise_rows(in.x, in.dtype, problem, in.dim, w.rows, w.x);
  normalise_rows(in.y, in.dtype, problem, in.dim, w.columns, w.y);
}

// Gradients of upstream * distance; the plan (m, ld) is of the valid rows and columns.
VLPFAST_INLINE void write_gradients(Workspace& w, const FeaturePair& in, const float* plan,
                                    float upstream, const Gradients& out, int64_t problem) {
  const int64_t m = w.rows.size(), n = w.columns.size(), ld = padded(n);
  const auto gradient = [&](void* data, int64_t length) {
    return FeatureGradient{data, in.dtype, in.dim, problem * length, length};
  };
  if (out.x != nullptr) {
    feature_gradient(plan, ld, 1, w.x, w.rows, w.y, n, upstream, w.mixed,
                     gradient(out.x, in.x.length));
  }
  if (out.y != nullptr) {
    feature_gradient(plan, 1, ld, w.y, w.columns, w.x, m, upstream, w.mixed,
                     gradient(out.y, in.y.length));
  }
}

// Takes problems from the counter until none is left.
inline void solve_ipot(const IpotBatch& batch, std::atomic<int64_t>& next) {
  const int64_t M = batch.in.x.length, N = batch.in.y.length;
  const bool on_features = batch.cost == nullptr;
  const double offset = on_features ? 1 : 0;
  Workspace w(M, N, on_features ? batch.in.dim : 0);
  for (int64_t b; (b = next.fetch_add(1)) < batch.size;) {
    w.gather(batch.in.x.mask, batch.in.y.mask, b, M, N);
    Solved solved{nullptr, 0};
    double distance = 0;
    if (w.rows.size() > 0) {
      if (on_features) {
        gather_features(w, batch.in, b);
        cosines(w.x, w.y, w.rows.size(), w.columns.size(), w.similarity);
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
  }
}

inline void differentiate_ipot(const GradientBatch& batch, std::atomic<int64_t>& next) {
  const int64_t M = batch.in.x.length, N = batch.in.y.length;
  Workspace w(M, N, batch.in.dim);
  for (int64_t b; (b = next.fetch_add(1)) < batch.size;) {
    w.gather(batch.in.x.mask, batch.in.y.mask, b, M, N);
    gather_features(w, batch.in, b);
    gather_plan(w, batch.plan + b * M * N, N);
    write_gradients(w, batch.in, w.similarity, batch.upstream[b], batch.gradients, b);
  }
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
