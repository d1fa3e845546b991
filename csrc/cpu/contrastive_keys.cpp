// Softmax contrastive loss against keys without a gradient, on the CPU: checks, memory, threads and
// the order in which segments are merged. vlpfast/contrastive_keys.h walks.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

#include "vlpfast/buffer.h"
#include "vlpfast/contrastive_keys_types.h"
#include "vlpfast/contrastive_tile.h"
#include "vlpfast/threads.h"

#define VLPFAST_EACH_TARGET "vlpfast/contrastive_keys.h"
#include "vlpfast/each_bf16_target.h"

namespace vlpfast {
namespace {

struct Arguments {
  const Tensor& query;
  const std::optional<Tensor>& teacher;
  const Tensor &keys, &scale;
  const std::optional<Tensor>&row_ids, &key_ids, &sims;
};

void check_features(const Tensor& x, const Tensor& like, const char* op, const char* name) {
  check_argument(x, like.scalar_type(), op, name);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) > 0 && x.size(1) == like.size(1), op, ": ", name,
                  " must be (., D) as query is, and not empty");
}

KeyWalk walk_of(const Arguments& given, const char* op) {
  const Tensor &query = given.query, &keys = given.keys;
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op,
                  ": query must be Float or BFloat16, got ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(query.dim() == 2, op, ": query must be (M, D)");
  check_features(query, query, op, "query");
  check_features(keys, query, op, "keys");
  KeyWalk walk{};
  walk.M = query.size(0), walk.N = keys.size(0), walk.D = query.size(1);
  walk.is_bf16 = dtype == ScalarType::BFloat16;
  walk.query = query.data_ptr(), walk.keys = keys.data_ptr();
  if (given.teacher) {
    check_features(*given.teacher, query, op, "teacher");
    STD_TORCH_CHECK(given.teacher->size(0) == walk.M, op, ": teacher must have query's shape");
    walk.teacher = given.teacher->data_ptr();
  }
  walk.scale = scalar_of(given.scale, op, "scale");
  STD_TORCH_CHECK(given.row_ids.has_value() == given.key_ids.has_value(), op,
                  ": row_ids and key_ids must be given together");
  if (given.row_ids) {
    check_argument(*given.row_ids, ScalarType::Long, op, "row_ids");
    check_argument(*given.key_ids, ScalarType::Long, op, "key_ids");
    STD_TORCH_CHECK(given.row_ids->numel() == walk.M && given.key_ids->numel() == walk.N, op,
                    ": row_ids and key_ids must have one element for each query and key");
    walk.row_ids = given.row_ids->const_data_ptr<int64_t>();
    walk.key_ids = given.key_ids->const_data_ptr<int64_t>();
  }
  if (given.sims) {
    const int64_t size = walk.N * walk.copies() * to_lanes(walk.M);
    check_argument(*given.sims, dtype, op, "sims");
    STD_TORCH_CHECK(given.sims->numel() == size, op, ": sims must have ", size, " elements, got ",
                    given.sims->numel());
    walk.sims = given.sims->data_ptr();
  }
  return walk;
}

void pack_queries(KeyWalk& walk, std::vector<uint32_t>& memory) {
  memory.resize(walk.ld() * walk.copies() * to_lanes(walk.M));
  walk.queries = memory.data();
  on_all_threads(walk.num_panels(),
                 [&](auto& next) { VLPFAST_ON_WIDEST_FOR(walk.is_bf16, pack_panels(walk, next)); });
}

// Merges running sums with those of every segment, in the segments' order.
struct Merge {
  float *max, *sum, *dot;  // dot: nullable, weighted by exp(z - max) as sum is
};

VLPFAST_CLONES
void merge_segments(const KeyWalk& walk, bool of_teacher, const Merge& state) {
  for (int64_t row = 0; row < walk.M; row += kLaneCount) {
    const size_t count = sizeof(float) * std::min<int64_t>(kLaneCount, walk.M - row);
    F16 max = splat(-kInfinity), sum{}, dot{};
    std::memcpy(&max, state.max + row, count);
    std::memcpy(&sum, state.sum + row, count);
    if (state.dot) std::memcpy(&dot, state.dot + row, count);
    F16 top = max;
    for (int64_t t = 0; t < walk.num_segments(); ++t) {
      const KeySums from = walk.sums_of(t);
      top = max16(load16((of_teacher ? from.teacher_max : from.max) + row), top);
    }
    F16 factor = exp16(max - top);
    sum *= factor;
    dot *= factor;
    for (int64_t t = 0; t < walk.num_segments(); ++t) {
      const KeySums from = walk.sums_of(t);
      factor = exp16(load16((of_teacher ? from.teacher_max : from.max) + row) - top);
      sum += load16((of_teacher ? from.teacher_sum : from.sum) + row) * factor;
      if (state.dot) dot += load16(from.teacher_dot + row) * factor;
    }
    std::memcpy(state.max + row, &top, count);
    std::memcpy(state.sum + row, &sum, count);
    if (state.dot) std::memcpy(state.dot + row, &dot, count);
  }
}

void contrastive_keys_stats_cpu(
    const Tensor& query, const std::optional<Tensor>& teacher, const Tensor& keys,
    const Tensor& scale, const std::optional<Tensor>& row_ids,
    const std::optional<Tensor>& key_ids, const std::optional<Tensor>& sims,
    const Tensor& row_max, const Tensor& row_sum, const Tensor& row_pos,
    const std::optional<Tensor>& teacher_max, const std::optional<Tensor>& teacher_sum,
    const std::optional<Tensor>& teacher_dot) {
  constexpr const char* op = "contrastive_keys_stats";
  KeyWalk walk = walk_of({query, teacher, keys, scale, row_ids, key_ids, sims}, op);
  const int64_t M = walk.M, size = to_lanes(M);
  const Merge own{vector_of(row_max, M, op, "row_max"), vector_of(row_sum, M, op, "row_sum"),
                  nullptr};
  float* const positive = vector_of(row_pos, M, op, "row_pos");
  const Merge its{vector_of(teacher_max, M, op, "teacher_max"),
                  vector_of(teacher_sum, M, op, "teacher_sum"),
                  vector_of(teacher_dot, M, op, "teacher_dot")};
  STD_TORCH_CHECK(!walk.teacher == !its.max && !walk.teacher == !its.sum &&
                      !walk.teacher == !its.dot,
                  op, ": teacher and its max, sum and dot must be given together");
  std::vector<uint32_t> queries;
  pack_queries(walk, queries);
  std::vector<float> sums(walk.num_segments() * 6 * size);
  walk.sums = sums.data();
  for (int64_t t = 0; t < walk.num_segments(); ++t) {
    const KeySums start = walk.sums_of(t);
    std::fill_n(start.max, size, -kInfinity);
    std::fill_n(start.teacher_max, size, -kInfinity);
  }
  on_all_threads(walk.num_tasks(), [&](auto& next) {
    VLPFAST_ON_WIDEST_FOR(walk.is_bf16, look_at_keys(walk, next));
  });
  merge_segments(walk, false, own);
  if (walk.teacher) merge_segments(walk, true, its);
  for (int64_t t = 0; t < walk.num_segments(); ++t) {
    for (int64_t row = 0; row < M; ++row) positive[row] += walk.sums_of(t).positive[row];
  }
}

// total (M, D) += the segments' (M, ld) each, in their order.
VLPFAST_CLONES
void add_segments(const KeyWalk& walk, float* total, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t t = 0; t < walk.num_segments(); ++t) {
      const float* from = walk.grads + (t * walk.M + row) * walk.ld();
      for (int64_t d = 0; d < walk.D; ++d) total[row * walk.D + d] += from[d];
    }
  }
}

void contrastive_keys_grad_cpu(
    const Tensor& query, const std::optional<Tensor>& teacher, const Tensor& keys,
    const Tensor& scale, const std::optional<Tensor>& row_ids,
    const std::optional<Tensor>& key_ids, const std::optional<Tensor>& sims,
    const Tensor& row_max, const Tensor& row_sum, const Tensor& row_weight, double smoothing,
    const std::optional<Tensor>& teacher_max, const std::optional<Tensor>& teacher_sum,
    double alpha, const Tensor& row_dot, const std::optional<Tensor>& row_grad) {
  constexpr const char* op = "contrastive_keys_grad";
  KeyWalk walk = walk_of({query, teacher, keys, scale, row_ids, key_ids, sims}, op);
  const int64_t M = walk.M, size = to_lanes(M), segments = walk.num_segments();
  walk.row_max = vector_of(row_max, M, op, "row_max");
  walk.row_sum = vector_of(row_sum, M, op, "row_sum");
  walk.row_weight = vector_of(row_weight, M, op, "row_weight");
  walk.teacher_max = vector_of(teacher_max, M, op, "teacher_max");
  walk.teacher_sum = vector_of(teacher_sum, M, op, "teacher_sum");
  STD_TORCH_CHECK(!walk.teacher == !walk.teacher_max && !walk.teacher == !walk.teacher_sum, op,
                  ": teacher, teacher_max and teacher_sum must be given together");
  walk.smoothing = static_cast<float>(smoothing);
  walk.alpha = static_cast<float>(alpha);
  float* const total = vector_of(row_dot, M, op, "row_dot");
  float* const grad = vector_of(row_grad, M * walk.D, op, "row_grad");
  std::vector<uint32_t> queries;
  pack_queries(walk, queries);
  std::vector<float> dots(segments * size), grads(grad ? segments * M * walk.ld() : 0);
  walk.dots = dots.data();
  walk.grads = grad ? grads.data() : nullptr;
  on_all_threads(walk.num_tasks(), [&](auto& next) {
    VLPFAST_ON_WIDEST_FOR(walk.is_bf16, differentiate_keys(walk, next));
  });
  for (int64_t t = 0; t < segments; ++t) {
    for (int64_t row = 0; row < M; ++row) total[row] += dots[t * size + row];
  }
  if (!grad) return;
  torch::stable::parallel_for(
      0, M, std::max<int64_t>(1, kGrainSims / (walk.D * segments)),
      [&](int64_t begin, int64_t end) { add_segments(walk, grad, begin, end); });
}

}  // namespace
}  // namespace vlpfast

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
  m.impl("contrastive_keys_stats", TORCH_BOX(&vlpfast::contrastive_keys_stats_cpu));
  m.impl("contrastive_keys_grad", TORCH_BOX(&vlpfast::contrastive_keys_grad_cpu));
}
