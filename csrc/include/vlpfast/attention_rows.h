// Query rows of an attention task and the masks on their scores. Scores are transposed throughout:
// one row of vectors for each key, one lane for each query, so that a softmax is a walk down the
// rows and any number of queries of any sequences fills the lanes. Included by each_target.h; no
// include guard.

namespace vlpfast::VLPFAST_NAMESPACE {

typedef uint32_t BitVec __attribute__((vector_size(4 * VLPFAST_LANES)));

constexpr int64_t kMaxRows = kProductVecs * kLanes;

VLPFAST_INLINE IntVec load(const int32_t* p) {
  IntVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// One head of a token as floats, with zeros up to whole vectors; and back.
VLPFAST_INLINE void read_head(const Heads& heads, int64_t token, int64_t head, int64_t E,
                              float factor, float* to) {
  const int64_t at = token * heads.token_stride + head * heads.head_stride;
  if (heads.is_bf16) {
    const auto* from = static_cast<const uint16_t*>(heads.data) + at;
    for (int64_t e = 0; e < E; ++e) {
      const uint32_t bits = uint32_t{from[e]} << 16;
      float value;
      __builtin_memcpy(&value, &bits, sizeof value);
      to[e] = value * factor;
    }
  } else {
    const auto* from = static_cast<const float*>(heads.data) + at;
    for (int64_t e = 0; e < E; ++e) to[e] = from[e] * factor;
  }
  for (int64_t e = E; e < padded(E); ++e) to[e] = 0;
}

VLPFAST_INLINE void write_head(const Heads& heads, int64_t token, int64_t head, int64_t E,
                               float factor, const float* from) {
  const int64_t at = token * heads.token_stride + head * heads.head_stride;
  if (heads.is_bf16) {
    auto* to = static_cast<uint16_t*>(heads.data) + at;
    for (int64_t e = 0; e < E; ++e) {
      const float value = from[e] * factor;
      uint32_t bits;
      __builtin_memcpy(&bits, &value, sizeof bits);
      const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
      const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
      to[e] = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
    }
  } else {
    auto* to = static_cast<float*>(heads.data) + at;
    for (int64_t e = 0; e < E; ++e) to[e] = from[e] * factor;
  }
}

// Up to kMaxRows queries of the sequences that read one key sequence.
struct QueryRows {
  int64_t count, lanes;  // queries, and rounded up to whole vectors
  int64_t num_keys;      // keys that any of them may see
  int64_t token[kMaxRows], sequence[kMaxRows];
  int32_t position[kMaxRows], block[kMaxRows];
  uint32_t stream[kMaxRows];  // of dropout
};

// Walks over the queries of the readers of key sequence `s`.
class QueryWalk {
 public:
  QueryWalk(const AttentionBatch& batch, int64_t s, int64_t head)
      : batch_(batch),
        head_(head),
        num_keys_(batch.k_spans.length(s)),
        reader_(batch.reader_starts[s]),
        end_(batch.reader_starts[s + 1]) {}

  // Fills `rows` with the next queries; false where there are none left.
  bool next(QueryRows& rows) {
    int64_t n = 0;
    int32_t last = -1;
    for (; reader_ < end_ && n < kMaxRows; ++reader_, position_ = 0) {
      const int64_t r = batch_.readers[reader_];
      const int64_t start = batch_.q_spans.start(r), length = batch_.q_spans.length(r);
      const uint32_t of_head =
          batch_.drop_below ? draw(stream_key(batch_.seed, r), static_cast<uint32_t>(head_)) : 0;
      for (; position_ < length && n < kMaxRows; ++position_, ++n) {
        rows.token[n] = start + position_;
        rows.sequence[n] = r;
        rows.position[n] = static_cast<int32_t>(position_);
        rows.block[n] = batch_.q_block ? batch_.q_block[start + position_] : 0;
        rows.stream[n] = draw(of_head, static_cast<uint32_t>(position_));
        last = rows.position[n] > last ? rows.position[n] : last;
      }
      if (position_ < length) break;
    }
    rows.count = n;
    rows.lanes = padded(n);
    rows.num_keys = batch_.causal && last + 1 < num_keys_ ? last + 1 : num_keys_;
    for (int64_t m = n; m < rows.lanes; ++m) {
      rows.position[m] = rows.block[m] = 0;
      rows.stream[m] = 0;
    }
    return n > 0;
  }

 private:
  const AttentionBatch& batch_;
  int64_t head_, num_keys_, reader_, end_, position_ = 0;
};

// Adds the bias to scores (N, lanes) and hides keys: -inf.
VLPFAST_INLINE void mask_scores(const AttentionBatch& batch, const QueryRows& rows, int64_t s,
                                int64_t head, float* scores) {
  const ScoreBias& bias = batch.bias;
  if (bias.data != nullptr) {
    for (int64_t m = 0; m < rows.count; ++m) {
      const float* from = bias.data + rows.sequence[m] * bias.sequence + head * bias.head +
                          rows.position[m] * bias.query;
      for (int64_t n = 0; n < rows.num_keys; ++n) scores[n * rows.lanes + m] += from[n];
    }
  }
  if (!batch.causal && batch.q_block == nullptr) return;
  const Vec hidden = all(-__builtin_inff());
  const int32_t* first = batch.causal ? nullptr : batch.k_block + batch.k_spans.start(s);
  const int32_t* limits = batch.causal ? rows.position : rows.block;
  for (int64_t n = 0; n < rows.num_keys; ++n) {
    const IntVec block = IntVec{} + (first == nullptr ? static_cast<int32_t>(n) : first[n]);
    float* row = scores + n * rows.lanes;
    for (int64_t m = 0; m < rows.lanes; m += kLanes) {
      store(row + m, block <= load(limits + m) ? load(row + m) : hidden);
    }
  }
}

VLPFAST_INLINE BitVec mix(BitVec x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// keep_scale where the weight of key n is kept, 0 where it is dropped; of kLanes rows from m on.
VLPFAST_INLINE Vec kept(const AttentionBatch& batch, const QueryRows& rows, uint32_t key_hash,
                        int64_t m) {
  BitVec stream;
  __builtin_memcpy(&stream, rows.stream + m, sizeof stream);
  const BitVec bits = mix(stream ^ key_hash) >> 8;
  return bits >= BitVec{} + batch.drop_below ? all(batch.keep_scale) : Vec{};
}

}  // namespace vlpfast::VLPFAST_NAMESPACE
