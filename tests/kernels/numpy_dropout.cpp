// The CPU kernels of dropout and of what is fused with it over NumPy arrays (numpy_module.cpp has the module). Options
// are dictionaries of arrays, half types as their bits; the sizes are those of "x" or "out", (rows, columns).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <new>
#include <string>

#include "cpu/dropout.h"
#include "numpy_arguments.h"

namespace py = pybind11;

namespace {

using Options = py::dict;

struct Sizes {
  mmer::DType dtype;
  int64_t rows, cols;
};

Sizes sizes_of(const Options& o, const char* name) {
  const py::array array = py::cast<py::array>(o[name]);
  require(array.ndim() == 2, std::string(name) + " must have shape (rows, columns)");
  return {dtype_of(py::cast<std::string>(o["dtype"])), array.shape(0), array.shape(1)};
}

// An array's memory, which must be contiguous and hold `size` items of `bytes` each; null where there is None.
void* data_of(const Options& o, const char* name, int64_t size, int64_t bytes) {
  const py::object value = o[name];
  if (value.is_none()) return nullptr;
  const py::array array = py::cast<py::array>(value);
  require(array.size() == size && array.itemsize() == bytes && (array.flags() & py::array::c_style),
          std::string(name) + ": wrong size, dtype or strides");
  return const_cast<void*>(array.data());
}

int64_t wide_bytes_of(mmer::DType dtype) { return dtype == mmer::DType::kFloat64 ? 8 : 4; }

class Arrays {
 public:
  Arrays(const Options& o, const char* like) : o_(o), sizes(sizes_of(o, like)) {}
  void* all(const char* name) const {
    return data_of(o_, name, sizes.rows * sizes.cols, mmer::entry_bytes(sizes.dtype));
  }
  void* wide(const char* name, int64_t size) const { return data_of(o_, name, size, wide_bytes_of(sizes.dtype)); }
  void* row(const char* name) const { return wide(name, sizes.cols); }
  void* sums(int64_t kinds) const { return wide("sums", mmer::sum_chunks(sizes.rows) * kinds * sizes.cols); }
  double number(const char* name) const { return py::cast<double>(o_[name]); }
  mmer::DropoutDraw draw() const {
    return {number("p"), static_cast<const int64_t*>(data_of(o_, "seed", 1, sizeof(int64_t)))};
  }

 private:
  const Options& o_;

 public:
  const Sizes sizes;
};

void check(bool ok) {
  if (!ok) throw std::bad_alloc();
}

void dropout(const Options& o, int64_t begin, int64_t end) {
  const Arrays a(o, "x");
  check(mmer::dropout_cpu({a.sizes.dtype, a.all("x"), a.all("out"), a.draw()}, begin, end));
}

void relu_dropout(const Options& o, int64_t begin, int64_t end) {
  const Arrays a(o, "x");
  check(mmer::relu_dropout_cpu({a.sizes.dtype, a.sizes.cols, a.all("x"), a.row("bias"), a.all("out"), a.draw()}, begin,
                               end));
}

void relu_dropout_backward(const Options& o, int64_t begin, int64_t end) {
  const Arrays a(o, "out");
  mmer::relu_dropout_backward_cpu({a.sizes.dtype, a.sizes.rows, a.sizes.cols, a.all("grad"), a.all("out"),
                                   a.number("p"), a.all("grad_x"), a.sums(1)},
                                  begin, end);
}

mmer::DropoutNormInputs inputs_of(const Arrays& a) {
  return {a.sizes.dtype,   a.sizes.rows,      a.sizes.cols,    a.all("x"),
          a.row("x_bias"), a.all("residual"), a.row("weight"), a.draw()};
}

void norm_forward(const Options& o, int64_t begin, int64_t end) {
  const Arrays a(o, "x");
  check(mmer::dropout_norm_forward_cpu(
      {inputs_of(a), a.row("bias"), a.number("eps"), a.all("y"), a.wide("moments", 2 * a.sizes.rows)}, begin, end));
}

void norm_backward(const Options& o, int64_t begin, int64_t end) {
  const Arrays a(o, "x");
  check(mmer::dropout_norm_backward_cpu({inputs_of(a), a.all("grad"), a.wide("moments", 2 * a.sizes.rows),
                                         a.all("grad_x"), a.all("grad_residual"), a.sums(3)},
                                        begin, end));
}

}  // namespace

void bind_dropout(py::module_& module) {
  module.def("dropout_chunk_rows", &mmer::sum_chunk_rows, "Rows of each chunk of sums.");
  module.def("dropout", &dropout, "Fills elements [begin, end) of out.");
  module.def("relu_dropout", &relu_dropout, "Fills rows [begin, end) of out.");
  module.def("relu_dropout_backward", &relu_dropout_backward, "Fills grad_x and sums of chunks [begin, end).");
  module.def("dropout_norm_forward", &norm_forward, "Fills y and moments of rows [begin, end).");
  module.def("dropout_norm_backward", &norm_backward, "Fills the gradients and sums of chunks [begin, end).");
}
