// The CPU kernels over NumPy arrays, torch-free, so that sanitizers and guard pages see the kernels alone. Every output
// is an array of the caller's, and rows [begin, end) alone are computed: what is written beyond them can be seen.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>
#include <optional>
#include <string>
#include <variant>

#include "cpu/dispatch.h"
#include "cpu/soft_topk.h"
#include "numpy_arguments.h"

namespace py = pybind11;

void bind_attention(py::module_& module);     // numpy_attention.cpp
void bind_dropout(py::module_& module);       // numpy_dropout.cpp
void bind_perturbation(py::module_& module);  // numpy_perturbation.cpp

namespace {

template <class T>
using Vector = py::array_t<T, py::array::c_style>;
using NumberOrRows = std::variant<double, Vector<double>>;

// What holds numbers of `dtype`: bfloat16 and float16 come as their bits, uint16.
bool holds(const py::array& array, mmer::DType dtype) {
  switch (dtype) {
    case mmer::DType::kFloat32: return py::isinstance<py::array_t<float>>(array);
    case mmer::DType::kFloat64: return py::isinstance<py::array_t<double>>(array);
    default: return py::isinstance<py::array_t<uint16_t>>(array);
  }
}

// [R, n] with unit column stride; returns the elements from row to row.
int64_t row_stride(const py::array& array, int64_t rows, int64_t cols, const char* name) {
  require(array.ndim() == 2 && array.shape(0) == rows && array.shape(1) == cols,
          std::string(name) + " must have the shape (rows, n) of scores");
  require(cols <= 1 || array.strides(1) == array.itemsize(), std::string(name) + " must have unit column stride");
  return array.strides(0) / array.itemsize();
}

template <class T>
T* output(py::array& array, int64_t size, const char* name) {
  require(array.size() == size && (array.flags() & py::array::c_style) && array.writeable(),
          std::string(name) + " must be a writeable C-contiguous array of " + std::to_string(size) + " entries");
  require(std::is_void_v<T> || static_cast<size_t>(array.itemsize()) == sizeof(double),
          std::string(name) + " must be float64");
  return static_cast<T*>(array.mutable_data());
}

const double* rows_of(const NumberOrRows& value, int64_t rows, const char* name) {
  if (const auto* vector = std::get_if<Vector<double>>(&value)) {
    require(vector->size() == rows, std::string(name) + " must be a number or have one entry a row");
    return vector->data();
  }
  return nullptr;
}

double number_of(const NumberOrRows& value) {
  const double* number = std::get_if<double>(&value);
  return number != nullptr ? *number : 0.0;
}

mmer::SoftTopKRows rows_view(const py::array& scores, const std::string& dtype, const NumberOrRows& tau,
                             const std::optional<Vector<int64_t>>& lengths, const std::optional<py::array>& mask,
                             bool largest) {
  mmer::SoftTopKRows view{};
  require(scores.ndim() == 2, "scores must have shape (rows, n)");
  view.dtype = dtype_of(dtype);
  require(holds(scores, view.dtype), "scores do not hold " + dtype);
  view.rows = scores.shape(0);
  view.cols = scores.shape(1);
  view.scores = scores.data();
  view.scores_stride = row_stride(scores, view.rows, view.cols, "scores");
  view.tau = rows_of(tau, view.rows, "tau");
  view.tau_value = number_of(tau);
  view.largest = largest;
  if (lengths) {
    require(lengths->size() == view.rows, "lengths must have one entry a row");
    view.lengths = lengths->data();
  }
  if (mask) {
    require(mask->itemsize() == 1, "mask must be bool or uint8");
    view.mask = static_cast<const uint8_t*>(mask->data());
    view.mask_stride = row_stride(*mask, view.rows, view.cols, "mask");
  }
  return view;
}

int64_t last_row(const mmer::SoftTopKRows& view, int64_t begin, const std::optional<int64_t>& end) {
  const int64_t last = end.value_or(view.rows);
  require(0 <= begin && begin <= last && last <= view.rows, "need 0 <= begin <= end <= rows");
  return last;
}

void forward(const py::array& scores, py::array weights, py::array threshold, py::array certificate,
             const std::string& dtype, const NumberOrRows& k, const NumberOrRows& tau,
             const std::optional<Vector<int64_t>>& lengths, const std::optional<py::array>& mask, bool largest,
             int64_t sinkhorn_iterations, int64_t begin, const std::optional<int64_t>& end) {
  mmer::SoftTopKForwardArgs args{};
  args.in = rows_view(scores, dtype, tau, lengths, mask, largest);
  require(holds(weights, args.in.dtype), "weights do not hold " + dtype);
  args.k = rows_of(k, args.in.rows, "k");
  args.k_value = number_of(k);
  args.sinkhorn_iterations = sinkhorn_iterations;
  args.weights = output<void>(weights, args.in.rows * args.in.cols, "weights");
  args.threshold = output<double>(threshold, args.in.rows, "threshold");
  args.certificate = output<double>(certificate, 2 * args.in.rows, "certificate");
  if (!mmer::soft_topk_forward_cpu(args, begin, last_row(args.in, begin, end))) throw std::bad_alloc();
}

void backward(const py::array& grad_weights, const py::array& scores, const Vector<double>& threshold,
              py::array grad_scores, py::array grad_k, py::array grad_tau, const std::string& dtype,
              const NumberOrRows& tau, const std::optional<Vector<double>>& grad_threshold,
              const std::optional<Vector<int64_t>>& lengths, const std::optional<py::array>& mask, bool largest,
              int64_t begin, const std::optional<int64_t>& end) {
  mmer::SoftTopKBackwardArgs args{};
  args.in = rows_view(scores, dtype, tau, lengths, mask, largest);
  require(holds(grad_weights, args.in.dtype), "grad_weights do not hold " + dtype);
  require(holds(grad_scores, args.in.dtype), "grad_scores do not hold " + dtype);
  args.grad_weights = grad_weights.data();
  args.grad_weights_stride = row_stride(grad_weights, args.in.rows, args.in.cols, "grad_weights");
  require(threshold.size() == args.in.rows, "threshold must have one entry a row");
  args.threshold = threshold.data();
  if (grad_threshold) {
    require(grad_threshold->size() == args.in.rows, "grad_threshold must have one entry a row");
    args.grad_threshold = grad_threshold->data();
  }
  args.grad_scores = output<void>(grad_scores, args.in.rows * args.in.cols, "grad_scores");
  args.grad_k = output<double>(grad_k, args.in.rows, "grad_k");
  args.grad_tau = output<double>(grad_tau, args.in.rows, "grad_tau");
  if (!mmer::soft_topk_backward_cpu(args, begin, last_row(args.in, begin, end))) throw std::bad_alloc();
}

}  // namespace

PYBIND11_MODULE(mmer_kernels_numpy, module) {
  module.doc() = "The CPU kernels of mmer_fast over NumPy arrays.";
  bind_attention(module);
  bind_dropout(module);
  bind_perturbation(module);
  module.def("cpu_isa", &mmer::cpu_isa_name, "The instruction set in use: baseline, avx2 or avx512.");
  module.def("soft_topk_forward", &forward, py::arg("scores").noconvert(), py::arg("weights").noconvert(),
             py::arg("threshold").noconvert(), py::arg("certificate").noconvert(), py::kw_only(), py::arg("dtype"),
             py::arg("k"), py::arg("tau"), py::arg("lengths") = py::none(), py::arg("mask") = py::none(),
             py::arg("largest") = true, py::arg("sinkhorn_iterations") = 0, py::arg("begin") = 0,
             py::arg("end") = py::none(),
             "Fills weights (R, n), threshold (R,) and certificate (R, 2) for the rows [begin, end).");
  module.def("soft_topk_backward", &backward, py::arg("grad_weights").noconvert(), py::arg("scores").noconvert(),
             py::arg("threshold").noconvert(), py::arg("grad_scores").noconvert(), py::arg("grad_k").noconvert(),
             py::arg("grad_tau").noconvert(), py::kw_only(), py::arg("dtype"), py::arg("tau"),
             py::arg("grad_threshold") = py::none(), py::arg("lengths") = py::none(), py::arg("mask") = py::none(),
             py::arg("largest") = true, py::arg("begin") = 0, py::arg("end") = py::none(),
             "Fills grad_scores (R, n), grad_k (R,) and grad_tau (R,) for the rows [begin, end).");
}
