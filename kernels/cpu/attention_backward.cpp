// Attention backward, by blocks of queries and keys (attention_slopes.h has p and ds):
//
//     dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i
//     dv_j = sum_i r_ij p_ij do_i,    dm_j = sum_i e_ij a_ij
//
// A task owns the keys of a head, or a chunk of them, with all queries that look at them, so that every sum has one
// owner and one order. The parts that several chunks have in grad_q are summed in a second pass, and so are a task's
// sums over tokens, which are the gradient of the bias of the layer that q, k and v come from.
#include "attention_slopes.h"

namespace mmer {
inline namespace MMER_VARIANT {
namespace {

template <class S>
class BackwardTask {
 public:
  static int64_t scratch(const AttentionInputs& in, int64_t most) {
    const int64_t keys = GatheredKeys::room(most), row = round_up(in.width, kFloatLanes);
    return GatheredKeys::scratch(most) + Dropout::scratch(in) + QueryBlock<S>::scratch(in) +
           2 * Arena::size(in.width * keys) + 3 * Arena::size(keys * row) + Arena::size(keys) +
           2 * Arena::size(most * row) + Arena::size(kQueryBlock * row);
  }

  // Of at most `most` keys.
  BackwardTask(const AttentionBackwardArgs& args, int64_t most, Arena& arena)
      : args_(args),
        in_(args.in),
        room_(GatheredKeys::room(most)),
        row_(round_up(in_.width, kFloatLanes)),
        keys_(in_, most, arena),
        dropout_(in_, arena),
        block_(args, arena),
        kt_(arena.take(in_.width * room_)),
        vt_(arena.take(in_.width * room_)),
        k_(arena.take(room_ * row_)),
        dk_(arena.take(room_ * row_)),
        dv_(arena.take(room_ * row_)),
        dm_(arena.take(room_)),
        all_dk_(arena.take(most * row_)),
        all_dv_(arena.take(most * row_)),
        dq_(arena.take(kQueryBlock * row_)) {}

  // Keys [begin, end) of a head of sample b, and its padding behind them. `parts`: where this task's own go, grad_q
  // null where it is the only one.
  void run(int64_t b, int64_t key_head, int64_t begin, int64_t end, const AttentionParts& parts) {
    b_ = b;
    parts_ = parts;
    queries_ = in_.query_span(b);
    const AttentionSpan span = in_.key_span(b);
    first_key_ = span.first + begin;
    count_ = least(end, span.room) - begin;
    if (count_ < 0) count_ = 0;
    zero(all_dk_, count_ * row_);
    zero(all_dv_, count_ * row_);
    const int64_t group = in_.heads / in_.key_heads;
    for (h_ = key_head * group; h_ < (key_head + 1) * group; ++h_) {
      keys_.gather(b, h_, begin, end, in_.exact_zero_weight_grad && args_.grad_weights.data != nullptr, kBackwardSplit);
      keys_.columns<S>(in_.k, b, key_head, kt_);
      keys_.columns<S>(in_.v, b, key_head, vt_);
      keys_.rows<S>(in_.k, b, key_head, row_, k_);
      zero(dk_, keys_.count() * row_);
      zero(dv_, keys_.count() * row_);
      zero(dm_, padded(keys_.count()));
      float* columns = columns_of(0, h_);
      for (int64_t first = 0; first < queries_.room; first += kQueryBlock) {
        const int64_t rows = least(kQueryBlock, queries_.room - first), taken = least(rows, queries_.count - first);
        if (taken > 0) differentiate(first, taken);
        write_queries(first, taken, rows);
        add_rows(dq_, taken, static_cast<float>(in_.scale), columns);
      }
      scatter(begin);
    }
    write_keys(key_head, all_dk_, args_.grad_k);
    write_keys(key_head, all_dv_, args_.grad_v);
    add_rows(all_dk_, count_, 1.0f, columns_of(1, key_head));
    add_rows(all_dv_, count_, 1.0f, columns_of(2, key_head));
  }

 private:
  void differentiate(int64_t first, int64_t rows) {
    const int64_t row_vectors = row_ / kFloatLanes;
    block_.read(keys_, b_, h_, first, rows);
    zero(dq_, rows * row_);
    for (int64_t start = 0; start < keys_.count(); start += kKeyBlock) {
      if (in_.causal && keys_.index(start) > first + rows - 1) break;
      const int64_t count = least(kKeyBlock, keys_.count() - start);
      block_.meet(keys_, dropout_, start, count, kt_, vt_, room_, dm_);
      gemm({rows, block_.p(), 1, kKeyBlock, block_.grad_out(), row_, dv_ + start * row_, row_, true}, count,
           row_vectors);
      gemm({rows, block_.ds(), 1, kKeyBlock, block_.q(), row_, dk_ + start * row_, row_, true}, count, row_vectors);
      gemm({count, block_.ds(), kKeyBlock, 1, k_ + start * row_, row_, dq_, row_, true}, rows, row_vectors);
    }
  }

  void scatter(int64_t begin) {
    const AttentionVector& dm = args_.grad_weights;
    for (int64_t j = 0; dm.data != nullptr && j < count_; ++j) *dm.at(b_, h_, first_key_ + j) = 0;
    for (int64_t j = 0; j < keys_.count(); ++j) {
      const int64_t to = keys_.index(j) - begin;
      for (int64_t d = 0; d < row_; ++d) all_dk_[to * row_ + d] += dk_[j * row_ + d];
      for (int64_t d = 0; d < row_; ++d) all_dv_[to * row_ + d] += dv_[j * row_ + d];
      if (dm.data != nullptr) *dm.at(b_, h_, first_key_ + to) = keys_.weight_gradient(j, dm_[j]);
    }
  }

  void write_queries(int64_t first, int64_t taken, int64_t rows) {
    const float scale = static_cast<float>(in_.scale);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = queries_.first + first + i;
      S* out = args_.grad_q.at<S>(b_, h_, token);
      float* part = parts_.grad_q == nullptr ? nullptr : parts_.grad_q + row_number(token) * in_.width;
      for (int64_t d = 0; d < in_.width; ++d) {
        const float value = i < taken ? scale * dq_[i * row_ + d] : 0.0f;
        if (part != nullptr) {
          part[d] = value;
        } else {
          from_compute(value, out + d);
        }
      }
    }
  }

  // The row of a query in a contiguous array.
  int64_t row_number(int64_t token) const {
    return in_.cu_seqlens_q != nullptr ? token * in_.heads + h_ : (b_ * in_.heads + h_) * in_.queries + token;
  }

  // This task's sum of the columns of grad_q (0), grad_k (1) or grad_v (2) of a head, set to 0; or null.
  float* columns_of(int64_t array, int64_t head) const {
    if (parts_.columns == nullptr) return nullptr;
    float* columns = parts_.columns + (array * in_.heads + head) * in_.width;
    zero(columns, in_.width);
    return columns;
  }

  void add_rows(const float* rows, int64_t count, float factor, float* columns) const {
    if (columns == nullptr) return;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t d = 0; d < in_.width; ++d) columns[d] += factor * rows[i * row_ + d];
    }
  }

  void write_keys(int64_t key_head, const float* gradient, const AttentionArray& array) const {
    for (int64_t j = 0; j < count_; ++j) {
      S* out = array.at<S>(b_, key_head, first_key_ + j);
      for (int64_t d = 0; d < in_.width; ++d) from_compute(gradient[j * row_ + d], out + d);
    }
  }

  const AttentionBackwardArgs& args_;
  const AttentionInputs& in_;
  const int64_t room_, row_;  // keys and entries of a row in scratch
  GatheredKeys keys_;
  Dropout dropout_;
  QueryBlock<S> block_;
  float *kt_, *vt_, *k_, *dk_, *dv_, *dm_, *all_dk_, *all_dv_, *dq_;
  AttentionParts parts_{};
  AttentionSpan queries_{};
  int64_t b_ = 0, h_ = 0, first_key_ = 0, count_ = 0;
};

template <class S>
bool backward_tasks(const AttentionBackwardArgs& args, const AttentionParts& parts, int64_t begin, int64_t end) {
  const AttentionInputs& in = args.in;
  const AttentionTasks tasks = attention_cpu_tasks(in);
  Arena arena(BackwardTask<S>::scratch(in, tasks.key_chunk));
  if (!arena.ok()) return false;
  BackwardTask<S> task(args, tasks.key_chunk, arena);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i / tasks.key_chunks, chunk = i % tasks.key_chunks, first = chunk * tasks.key_chunk;
    const int64_t b = head / in.key_heads;
    AttentionParts own;
    if (parts.grad_q != nullptr) own.grad_q = parts.grad_q + chunk * args.grad_q_elements;
    if (parts.columns != nullptr) {
      own.columns = parts.columns + (b * tasks.key_chunks + chunk) * 3 * in.heads * in.width;
    }
    task.run(b, head % in.key_heads, first, first + tasks.key_chunk, own);
  }
  return true;
}

template <class S>
bool sum_parts(const AttentionBackwardArgs& args, const float* parts, int64_t begin, int64_t end) {
  const AttentionInputs& in = args.in;
  const int64_t chunks = attention_cpu_tasks(in).key_chunks;
  const bool packed = in.cu_seqlens_q != nullptr;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t outer = row / (packed ? in.heads : in.queries), inner = row % (packed ? in.heads : in.queries);
    S* out = packed ? args.grad_q.at<S>(0, inner, outer) : args.grad_q.at<S>(outer / in.heads, outer % in.heads, inner);
    for (int64_t d = 0; d < in.width; ++d) {
      float sum = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += parts[chunk * args.grad_q_elements + row * in.width + d];
      from_compute(sum, out + d);
    }
  }
  return true;
}

}  // namespace

bool attention_backward_tasks(const AttentionBackwardArgs& args, const AttentionParts& parts, int64_t begin,
                              int64_t end) {
  return by_narrow_storage(args.in.dtype,
                           [&](auto storage) { return backward_tasks<decltype(storage)>(args, parts, begin, end); });
}

bool attention_sum_parts_tasks(const AttentionBackwardArgs& args, const float* parts, int64_t begin, int64_t end) {
  return by_narrow_storage(args.in.dtype,
                           [&](auto storage) { return sum_parts<decltype(storage)>(args, parts, begin, end); });
}

}  // namespace MMER_VARIANT
}  // namespace mmer
