// Optimal transport on the CPU: checks, allocation, threads. A thread takes one problem after the
// other; vlpfast/transport_engine.h solves it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>

#include "vlpfast/checks.h"
#include "vlpfast/huge_pages.h"
#include "vlpfast/simd.h"
#include "vlpfast/threads.h"
#include "vlpfast/transport_types.h"

#define VLPFAST_EACH_TARGET "vlpfast/transport_engine.h"
#include "vlpfast/each_target.h"

namespace vlpfast {
namespace {

const bool* mask_of(const std::optional<Tensor>& mask) {
  if (!mask) return nullptr;
  check_argument(*mask, ScalarType::Bool, "transport", "a mask");
  return mask->const_data_ptr<bool>();
}

Side side_of(const Tensor& features, const std::optional<Tensor>& mask, const char* op,
             const char* name) {
  STD_TORCH_CHECK(features.dim() == 3 && (features.stride(2) == 1 || features.size(2) == 1), op,
                  ": ", name, " must be 3-d and contiguous in its last dimension");
  return {features.const_data_ptr(), features.stride(0), features.stride(1), features.size(1),
          mask_of(mask)};
}

FeaturePair features_of(const Tensor& x, const Tensor& y, const std::optional<Tensor>& x_mask,
                        const std::optional<Tensor>& y_mask, const char* op, const char* x_name,
                        const char* y_name) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
      ": ", x_name, " must be float, bfloat16 or half, got ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(y.scalar_type() == type, op, ": ", x_name, " and ", y_name,
                  " must have one dtype");
  STD_TORCH_CHECK(x.size(0) == y.size(0) && x.size(2) == y.size(2), op, ": ", x_name, " and ",
                  y_name, " must share B and D");
  const Dtype dtype = type == ScalarType::Float      ? Dtype::kFloat
                      : type == ScalarType::BFloat16 ? Dtype::kBFloat16
                                                     : Dtype::kHalf;
  return {side_of(x, x_mask, op, x_name), side_of(y, y_mask, op, y_name), dtype, x.size(2)};
}

Tensor allocate(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return on_huge_pages(torch::stable::new_empty(like, shape, dtype));
}

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

FiveTensors solve(IpotBatch batch, const Tensor& like) {
  const int64_t B = batch.size, M = batch.in.x.length, N = batch.in.y.length;
  Tensor distance = allocate(like, {B}, ScalarType::Float);
  Tensor plan = allocate(like, {B, M, N}, ScalarType::Float);
  Tensor f = allocate(like, {B, M}, ScalarType::Float);
  Tensor g = allocate(like, {B, N}, ScalarType::Float);
  Tensor num_iters = allocate(like, {B}, ScalarType::Long);
  batch.out = {.distance = distance.mutable_data_ptr<float>(),
               .plan = plan.mutable_data_ptr<float>(),
               .f = f.mutable_data_ptr<float>(),
               .g = g.mutable_data_ptr<float>(),
               .num_iters = num_iters.mutable_data_ptr<int64_t>()};
  on_all_threads(B, [&](auto& next) { VLPFAST_ON_WIDEST(solve_ipot(batch, next)); });
  return {distance, plan, f, g, num_iters};
}

FiveTensors ipot_fwd_cpu(const Tensor& x, const Tensor& y, const std::optional<Tensor>& x_mask,
                         const std::optional<Tensor>& y_mask, double beta, int64_t iters,
                         int64_t inner, std::optional<double> tol) {
  return solve({.size = x.size(0),
                .in = features_of(x, y, x_mask, y_mask, "ipot", "x", "y"),
                .options = {beta, iters, inner, tol.value_or(-1)}},
               x);
}

FiveTensors ipot_cost_fwd_cpu(const Tensor& cost, const std::optional<Tensor>& x_mask,
                              const std::optional<Tensor>& y_mask, double beta, int64_t iters,
                              int64_t inner, std::optional<double> tol) {
  check_argument(cost, ScalarType::Float, "ipot_from_cost", "cost");
  return solve({.size = cost.size(0),
                .in = {.x = {.length = cost.size(1), .mask = mask_of(x_mask)},
                       .y = {.length = cost.size(2), .mask = mask_of(y_mask)}},
                .cost = cost.const_data_ptr<float>(),
                .options = {beta, iters, inner, tol.value_or(-1)}},
               cost);
}

// Room for a gradient, or an empty tensor in its place.
Tensor gradient_of(const Tensor& features, bool needed) {
  if (!needed) return torch::stable::new_empty(features, {0});
  return allocate(features, {features.size(0), features.size(1), features.size(2)},
                  features.scalar_type());
}

Gradients gradients_of(const Tensor& grad_x, bool need_x, const Tensor& grad_y, bool need_y) {
  constexpr int64_t kKept = int64_t{16} << 20;  // bytes: half of an L3
  const int64_t num_bytes =
      (grad_x.numel() + grad_y.numel()) * static_cast<int64_t>(grad_y.element_size());
  return {.x = need_x ? grad_x.mutable_data_ptr() : nullptr,
          .y = need_y ? grad_y.mutable_data_ptr() : nullptr,
          .past_caches = num_bytes > kKept};
}

std::tuple<Tensor, Tensor> ipot_bwd_cpu(const Tensor& grad_distance, const Tensor& x,
                                        const Tensor& y, const std::optional<Tensor>& x_mask,
                                        const std::optional<Tensor>& y_mask, const Tensor& plan,
                                        bool need_x, bool need_y) {
  check_argument(grad_distance, ScalarType::Float, "ipot", "grad_distance");
  check_argument(plan, ScalarType::Float, "ipot", "plan");
  Tensor grad_x = gradient_of(x, need_x), grad_y = gradient_of(y, need_y);
  const GradientBatch batch{
      .size = x.size(0),
      .in = features_of(x, y, x_mask, y_mask, "ipot", "x", "y"),
      .plan = plan.const_data_ptr<float>(),
      .upstream = grad_distance.const_data_ptr<float>(),
      .gradients = gradients_of(grad_x, need_x, grad_y, need_y)};
  on_all_threads(batch.size,
                 [&](auto& next) { VLPFAST_ON_WIDEST(differentiate_ipot(batch, next)); });
  return {grad_x, grad_y};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> wra_fwd_cpu(
    const Tensor& text, const Tensor& image, const std::optional<Tensor>& text_mask,
    const std::optional<Tensor>& image_mask, const Tensor& matched, double beta, int64_t iters,
    double weight, bool need_text, bool need_image) {
  check_argument(matched, ScalarType::Bool, "wra_loss", "matched");
  const int64_t B = text.size(0);
  Tensor loss = torch::stable::new_empty(text, {}, ScalarType::Float);
  Tensor distance = torch::stable::new_empty(text, {B}, ScalarType::Float);
  Tensor grad_text = gradient_of(text, need_text), grad_image = gradient_of(image, need_image);
  const double share = weight / static_cast<double>(std::max<int64_t>(1, B));
  const IpotBatch batch{
      .size = B,
      .in = features_of(text, image, text_mask, image_mask, "wra_loss", "text", "image"),
      .options = {beta, iters, 1, -1},
      .out = {.distance = distance.mutable_data_ptr<float>()},
      .gradients = gradients_of(grad_text, need_text, grad_image, need_image),
      .matched = matched.const_data_ptr<bool>(),
      .weight = static_cast<float>(share)};
  on_all_threads(B, [&](auto& next) { VLPFAST_ON_WIDEST(solve_ipot(batch, next)); });
  double total = 0;
  for (int64_t b = 0; b < B; ++b) {
    total += batch.matched[b] ? batch.out.distance[b] : -batch.out.distance[b];
  }
  *loss.mutable_data_ptr<float>() = static_cast<float>(share * total);
  return {loss, distance, grad_text, grad_image};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn_fwd_cpu(
    const Tensor& cost, const Tensor& a, const Tensor& b, const std::optional<Tensor>& f_init,
    double eps, int64_t iters, std::optional<double> tol, std::optional<double> tau_a,
    std::optional<double> tau_b) {
  check_argument(cost, ScalarType::Float, "sinkhorn", "cost");
  check_argument(a, ScalarType::Float, "sinkhorn", "a");
  check_argument(b, ScalarType::Float, "sinkhorn", "b");
  if (f_init) check_argument(*f_init, ScalarType::Float, "sinkhorn", "f");
  const int64_t B = cost.size(0), M = cost.size(1), N = cost.size(2);
  const auto floats = [&](std::initializer_list<int64_t> shape) {
    return allocate(cost, shape, ScalarType::Float);
  };
  Tensor distance = floats({B}), value = floats({B}), plan = floats({B, M, N});
  Tensor f = floats({B, M}), g = floats({B, N});
  Tensor num_iters = allocate(cost, {B}, ScalarType::Long);
  const auto damp = [&](std::optional<double> tau) { return tau ? *tau / (*tau + eps) : 1.0; };
  const SinkhornBatch batch{.size = B,
                            .num_sources = M,
                            .num_targets = N,
                            .cost = cost.const_data_ptr<float>(),
                            .a = a.const_data_ptr<float>(),
                            .b = b.const_data_ptr<float>(),
                            .f_init = f_init ? f_init->const_data_ptr<float>() : nullptr,
                            .options = {.eps = eps,
                                        .iters = iters,
                                        .tol = tol.value_or(-1),
                                        .damp_a = damp(tau_a),
                                        .damp_b = damp(tau_b),
                                        .tau_a = tau_a.value_or(INFINITY),
                                        .tau_b = tau_b.value_or(INFINITY)},
                            .out = {.distance = distance.mutable_data_ptr<float>(),
                                    .value = value.mutable_data_ptr<float>(),
                                    .plan = plan.mutable_data_ptr<float>(),
                                    .f = f.mutable_data_ptr<float>(),
                                    .g = g.mutable_data_ptr<float>(),
                                    .num_iters = num_iters.mutable_data_ptr<int64_t>()}};
  on_all_threads(B, [&](auto& next) { VLPFAST_ON_WIDEST(solve_sinkhorn(batch, next)); });
  return {distance, value, plan, f, g, num_iters};
}

}  // namespace
}  // namespace vlpfast

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
  m.impl("ipot_fwd", TORCH_BOX(&vlpfast::ipot_fwd_cpu));
  m.impl("ipot_bwd", TORCH_BOX(&vlpfast::ipot_bwd_cpu));
  m.impl("ipot_cost_fwd", TORCH_BOX(&vlpfast::ipot_cost_fwd_cpu));
  m.impl("wra_fwd", TORCH_BOX(&vlpfast::wra_fwd_cpu));
  m.impl("sinkhorn_fwd", TORCH_BOX(&vlpfast::sinkhorn_fwd_cpu));
}
