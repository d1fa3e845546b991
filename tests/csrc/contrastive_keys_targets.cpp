// Walks over the same keys as compiled for every target that this CPU runs, and prints for each the
// largest differences from the baseline's sums and gradients.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "vlpfast/buffer.h"
#include "vlpfast/contrastive_keys_types.h"
#include "vlpfast/simd.h"

#define VLPFAST_EACH_TARGET "vlpfast/contrastive_keys.h"
#include "vlpfast/each_bf16_target.h"

using namespace vlpfast;

namespace {

// More than a panel and than a chunk, and parts of vectors.
constexpr int64_t M = 69, N = 401, D = 45;

struct Results {
  std::vector<float> sums, dots, grads;
};

// Small multiples of 1/8: similarities are exact, and bf16 rounds the same ones on every target.
template <class T>
std::vector<T> features(int64_t rows, unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<T> result(rows * D);
  for (T& x : result) {
    const float value = static_cast<float>(static_cast<int>(generator() % 5) - 2) / 8;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if constexpr (sizeof(T) == 2) x = static_cast<T>(bits >> 16);
    else x = value;
  }
  return result;
}

template <class T, class Pack, class Look, class Differentiate>
Results run(Pack pack, Look look, Differentiate differentiate) {
  const auto query = features<T>(M, 1), teacher = features<T>(M, 2), keys = features<T>(N, 3);
  std::vector<int64_t> row_ids(M), key_ids(N);
  for (int64_t i = 0; i < M; ++i) row_ids[i] = i % 50;
  for (int64_t j = 0; j < N; ++j) key_ids[j] = j % 90;
  KeyWalk walk{};
  walk.M = M, walk.N = N, walk.D = D, walk.is_bf16 = sizeof(T) == 2;
  walk.query = query.data(), walk.teacher = teacher.data(), walk.keys = keys.data();
  walk.row_ids = row_ids.data(), walk.key_ids = key_ids.data();
  walk.scale = 3;
  const int64_t size = to_lanes(M), segments = walk.num_segments();
  std::vector<T> sims(N * 2 * size);
  std::vector<uint32_t> queries(walk.ld() * 2 * size);
  walk.sims = sims.data(), walk.queries = queries.data();

  Results results;
  results.sums.assign(segments * 6 * size, 0);
  walk.sums = results.sums.data();
  for (int64_t t = 0; t < segments; ++t) {
    std::fill_n(walk.sums_of(t).max, size, -std::numeric_limits<float>::infinity());
    std::fill_n(walk.sums_of(t).teacher_max, size, -std::numeric_limits<float>::infinity());
  }
  std::atomic<int64_t> next = 0;
  pack(walk, next);
  next = 0;
  look(walk, next);

  const std::vector<float> top(M, 3), sum(M, 200), weight(M, 0.3f);
  walk.row_max = walk.teacher_max = top.data();
  walk.row_sum = walk.teacher_sum = sum.data();
  walk.row_weight = weight.data();
  walk.smoothing = 0.001f, walk.alpha = 0.4f;
  results.dots.assign(segments * size, 0);
  results.grads.assign(segments * M * walk.ld(), 0);
  walk.dots = results.dots.data(), walk.grads = results.grads.data();
  next = 0;
  differentiate(walk, next);
  return results;
}

float difference(const std::vector<float>& a, const std::vector<float>& b) {
  float largest = 0, scale = 1;
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isinf(b[i]) && a[i] == b[i]) continue;
    largest = std::max(largest, std::abs(a[i] - b[i]));
    scale = std::max(scale, std::abs(b[i]));
  }
  return largest / scale;
}

#define RUN(T, target) \
  run<T>(target::pack_panels, target::look_at_keys, target::differentiate_keys)

void compare(const char* name, const Results& got, const Results& want) {
  std::printf("%s %g %g %g\n", name, difference(got.sums, want.sums),
              difference(got.dots, want.dots), difference(got.grads, want.grads));
}

template <class T>
void compare_all() {
  const Results want = RUN(T, base);
  compare("base", RUN(T, base), want);
#ifdef __x86_64__
  if (__builtin_cpu_supports("x86-64-v3")) compare("v3", RUN(T, v3), want);
  if (__builtin_cpu_supports("x86-64-v4")) compare("v4", RUN(T, v4), want);
  if (sizeof(T) == 2 && __builtin_cpu_supports("avx512bf16")) {
    compare("v4_bf16", RUN(T, v4_bf16), want);
  }
#endif
}

}  // namespace

int main() {
  compare_all<float>();
  compare_all<uint16_t>();
}
