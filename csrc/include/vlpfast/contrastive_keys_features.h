// What the walk over a contrastive loss's keys multiplies: queries packed by panels, keys as rows,
// both in fp32 or in pairs of bf16, and the products themselves. Included by contrastive_keys.h; no
// include guard.

namespace vlpfast::VLPFAST_NAMESPACE {

#ifdef VLPFAST_BF16_PAIRS
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

typedef uint16_t ShortVec __attribute__((vector_size(2 * VLPFAST_LANES)));
typedef uint32_t WordVec __attribute__((vector_size(4 * VLPFAST_LANES)));

VLPFAST_INLINE Vec load(const uint16_t* p) {
  ShortVec half;
  __builtin_memcpy(&half, p, sizeof half);
  return (Vec)(__builtin_convertvector(half, WordVec) << 16);
}

// fp32 to bf16 in the high half of each word, to nearest even; a NaN stays one.
VLPFAST_INLINE WordVec rounded(Vec x) {
  const WordVec bits = (WordVec)x;
  const WordVec even = bits + 0x7FFFu + ((bits >> 16) & 1u);
  return (x != x ? bits | 0x400000u : even) & 0xFFFF0000u;
}

VLPFAST_INLINE void store_bf16(uint16_t* p, Vec x) {
  const ShortVec half = __builtin_convertvector((WordVec)x >> 16, ShortVec);
  __builtin_memcpy(p, &half, sizeof half);
}

// What one thread works in; ld is D in whole lanes.
struct KeySpace {
  explicit KeySpace(const KeyWalk& walk)
      : features(kChunkKeys * walk.ld()),
        pairs(walk.is_bf16 && kHasPairs ? kChunkKeys / 2 * walk.ld() : 0),
        sims(kChunkKeys * kPanelRows * walk.copies()),
        grads(kChunkKeys * kPanelRows),
        grad_pairs(kChunkKeys / 2 * kPanelRows) {}
  Buffer<uint32_t> features;    // keys in fp32, or pairs of columns (keys, ld / 2)
  Buffer<uint32_t> pairs;       // pairs of keys (keys / 2, ld)
  Buffer<float> sims, grads;    // (keys, lanes)
  Buffer<uint32_t> grad_pairs;  // (keys / 2, lanes)
};

VLPFAST_INLINE float as_float(float x) { return x; }
VLPFAST_INLINE float as_float(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Element `at` of features as fp32.
VLPFAST_INLINE float feature(const KeyWalk& walk, const void* features, int64_t at) {
  return walk.is_bf16 ? as_float(static_cast<const uint16_t*>(features)[at])
                      : static_cast<const float*>(features)[at];
}

VLPFAST_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

// A panel's queries, then its teacher's, as columns: (ld, width) in fp32 or (ld / 2, width) pairs.
inline void pack_panel(const KeyWalk& walk, const Panel& panel) {
  const bool in_pairs = kHasPairs && walk.is_bf16;
  const int64_t D = walk.D, width = panel.width;
  uint32_t* out = walk.queries + panel.first * walk.copies() * walk.ld();
  std::fill_n(out, width * walk.ld() / (in_pairs ? 2 : 1), 0u);
  for (int64_t copy = 0; copy < walk.copies(); ++copy) {
    const void* from = copy ? walk.teacher : walk.query;
    for (int64_t m = 0; m < panel.count; ++m) {
      uint32_t* column = out + copy * panel.lanes + m;
      for (int64_t d = 0; d < D; ++d) {
        const uint32_t bits = bits_of(feature(walk, from, (panel.first + m) * D + d));
        if (!in_pairs) column[d * width] = bits;
        else column[d / 2 * width] |= d % 2 ? bits : bits >> 16;
      }
    }
  }
}

// Keys [begin, begin + n) as rows for the products: in place where their layout serves.
struct KeyRows {
  const uint32_t* data;
  int64_t ld;
};

inline KeyRows key_rows(const KeyWalk& walk, int64_t begin, int64_t n, KeySpace& space) {
  const int64_t D = walk.D, ld = walk.ld();
  const bool in_pairs = kHasPairs && walk.is_bf16;
  const int64_t words = in_pairs ? ld / 2 : ld;
  if (D == ld && (in_pairs || !walk.is_bf16)) {
    const char* at = static_cast<const char*>(walk.keys) + begin * words * 4;
    if (reinterpret_cast<uintptr_t>(at) % 4 == 0) {
      return {reinterpret_cast<const uint32_t*>(at), words};
    }
  }
  const int64_t size = walk.is_bf16 ? 2 : 4;
  const char* from = static_cast<const char*>(walk.keys) + begin * D * size;
  for (int64_t j = 0; j < n; ++j) {
    uint32_t* row = space.features + j * words;
    if (in_pairs || !walk.is_bf16) {
      std::memset(row, 0, words * 4);
      std::memcpy(row, from + j * D * size, D * size);
    } else {
      for (int64_t d = 0; d < ld; ++d) {
        row[d] = d < D ? bits_of(feature(walk, walk.keys, (begin + j) * D + d)) : 0;
      }
    }
  }
  return {space.features, words};
}

// Raw similarities of a chunk with a panel, in fp32.
inline void similarities(const KeyWalk& walk, const Panel& panel, const KeyRows& keys, int64_t n,
                         float* out) {
  const uint32_t* queries = walk.queries + panel.first * walk.copies() * walk.ld();
#ifdef VLPFAST_BF16_PAIRS
  if (walk.is_bf16) {
    return product_of<false>(StridedOf<uint32_t>{keys.data, keys.ld, 1}, n, queries, panel.width,
                             walk.ld() / 2, panel.width, out, panel.width);
  }
#endif
  product<false>({reinterpret_cast<const float*>(keys.data), keys.ld, 1}, n,
                 reinterpret_cast<const float*>(queries), panel.width, walk.ld(), panel.width, out,
                 panel.width);
}

// A panel's similarities with keys from `begin` on among those kept, in elements.
VLPFAST_INLINE int64_t kept_at(const KeyWalk& walk, const Panel& panel, int64_t begin) {
  return panel.first * walk.copies() * walk.N + begin * panel.width;
}

// Similarities as both walks see them: made, rounded as the features are, and kept if there is a
// place for them.
inline float* make_similarities(const KeyWalk& walk, const Panel& panel, const KeyRows& keys,
                                int64_t begin, int64_t n, KeySpace& space) {
  const bool in_place = walk.sims && !walk.is_bf16;
  float* sims = in_place ? static_cast<float*>(walk.sims) + kept_at(walk, panel, begin)
                         : static_cast<float*>(space.sims);
  similarities(walk, panel, keys, n, sims);
  if (!walk.is_bf16) return sims;
  uint16_t* kept = nullptr;
  if (walk.sims) kept = static_cast<uint16_t*>(walk.sims) + kept_at(walk, panel, begin);
  for (int64_t i = 0; i < n * panel.width; i += kLanes) {
    const Vec value = (Vec)rounded(load(sims + i));
    store(sims + i, value);
    if (kept) store_bf16(kept + i, value);
  }
  return sims;
}

// Rows 2 k and 2 k + 1 of (n, columns) fp32 as row k of pairs; a row behind the last one is 0.
inline void pair_rows(const float* from, int64_t n, int64_t columns, uint32_t* out) {
  for (int64_t j = 0; j < n; j += 2) {
    for (int64_t m = 0; m < columns; m += kLanes) {
      const WordVec low = rounded(load(from + j * columns + m)) >> 16;
      const WordVec high = j + 1 < n ? rounded(load(from + (j + 1) * columns + m)) : WordVec{};
      const WordVec pair = low | high;
      __builtin_memcpy(out + j / 2 * columns + m, &pair, sizeof pair);
    }
  }
}

// Lane l of the lower or upper half of a[0], b[0], a[1], b[1], ...
constexpr int alternating_lane(int l, int upper) {
  return l / 2 + upper * kLanes / 2 + (l % 2) * kLanes;
}

template <int... L>
VLPFAST_INLINE void store_alternating(WordVec a, WordVec b, uint32_t* to,
                                      std::integer_sequence<int, L...>) {
  const WordVec first = __builtin_shufflevector(a, b, alternating_lane(L, 0)...);
  const WordVec second = __builtin_shufflevector(a, b, alternating_lane(L, 1)...);
  __builtin_memcpy(to, &first, sizeof first);
  __builtin_memcpy(to + kLanes, &second, sizeof second);
}

// The same of keys, which are pairs of columns.
inline void pair_keys(const KeyRows& keys, int64_t n, int64_t ld, uint32_t* out) {
  for (int64_t j = 0; j < n; j += 2, out += ld) {
    const uint32_t* row = keys.data + j * keys.ld;
    for (int64_t d = 0; d < ld / 2; d += kLanes) {
      WordVec a, b{};
      __builtin_memcpy(&a, row + d, sizeof a);
      if (j + 1 < n) __builtin_memcpy(&b, row + keys.ld + d, sizeof b);
      store_alternating((a & 0xFFFFu) | (b << 16), (a >> 16) | (b & 0xFFFF0000u), out + 2 * d,
                        std::make_integer_sequence<int, kLanes>{});
    }
  }
}

// grads += transpose(g) keys, by so many keys that a tile's columns of them stay in the first
// cache.
template <class T>
VLPFAST_INLINE void add_gradient(const T* g, const Panel& panel, const T* keys, int64_t ld_keys,
                                 int64_t n, int64_t ld, float* grads) {
  constexpr int64_t kDepth = 96;
  for (int64_t j = 0; j < n; j += kDepth) {
    product_of<true>(StridedOf<T>{g + j * panel.lanes, 1, panel.lanes}, panel.count,
                     keys + j * ld_keys, ld_keys, std::min(kDepth, n - j), ld, grads, ld);
  }
}

inline void add_gradient(const KeyWalk& walk, const Panel& panel, const KeyRows& keys, int64_t n,
                         float* grads, KeySpace& space) {
  const int64_t ld = walk.ld();
#ifdef VLPFAST_BF16_PAIRS
  if (walk.is_bf16) {
    pair_rows(space.grads, n, panel.lanes, space.grad_pairs);
    return add_gradient<uint32_t>(space.grad_pairs, panel, space.pairs, ld, (n + 1) / 2, ld,
                                  grads);
  }
#endif
  add_gradient<float>(space.grads, panel, reinterpret_cast<const float*>(keys.data), keys.ld, n,
                      ld, grads);
}

}  // namespace vlpfast::VLPFAST_NAMESPACE
