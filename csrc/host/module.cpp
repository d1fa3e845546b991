// The Python module vlpfast._host: host code over NumPy arrays, without Tensors.
#include <pybind11/pybind11.h>

#include "tar_index.h"

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host code of vlpfast that has no Tensor in it.";
  vlpfast::bind_tar_index(m);
}
