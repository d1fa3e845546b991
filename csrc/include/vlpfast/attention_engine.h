// Attention of one key sequence, one head: all queries that read it, block by block, each block with
// all keys. Keys and values are read once; their gradients are summed by one thread and written
// once. Included by each_target.h; no include guard.
#include "vlpfast/vec.h"
#include "vlpfast/product.h"
#include "vlpfast/attention_rows.h"

namespace vlpfast::VLPFAST_NAMESPACE {

// What one thread works in. Letters: N keys, M rows of queries at a time, ld a head in whole
// vectors.
struct AttentionSpace {
  AttentionSpace(const AttentionBatch& batch, bool backward)
      : ld(padded(batch.head_dim)),
        keys(longest(batch.k_spans) * ld),
        values(longest(batch.k_spans) * ld),
        scores(longest(batch.k_spans) * kMaxRows),
        rows(kMaxRows * ld),
        columns(ld * kMaxRows),
        mixed(kMaxRows * ld),
        grad_scores(backward ? longest(batch.k_spans) * kMaxRows : 0),
        dropped(backward && batch.drop_below ? longest(batch.k_spans) * kMaxRows : 0),
        grad_rows(backward ? kMaxRows * ld : 0),
        grad_keys(backward ? longest(batch.k_spans) * ld : 0),
        grad_values(backward ? longest(batch.k_spans) * ld : 0) {}

  static int64_t longest(const Spans& spans) {
    int64_t most = 0;
    for (int64_t i = 0; i < spans.count; ++i) most = std::max(most, spans.length(i));
    return most;
  }

  int64_t ld;
  Buffer<float> keys, values;   // (N, ld)
  Buffer<float> scores;         // (N, M): then weights
  Buffer<float> rows, columns;  // queries (M, ld), and transposed (ld, M); then grad_out's
  Buffer<float> mixed;          // (M, ld)
  // Of the backward.
  Buffer<float> grad_scores, dropped;    // (N, M)
  Buffer<float> grad_rows;               // grad_out (M, ld)
  Buffer<float> grad_keys, grad_values;  // (N, ld)
  QueryRows queries;
};

// The queries' heads times `factor` as rows (lanes, ld) and as columns (ld, lanes).
VLPFAST_INLINE void gather_rows(const Heads& from, const QueryRows& queries, int64_t head,
                                int64_t E, float factor, float* rows, float* columns) {
  const int64_t ld = padded(E), lanes = queries.lanes;
  for (int64_t m = 0; m < queries.count; ++m) {
    read_head(from, queries.token[m], head, E, factor, rows + m * ld);
  }
  std::fill(rows + queries.count * ld, rows + lanes * ld, 0.0f);
  for (int64_t m = 0; m < lanes; m += kLanes) {
    for (int64_t e = 0; e < ld; e += kLanes) {
      Vec tile[kLanes];
      for (int k = 0; k < kLanes; ++k) tile[k] = load(rows + (m + k) * ld + e);
      transpose(tile);
      for (int k = 0; k < kLanes; ++k) store(columns + (e + k) * lanes + m, tile[k]);
    }
  }
}

VLPFAST_INLINE void gather_keys(const AttentionBatch& batch, int64_t s, int64_t head,
                                AttentionSpace& w) {
  const int64_t start = batch.k_spans.start(s), E = batch.head_dim;
  for (int64_t n = 0; n < batch.k_spans.length(s); ++n) {
    read_head(batch.k, start + n, head, E, 1, w.keys + n * w.ld);
    read_head(batch.v, start + n, head, E, 1, w.values + n * w.ld);
  }
}

// Masked scores (N, lanes) of the gathered queries.
VLPFAST_INLINE void score(const AttentionBatch& batch, int64_t s, int64_t head,
                          AttentionSpace& w) {
  const QueryRows& rows = w.queries;
  gather_rows(batch.q, rows, head, batch.head_dim, batch.scale, w.rows, w.columns);
  product<false>({w.keys, w.ld, 1}, rows.num_keys, w.columns, rows.lanes, batch.head_dim,
                 rows.lanes, w.scores, rows.lanes);
  mask_scores(batch, rows, s, head, w.scores);
}

// Scores to weights that are not divided by their sum yet; the largest score and the sum a lane.
VLPFAST_INLINE void exponentiate(const AttentionBatch& batch, AttentionSpace& w, int64_t m,
                                 Vec& largest, Vec& sum) {
  const int64_t lanes = w.queries.lanes, N = w.queries.num_keys;
  const Vec none = all(-__builtin_inff());
  largest = none;
  for (int64_t n = 0; n < N; ++n) largest = max(largest, load(w.scores + n * lanes + m));
  const Vec origin = largest == none ? Vec{} : largest;
  Vec sums[2] = {};
  for (int64_t n = 0; n < N; ++n) {
    float* at = w.scores + n * lanes + m;
    const Vec weight = exp(load(at) - origin, Vec{});
    sums[n & 1] += weight;
    const uint32_t hash = batch.drop_below ? mix32(static_cast<uint32_t>(n)) : 0;
    store(at, batch.drop_below ? weight * kept(batch, w.queries, hash, m) : weight);
  }
  sum = sums[0] + sums[1];
}

inline void attend(const AttentionBatch& batch, int64_t s, int64_t head, AttentionSpace& w) {
  gather_keys(batch, s, head, w);
  const QueryRows& rows = w.queries;
  QueryWalk walk(batch, s, head);
  while (walk.next(w.queries)) {
    score(batch, s, head, w);
    float inverse[kMaxRows], lse[kMaxRows];
    for (int64_t m = 0; m < rows.lanes; m += kLanes) {
      Vec largest, sum;
      exponentiate(batch, w, m, largest, sum);
      const Vec nothing = all(0.0f);
      store(inverse + m, sum == nothing ? nothing : 1.0f / sum);
      store(lse + m, sum == nothing ? all(-__builtin_inff()) : largest + log(sum));
    }
    product<false>({w.scores, 1, rows.lanes}, rows.count, w.values, w.ld, rows.num_keys, w.ld,
                   w.mixed, w.ld);
    for (int64_t m = 0; m < rows.count; ++m) {
      write_head(batch.out, rows.token[m], head, batch.head_dim, inverse[m], w.mixed + m * w.ld);
      batch.lse[rows.token[m] * batch.num_heads + head] = lse[m];
    }
  }
}

// Weights from scores by the saved log-sum-exp, whose rounding their own sum takes out; then, from
// the weights' gradient, the scores' gradient. With dropout, `dropped` holds what mixes the values.
VLPFAST_INLINE void differentiate_softmax(const AttentionBatch& batch, AttentionSpace& w,
                                          int64_t m, Vec lse) {
  const int64_t lanes = w.queries.lanes, N = w.queries.num_keys;
  const auto keep = [&](int64_t n) {
    return kept(batch, w.queries, mix32(static_cast<uint32_t>(n)), m);
  };
  Vec sum{}, delta{};
  for (int64_t n = 0; n < N; ++n) {
    const int64_t at = n * lanes + m;
    const Vec weight = exp(load(w.scores + at) - lse, Vec{});
    Vec grad = load(w.grad_scores + at);
    if (batch.drop_below) {
      const Vec factor = keep(n);
      store(w.dropped + at, weight * factor);
      grad *= factor;
      store(w.grad_scores + at, grad);
    }
    store(w.scores + at, weight);
    sum += weight;
    delta += weight * grad;
  }
  const Vec inverse = sum == Vec{} ? Vec{} : 1.0f / sum;
  delta *= inverse;
  for (int64_t n = 0; n < N; ++n) {
    const int64_t at = n * lanes + m;
    const Vec weight = load(w.scores + at) * inverse;
    store(w.grad_scores + at, weight * (load(w.grad_scores + at) - delta));
    if (batch.drop_below) {
      store(w.dropped + at, load(w.dropped + at) * inverse);
    } else {
      store(w.scores + at, weight);
    }
  }
}

VLPFAST_INLINE void add_bias_gradient(const AttentionBatch& batch, const QueryRows& rows,
                                      int64_t head, const float* grad_scores) {
  const ScoreBias& bias = batch.bias;
  if (bias.grad == nullptr) return;
  for (int64_t m = 0; m < rows.count; ++m) {
    float* to = bias.grad + rows.sequence[m] * bias.sequence + head * bias.head +
                rows.position[m] * bias.query;
    for (int64_t n = 0; n < rows.num_keys; ++n) to[n] += grad_scores[n * rows.lanes + m];
  }
}

inline void differentiate(const AttentionBatch& batch, int64_t s, int64_t head,
                          AttentionSpace& w) {
  const int64_t start = batch.k_spans.start(s), N = batch.k_spans.length(s), E = batch.head_dim;
  gather_keys(batch, s, head, w);
  std::fill_n(static_cast<float*>(w.grad_keys), N * w.ld, 0.0f);
  std::fill_n(static_cast<float*>(w.grad_values), N * w.ld, 0.0f);
  const QueryRows& rows = w.queries;
  QueryWalk walk(batch, s, head);
  while (walk.next(w.queries)) {
    const int64_t lanes = rows.lanes, seen = rows.num_keys;
    score(batch, s, head, w);
    gather_rows(batch.grad_out, rows, head, E, 1, w.grad_rows, w.columns);
    product<false>({w.values, w.ld, 1}, seen, w.columns, lanes, E, lanes, w.grad_scores, lanes);
    // Lanes without a query, and queries that see nothing, get weights of zero.
    float lse[kMaxRows];
    for (int64_t m = 0; m < lanes; ++m) {
      const float own = m < rows.count ? batch.lse[rows.token[m] * batch.num_heads + head] : 0;
      lse[m] = m < rows.count && own > -__builtin_inff() ? own : __builtin_inff();
    }
    for (int64_t m = 0; m < lanes; m += kLanes) {
      differentiate_softmax(batch, w, m, load(lse + m));
    }
    add_bias_gradient(batch, rows, head, w.grad_scores);
    const float* weights = batch.drop_below ? w.dropped : w.scores;
    product<true>({weights, lanes, 1}, seen, w.grad_rows, w.ld, rows.count, w.ld, w.grad_values,
                  w.ld);
    product<true>({w.grad_scores, lanes, 1}, seen, w.rows, w.ld, rows.count, w.ld, w.grad_keys,
                  w.ld);
    product<false>({w.grad_scores, 1, lanes}, rows.count, w.keys, w.ld, seen, w.ld, w.mixed, w.ld);
    for (int64_t m = 0; m < rows.count; ++m) {
      write_head(batch.grad_q, rows.token[m], head, E, batch.scale, w.mixed + m * w.ld);
    }
  }
  for (int64_t n = 0; n < N; ++n) {
    write_head(batch.grad_k, start + n, head, E, 1, w.grad_keys + n * w.ld);
    write_head(batch.grad_v, start + n, head, E, 1, w.grad_values + n * w.ld);
  }
}

// Takes tasks from the counter until none is left.
inline void run_attention(const AttentionBatch& batch, bool backward, std::atomic<int64_t>& next) {
  AttentionSpace w(batch, backward);
  const auto run = [&](int64_t s, int64_t head) {
    if (backward) {
      differentiate(batch, s, head, w);
    } else if (batch.reader_starts[s] < batch.reader_starts[s + 1]) {
      attend(batch, s, head, w);
    }
  };
  for (int64_t task; (task = next.fetch_add(1)) < batch.num_tasks();) {
    if (batch.by_head) {
      for (int64_t s = 0; s < batch.k_spans.count; ++s) run(s, task);
    } else {
      run(task / batch.num_heads, task % batch.num_heads);
    }
  }
}

}  // namespace vlpfast::VLPFAST_NAMESPACE
