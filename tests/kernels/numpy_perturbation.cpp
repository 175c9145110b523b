// The CPU kernels of the weight perturbation over NumPy arrays (numpy_module.cpp has the module), a pass at a time as
// csrc/perturbation.cpp drives them. Entries come and go as their bits: no conversion can quiet a NaN on the way.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/perturbation_math.h"
#include "cpu/perturbation.h"
#include "numpy_arguments.h"

namespace py = pybind11;

namespace {

using Options = py::dict;
using Arrays = std::vector<py::array>;

// An array's memory, which must hold `size` items of T in a row; null where the dictionary has None.
template <class T>
T* data_of(const Options& options, const char* name, int64_t size) {
  const py::object value = options[name];
  if (value.is_none()) return nullptr;
  const py::array_t<T> array = py::cast<py::array_t<T>>(value);
  require(array.ptr() == value.ptr(), std::string(name) + ": wrong dtype");
  require(array.size() == size && (array.flags() & py::array::c_style), std::string(name) + ": wrong size or strides");
  return const_cast<T*>(array.data());
}

void* entries_of(const py::array& array, int64_t n, mmer::DType dtype, const char* name) {
  const int64_t bytes = dtype == mmer::DType::kFloat64 ? 8 : dtype == mmer::DType::kFloat32 ? 4 : 2;
  require(array.dtype().kind() == 'u' && array.itemsize() == bytes, std::string(name) + ": not the bits of its dtype");
  require(array.ndim() == 1 && array.size() == n && (array.flags() & py::array::c_style),
          std::string(name) + ": wrong size or strides");
  return const_cast<void*>(array.data());
}

// What a pass is called with. The chunks are the caller's, so that they too may lie before a guard page.
class Call {
 public:
  explicit Call(const Options& o) {
    const Arrays weights = py::cast<Arrays>(o["weights"]), grads = py::cast<Arrays>(o["grads"]);
    const Arrays stash = py::cast<Arrays>(o["stash"]);
    const auto weight_dtypes = py::cast<std::vector<std::string>>(o["weight_dtypes"]);
    const auto grad_dtypes = py::cast<std::vector<std::string>>(o["grad_dtypes"]);
    const size_t count = weights.size();
    require(
        grads.size() == count && stash.size() == count && weight_dtypes.size() == count && grad_dtypes.size() == count,
        "the lists must be of one length");
    for (size_t i = 0; i < count; ++i) {
      const int64_t n = weights[i].size();
      const mmer::DType dtype = dtype_of(weight_dtypes[i]), grad_dtype = dtype_of(grad_dtypes[i]);
      tensors_.push_back({entries_of(weights[i], n, dtype, "weights"), entries_of(grads[i], n, grad_dtype, "grads"),
                          entries_of(stash[i], n, dtype, "stash"), n, dtype, grad_dtype});
    }
    static_assert(sizeof(mmer::PerturbationChunk) == 3 * sizeof(int64_t));
    chunks_ = py::cast<py::array>(o["chunks"]).size() / 3;
    mmer::PerturbationArgs& args = call_.args;
    args.tensors = tensors_.data();
    args.count = static_cast<int64_t>(count);
    args.scope = static_cast<mmer::PerturbationScope>(py::cast<int>(o["scope"]));
    args.adaptive = py::cast<bool>(o["adaptive"]);
    args.radius = py::cast<double>(o["radius"]);
    args.norms = data_of<double>(o, "norms", args.groups());
    args.weight_norms = data_of<double>(o, "weight_norms", args.count);
    call_.chunks = reinterpret_cast<const mmer::PerturbationChunk*>(data_of<int64_t>(o, "chunks", 3 * chunks_));
    call_.parts = data_of<double>(o, "parts", chunks_);
    call_.weight_parts = data_of<double>(o, "weight_parts", chunks_);
    call_.streaming = py::cast<bool>(o["streaming"]);
  }

  void run(void (*pass)(const mmer::PerturbationCpuArgs&, int64_t, int64_t), int64_t begin, int64_t end) const {
    require(0 <= begin && begin <= end && end <= chunks_, "need 0 <= begin <= end <= chunks");
    pass(call_, begin, end);
  }

 private:
  std::vector<mmer::PerturbationTensor> tensors_;
  mmer::PerturbationCpuArgs call_{};
  int64_t chunks_ = 0;
};

template <void (*pass)(const mmer::PerturbationCpuArgs&, int64_t, int64_t)>
void run(const Options& options, int64_t begin, int64_t end) {
  Call(options).run(pass, begin, end);
}

double norm_of_norms(const std::vector<double>& parts) {
  return mmer::norm_of_norms(static_cast<int64_t>(parts.size()), [&](int64_t i) { return parts[i]; });
}

}  // namespace

void bind_perturbation(py::module_& module) {
  module.attr("perturbation_chunk") = mmer::kPerturbationChunk;
  module.def("perturbation_norm", &run<mmer::perturbation_norm_cpu>, "Fills parts and weight_parts [begin, end).");
  module.def("perturbation_apply", &run<mmer::perturbation_apply_cpu>, "Stashes and moves the chunks [begin, end).");
  module.def("perturbation_restore", &run<mmer::perturbation_restore_cpu>, "Restores the chunks [begin, end).");
  module.def("perturbation_norm_of_norms", &norm_of_norms, "The norm of a vector from the norms of its parts.");
}
