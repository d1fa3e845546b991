// A thread's memory and what goes into it: a problem's valid rows, and its results out of it.
// Included by each_target.h; no include guard.

namespace vlpfast::VLPFAST_NAMESPACE {

// What the next problem reads first, brought towards L2 while this one is iterated on.
struct Ahead {
  // Lines of [data, data + num_bytes), a share of them in each of num_steps calls.
  VLPFAST_INLINE void begin(const void* data, int64_t num_bytes, int64_t num_steps) {
    next = static_cast<const char*>(data), end = next + num_bytes;
    step = (num_bytes / std::max<int64_t>(1, num_steps) + kLine) / kLine * kLine;
  }
  VLPFAST_INLINE void fetch() {
    const char* stop = std::min(end, next + step);
    for (; next < stop; next += kLine) __builtin_prefetch(next, 0, 2);
  }

  static constexpr int64_t kLine = 64;
  const char *next = nullptr, *end = nullptr;
  int64_t step = 0;
};

// A thread's memory: enough for the largest problem of the batch.
struct Workspace {
  Workspace(int64_t max_m, int64_t max_n, int64_t dim)
      : x(dim > 0 ? max_m : 0, dim), y(dim > 0 ? max_n : 0, dim), mixed(kMixedRows * padded(dim)),
        weight(dim > 0 ? max_m * padded(max_n) : 0), along(std::max(max_m, padded(max_n))),
        similarity(max_m * padded(max_n)), scaling(max_m, max_n), log(max_m, max_n), f(max_m),
        g(padded(max_n)), last(max_m) {}

  // The problem's valid rows and columns: none of either if there is none of one.
  template <class T>
  VLPFAST_INLINE void gather(const T* x, const T* y, int64_t problem, int64_t M, int64_t N) {
    rows.gather(x, problem, M);
    columns.gather(y, problem, N);
    if (rows.size() == 0 || columns.size() == 0) rows.index.clear(), columns.index.clear();
  }

  Valid rows, columns;
  Ahead ahead;
  Rows x, y;
  Buffer<float> mixed;       // (kMixedRows, D)
  Buffer<float> weight;      // (m, ld)
  Buffer<float> along;       // (m,) or (ld,)
  Buffer<float> similarity;  // (m, ld): C = offset - similarity
  Scaling scaling;
  LogDomain log;
  Buffer<double> f, g;  // potentials, in units of cost
  Buffer<double> last;  // (m,)
};

// A problem solved; its f, g are in the workspace where they were asked for.
struct Solved {
  float* plan;  // (m, ld), 0 on padding
  int64_t num_iters;
};

struct Range {
  double low = INFINITY, high = -INFINITY;
  VLPFAST_INLINE void take(double x) { low = std::min(low, x), high = std::max(high, x); }
  VLPFAST_INLINE double width() const { return high - low; }
};

VLPFAST_INLINE Range similarities(const Workspace& w) {
  Vec low = load(w.similarity), high = low;
  for (int64_t k = 0; k < w.rows.size() * padded(w.columns.size()); k += kLanes) {
    const Vec v = load(w.similarity + k);
    low = v < low ? v : low;
    high = v > high ? v : high;
  }
  Range range;
  for (int l = 0; l < kLanes; ++l) range.take(low[l]), range.take(high[l]);
  return range;
}

// to[j] = sign * from[index_j] on every valid column.
VLPFAST_INLINE void gather_row(const Valid& columns, const float* from, float sign, float* to) {
  const int64_t n = columns.size();
  const int32_t* index = columns.index.data();
  if (columns.contiguous()) {
    from += index[0];
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) store(to + j, sign * load(from + j));
    for (; j < n; ++j) to[j] = sign * from[j];
  } else {
    for (int64_t j = 0; j < n; ++j) to[j] = sign * from[index[j]];
  }
}

VLPFAST_INLINE void gather_cost(Workspace& w, const float* cost, int64_t num_targets) {
  const int64_t m = w.rows.size(), n = w.columns.size(), ld = padded(n);
  for (int64_t i = 0; i < m; ++i) {
    float* to = w.similarity + i * ld;
    gather_row(w.columns, cost + w.rows.index[i] * num_targets, -1, to);
    std::fill(to + n, to + ld, to[0]);  // no extreme of the problem
  }
}

// (m, ld), 0 on padding, where the kernel would lie.
VLPFAST_INLINE float* gather_plan(Workspace& w, const float* plan, int64_t num_targets) {
  const int64_t m = w.rows.size(), n = w.columns.size(), ld = padded(n);
  for (int64_t i = 0; i < m; ++i) {
    float* to = w.scaling.kernel + i * ld;
    gather_row(w.columns, plan + w.rows.index[i] * num_targets, 1, to);
    std::fill(to + n, to + ld, 0.0f);
  }
  return w.scaling.kernel;
}

// sum_ij C_ij plan_ij
VLPFAST_INLINE double plan_cost(const Workspace& w, const float* plan, double offset) {
  const int64_t ld = padded(w.columns.size());
  double total = 0;
  for (int64_t i = 0; i < w.rows.size(); ++i) {
    Vec row = {};
    for (int64_t k = i * ld; k < (i + 1) * ld; k += kLanes) {
      row += (static_cast<float>(offset) - load(w.similarity + k)) * load(plan + k);
    }
    total += sum(row);
  }
  return total;
}

VLPFAST_INLINE void scatter(const Valid& valid, const double* from, double added, int64_t length,
                            float* to) {
  std::fill(to, to + length, 0.0f);
  for (int64_t k = 0; k < valid.size(); ++k) {
    to[valid.index[k]] = static_cast<float>(from[k] + added);
  }
}

VLPFAST_INLINE void scatter_plan(const Workspace& w, const float* from, int64_t M, int64_t N,
                                 float* to) {
  const int64_t m = w.rows.size(), n = w.columns.size(), ld = padded(n);
  if (m < M || n < N) std::fill(to, to + M * N, 0.0f);
  for (int64_t i = 0; i < m; ++i) {
    float* row = to + w.rows.index[i] * N;
    if (w.columns.contiguous()) {
      std::copy(from + i * ld, from + i * ld + n, row + w.columns.index[0]);
    } else {
      for (int64_t j = 0; j < n; ++j) row[w.columns.index[j]] = from[i * ld + j];
    }
  }
}

// Everything but the value. A problem with an empty side has no rows and no columns here.
VLPFAST_INLINE void write(const Workspace& w, const Solved& solved, double distance,
                          const Solutions& out, int64_t problem, int64_t M, int64_t N) {
  out.distance[problem] = static_cast<float>(distance);
  if (out.plan == nullptr) return;
  out.num_iters[problem] = solved.num_iters;
  // Not 0 but NaN where the distance is not finite: then the potentials are not either.
  const double poison = distance - distance;
  scatter(w.rows, w.f, poison, M, out.f + problem * M);
  scatter(w.columns, w.g, poison, N, out.g + problem * N);
  scatter_plan(w, solved.plan, M, N, out.plan + problem * M * N);
}

}  // namespace vlpfast::VLPFAST_NAMESPACE
