// Weight perturbation for the dispatcher: checks, flat views, outputs, launch. Schemas: mmer_fast/ops/perturbation.py.
#include "../kernels/cpu/perturbation.h"

#include <algorithm>
#include <array>
#include <tuple>

#include "../kernels/common/perturbation_math.h"
#include "cuda_stream.h"
#include "own_memory.h"
#include "tensor.h"

#ifdef MMER_WITH_CUDA
#include "../kernels/cuda/perturbation.h"
#endif

namespace mmer {
namespace {

using Tensors = std::vector<Tensor>;

bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// Whether the entries fill a piece of memory without holes or overlaps, in whatever order.
bool is_dense(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Whether tensors of one shape have their entries at the same places of a piece of memory each.
bool laid_out_alike(const Tensor& like, std::initializer_list<const Tensor*> others) {
  const bool contiguous = like.is_contiguous();
  if (!contiguous && !is_dense(like)) return false;
  for (const Tensor* other : others) {
    if (other == nullptr || other == &like || (contiguous && other->is_contiguous())) continue;
    if (!same_strides(*other, like)) return false;
  }
  return true;
}

// The tensors of a call as the kernels see them: flat. What is not dense, or not laid out as its partners are, goes
// through contiguous copies.
class FlatTensors {
 public:
  // An empty list stands for tensors that the call has none of.
  FlatTensors(const Tensors& weights, const Tensors& grads, const Tensors& stash) : weights_(weights), stash_(stash) {
    const size_t count = std::max(weights.size(), grads.size());
    STD_TORCH_CHECK(count > 0, "expected at least one tensor");
    for (const Tensors* list : {&weights, &grads, &stash}) {
      STD_TORCH_CHECK(list->empty() || list->size() == count, "the lists must be of one length");
    }
    tensors_.reserve(count);
    own_memory_.reserve(2 * stash.size());
    const auto device = (weights.empty() ? grads : weights)[0].device();
    for (size_t i = 0; i < count; ++i) add(i, device, at(weights, i), at(grads, i), at(stash, i));
    own_memory_.check();
  }

  const PerturbationTensor* data() const { return tensors_.data(); }
  int64_t count() const { return static_cast<int64_t>(tensors_.size()); }

  void write_back_weights() const { write_back(weights_, weight_copies_); }
  void write_back_stash() const { write_back(stash_, stash_copies_); }

 private:
  using Copies = std::vector<std::pair<size_t, Tensor>>;  // of which tensor

  static const Tensor* at(const Tensors& list, size_t i) { return list.empty() ? nullptr : &list[i]; }

  template <class Device>
  void add(size_t i, const Device& device, const Tensor* weight, const Tensor* grad, const Tensor* stash) {
    const Tensor& like = weight != nullptr ? *weight : *grad;
    for (const Tensor* other : {weight, grad, stash}) {
      if (other == nullptr) continue;
      STD_TORCH_CHECK(other->device() == device, "tensor ", i, " is on another device");
      STD_TORCH_CHECK(other == &like || same_shape(*other, like), "tensor ", i, " of the lists has several shapes");
    }
    STD_TORCH_CHECK(stash == nullptr || stash->scalar_type() == weight->scalar_type(), "stash ", i,
                    " must have the dtype of its parameter");
    PerturbationTensor entry{};
    entry.weight_dtype = dtype_of(like, "params");
    entry.grad_dtype = grad != nullptr ? dtype_of(*grad, "grads") : entry.weight_dtype;
    entry.n = like.numel();
    if (entry.n > 0) {
      const bool alike = laid_out_alike(like, {weight, grad, stash});
      if (stash != nullptr) {
        const int64_t bytes = entry_bytes(entry.weight_dtype);
        own_memory_.add("params", i, *weight, alike, bytes);
        own_memory_.add("stash", i, *stash, alike, bytes);
      }
      entry.weight = flat(weight_copies_, i, weight, alike);
      entry.grad = flat(grad_copies_, i, grad, alike);
      entry.stash = flat(stash_copies_, i, stash, alike);
    }
    tensors_.push_back(entry);
  }

  static void* flat(Copies& copies, size_t i, const Tensor* tensor, bool alike) {
    if (tensor == nullptr) return nullptr;
    if (alike) return tensor->data_ptr();
    copies.emplace_back(i, torch::stable::contiguous(*tensor));
    return copies.back().second.data_ptr();
  }

  static void write_back(const Tensors& originals, const Copies& copies) {
    for (const auto& [i, copy] : copies) {
      Tensor original = originals[i];
      if (copy.data_ptr() != original.data_ptr()) torch::stable::copy_(original, copy);
    }
  }

  const Tensors &weights_, &stash_;
  Copies weight_copies_, grad_copies_, stash_copies_;
  OwnMemory own_memory_;
  std::vector<PerturbationTensor> tensors_;
};

// The chunks of a call on the CPU and the threads' share of them.
class CpuCall {
 public:
  CpuCall(const PerturbationArgs& args) {
    int64_t bytes = 0;
    for (int64_t t = 0; t < args.count; ++t) {
      const PerturbationTensor& tensor = args.tensors[t];
      first_.push_back(size());
      for (int64_t begin = 0; begin < tensor.n; begin += kPerturbationChunk) {
        chunks_.push_back({t, begin, std::min(begin + kPerturbationChunk, tensor.n)});
      }
      entries_ += tensor.n;
      bytes += 4 * tensor.n;
    }
    first_.push_back(size());
    constexpr int64_t kCached = 8 << 20;  // bytes that stay in a cache until the weights are restored
    call_ = {args, chunks_.data(), nullptr, nullptr, bytes > kCached};
  }

  // args.norms and args.weight_norms, from the norms of the chunks in their order.
  void norms() {
    const size_t count = chunks_.size();
    std::vector<double> parts(count), weight_parts(call_.args.needs_weight_norms() ? count : 0);
    call_.parts = parts.data();
    call_.weight_parts = weight_parts.empty() ? nullptr : weight_parts.data();
    run(perturbation_norm_cpu);
    for (int64_t group = 0; group < call_.args.groups(); ++group) {
      const bool global = call_.args.scope == PerturbationScope::kGlobal;
      const int64_t first = global ? 0 : first_[group], last = global ? size() : first_[group + 1];
      const auto norm = [&](const std::vector<double>& of) {
        return norm_of_norms(last - first, [&](int64_t i) { return of[first + i]; });
      };
      call_.args.norms[group] = norm(parts);
      if (call_.args.needs_weight_norms()) call_.args.weight_norms[group] = norm(weight_parts);
    }
  }

  void run(void (*pass)(const PerturbationCpuArgs&, int64_t, int64_t)) const {
    constexpr int64_t kFewest = 32768;  // entries that are worth another thread
    const int64_t per_chunk = size() > 0 ? std::max<int64_t>(entries_ / size(), 1) : 1;
    torch::stable::parallel_for(0, size(), std::max<int64_t>(kFewest / per_chunk, 1),
                                [&](int64_t begin, int64_t end) { pass(call_, begin, end); });
  }

 private:
  int64_t size() const { return static_cast<int64_t>(chunks_.size()); }

  std::vector<PerturbationChunk> chunks_;
  std::vector<int64_t> first_;  // chunk of each tensor
  int64_t entries_ = 0;
  PerturbationCpuArgs call_{};
};

PerturbationArgs make_args(const FlatTensors& tensors, int64_t scope, bool adaptive) {
  STD_TORCH_CHECK(scope >= 0 && scope <= 2, "scope must be 0 (global), 1 (tensor) or 2 (awp), got ", scope);
  PerturbationArgs args{};
  args.tensors = tensors.data();
  args.count = tensors.count();
  args.scope = static_cast<PerturbationScope>(scope);
  args.adaptive = adaptive;
  return args;
}

Tensor doubles(const Tensor& like, int64_t n) { return empty(like, {n}, ScalarType::Double); }
double* numbers(const Tensor& tensor) { return static_cast<double*>(tensor.data_ptr()); }

const double* given(const std::optional<Tensor>& norms, const char* name, int64_t groups, const Tensor& like) {
  if (!norms.has_value()) return nullptr;
  STD_TORCH_CHECK(norms->dim() == 1 && norms->size(0) == groups && norms->scalar_type() == ScalarType::Double &&
                      norms->device() == like.device() && norms->is_contiguous(),
                  name, " must be float64 of shape (", groups, ",), contiguous, on the device of params");
  return numbers(*norms);
}

std::tuple<Tensor, Tensor> grad_norm(const Tensors& grads, const Tensors& params, int64_t scope, bool adaptive) {
  const FlatTensors tensors(params, grads, {});
  PerturbationArgs args = make_args(tensors, scope, adaptive);
  STD_TORCH_CHECK(!params.empty() || (!adaptive && !args.needs_weight_norms()), "params must be given");
  const Tensor norms = doubles(grads[0], args.groups());
  const Tensor weight_norms = doubles(grads[0], args.needs_weight_norms() ? args.count : 0);
  args.norms = numbers(norms);
  args.weight_norms = args.needs_weight_norms() ? numbers(weight_norms) : nullptr;
#ifdef MMER_WITH_CUDA
  if (grads[0].is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(grads[0].get_device_index());
    const Tensor workspace = empty(grads[0], {perturbation_workspace_cuda(args)}, ScalarType::Byte);
    check_launch(perturbation_norm_cuda(args, workspace.data_ptr(), current_stream(grads[0])), "grad_norm");
    return {norms, weight_norms};
  }
#endif
  CpuCall(args).norms();
  return {norms, weight_norms};
}

std::tuple<Tensor, Tensor> perturb_(const Tensors& params, const Tensors& grads, const Tensors& stash,
                                    const std::optional<Tensor>& norms, const std::optional<Tensor>& weight_norms,
                                    double radius, int64_t scope, bool adaptive) {
  STD_TORCH_CHECK(!params.empty() && params.size() == grads.size() && params.size() == stash.size(),
                  "params, grads and stash must be lists of one length, at least 1");
  FlatTensors tensors(params, grads, stash);
  PerturbationArgs args = make_args(tensors, scope, adaptive);
  args.radius = radius;
  args.given_norms = given(norms, "norms", args.groups(), params[0]);
  args.given_weight_norms = given(weight_norms, "weight_norms", args.count, params[0]);
  STD_TORCH_CHECK(args.needs_weight_norms() ? norms.has_value() == weight_norms.has_value() : !weight_norms.has_value(),
                  "weight_norms must be given together with norms in scope awp, and nowhere else");
  const Tensor out_norms = doubles(params[0], args.groups()), factors = doubles(params[0], args.groups());
  const Tensor out_weight_norms = doubles(params[0], args.needs_weight_norms() ? args.count : 0);
  args.norms = numbers(out_norms);
  args.weight_norms = args.needs_weight_norms() ? numbers(out_weight_norms) : nullptr;
  args.factors = numbers(factors);
#ifdef MMER_WITH_CUDA
  if (params[0].is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(params[0].get_device_index());
    const Tensor workspace = empty(params[0], {perturbation_workspace_cuda(args)}, ScalarType::Byte);
    check_launch(perturbation_apply_cuda(args, workspace.data_ptr(), current_stream(params[0])), "perturb_");
    tensors.write_back_stash();
    tensors.write_back_weights();
    return {out_norms, factors};
  }
#endif
  CpuCall call(args);
  if (args.given_norms == nullptr) {
    call.norms();
  } else {
    std::copy_n(args.given_norms, args.groups(), args.norms);
    if (args.needs_weight_norms()) std::copy_n(args.given_weight_norms, args.count, args.weight_norms);
  }
  for (int64_t group = 0; group < args.groups(); ++group) {
    const double reach = args.needs_weight_norms() ? radius * args.weight_norms[group] : radius;
    args.factors[group] = PerturbationStep(args.norms[group], reach, 1020).factor();
  }
  call.run(perturbation_apply_cpu);
  tensors.write_back_stash();
  tensors.write_back_weights();
  return {out_norms, factors};
}

void restore_(const Tensors& params, const Tensors& stash) {
  STD_TORCH_CHECK(!params.empty() && params.size() == stash.size(),
                  "params and stash must be lists of one length, at least 1");
  FlatTensors tensors(params, {}, stash);
#ifdef MMER_WITH_CUDA
  if (params[0].is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(params[0].get_device_index());
    check_launch(perturbation_restore_cuda(tensors.data(), tensors.count(), current_stream(params[0])), "restore_");
    tensors.write_back_weights();
    return;
  }
#endif
  CpuCall(make_args(tensors, 0, false)).run(perturbation_restore_cpu);
  tensors.write_back_weights();
}

}  // namespace

MMER_IMPLEMENT(CPU, library) {
  library.impl("grad_norm", TORCH_BOX(&grad_norm));
  library.impl("perturb_", TORCH_BOX(&perturb_));
  library.impl("restore_", TORCH_BOX(&restore_));
}

#ifdef MMER_WITH_CUDA
MMER_IMPLEMENT(CUDA, library) {
  library.impl("grad_norm", TORCH_BOX(&grad_norm));
  library.impl("perturb_", TORCH_BOX(&perturb_));
  library.impl("restore_", TORCH_BOX(&restore_));
}
#endif

}  // namespace mmer
