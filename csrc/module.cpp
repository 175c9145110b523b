// The Python module mmer_fast._C: importing it registers the kernels. Limited API (abi3), Python >= 3.10.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include "../kernels/cpu/dispatch.h"

namespace {

PyObject* build_info(PyObject*, PyObject*) { return PyUnicode_FromString(MMER_BUILD_INFO); }

PyObject* cpu_isa(PyObject*, PyObject*) { return PyUnicode_FromString(mmer::cpu_isa_name()); }

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "What the library was built with, as JSON."},
    {"cpu_isa", cpu_isa, METH_NOARGS, "The instruction set of the CPU kernels in use."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
