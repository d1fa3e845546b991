// The Python module vlpfast._C_cuda. It is empty: loading it runs the operator registrations.
#include <Python.h>

extern "C" PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
