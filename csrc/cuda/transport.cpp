// The dispatcher's side of optimal transport on CUDA: checks, allocation, stream.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "vlpfast/checks.h"
#include "vlpfast/launch.h"
#include "vlpfast/stream.h"

namespace vlpfast {
namespace {

using torch::stable::new_empty;

constexpr int64_t kMaxBlocks = 2147483647;  // of a grid

const float* floats(const Tensor& tensor) { return tensor.const_data_ptr<float>(); }

const float* optional_floats(const std::optional<Tensor>& tensor, const char* op,
                             const char* name) {
  if (!tensor) return nullptr;
  check_argument(*tensor, ScalarType::Float, op, name);
  return floats(*tensor);
}

const bool* mask_of(const std::optional<Tensor>& mask, const char* op, const char* name) {
  if (!mask) return nullptr;
  check_argument(*mask, ScalarType::Bool, op, name);
  return mask->const_data_ptr<bool>();
}

FeatureType feature_type(const Tensor& x, const char* op) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  op, ": features must be fp32, bf16 or fp16, got ",
                  torch::headeronly::toString(type));
  return type == ScalarType::Float      ? FeatureType::kFloat
         : type == ScalarType::BFloat16 ? FeatureType::kBFloat16
                                        : FeatureType::kHalf;
}

FeatureRows rows_of(const Tensor& x, const char* op, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3, op, ": ", name, " must be 3-d, got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(x.stride(2) == 1 || x.size(2) == 1, op, ": the features of ", name,
                  " must be contiguous");
  return {x.data_ptr(), x.stride(0), x.stride(1)};
}

TransportProblems problems_of(const Tensor& x, const Tensor& y, const std::optional<Tensor>& x_mask,
                              const std::optional<Tensor>& y_mask, const char* op) {
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), op, ": features must be of one type");
  STD_TORCH_CHECK(x.size(0) == y.size(0) && x.size(2) == y.size(2), op,
                  ": features must share B and D");
  TransportProblems problems = {};
  problems.batch = x.size(0);
  problems.type = feature_type(x, op);
  problems.x = rows_of(x, op, "x");
  problems.y = rows_of(y, op, "y");
  STD_TORCH_CHECK(x.size(1) <= kTransportMaxTokens && y.size(1) <= kTransportMaxTokens, op,
                  ": at most ", kTransportMaxTokens, " tokens, got ", x.size(1), " and ",
                  y.size(1));
  problems.M = static_cast<int>(x.size(1));
  problems.N = static_cast<int>(y.size(1));
  problems.D = static_cast<int>(x.size(2));
  problems.x_mask = mask_of(x_mask, op, "x_mask");
  problems.y_mask = mask_of(y_mask, op, "y_mask");
  return problems;
}

TransportProblems problems_of(const Tensor& cost, const char* op) {
  check_argument(cost, ScalarType::Float, op, "cost");
  STD_TORCH_CHECK(cost.dim() == 3, op, ": cost must be 3-d");
  STD_TORCH_CHECK(cost.size(1) <= kTransportMaxTokens && cost.size(2) <= kTransportMaxTokens, op,
                  ": at most ", kTransportMaxTokens, " rows or columns");
  TransportProblems problems = {};
  problems.batch = cost.size(0);
  problems.M = static_cast<int>(cost.size(1));
  problems.N = static_cast<int>(cost.size(2));
  problems.cost = floats(cost);
  return problems;
}

TransportSchedule ipot_schedule(double beta, int64_t iters, int64_t inner,
                                std::optional<double> tol) {
  TransportSchedule schedule = {};
  schedule.rate = 1 / beta;
  schedule.iters = static_cast<int>(iters);
  schedule.inner = static_cast<int>(inner);
  schedule.tol = tol.value_or(-1);
  schedule.damp_a = schedule.damp_b = 1;
  schedule.log = beta < kTransportLogBeta;
  return schedule;
}

void check_fits(const TransportProblems& problems, bool sinkhorn, bool log, const char* op) {
  const int64_t bytes = transport_shared_bytes(problems.M, problems.N, sinkhorn, log);
  STD_TORCH_CHECK(bytes > 0, op, ": no register layout for problems of ", problems.M, " x ",
                  problems.N);
  const int64_t most = max_shared_bytes();
  STD_TORCH_CHECK(bytes <= most, op, ": problems of ", problems.M, " x ", problems.N, " need ",
                  bytes, " bytes of shared memory, this GPU has ", most);
  STD_TORCH_CHECK(problems.batch <= kMaxBlocks, op, ": batch of ", problems.batch);
}

struct Solved {
  Tensor distance, plan, f, g, num_iters;
};

// `like`: a tensor on the device. `value` and `stats` nullable.
Solved solve(const TransportProblems& problems, const TransportSchedule& schedule,
             const Tensor& like, float* value, float* stats, const char* op) {
  check_fits(problems, schedule.sinkhorn, schedule.log, op);
  const int64_t B = problems.batch, M = problems.M, N = problems.N;
  Solved solved{new_empty(like, {B}, ScalarType::Float),
                new_empty(like, {B, M, N}, ScalarType::Float),
                new_empty(like, {B, M}, ScalarType::Float),
                new_empty(like, {B, N}, ScalarType::Float),
                new_empty(like, {B}, ScalarType::Long)};
  if (B > 0) {
    const TransportResults results{solved.distance.mutable_data_ptr<float>(),
                                   value,
                                   solved.plan.mutable_data_ptr<float>(),
                                   solved.f.mutable_data_ptr<float>(),
                                   solved.g.mutable_data_ptr<float>(),
                                   solved.num_iters.mutable_data_ptr<int64_t>(),
                                   stats};
    launch_transport(problems, schedule, results, current_stream(like));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return solved;
}

using IpotResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

IpotResult ipot_fwd_cuda(const Tensor& x, const Tensor& y, const std::optional<Tensor>& x_mask,
                         const std::optional<Tensor>& y_mask, double beta, int64_t iters,
                         int64_t inner, std::optional<double> tol) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const TransportProblems problems = problems_of(x, y, x_mask, y_mask, "ipot_fwd");
  const Solved solved = solve(problems, ipot_schedule(beta, iters, inner, tol), x, nullptr, nullptr,
                              "ipot_fwd");
  return {solved.distance, solved.plan, solved.f, solved.g, solved.num_iters};
}

IpotResult ipot_cost_fwd_cuda(const Tensor& cost, const std::optional<Tensor>& x_mask,
                              const std::optional<Tensor>& y_mask, double beta, int64_t iters,
                              int64_t inner, std::optional<double> tol) {
  const torch::stable::accelerator::DeviceGuard guard(cost.get_device_index());
  TransportProblems problems = problems_of(cost, "ipot_cost_fwd");
  problems.x_mask = mask_of(x_mask, "ipot_cost_fwd", "x_mask");
  problems.y_mask = mask_of(y_mask, "ipot_cost_fwd", "y_mask");
  TransportSchedule schedule = ipot_schedule(beta, iters, inner, tol);
  schedule.log = true;  // a cost may be of any size
  const Solved solved = solve(problems, schedule, cost, nullptr, nullptr, "ipot_cost_fwd");
  return {solved.distance, solved.plan, solved.f, solved.g, solved.num_iters};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn_fwd_cuda(
    const Tensor& cost, const Tensor& a, const Tensor& b, const std::optional<Tensor>& f_init,
    double eps, int64_t iters, std::optional<double> tol, std::optional<double> tau_a,
    std::optional<double> tau_b) {
  const torch::stable::accelerator::DeviceGuard guard(cost.get_device_index());
  TransportProblems problems = problems_of(cost, "sinkhorn_fwd");
  check_argument(a, ScalarType::Float, "sinkhorn_fwd", "a");
  check_argument(b, ScalarType::Float, "sinkhorn_fwd", "b");
  problems.a = floats(a);
  problems.b = floats(b);
  problems.f_init = optional_floats(f_init, "sinkhorn_fwd", "f_init");
  TransportSchedule schedule = ipot_schedule(eps, iters, 1, tol);
  schedule.sinkhorn = schedule.log = true;
  schedule.tau_a = tau_a.value_or(0);
  schedule.tau_b = tau_b.value_or(0);
  schedule.damp_a = tau_a ? *tau_a / (*tau_a + eps) : 1;
  schedule.damp_b = tau_b ? *tau_b / (*tau_b + eps) : 1;
  Tensor value = new_empty(cost, {problems.batch});
  const Solved solved = solve(problems, schedule, cost, value.mutable_data_ptr<float>(), nullptr,
                              "sinkhorn_fwd");
  return {solved.distance, value, solved.plan, solved.f, solved.g, solved.num_iters};
}

// Gradients of both sides, of shape (0,) where not needed.
std::tuple<Tensor, Tensor> gradients(const TransportProblems& problems, const Tensor& x,
                                     const Tensor& y, const Tensor& plan, const Tensor& stats,
                                     const float* grad_distance, const bool* matched, float weight,
                                     bool need_x, bool need_y) {
  const int64_t B = problems.batch, M = problems.M, N = problems.N, D = problems.D;
  Tensor grad_x = need_x ? new_empty(x, {B, M, D}) : new_empty(x, {0});
  Tensor grad_y = need_y ? new_empty(y, {B, N, D}) : new_empty(y, {0});
  if (B > 0 && (need_x || need_y)) {
    // Blocks of 32 rows and 256 features.
    const int64_t blocks = B * ((M + 31) / 32 + (N + 31) / 32) * ((D + 255) / 256);
    STD_TORCH_CHECK(blocks <= kMaxBlocks, "ipot_bwd: batch of ", B, " is too large");
    launch_transport_grad(problems, floats(plan), floats(stats), grad_distance, matched, weight,
                          need_x ? grad_x.data_ptr() : nullptr,
                          need_y ? grad_y.data_ptr() : nullptr, current_stream(x));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {grad_x, grad_y};
}

std::tuple<Tensor, Tensor> ipot_bwd_cuda(const Tensor& grad_distance, const Tensor& x,
                                         const Tensor& y, const std::optional<Tensor>& x_mask,
                                         const std::optional<Tensor>& y_mask, const Tensor& plan,
                                         bool need_x, bool need_y) {
  check_argument(grad_distance, ScalarType::Float, "ipot_bwd", "grad_distance");
  check_argument(plan, ScalarType::Float, "ipot_bwd", "plan");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const TransportProblems problems = problems_of(x, y, x_mask, y_mask, "ipot_bwd");
  check_fits(problems, false, true, "ipot_bwd");
  Tensor stats =
      new_empty(x, {problems.batch, 2, problems.M + problems.N}, ScalarType::Float);
  if (problems.batch > 0 && (need_x || need_y)) {
    launch_transport_stats(problems, floats(plan), stats.mutable_data_ptr<float>(),
                           current_stream(x));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return gradients(problems, x, y, plan, stats, floats(grad_distance), nullptr, 0, need_x, need_y);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> wra_fwd_cuda(
    const Tensor& text, const Tensor& image, const std::optional<Tensor>& text_mask,
    const std::optional<Tensor>& image_mask, const Tensor& matched, double beta, int64_t iters,
    double weight, bool need_text, bool need_image) {
  check_argument(matched, ScalarType::Bool, "wra_fwd", "matched");
  const torch::stable::accelerator::DeviceGuard guard(text.get_device_index());
  const TransportProblems problems = problems_of(text, image, text_mask, image_mask, "wra_fwd");
  const int64_t B = problems.batch;
  const bool differentiated = need_text || need_image;
  Tensor stats = new_empty(text, {differentiated ? B : 0, 2, problems.M + problems.N},
                           ScalarType::Float);
  const Solved solved = solve(problems, ipot_schedule(beta, iters, 1, std::nullopt), text, nullptr,
                              differentiated ? stats.mutable_data_ptr<float>() : nullptr,
                              "wra_fwd");
  const auto share = static_cast<float>(weight / static_cast<double>(B > 0 ? B : 1));
  Tensor loss = new_empty(text, {}, ScalarType::Float);
  launch_wra_loss(floats(solved.distance), matched.const_data_ptr<bool>(),
                  loss.mutable_data_ptr<float>(), B, share, current_stream(text));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const auto [grad_text, grad_image] =
      gradients(problems, text, image, solved.plan, stats, nullptr, matched.const_data_ptr<bool>(),
                share, need_text, need_image);
  return {loss, solved.distance, grad_text, grad_image};
}

}  // namespace
}  // namespace vlpfast

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CUDA, m) {
  m.impl("ipot_fwd", TORCH_BOX(&vlpfast::ipot_fwd_cuda));
  m.impl("ipot_cost_fwd", TORCH_BOX(&vlpfast::ipot_cost_fwd_cuda));
  m.impl("ipot_bwd", TORCH_BOX(&vlpfast::ipot_bwd_cuda));
  m.impl("wra_fwd", TORCH_BOX(&vlpfast::wra_fwd_cuda));
  m.impl("sinkhorn_fwd", TORCH_BOX(&vlpfast::sinkhorn_fwd_cuda));
}
