// What the CPU engine of attention is given, whatever the target; no tensor in it.
//
// Letters: R query sequences, S key sequences, T tokens, H heads, E head size, M queries and N keys
// of one sequence.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vlpfast/buffer.h"
#include "vlpfast/counter.h"

namespace vlpfast {

// Tokens (T, H, E) in fp32 or bf16, contiguous in E; strides in elements.
struct Heads {
  void* data = nullptr;
  bool is_bf16 = false;
  int64_t token_stride = 0, head_stride = 0;
};

// Where sequences lie: first token and length of each.
struct Spans {
  const int32_t* data;  // (sequences, 2)
  int64_t count;
  int64_t start(int64_t i) const { return data[2 * i]; }
  int64_t length(int64_t i) const { return data[2 * i + 1]; }
};

// Added to the scores; strides in elements, `sequence` 0 where all sequences share it.
struct ScoreBias {
  const float* data = nullptr;
  float* grad = nullptr;
  int64_t sequence = 0, head = 0, query = 0;  // a row's keys are contiguous
  bool shared() const { return sequence == 0; }
};

struct AttentionBatch {
  int64_t num_heads, head_dim;
  Heads q, k, v;
  Spans q_spans, k_spans;
  // Query sequences ordered by the key sequence they read: those of s are
  // readers[reader_starts[s]] up to readers[reader_starts[s + 1]].
  std::vector<int64_t> readers, reader_starts;
  const int32_t* q_block;  // (T,) or null
  const int32_t* k_block;
  bool causal;
  ScoreBias bias;
  int64_t seed;
  uint32_t drop_below;  // a weight is dropped if its 24 random bits are below this
  float keep_scale;     // 1 / (1 - dropout_p)
  float scale;
  float* lse;  // (T, H): written by the forward, read by the backward
  Heads out;       // forward
  Heads grad_out;  // backward
  Heads grad_q, grad_k, grad_v;
  // A task is (key sequence, head); or a head, where sequences add to one gradient of the bias.
  bool by_head;
  int64_t num_tasks() const { return by_head ? num_heads : num_heads * k_spans.count; }
};

}  // namespace vlpfast
