// The dispatcher's side of keep_ids on CUDA: checks, allocation, stream.
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

std::tuple<Tensor, Tensor> keep_ids_cuda(const Tensor& seed, const Tensor& sample_ids,
                                         int64_t num_patches, int64_t num_keep,
                                         const std::optional<Tensor>& valid) {
  check_argument(seed, ScalarType::Long, "keep_ids", "seed");
  check_argument(sample_ids, ScalarType::Long, "keep_ids", "sample_ids");
  if (valid) check_argument(*valid, ScalarType::Bool, "keep_ids", "valid");
  STD_TORCH_CHECK(num_patches <= kKeepIdsMaxPatches, "keep_ids: num_patches must be <= ",
                  kKeepIdsMaxPatches, ", got ", num_patches);
  STD_TORCH_CHECK(1 <= num_keep && num_keep <= num_patches,
                  "keep_ids: num_keep must be in 1..num_patches");
  const int64_t num_samples = sample_ids.size(0);
  const torch::stable::accelerator::DeviceGuard guard(sample_ids.get_device_index());
  Tensor ids = torch::stable::new_empty(sample_ids, {num_samples, num_keep});
  Tensor inverse = torch::stable::new_empty(sample_ids, {num_samples, num_patches});
  if (num_samples > 0) {
    launch_keep_ids(seed.const_data_ptr<int64_t>(), sample_ids.const_data_ptr<int64_t>(),
                    valid ? valid->const_data_ptr<bool>() : nullptr,
                    ids.mutable_data_ptr<int64_t>(), inverse.mutable_data_ptr<int64_t>(),
                    num_samples, static_cast<int>(num_patches), static_cast<int>(num_keep),
                    current_stream(sample_ids));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {ids, inverse};
}

}  // namespace
}  // namespace vlpfast

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CUDA, m) {
  m.impl("keep_ids", TORCH_BOX(&vlpfast::keep_ids_cuda));
}
