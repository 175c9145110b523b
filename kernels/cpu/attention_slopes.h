// A block of queries in the backward pass: from a block of keys to p and ds, which all gradients are made of.
//
//     e_ij = e^(x_ij - lse_i),   p_ij = m_j e_ij,   delta_i = do_i . o_i - dlse_i
//     a_ij = r_ij do_i . v_j - delta_i,   ds_ij = p_ij a_ij
//
// with r what dropout multiplies p by (1 without it).
#pragma once

#include "attention_dropout.h"

namespace mmer {
inline namespace MMER_VARIANT {

template <class S>
class QueryBlock {
 public:
  static int64_t scratch(const AttentionInputs& in) {
    const int64_t row = round_up(in.width, kFloatLanes);
    return 2 * Arena::size(kQueryBlock * row) + 2 * Arena::size(kQueryBlock * kKeyBlock) + 2 * Arena::size(kQueryBlock);
  }

  QueryBlock(const AttentionBackwardArgs& args, Arena& arena)
      : args_(args),
        in_(args.in),
        row_(round_up(in_.width, kFloatLanes)),
        q_(arena.take(kQueryBlock * row_)),
        do_(arena.take(kQueryBlock * row_)),
        p_(arena.take(kQueryBlock * kKeyBlock)),
        ds_(arena.take(kQueryBlock * kKeyBlock)),
        lse_(arena.take(kQueryBlock)),
        delta_(arena.take(kQueryBlock)) {}

  const float* q() const { return q_; }  // scale q, [rows, row] as do
  const float* grad_out() const { return do_; }
  const float* p() const { return p_; }    // r p, [rows, kKeyBlock] as ds
  const float* ds() const { return ds_; }  // 0 up to the end of the last vectors

  void read(const GatheredKeys& keys, int64_t b, int64_t h, int64_t first, int64_t rows) {
    b_ = b;
    h_ = h;
    first_ = first;
    rows_ = rows;
    const int64_t token = in_.query_span(b).first + first;
    for (int64_t i = 0; i < rows; ++i) {
      keys.load_row(in_.q.at<S>(b, h, token + i), row_, static_cast<float>(in_.scale), q_ + i * row_);
      keys.load_row(args_.grad_out.at<S>(b, h, token + i), row_, 1.0f, do_ + i * row_);
      const S* o = args_.out.at<S>(b, h, token + i);
      float delta = args_.grad_lse.data != nullptr ? -*args_.grad_lse.at(b, h, token + i) : 0.0f;
      for (int64_t d = 0; d < in_.width; ++d) delta += do_[i * row_ + d] * to_compute(o[d]);
      delta_[i] = delta;
      lse_[i] = *args_.lse.at(b, h, token + i);
      if (lse_[i] == -kInfinity) zero(do_ + i * row_, row_);  // no key, no gradient, whatever came
    }
  }

  // p and ds for the keys [start, start + count), whose K and V are columns [D, room]. Adds sum_i e_ij a_ij to dm,
  // up to the end of the last vectors.
  void meet(const GatheredKeys& keys, Dropout& dropout, int64_t start, int64_t count, const float* kt, const float* vt,
            int64_t room, float* dm) {
    gemm({in_.width, q_, row_, 1, kt + start, room, p_, kKeyBlock, false}, rows_, vectors_of(count));
    gemm({in_.width, do_, row_, 1, vt + start, room, ds_, kKeyBlock, false}, rows_, vectors_of(count));
    dropout.draw(b_, h_, first_, rows_, keys, start, count);
    for (int64_t i = 0; i < rows_; ++i) slopes(keys, dropout, i, start, count, dm + start);
  }

 private:
  void slopes(const GatheredKeys& keys, const Dropout& dropout, int64_t i, int64_t start, int64_t count, float* dm) {
    float *x = p_ + i * kKeyBlock, *a = ds_ + i * kKeyBlock;
    const float* m = keys.weights() + start;
    if (lse_[i] == -kInfinity) {
      zero(x, padded(count));
      zero(a, padded(count));
      return;
    }
    keys.restrict_scores(b_, h_, first_ + i, start, count, x);
    for (int64_t j = count; j < padded(count); ++j) a[j] = 0;
    dropout.apply(i, a);
    const float lse = lse_[i], delta = delta_[i];
    for_vectors(count, [&](auto registers, int64_t j) MMER_INLINE_LAMBDA {
      constexpr int kCount = decltype(registers)::kCount;
      const auto e = exp_or_zero(load<kCount>(x + j) - lse), p = e * load<kCount>(m + j);
      const auto distance = load<kCount>(a + j) - delta;
      store(dm + j, load<kCount>(dm + j) + e * distance);
      store(x + j, p);
      store(a + j, p * distance);
    });
    dropout.apply(i, x);
  }

  const AttentionBackwardArgs& args_;
  const AttentionInputs& in_;
  const int64_t row_;
  float *q_, *do_, *p_, *ds_, *lse_, *delta_;
  int64_t b_ = 0, h_ = 0, first_ = 0, rows_ = 0;
};

}  // namespace MMER_VARIANT
}  // namespace mmer
