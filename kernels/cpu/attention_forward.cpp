// Attention forward, by blocks of queries and keys with a running maximum and sum (online softmax):
//
//     x = scale q k^T + b,   top' = max(top, max_j x_j),   p_j = m_j e^(x_j - top')
//     sum <- sum e^(top - top') + sum_j p_j,   o <- o e^(top - top') + sum_j p_j v_j;   at the end o / sum
//
// The keys that count are gathered first, K transposed: padding, masked keys and keys of weight 0 cost nothing after
// that, whatever they hold.
#include "attention_dropout.h"

namespace mmer {
inline namespace MMER_VARIANT {
namespace {

template <class S>
class ForwardTask {
 public:
  static int64_t scratch(const AttentionInputs& in) {
    const int64_t keys = GatheredKeys::room(in.keys), width = round_up(in.width, kFloatLanes);
    return GatheredKeys::scratch(in.keys) + Dropout::scratch(in) + Arena::size(in.width * keys) +
           Arena::size(keys * width) + 2 * Arena::size(kQueryBlock * width) + Arena::size(kQueryBlock * kKeyBlock) +
           2 * Arena::size(kQueryBlock);
  }

  ForwardTask(const AttentionForwardArgs& args, Arena& arena)
      : args_(args),
        in_(args.in),
        room_(GatheredKeys::room(in_.keys)),
        row_(round_up(in_.width, kFloatLanes)),
        keys_(in_, in_.keys, arena),
        dropout_(in_, arena),
        kt_(arena.take(in_.width * room_)),
        v_(arena.take(room_ * row_)),
        q_(arena.take(kQueryBlock * row_)),
        o_(arena.take(kQueryBlock * row_)),
        x_(arena.take(kQueryBlock * kKeyBlock)),
        top_(arena.take(kQueryBlock)),
        sum_(arena.take(kQueryBlock)) {}

  // Queries [begin, end) of head h of sample b, or as many of them as there are.
  void run(int64_t b, int64_t h, int64_t begin, int64_t end) {
    b_ = b;
    h_ = h;
    queries_ = in_.query_span(b);
    end = least(end, queries_.room);
    if (begin >= end) return;
    if (begin < queries_.count) {
      const int64_t key_head = h * in_.key_heads / in_.heads;
      keys_.gather(b, h, 0, in_.keys, false, kForwardSplit);
      keys_.columns<S>(in_.k, b, key_head, kt_);
      keys_.rows<S>(in_.v, b, key_head, row_, v_);
    }
    for (int64_t first = begin; first < end; first += kQueryBlock) {
      const int64_t rows = least(kQueryBlock, end - first), taken = least(rows, queries_.count - first);
      if (taken > 0) attend(first, taken);
      write(first, taken, rows);
    }
  }

 private:
  void attend(int64_t first, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      keys_.load_row(in_.q.at<S>(b_, h_, queries_.first + first + i), row_, static_cast<float>(in_.scale),
                     q_ + i * row_);
      top_[i] = -kInfinity;
      sum_[i] = 0;
    }
    zero(o_, rows * row_);
    for (int64_t start = 0; start < keys_.count(); start += kKeyBlock) {
      if (in_.causal && keys_.index(start) > first + rows - 1) break;
      const int64_t count = least(kKeyBlock, keys_.count() - start);
      gemm({in_.width, q_, row_, 1, kt_ + start, room_, x_, kKeyBlock, false}, rows, vectors_of(count));
      dropout_.draw(b_, h_, first, rows, keys_, start, count);
      for (int64_t i = 0; i < rows; ++i) weigh(first + i, i, start, count);
      gemm({count, x_, kKeyBlock, 1, v_ + start * row_, row_, o_, row_, true}, rows, row_ / kFloatLanes);
    }
  }

  // Row i of the block: scores to p, and the running maximum, sum and output.
  void weigh(int64_t query, int64_t i, int64_t start, int64_t count) {
    float* x = x_ + i * kKeyBlock;
    const int64_t seen = keys_.restrict_scores(b_, h_, query, start, count, x);
    Vec<float> largest = broadcast(-kInfinity);
    for_vectors(count, [&](auto registers, int64_t j) MMER_INLINE_LAMBDA {
      const auto entries = load<decltype(registers)::kCount>(x + j);
      for (int u = 0; u < decltype(registers)::kCount; ++u) largest.v[u] = native_greater(entries.v[u], largest.v[u]);
    });
    const float here = static_cast<float>(max_lanes(largest)), top = here > top_[i] ? here : top_[i];
    if (top == -kInfinity) {  // no key yet, or NaN alone, which no maximum sees
      float nothing = 0;
      for (int64_t j = 0; j < seen; ++j) nothing = x[j] != x[j] ? x[j] : nothing;
      for (int64_t j = 0; j < padded(count); ++j) x[j] = nothing;
      sum_[i] += nothing;
      return;
    }
    Accumulator<float> sum;
    const float* weights = in_.key_weights.data != nullptr ? keys_.weights() + start : nullptr;
    for_vectors(count, [&](auto registers, int64_t j) MMER_INLINE_LAMBDA {
      auto p = exp_or_zero(load<decltype(registers)::kCount>(x + j) - top);
      if (weights != nullptr) p = p * load<decltype(registers)::kCount>(weights + j);
      store(x + j, p);
      sum.add(p);
    });
    if (top > top_[i]) {
      const float shrink = std::exp(top_[i] - top);
      sum_[i] *= shrink;
      for (int64_t d = 0; d < row_; ++d) o_[i * row_ + d] *= shrink;
      top_[i] = top;
    }
    sum_[i] += static_cast<float>(sum.total());
    dropout_.apply(i, x);
  }

  void write(int64_t first, int64_t taken, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      const bool any = i < taken && sum_[i] != 0;  // a NaN counts
      const float factor = any ? 1 / sum_[i] : 0;
      S* out = args_.out.at<S>(b_, h_, queries_.first + first + i);
      for (int64_t d = 0; d < in_.width; ++d) from_compute(any ? o_[i * row_ + d] * factor : 0.0f, out + d);
      *args_.lse.at(b_, h_, queries_.first + first + i) = any ? top_[i] + std::log(sum_[i]) : -kInfinity;
    }
  }

  const AttentionForwardArgs& args_;
  const AttentionInputs& in_;
  const int64_t room_, row_;  // keys and entries of a row in scratch
  GatheredKeys keys_;
  Dropout dropout_;
  float *kt_, *v_, *q_, *o_, *x_, *top_, *sum_;
  AttentionSpan queries_{};
  int64_t b_ = 0, h_ = 0;
};

template <class S>
bool forward_tasks(const AttentionForwardArgs& args, int64_t begin, int64_t end) {
  const AttentionInputs& in = args.in;
  Arena arena(ForwardTask<S>::scratch(in));
  if (!arena.ok()) return false;
  ForwardTask<S> task(args, arena);
  const int64_t chunk = attention_cpu_tasks(in).query_chunk, chunks = (in.queries + chunk - 1) / chunk;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i / chunks, first = i % chunks * chunk;
    task.run(head / in.heads, head % in.heads, first, first + chunk);
  }
  return true;
}

}  // namespace

bool attention_forward_tasks(const AttentionForwardArgs& args, int64_t begin, int64_t end) {
  return by_narrow_storage(args.in.dtype,
                           [&](auto storage) { return forward_tasks<decltype(storage)>(args, begin, end); });
}

}  // namespace MMER_VARIANT
}  // namespace mmer
