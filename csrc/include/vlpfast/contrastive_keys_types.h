// What the walk over a contrastive loss's keys is given, whatever the target; no tensor in it.
//
// Letters: M queries, N keys, D width; a panel is up to kPanelRows queries, a segment the keys that
// one task walks with a panel, a chunk those of which it makes similarities at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace vlpfast {

constexpr int64_t kPanelRows = 64;
// Lanes come in sixteens, whatever a target's vectors.
constexpr int64_t kLaneStep = 16;
// A chunk of keys, its similarities and a panel stay in a core's second cache. Even, for pairs, and
// whole tiles of six.
constexpr int64_t kChunkKeys = 192;
// Segments times panels. Many queries need few segments, each of which has gradients of its own;
// and neither depends on threads, so results do not.
constexpr int64_t kMostTasks = 32;

inline int64_t to_lanes(int64_t n) { return (n + kLaneStep - 1) / kLaneStep * kLaneStep; }

// Running sums of one segment, each (padded M).
struct KeySums {
  float *max, *sum, *positive;
  float *teacher_max, *teacher_sum, *teacher_dot;
};

struct KeyWalk {
  int64_t M, N, D;
  bool is_bf16;
  const void *query, *teacher, *keys;  // (M, D), nullable (M, D), (N, D)
  const int64_t *row_ids, *key_ids;    // nullable, both or none
  float scale;
  // Similarities from the first walk for the second, or null. A panel's are a block of N rows, its
  // queries' lanes and then the teacher's; fp32 or bf16 as the features.
  void* sims;
  uint32_t* queries;  // the panels' features as the products take them, (D, lanes) each
  float* sums;        // (segments, 6, padded M) of the first walk

  // Of the second walk.
  const float *row_max, *row_sum, *row_weight, *teacher_max, *teacher_sum;
  float smoothing, alpha;
  float* dots;   // (segments, padded M)
  float* grads;  // nullable, (segments, M, padded D)

  int64_t copies() const { return teacher ? 2 : 1; }
  int64_t num_panels() const { return (M + kPanelRows - 1) / kPanelRows; }
  int64_t num_chunks() const { return (N + kChunkKeys - 1) / kChunkKeys; }
  int64_t num_segments() const {
    return std::min(std::max<int64_t>(1, kMostTasks / num_panels()), num_chunks());
  }
  int64_t num_tasks() const { return num_segments() * num_panels(); }
  int64_t chunk_from(int64_t segment) const { return segment * num_chunks() / num_segments(); }
  // D in whole vectors, also of pairs of columns.
  int64_t ld() const { return (D + 2 * kLaneStep - 1) / (2 * kLaneStep) * (2 * kLaneStep); }

  KeySums sums_of(int64_t segment) const {
    const int64_t size = to_lanes(M);
    float* at = sums + segment * 6 * size;
    return {at, at + size, at + 2 * size, at + 3 * size, at + 4 * size, at + 5 * size};
  }
};

// Queries [first, first + count) and how many lanes they take; the teacher's follow in as many.
struct Panel {
  int64_t first, count, lanes, width;
  Panel(const KeyWalk& walk, int64_t index)
      : first(index * kPanelRows),
        count(std::min(kPanelRows, walk.M - first)),
        lanes(to_lanes(count)),
        width(lanes * walk.copies()) {}
};

}  // namespace vlpfast
