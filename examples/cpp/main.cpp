// mmer_fast's operators called from C++, by torch's dispatcher and without Python: CMakeLists.txt says how to build it.
//
// To copy: TORCH_LIBRARY, load, call, and the calls you need. Arguments are those of the schemas (schemas.h), below the
// functions in Python: nothing has a default, nothing is broadcast, and derivatives are operators of their own.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <torch/library.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "schemas.h"  // kSchemas

using at::Tensor;
using Values = std::vector<c10::IValue>;
using Tensors = std::vector<Tensor>;

const c10::IValue none;

TORCH_LIBRARY(mmer_fast, library) {
  for (const char* schema : kSchemas) library.def(schema);
}

// Registers the kernels. Lazily: the library is also a Python module, whose calls of Python are never reached.
void load(const char* path) {
  if (dlopen(path, RTLD_LAZY) != nullptr) return;
  std::fprintf(stderr, "%s\n", dlerror());
  std::exit(1);
}

// What an operator returns; the arguments in the order of its schema.
Values call(const std::string& name, Values arguments) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(("mmer_fast::" + name).c_str(), "");
  op.schema().checkAndNormalizeInputs(arguments);
  op.callBoxed(arguments);
  return arguments;
}

void soft_topk() {
  const Tensor scores = at::arange(24, at::kFloat).sin().view({3, 8});
  const double k = 2, tau = 0.05;  // epsilon / 2
  const Tensor weights = call("soft_topk_forward", {scores, none, k, none, tau, none, none, true, 0})[0].toTensor();
  std::printf("soft_topk, weights of the first row:");
  for (int64_t i = 0; i < 8; ++i) std::printf(" %.6f", weights[0][i].item<double>());
  std::printf("\n");
}

void attention() {
  const Tensor x = at::arange(2 * 4 * 10 * 16, at::kFloat).sin().view({2, 4, 10, 16});  // (B, H, L, D)
  const Tensor lengths = at::arange(2, at::kLong).mul(3).add(4);                        // 4 and 7 of the 10 keys
  const double scale = 0.25;
  Values arguments{x, x, x, none, none, none, lengths, none, none, none, 10, 10, false, scale, 0.0, none, false};
  const Tensor out = call("attention_forward", arguments)[0].toTensor();
  const Tensor mask = at::arange(10).lt(lengths.view({2, 1, 1, 1}));
  const Tensor expected = at::scaled_dot_product_attention(x, x, x, mask, 0.0, false, scale);
  std::printf("masked_attention, largest difference from SDPA: %.1e\n", (out - expected).abs().max().item<double>());
}

void perturbation() {
  const Tensor weights = at::arange(1000, at::kFloat).sin(), before = weights.clone(), stash = at::empty_like(weights);
  const Tensors params{weights}, grads{weights.cos()}, stashes{stash};
  call("perturb_", {params, grads, stashes, none, none, /*radius=*/0.5, /*scope=*/0, /*adaptive=*/false});
  std::printf("perturb_, length of the step: %.6f\n", (weights - before).norm().item<double>());
  call("restore_", {params, stashes});
  std::printf("restore_, weights that differ from before: %ld\n", (weights != before).sum().item<long>());
}

int main(int argc, char** argv) {
  const c10::InferenceMode no_gradients;
  load(argc > 1 ? argv[1] : "mmer_fast/_C.abi3.so");
  soft_topk();
  attention();
  perturbation();
}
