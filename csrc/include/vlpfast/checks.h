// Checks that a kernel makes on what it is given, with the op and the argument in the message.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace vlpfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_argument(const Tensor& tensor, ScalarType dtype, const char* op,
                           const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " must be ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
}

}  // namespace vlpfast
