// The softmax contrastive loss of queries against keys that have no gradient (a queue):
// similarities are made for a chunk of keys at a time and used while they, and the keys, are in a
// core's caches. They are transposed, one row for each key and one lane for each query, so that all
// sums go down the lanes. Included for each target; no include guard.
#include "vlpfast/vec.h"
#include "vlpfast/product.h"
#include "vlpfast/contrastive_keys_features.h"

namespace vlpfast::VLPFAST_NAMESPACE {

// Which of a panel's queries have a key's id. One bit per hash of an id: most keys find that none
// can have theirs.
struct PanelIds {
  uint64_t seen[64] = {};
  const int64_t *ids = nullptr, *key_ids;
  int64_t count = 0;
  PanelIds(const KeyWalk& walk, const Panel& panel) : key_ids(walk.key_ids) {
    if (!walk.row_ids) return;
    ids = walk.row_ids + panel.first;
    count = panel.count;
    for (int64_t m = 0; m < count; ++m) seen[hash(ids[m]) >> 6] |= bit(ids[m]);
  }
  static uint32_t hash(int64_t id) {
    return static_cast<uint32_t>((static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u) >> 52);
  }
  static uint64_t bit(int64_t id) { return uint64_t{1} << (hash(id) & 63); }

  // Calls found(key, query) for every positive pair of keys [begin, begin + n), counted from there.
  template <class Found>
  VLPFAST_INLINE void each_positive(int64_t begin, int64_t n, Found found) const {
    for (int64_t j = 0; j < n && count > 0; ++j) {
      const int64_t id = key_ids[begin + j];
      if (!(seen[hash(id) >> 6] & bit(id))) continue;
      for (int64_t m = 0; m < count; ++m) {
        if (ids[m] == id) found(j, m);
      }
    }
  }
};

// One vector of a panel's lanes against a chunk: log-sum-exp of the student, of the teacher, and
// the sum of the student's similarities by the teacher's exponentials.
template <bool kTeacher>
VLPFAST_INLINE void sum_lanes_of(const float* s, int64_t n, int64_t width, int64_t lanes,
                                 float scale, const KeySums& at) {
  const Vec old = load(at.max), old_m = kTeacher ? load(at.teacher_max) : Vec{};
  Vec top = old, top_m = old_m;
  for (int64_t j = 0; j < n; ++j) {
    top = max(load(s + j * width) * scale, top);
    if (kTeacher) top_m = max(load(s + j * width + lanes) * scale, top_m);
  }
  Vec sum{}, sum_m{}, dot_m{};
  for (int64_t j = 0; j < n; ++j) {
    const Vec value = load(s + j * width);
    sum += exp(value * scale - top, Vec{});
    if (!kTeacher) continue;
    const Vec e = exp(load(s + j * width + lanes) * scale - top_m, Vec{});
    sum_m += e;
    dot_m += e * value;
  }
  store(at.max, top);
  store(at.sum, load(at.sum) * exp(old - top, Vec{}) + sum);
  if (!kTeacher) return;
  const Vec factor = exp(old_m - top_m, Vec{});
  store(at.teacher_max, top_m);
  store(at.teacher_sum, load(at.teacher_sum) * factor + sum_m);
  store(at.teacher_dot, load(at.teacher_dot) * factor + dot_m);
}

VLPFAST_INLINE KeySums plus(const KeySums& sums, int64_t m) {
  return {sums.max + m,         sums.sum + m,         sums.positive + m,
          sums.teacher_max + m, sums.teacher_sum + m, sums.teacher_dot + m};
}

inline void look(const KeyWalk& walk, const Panel& panel, const KeyRows& keys, int64_t begin,
                 int64_t n, const KeySums& sums, KeySpace& space) {
  const float* sims = make_similarities(walk, panel, keys, begin, n, space);
  for (int64_t m = 0; m < panel.lanes; m += kLanes) {
    const KeySums at = plus(sums, panel.first + m);
    if (walk.teacher) sum_lanes_of<true>(sims + m, n, panel.width, panel.lanes, walk.scale, at);
    else sum_lanes_of<false>(sims + m, n, panel.width, panel.lanes, walk.scale, at);
  }
  PanelIds(walk, panel).each_positive(begin, n, [&](int64_t j, int64_t m) {
    sums.positive[panel.first + m] += sims[j * panel.width + m];
  });
}

// g of one vector of a panel's lanes without what positives take from it; returns sum of g s.
template <bool kTeacher, class T>
VLPFAST_INLINE Vec grad_lanes_of(const T* s, int64_t n, const Panel& panel, float scale,
                                 float smoothing, Vec top, Vec factor, Vec top_m, Vec factor_m,
                                 float* g) {
  Vec dot{};
  for (int64_t j = 0; j < n; ++j) {
    const Vec value = load(s + j * panel.width);
    Vec grad = exp(value * scale - top, Vec{}) * factor - smoothing;
    if (kTeacher) {
      const Vec z = load(s + j * panel.width + panel.lanes) * scale;
      grad -= exp(z - top_m, Vec{}) * factor_m;
    }
    store(g + j * panel.lanes, grad);
    dot += grad * value;
  }
  return dot;
}

struct PanelSoftmax {
  float max[kPanelRows] = {}, factor[kPanelRows] = {}, weight[kPanelRows] = {};
  float teacher_max[kPanelRows] = {}, teacher_factor[kPanelRows] = {};
  PanelSoftmax(const KeyWalk& walk, const Panel& panel) {
    for (int64_t m = 0; m < panel.count; ++m) {
      const int64_t row = panel.first + m;
      max[m] = walk.row_max[row];
      factor[m] = 1.0f / walk.row_sum[row];
      weight[m] = walk.row_weight[row];
      if (!walk.teacher) continue;
      teacher_max[m] = walk.teacher_max[row];
      teacher_factor[m] = walk.alpha / walk.teacher_sum[row];
    }
  }
};

// g of a panel with a chunk, into `g`, and its sums of g s.
template <class T>
inline void differentiate_sims(const KeyWalk& walk, const Panel& panel, const T* sims,
                               int64_t begin, int64_t n, float* g, float* dots) {
  const PanelSoftmax p(walk, panel);
  for (int64_t m = 0; m < panel.lanes; m += kLanes) {
    const Vec top = load(p.max + m), factor = load(p.factor + m);
    const Vec top_m = load(p.teacher_max + m), factor_m = load(p.teacher_factor + m);
    const auto run = walk.teacher ? grad_lanes_of<true, T> : grad_lanes_of<false, T>;
    const Vec dot = run(sims + m, n, panel, walk.scale, walk.smoothing, top, factor, top_m,
                        factor_m, g + m);
    store(dots + panel.first + m, load(dots + panel.first + m) + dot);
  }
  PanelIds(walk, panel).each_positive(begin, n, [&](int64_t j, int64_t m) {
    g[j * panel.lanes + m] -= p.weight[m];
    dots[panel.first + m] -= p.weight[m] * as_float(sims[j * panel.width + m]);
  });
}

inline void differentiate(const KeyWalk& walk, const Panel& panel, const KeyRows& keys,
                          int64_t begin, int64_t n, float* dots, float* grads, KeySpace& space) {
  const int64_t at = kept_at(walk, panel, begin);
  if (walk.sims && walk.is_bf16) {
    const uint16_t* sims = static_cast<uint16_t*>(walk.sims) + at;
    differentiate_sims(walk, panel, sims, begin, n, space.grads, dots);
  } else {
    const float* sims = walk.sims ? static_cast<float*>(walk.sims) + at
                                  : make_similarities(walk, panel, keys, begin, n, space);
    differentiate_sims(walk, panel, sims, begin, n, space.grads, dots);
  }
  if (grads) add_gradient(walk, panel, keys, n, grads + panel.first * walk.ld(), space);
}

template <class Work>
VLPFAST_INLINE void over_chunks(const KeyWalk& walk, int64_t segment, Work work) {
  const int64_t end = walk.chunk_from(segment + 1);
  for (int64_t chunk = walk.chunk_from(segment); chunk < end; ++chunk) {
    const int64_t begin = chunk * kChunkKeys;
    work(begin, std::min(kChunkKeys, walk.N - begin));
  }
}

// The first walk. Tasks of a segment follow each other, so that its keys stay in the last cache.
inline void look_at_keys(const KeyWalk& walk, std::atomic<int64_t>& next) {
  KeySpace space(walk);
  for (int64_t task; (task = next++) < walk.num_tasks();) {
    const int64_t segment = task / walk.num_panels();
    const Panel panel(walk, task % walk.num_panels());
    const KeySums sums = walk.sums_of(segment);
    over_chunks(walk, segment, [&](int64_t begin, int64_t n) {
      look(walk, panel, key_rows(walk, begin, n, space), begin, n, sums, space);
    });
  }
}

// The second.
inline void differentiate_keys(const KeyWalk& walk, std::atomic<int64_t>& next) {
  KeySpace space(walk);
  for (int64_t task; (task = next++) < walk.num_tasks();) {
    const int64_t segment = task / walk.num_panels();
    const Panel panel(walk, task % walk.num_panels());
    float* dots = walk.dots + segment * to_lanes(walk.M);
    float* grads = walk.grads ? walk.grads + segment * walk.M * walk.ld() : nullptr;
    over_chunks(walk, segment, [&](int64_t begin, int64_t n) {
      const KeyRows keys = key_rows(walk, begin, n, space);
      if (kHasPairs && walk.is_bf16 && grads) pair_keys(keys, n, walk.ld(), space.pairs);
      differentiate(walk, panel, keys, begin, n, dots, grads, space);
    });
  }
}

inline void pack_panels(const KeyWalk& walk, std::atomic<int64_t>& next) {
  for (int64_t i; (i = next++) < walk.num_panels();) pack_panel(walk, Panel(walk, i));
}

}  // namespace vlpfast::VLPFAST_NAMESPACE
