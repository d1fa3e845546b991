// Matrix products of torch, called from a CPU kernel by the C interface that compiled models
// (AOTInductor) link to: its symbols are kept from release to release, as the stable ABI's are.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

namespace vlpfast {

// out = a b
inline void torch_product(const torch::stable::Tensor& out, const torch::stable::Tensor& a,
                          const torch::stable::Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// out += a b
inline void torch_add_product(const torch::stable::Tensor& out, const torch::stable::Tensor& a,
                              const torch::stable::Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
}

}  // namespace vlpfast
