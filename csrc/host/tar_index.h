// Where the regular files of a tar archive lie.
#pragma once

#include <pybind11/pybind11.h>

namespace vlpfast {

void bind_tar_index(pybind11::module_& m);

}  // namespace vlpfast
