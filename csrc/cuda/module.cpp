// Importing `sparsekern._C_cuda` loads the library and so registers its ops; the module has no Python members.
#include <Python.h>

#include "common/interface.h"

SPARSEKERN_INTERFACE

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C_cuda(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
