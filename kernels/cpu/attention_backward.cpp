// Attention backward, from the log-sum-exp of each query, by blocks of queries and keys:
//
//     e_ij = e^(x_ij - lse_i),   p_ij = m_j e_ij,   delta_i = do_i . o_i
//     a_ij = do_i . v_j - delta_i,   ds_ij = p_ij a_ij
//
//     dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i
//     dv_j = sum_i p_ij do_i,         dm_j = sum_i e_ij a_ij
//
// A task owns a head of keys and all queries that look at it, so that every sum has one owner and one order.
#include "attention_task.h"

namespace mmer {
inline namespace MMER_VARIANT {
namespace {

template <class S>
class BackwardTask {
 public:
  static int64_t scratch(const AttentionInputs& in) {
    const int64_t keys = GatheredKeys::room(in), row = round_up(in.width, kFloatLanes);
    return GatheredKeys::scratch(in) + 2 * Arena::size(in.width * keys) + 3 * Arena::size(keys * row) +
           Arena::size(keys) + 2 * Arena::size(in.keys * row) + 3 * Arena::size(kQueryBlock * row) +
           2 * Arena::size(kQueryBlock * kKeyBlock) + 2 * Arena::size(kQueryBlock);
  }

  BackwardTask(const AttentionBackwardArgs& args, Arena& arena)
      : args_(args),
        in_(args.in),
        room_(GatheredKeys::room(in_)),
        row_(round_up(in_.width, kFloatLanes)),
        keys_(in_, arena),
        kt_(arena.take(in_.width * room_)),
        vt_(arena.take(in_.width * room_)),
        k_(arena.take(room_ * row_)),
        dk_(arena.take(room_ * row_)),
        dv_(arena.take(room_ * row_)),
        dm_(arena.take(room_)),
        all_dk_(arena.take(in_.keys * row_)),
        all_dv_(arena.take(in_.keys * row_)),
        q_(arena.take(kQueryBlock * row_)),
        do_(arena.take(kQueryBlock * row_)),
        dq_(arena.take(kQueryBlock * row_)),
        x_(arena.take(kQueryBlock * kKeyBlock)),
        a_(arena.take(kQueryBlock * kKeyBlock)),
        lse_(arena.take(kQueryBlock)),
        delta_(arena.take(kQueryBlock)) {}

  void run(int64_t b, int64_t key_head) {
    b_ = b;
    zero(all_dk_, in_.keys * row_);
    zero(all_dv_, in_.keys * row_);
    const int64_t group = in_.heads / in_.key_heads;
    for (h_ = key_head * group; h_ < (key_head + 1) * group; ++h_) {
      keys_.gather(b, h_);
      keys_.columns<S>(in_.k, b, key_head, kt_);
      keys_.columns<S>(in_.v, b, key_head, vt_);
      keys_.rows<S>(in_.k, b, key_head, row_, k_);
      zero(dk_, keys_.count() * row_);
      zero(dv_, keys_.count() * row_);
      zero(dm_, round_up(keys_.count(), Vec<float>::kLanes));
      const int64_t live = in_.query_lengths != nullptr ? least(in_.query_lengths[b], in_.queries) : in_.queries;
      for (int64_t first = 0; first < in_.queries; first += kQueryBlock) {
        const int64_t rows = least(kQueryBlock, in_.queries - first), taken = least(rows, live - first);
        if (taken > 0) differentiate(first, taken);
        write_queries(first, taken, rows);
      }
      scatter();
    }
    write_keys(key_head, all_dk_, static_cast<S*>(args_.grad_k));
    write_keys(key_head, all_dv_, static_cast<S*>(args_.grad_v));
  }

 private:
  void differentiate(int64_t first, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      keys_.load_row(in_.q.at<S>(b_, h_, first + i), row_, static_cast<float>(in_.scale), q_ + i * row_);
      keys_.load_row(args_.grad_out.at<S>(b_, h_, first + i), row_, 1.0f, do_ + i * row_);
      const S* o = args_.out.at<S>(b_, h_, first + i);
      float delta = 0;
      for (int64_t d = 0; d < in_.width; ++d) delta += do_[i * row_ + d] * to_compute(o[d]);
      delta_[i] = delta;
      lse_[i] = args_.lse[(b_ * in_.heads + h_) * in_.queries + first + i];
    }
    zero(dq_, rows * row_);
    for (int64_t start = 0; start < keys_.count(); start += kKeyBlock) {
      if (in_.causal && keys_.index(start) > first + rows - 1) break;
      const int64_t count = least(kKeyBlock, keys_.count() - start);
      const int64_t vectors = (count + kFloatLanes - 1) / kFloatLanes, row_vectors = row_ / kFloatLanes;
      gemm({in_.width, q_, row_, 1, kt_ + start, room_, x_, kKeyBlock, false}, rows, vectors);
      gemm({in_.width, do_, row_, 1, vt_ + start, room_, a_, kKeyBlock, false}, rows, vectors);
      for (int64_t i = 0; i < rows; ++i) slopes(first + i, i, start, count);
      gemm({rows, x_, 1, kKeyBlock, do_, row_, dv_ + start * row_, row_, true}, count, row_vectors);
      gemm({rows, a_, 1, kKeyBlock, q_, row_, dk_ + start * row_, row_, true}, count, row_vectors);
      gemm({count, a_, kKeyBlock, 1, k_ + start * row_, row_, dq_, row_, true}, rows, row_vectors);
    }
  }

  // Row i of the block: scores to p, do v^T to ds, and its part of dm.
  void slopes(int64_t query, int64_t i, int64_t start, int64_t count) {
    float *x = x_ + i * kKeyBlock, *a = a_ + i * kKeyBlock, *dm = dm_ + start;
    const float* m = keys_.weights() + start;
    const int64_t padded = round_up(count, Vec<float>::kLanes);
    if (lse_[i] == -kInfinity) {  // a query without a key
      zero(x, padded);
      zero(a, padded);
      return;
    }
    keys_.restrict_scores(b_, h_, query, start, count, x);
    for (int64_t j = count; j < padded; ++j) a[j] = 0;
    for (int64_t j = 0; j < padded; j += Vec<float>::kLanes) {
      const Vec<float> e = exp_or_zero(load(x + j) - lse_[i]), p = e * load(m + j), distance = load(a + j) - delta_[i];
      store(dm + j, load(dm + j) + e * distance);
      store(x + j, p);
      store(a + j, p * distance);
    }
  }

  void scatter() {
    float* dm = nullptr;
    if (args_.grad_weights != nullptr) {
      dm = args_.grad_weights + (b_ * in_.heads + h_) * in_.keys;
      zero(dm, in_.keys);
    }
    for (int64_t j = 0; j < keys_.count(); ++j) {
      const int64_t to = keys_.index(j);
      for (int64_t d = 0; d < row_; ++d) all_dk_[to * row_ + d] += dk_[j * row_ + d];
      for (int64_t d = 0; d < row_; ++d) all_dv_[to * row_ + d] += dv_[j * row_ + d];
      if (dm != nullptr) dm[to] = dm_[j];
    }
  }

  void write_queries(int64_t first, int64_t taken, int64_t rows) {
    const float scale = static_cast<float>(in_.scale);
    S* out = static_cast<S*>(args_.grad_q) + ((b_ * in_.heads + h_) * in_.queries + first) * in_.width;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < in_.width; ++d) {
        from_compute(i < taken ? scale * dq_[i * row_ + d] : 0.0f, out + i * in_.width + d);
      }
    }
  }

  void write_keys(int64_t key_head, const float* gradient, S* out) const {
    out += (b_ * in_.key_heads + key_head) * in_.keys * in_.width;
    for (int64_t j = 0; j < in_.keys; ++j) {
      for (int64_t d = 0; d < in_.width; ++d) from_compute(gradient[j * row_ + d], out + j * in_.width + d);
    }
  }

  const AttentionBackwardArgs& args_;
  const AttentionInputs& in_;
  const int64_t room_, row_;  // keys and entries of a row in scratch
  GatheredKeys keys_;
  float *kt_, *vt_, *k_, *dk_, *dv_, *dm_, *all_dk_, *all_dv_, *q_, *do_, *dq_, *x_, *a_, *lse_, *delta_;
  int64_t b_ = 0, h_ = 0;
};

template <class S>
bool backward_tasks(const AttentionBackwardArgs& args, int64_t begin, int64_t end) {
  Arena arena(BackwardTask<S>::scratch(args.in));
  if (!arena.ok()) return false;
  BackwardTask<S> task(args, arena);
  for (int64_t i = begin; i < end; ++i) task.run(i / args.in.key_heads, i % args.in.key_heads);
  return true;
}

}  // namespace

bool attention_backward_tasks(const AttentionBackwardArgs& args, int64_t begin, int64_t end) {
  return by_narrow_storage(args.in.dtype,
                           [&](auto storage) { return backward_tasks<decltype(storage)>(args, begin, end); });
}

}  // namespace MMER_VARIANT
}  // namespace mmer
