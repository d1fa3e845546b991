// Solves the same problems with the engine of optimal transport as compiled for every target that
// this CPU runs, and prints for each the largest differences from the baseline's results, relative
// to their maximum where that exceeds 1.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "vlpfast/simd.h"
#include "vlpfast/transport_types.h"

#define VLPFAST_EACH_TARGET "vlpfast/transport_engine.h"
#include "vlpfast/each_target.h"

using namespace vlpfast;

namespace {

constexpr int64_t B = 5, M = 19, N = 37, D = 45;

struct Results {
  std::vector<float> distance = std::vector<float>(B), value = std::vector<float>(B);
  std::vector<float> plan = std::vector<float>(B * M * N);
  std::vector<float> f = std::vector<float>(B * M), g = std::vector<float>(B * N);
  std::vector<float> grad_x = std::vector<float>(B * M * D), grad_y = std::vector<float>(B * N * D);
  std::vector<int64_t> num_iters = std::vector<int64_t>(B);

  Solutions out() {
    return {distance.data(), value.data(), plan.data(), f.data(), g.data(), num_iters.data()};
  }
};

float difference(const std::vector<float>& a, const std::vector<float>& b) {
  float largest = 0, scale = 1;
  for (size_t i = 0; i < a.size(); ++i) {
    largest = std::max(largest, std::abs(a[i] - b[i]));
    scale = std::max(scale, std::abs(b[i]));
  }
  return largest / scale;
}

template <class Ipot, class Sinkhorn>
std::vector<Results> run(Ipot solve_ipot, Sinkhorn solve_sinkhorn) {
  std::mt19937 generator(0);
  std::normal_distribution<float> normal;
  std::vector<float> x(B * M * D), y(B * N * D), cost(B * M * N), a(B * M), b(B * N);
  for (auto* v : {&x, &y, &cost, &a, &b}) {
    for (float& e : *v) e = std::abs(normal(generator)) + (v == &a || v == &b ? 0.1f : 0.0f);
  }
  bool valid[B * M];
  for (int i = 0; i < B * M; ++i) valid[i] = i % 5 != 0 && i / M != 3;
  std::vector<Results> all;
  for (double beta : {0.5, 0.1, 0.01}) {
    all.emplace_back();
    const FeaturePair in{{x.data(), M * D, D, M, valid}, {y.data(), N * D, D, N, nullptr},
                         Dtype::kFloat, D};
    Gradients gradients{all.back().grad_x.data(), all.back().grad_y.data()};
    IpotBatch batch{B, in, nullptr, {beta, 30, 2, -1}, all.back().out(), gradients, nullptr, 0.5f};
    std::atomic<int64_t> next = 0;
    solve_ipot(batch, next);
  }
  for (double eps : {0.5, 0.01}) {
    all.emplace_back();
    SinkhornBatch batch{B, M, N, cost.data(), a.data(), b.data(), nullptr,
                        {eps, 30, -1, 1, 1, INFINITY, INFINITY}, all.back().out()};
    std::atomic<int64_t> next = 0;
    solve_sinkhorn(batch, next);
  }
  return all;
}

void compare(const char* name, const std::vector<Results>& got, const std::vector<Results>& want) {
  for (size_t k = 0; k < got.size(); ++k) {
    const Results &a = got[k], &b = want[k];
    std::printf("%s %zu %g %g %g %g %g %g %g\n", name, k, difference(a.distance, b.distance),
                difference(a.value, b.value), difference(a.plan, b.plan), difference(a.f, b.f),
                difference(a.g, b.g), difference(a.grad_x, b.grad_x),
                difference(a.grad_y, b.grad_y));
  }
}

}  // namespace

int main() {
  const auto want = run(base::solve_ipot, base::solve_sinkhorn);
  compare("base", run(base::solve_ipot, base::solve_sinkhorn), want);
#ifdef __x86_64__
  if (__builtin_cpu_supports("x86-64-v3")) {
    compare("v3", run(v3::solve_ipot, v3::solve_sinkhorn), want);
  }
  if (__builtin_cpu_supports("x86-64-v4")) {
    compare("v4", run(v4::solve_ipot, v4::solve_sinkhorn), want);
  }
#endif
}
