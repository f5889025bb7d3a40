// The Python module `sparsekern._C`. Importing it loads the library and so registers the kernels; its functions name the
// instruction set in use. Python's limited API only: one build serves every Python from 3.10 on.
#include <Python.h>

#include <exception>

#include "common/interface.h"
#include "cpu/isa.h"

namespace {

using sparsekern::cpu::isa_name;

PyObject* detected_isa(PyObject*, PyObject*) { return PyUnicode_FromString(isa_name(sparsekern::cpu::detected_isa())); }

PyObject* current_isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(isa_name(sparsekern::cpu::current_isa()));
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {
    {"detected_isa", detected_isa, METH_NOARGS, "The best instruction set of this CPU that the kernels know."},
    {"current_isa", current_isa, METH_NOARGS, "The one in use: SPARSEKERN_CPU_ISA, or the best. ValueError if the CPU lacks it."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

SPARSEKERN_INTERFACE

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) { return PyModule_Create(&definition); }
