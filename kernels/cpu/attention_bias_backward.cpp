// The gradient of attention's bias:   db = sum of ds_ij over the batch, the heads or the queries that share an entry
//
// A task owns some rows of one of its matrices and goes through all that share it, so that every sum has one owner and
// one order. The scores are computed once more: only who asks for this gradient pays for it.
#include "attention_slopes.h"

namespace mmer {
inline namespace MMER_VARIANT {
namespace {

template <class S>
class BiasTask {
 public:
  static int64_t scratch(const AttentionInputs& in) {
    const int64_t keys = GatheredKeys::room(in.keys);
    return GatheredKeys::scratch(in.keys) + Dropout::scratch(in) + QueryBlock<S>::scratch(in) +
           2 * Arena::size(in.width * keys) + Arena::size(keys);
  }

  BiasTask(const AttentionBackwardArgs& args, Arena& arena)
      : args_(args),
        in_(args.in),
        room_(GatheredKeys::room(in_.keys)),
        keys_(in_, in_.keys, arena),
        dropout_(in_, arena),
        block_(args, arena),
        kt_(arena.take(in_.width * room_)),
        vt_(arena.take(in_.width * room_)),
        dm_(arena.take(room_)) {}

  // Rows [begin, end) of matrix (batch, head) of the bias; its only row where all queries share it.
  void run(int64_t batch, int64_t head, int64_t begin, int64_t end) {
    const bool shared = in_.bias_queries == 1;
    out_ = args_.grad_bias + (batch * in_.bias_heads + head) * in_.bias_queries * in_.keys;
    zero(out_ + begin * in_.keys, (end - begin) * in_.keys);
    const int64_t first = shared ? 0 : begin, last = shared ? in_.queries : end;
    const int64_t batches = in_.bias_batches == 1 ? in_.batch : batch + 1;
    const int64_t heads = in_.bias_heads == 1 ? in_.heads : head + 1;
    for (int64_t b = in_.bias_batches == 1 ? 0 : batch; b < batches; ++b) {
      for (int64_t h = in_.bias_heads == 1 ? 0 : head; h < heads; ++h) add(b, h, first, last, shared);
    }
  }

 private:
  void add(int64_t b, int64_t h, int64_t begin, int64_t end, bool shared) {
    end = least(end, in_.query_span(b).count);
    if (begin >= end) return;
    const int64_t key_head = h * in_.key_heads / in_.heads;
    keys_.gather(b, h, 0, in_.keys, false, kBackwardSplit);
    keys_.columns<S>(in_.k, b, key_head, kt_);
    keys_.columns<S>(in_.v, b, key_head, vt_);
    zero(dm_, room_);
    for (int64_t first = begin; first < end; first += kQueryBlock) {
      const int64_t rows = least(kQueryBlock, end - first);
      block_.read(keys_, b, h, first, rows);
      for (int64_t start = 0; start < keys_.count(); start += kKeyBlock) {
        if (in_.causal && keys_.index(start) > first + rows - 1) break;
        const int64_t count = least(kKeyBlock, keys_.count() - start);
        block_.meet(keys_, dropout_, start, count, kt_, vt_, room_, dm_);
        for (int64_t i = 0; i < rows; ++i) {
          float* out = out_ + (shared ? 0 : first + i) * in_.keys;
          for (int64_t j = 0; j < count; ++j) out[keys_.index(start + j)] += block_.ds()[i * kKeyBlock + j];
        }
      }
    }
  }

  const AttentionBackwardArgs& args_;
  const AttentionInputs& in_;
  const int64_t room_;
  GatheredKeys keys_;
  Dropout dropout_;
  QueryBlock<S> block_;
  float *kt_, *vt_, *dm_;  // dm is not asked for here
  float* out_ = nullptr;
};

template <class S>
bool bias_tasks(const AttentionBackwardArgs& args, int64_t begin, int64_t end) {
  const AttentionInputs& in = args.in;
  Arena arena(BiasTask<S>::scratch(in));
  if (!arena.ok()) return false;
  BiasTask<S> task(args, arena);
  const int64_t chunk = attention_cpu_tasks(in).bias_query_chunk, chunks = (in.bias_queries + chunk - 1) / chunk;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t matrix = i / chunks, first = i % chunks * chunk;
    task.run(matrix / in.bias_heads, matrix % in.bias_heads, first, least(first + chunk, in.bias_queries));
  }
  return true;
}

}  // namespace

bool attention_bias_backward_tasks(const AttentionBackwardArgs& args, int64_t begin, int64_t end) {
  return by_narrow_storage(args.in.dtype,
                           [&](auto storage) { return bias_tasks<decltype(storage)>(args, begin, end); });
}

}  // namespace MMER_VARIANT
}  // namespace mmer
