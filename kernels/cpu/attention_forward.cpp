// Attention forward, by blocks of queries and keys with a running maximum and sum (online softmax):
//
//     x = scale q k^T + b,   top' = max(top, max_j x_j),   p_j = m_j e^(x_j - top')
//     sum <- sum e^(top - top') + sum_j p_j,   o <- o e^(top - top') + sum_j p_j v_j;   at the end o / sum
//
// The keys that count are gathered first, K transposed: padding, masked keys and keys of weight 0 cost nothing after
// that, whatever they hold.
#include <cmath>
#include <cstdlib>
#include <limits>

#include "attention.h"
#include "gemm.h"

namespace mmer {
inline namespace MMER_VARIANT {
namespace {

constexpr int64_t kQueryBlock = 48;
constexpr int64_t kKeyBlock = 192;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Not the standard library's templates: instantiated here they would be code of this instruction set for everybody.
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline void zero(float* begin, int64_t count) {
  for (int64_t i = 0; i < count; ++i) begin[i] = 0;
}

// One allocation for all arrays of a task, each on a cache line.
class Arena {
 public:
  explicit Arena(int64_t floats) : data_(static_cast<float*>(std::aligned_alloc(64, floats * 4))), next_(data_) {}
  ~Arena() { std::free(data_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  bool ok() const { return data_ != nullptr; }
  static int64_t size(int64_t floats) { return round_up(floats > 0 ? floats : 1, 16); }
  float* take(int64_t floats) {
    float* taken = next_;
    next_ += size(floats);
    return taken;
  }

 private:
  float *data_, *next_;
};

template <class S>
class Task {
 public:
  static int64_t scratch(const AttentionForwardArgs& a) {
    const int64_t keys = round_up(a.keys, kKeyBlock), width = round_up(a.width, kFloatLanes);
    return Arena::size(a.width * keys) + Arena::size(keys * width) + 2 * Arena::size(keys) +
           Arena::size(kQueryBlock * a.width) + Arena::size(kQueryBlock * kKeyBlock) +
           Arena::size(kQueryBlock * width) + 2 * Arena::size(kQueryBlock);
  }

  Task(const AttentionForwardArgs& args, Arena& arena)
      : a_(args), key_room_(round_up(args.keys, kKeyBlock)), out_room_(round_up(args.width, kFloatLanes)) {
    kt_ = arena.take(a_.width * key_room_);
    v_ = arena.take(key_room_ * out_room_);
    m_ = arena.take(key_room_);
    index_ = reinterpret_cast<int32_t*>(arena.take(key_room_));
    q_ = arena.take(kQueryBlock * a_.width);
    x_ = arena.take(kQueryBlock * kKeyBlock);
    o_ = arena.take(kQueryBlock * out_room_);
    top_ = arena.take(kQueryBlock);
    sum_ = arena.take(kQueryBlock);
  }

  void run(int64_t b, int64_t h, int64_t begin, int64_t end) {
    b_ = b;
    h_ = h;
    gather_keys();
    const int64_t live = a_.query_lengths != nullptr ? least(a_.query_lengths[b], end) : end;
    for (int64_t first = begin; first < end; first += kQueryBlock) {
      const int64_t rows = least(kQueryBlock, end - first), rest = least(rows, live - first);
      if (rest > 0) attend(first, rest);
      write(first, rest, rows);
    }
  }

 private:
  void gather_keys() {
    const int64_t g = h_ * a_.key_heads / a_.heads;
    const int64_t length = a_.lengths != nullptr ? least(a_.lengths[b_], a_.keys) : a_.keys;
    const float* m = a_.key_weights;
    if (m != nullptr) m += b_ * a_.weights_batch + h_ * a_.weights_head;
    const uint8_t* mask = a_.mask != nullptr ? a_.mask + b_ * a_.mask_stride : nullptr;
    keys_ = 0;
    for (int64_t j = 0; j < length; ++j) {
      if ((mask != nullptr && mask[j] == 0) || (m != nullptr && m[j] == 0)) continue;
      index_[keys_] = static_cast<int32_t>(j);
      m_[keys_++] = m != nullptr ? m[j] : 1.0f;
    }
    const int64_t padded = round_up(keys_, kFloatLanes);
    zero(m_ + keys_, round_up(keys_, Vec<float>::kLanes) - keys_);
    for (int64_t j = 0; j < keys_; ++j) {
      const S *k = a_.k.at<S>(b_, g, index_[j]), *v = a_.v.at<S>(b_, g, index_[j]);
      float* row = v_ + j * out_room_;
      for (int64_t d = 0; d < a_.width; ++d) kt_[d * key_room_ + j] = to_compute(k[d]);
      for (int64_t d = 0; d < a_.width; ++d) row[d] = to_compute(v[d]);
      for (int64_t d = a_.width; d < out_room_; ++d) row[d] = 0;
    }
    for (int64_t d = 0; d < a_.width; ++d) zero(kt_ + d * key_room_ + keys_, padded - keys_);
  }

  void attend(int64_t first, int64_t rows) {
    const float scale = static_cast<float>(a_.scale);
    for (int64_t i = 0; i < rows; ++i) {
      const S* q = a_.q.at<S>(b_, h_, first + i);
      for (int64_t d = 0; d < a_.width; ++d) q_[i * a_.width + d] = scale * to_compute(q[d]);
      top_[i] = -kInfinity;
      sum_[i] = 0;
    }
    zero(o_, rows * out_room_);
    for (int64_t start = 0; start < keys_; start += kKeyBlock) {
      if (a_.causal && index_[start] > first + rows - 1) break;
      const int64_t count = least(kKeyBlock, keys_ - start), vectors = (count + kFloatLanes - 1) / kFloatLanes;
      gemm({a_.width, q_, a_.width, 1, kt_ + start, key_room_, x_, kKeyBlock, false}, rows, vectors);
      for (int64_t i = 0; i < rows; ++i) weigh(first + i, i, start, count);
      gemm({count, x_, kKeyBlock, 1, v_ + start * out_room_, out_room_, o_, out_room_, true}, rows,
           out_room_ / kFloatLanes);
    }
  }

  // Row i of the block: scores to p, and the running maximum, sum and output.
  void weigh(int64_t query, int64_t i, int64_t start, int64_t count) {
    float* x = x_ + i * kKeyBlock;
    int64_t seen = count;
    if (a_.bias != nullptr) add_bias(query, start, count, x);
    while (a_.causal && seen > 0 && index_[start + seen - 1] > query) --seen;
    const int64_t padded = round_up(count, Vec<float>::kLanes);
    for (int64_t j = seen; j < padded; ++j) x[j] = -kInfinity;
    Vec<float> largest = broadcast(-kInfinity);
    for (int64_t j = 0; j < padded; j += Vec<float>::kLanes) largest = greater(load(x + j), largest);
    const float here = static_cast<float>(max_lanes(largest)), top = here > top_[i] ? here : top_[i];
    if (top == -kInfinity) {  // no key yet, or NaN alone, which no maximum sees
      float nothing = 0;
      for (int64_t j = 0; j < seen; ++j) nothing = x[j] != x[j] ? x[j] : nothing;
      for (int64_t j = 0; j < padded; ++j) x[j] = nothing;
      sum_[i] += nothing;
      return;
    }
    constexpr float kLog2E = 1.44269504088896340736f;
    Accumulator<float> sum;
    const bool weighted = a_.key_weights != nullptr;
    for (int64_t j = 0; j < padded; j += Vec<float>::kLanes) {
      const Vec<float> t = (load(x + j) - top) * kLog2E;
      Vec<float> p = select(t <= -100.0f, Vec<float>{}, exp2_bounded(t) + (t - t));  // t - t: NaN stays NaN
      if (weighted) p = p * load(m_ + start + j);
      store(x + j, p);
      sum.add(p);
    }
    if (top > top_[i]) {
      const float shrink = std::exp(top_[i] - top);
      sum_[i] *= shrink;
      for (int64_t d = 0; d < out_room_; ++d) o_[i * out_room_ + d] *= shrink;
      top_[i] = top;
    }
    sum_[i] += static_cast<float>(sum.total());
  }

  void add_bias(int64_t query, int64_t start, int64_t count, float* x) const {
    const float* bias = a_.bias + b_ * a_.bias_batch + h_ * a_.bias_head + query * a_.bias_query;
    for (int64_t j = 0; j < count; ++j) x[j] += bias[index_[start + j] * a_.bias_key];
  }

  void write(int64_t first, int64_t taken, int64_t rows) {
    const int64_t place = (b_ * a_.heads + h_) * a_.queries + first;
    S* out = static_cast<S*>(a_.out) + place * a_.width;
    for (int64_t i = 0; i < rows; ++i) {
      const bool any = i < taken && sum_[i] != 0;  // a NaN counts
      const float factor = any ? 1 / sum_[i] : 0;
      for (int64_t d = 0; d < a_.width; ++d) {
        from_compute(any ? o_[i * out_room_ + d] * factor : 0.0f, out + i * a_.width + d);
      }
      a_.lse[place + i] = any ? top_[i] + std::log(sum_[i]) : -kInfinity;
    }
  }

  const AttentionForwardArgs& a_;
  const int64_t key_room_, out_room_;
  int64_t b_ = 0, h_ = 0, keys_ = 0;
  float *kt_, *v_, *m_, *q_, *x_, *o_, *top_, *sum_;
  int32_t* index_;
};

template <class S>
bool forward_tasks(const AttentionForwardArgs& args, int64_t begin, int64_t end) {
  Arena arena(Task<S>::scratch(args));
  if (!arena.ok()) return false;
  Task<S> task(args, arena);
  const int64_t chunk = attention_cpu_task_queries(args), chunks = (args.queries + chunk - 1) / chunk;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i / chunks, first = i % chunks * chunk;
    task.run(head / args.heads, head % args.heads, first, least(first + chunk, args.queries));
  }
  return true;
}

}  // namespace

bool attention_forward_tasks(const AttentionForwardArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kFloat32: return forward_tasks<float>(args, begin, end);
    case DType::kBFloat16: return forward_tasks<BFloat16>(args, begin, end);
    default: return forward_tasks<Float16>(args, begin, end);
  }
}

}  // namespace MMER_VARIANT
}  // namespace mmer
