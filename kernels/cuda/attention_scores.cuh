// Scores in base 2, and which entries count: the weights of the keys, the bias, the causal rule, dropout.
//
//     y_ij = log2(e) (scale q_i . k_j + b_ij),   e^(x_ij) = 2^(y_ij),   m_j = fraction_j 2^(exponent_j)
//
// The power of two of a weight goes into the exponent and so into the running maximum, its fraction stays a factor:
// nothing takes the logarithm of m, and m_j e^(x_ij) neither overflows nor is lost to the range of float16.
#pragma once

#include "../common/attention_args.h"
#include "../common/philox.h"
#include "attention_launch.cuh"
#include "attention_tile.cuh"

namespace mmer {

inline constexpr float kLn2 = 0.69314718055994530942f;

__device__ __forceinline__ float positive_infinity() { return bits_float(0x7F800000u); }
__device__ __forceinline__ float negative_infinity() { return bits_float(0xFF800000u); }

static_assert(kLongestSample + kBlockRows <= INT_MAX, "positions have 32 bits, those behind a sample's end too");

// The part of a head's scores that a block works on: positions within the sample.
struct Head {
  int batch, head;               // b, h
  int query_first, key_first;    // the sample's first tokens
  int query_room, key_room;      // tokens that exist
  int query_count, key_count;    // that count
  float scale;                   // to base 2
  const float* bias;             // of the sample and head, or null
  int64_t bias_query, bias_key;  // its strides
  bool causal;

  __device__ __forceinline__ Head(const AttentionInputs& in, const Plan& plan, int64_t b, int64_t h)
      : batch(static_cast<int>(b)),
        head(static_cast<int>(h)),
        scale(plan.score_scale),
        bias(in.bias == nullptr ? nullptr : in.bias + b * in.bias_batch + h * in.bias_head),
        bias_query(in.bias_query),
        bias_key(in.bias_key),
        causal(in.causal) {
    const AttentionSpan queries = in.query_span(b), keys = in.key_span(b);
    query_first = static_cast<int>(queries.first);
    query_room = static_cast<int>(queries.room);
    query_count = queries.count > 0 ? static_cast<int>(queries.count) : 0;
    key_first = static_cast<int>(keys.first);
    key_room = static_cast<int>(keys.room);
    key_count = keys.count > 0 ? static_cast<int>(keys.count) : 0;
  }

  __device__ __forceinline__ Head with_head(const AttentionInputs& in, int h) const {
    Head other = *this;
    if (bias != nullptr) other.bias += (h - head) * in.bias_head;
    other.head = h;
    return other;
  }

  // Keys that any of the queries before `query_end` may see.
  __device__ __forceinline__ int keys_seen(int query_end) const {
    return causal && query_end < key_count ? query_end : key_count;
  }
};

// m of a head's keys, by position in the sample.
struct KeyWeights {
  const float* weights;  // or null
  int64_t stride;
  const uint8_t* mask;  // or null
  int count;

  __device__ __forceinline__ KeyWeights(const AttentionInputs& in, const Head& at)
      : weights(in.key_weights.data == nullptr ? nullptr : in.key_weights.at(at.batch, at.head, at.key_first)),
        stride(in.key_weights.token),
        mask(in.mask == nullptr ? nullptr : in.mask + at.batch * in.mask_batch),
        count(at.key_count) {}

  __device__ __forceinline__ bool valid(int key) const { return key < count && (mask == nullptr || mask[key] != 0); }
  __device__ __forceinline__ float operator()(int key) const {
    return weights == nullptr ? 1.0f : weights[key * stride];
  }
  __device__ __forceinline__ bool uniform() const { return weights == nullptr && mask == nullptr; }
};

// m = fraction 2^exponent; an excluded key has exponent -infinity.
struct KeyFactor {
  float exponent, fraction;

  __device__ __forceinline__ bool excluded() const { return exponent == negative_infinity(); }

  static __device__ __forceinline__ KeyFactor of(const KeyWeights& weights, int key) {
    if (!weights.valid(key)) return {negative_infinity(), 0.0f};
    const float m = weights(key);
    if (m == 0.0f) return {negative_infinity(), 0.0f};
    const uint32_t bits = float_bits(m), power = bits >> 23 & 0xFFu;
    if (power == 0) return {-126.0f, m * bits_float(0x7E800000u)};  // below 2^-126, times 2^126
    if (power == 255) return {0.0f, m};                             // infinity or NaN
    return {static_cast<float>(static_cast<int>(power) - 127), bits_float((bits & 0x807FFFFFu) | 0x3F800000u)};
  }
};

// Where a warp's 16 x 8 kTiles sum lies among the scores. Rows are queries, or keys where kKeyRows.
template <bool kKeyRows>
struct Place {
  int query, key;  // of the sum's first entry

  __device__ __forceinline__ int row(int e) const { return (lane_index() >> 2) + 8 * (e >> 1); }
  __device__ __forceinline__ int column(int n, int e) const { return 8 * n + 2 * (lane_index() & 3) + (e & 1); }
  __device__ __forceinline__ int query_of(int n, int e) const { return query + (kKeyRows ? column(n, e) : row(e)); }
  __device__ __forceinline__ int key_of(int n, int e) const { return key + (kKeyRows ? row(e) : column(n, e)); }
};

// Products q . k to y: scale, bias and causal rule. The bias is read only where counted(n, e), the key's part of it.
template <bool kKeyRows, int kTiles, class Counted>
__device__ __forceinline__ void score(float (&y)[kTiles][4], const Head& at, const Place<kKeyRows>& place,
                                      Counted counted) {
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) y[i / 4][i % 4] *= at.scale;
  if (at.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {
      const int query = place.query_of(i / 4, i % 4), key = place.key_of(i / 4, i % 4);
      if (query < at.query_count && counted(i / 4, i % 4)) {
        y[i / 4][i % 4] += kLog2E * at.bias[query * at.bias_query + key * at.bias_key];
      }
    }
  }
  const int keys = kKeyRows ? kWarpRows : 8 * kTiles;
  if (at.causal && place.key + keys - 1 > place.query) {
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {
      if (place.key_of(i / 4, i % 4) > place.query_of(i / 4, i % 4)) y[i / 4][i % 4] = negative_infinity();
    }
  }
}

// The same for rows of queries, with the keys' exponents added where not all of them are 0.
template <int kTiles>
__device__ __forceinline__ void score_queries(float (&y)[kTiles][4], const Head& at, const Place<false>& place,
                                              const KeyFactor* factors, bool factored) {
  score(y, at, place, [&](int n, int e) { return !factors[place.column(n, e)].excluded(); });
  if (!factored) return;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const float even = factors[place.column(n, 0)].exponent, odd = factors[place.column(n, 1)].exponent;
    y[n][0] += even;
    y[n][1] += odd;
    y[n][2] += even;
    y[n][3] += odd;
  }
}

// p = 2^(y - shift of the row) fraction, in place.
template <int kTiles>
__device__ __forceinline__ void weigh_queries(float (&y)[kTiles][4], const float (&shift)[2], const Place<false>& place,
                                              const KeyFactor* factors, bool factored) {
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) y[i / 4][i % 4] = exp2_fast(y[i / 4][i % 4] - shift[i % 4 / 2]);
  if (!factored) return;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const float even = factors[place.column(n, 0)].fraction, odd = factors[place.column(n, 1)].fraction;
    y[n][0] *= even;
    y[n][1] *= odd;
    y[n][2] *= even;
    y[n][3] *= odd;
  }
}

// log2 of the weighted sum of a query, +infinity where it has no key or does not count: 2^(y - that) is 0.
__device__ __forceinline__ float base2_lse(const AttentionVector& lse, const Head& at, int64_t head, int query) {
  if (query >= at.query_count) return positive_infinity();
  const float here = *lse.at(at.batch, head, at.query_first + query);
  return here == negative_infinity() ? positive_infinity() : here * kLog2E;
}

// The draws are a function call: inlined they would take registers that the sums around them need. On sm_100 it is the
// other way round (tests/kernels/gpu_budget.json).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 == 10
#define MMER_CALL_OR_INLINE __forceinline__
#else
#define MMER_CALL_OR_INLINE __noinline__
#endif

struct Dropout {
  uint32_t dropped, key0, key1;  // dropped: q 2^16
  float rescale;                 // 1 / (1 - q)
  bool on;

  __device__ __forceinline__ Dropout(const AttentionInputs& in, const Plan& plan)
      : dropped(plan.dropped_of_65536), key0(0), key1(0), rescale(plan.dropout_rescale), on(in.dropout_p > 0) {
    if (!on) return;
    const uint64_t seed = static_cast<uint64_t>(*in.seed);
    key0 = static_cast<uint32_t>(seed);
    key1 = static_cast<uint32_t>(seed >> 32);
  }

  // Bit 4 n + e: whether that entry is kept. No lane draws what another one has.
  template <int kTiles>
  __device__ __forceinline__ uint32_t keep(const Head& at, const Place<false>& place) const {
    static_assert(kTiles % 2 == 0, "tiles come in pairs");
    const int rank = lane_index() & 3;  // of the four lanes with the same queries
    uint32_t kept = 0;
#pragma unroll 1
    for (int n = 0; n < kTiles; n += 2) {
      // Two tiles have four groups of keys and query: lane `rank` draws for query g + 8 (rank mod 2) and tile rank
      // div 2. Bits 2 t and 2 t + 1 of each are the keys of lane t.
      uint32_t bits = kept_of_group(at, place.key + 8 * (n + (rank >> 1)), place.query + place.row(2 * (rank & 1)));
      bits = exchange(bits, rank & 1, 0x33, 2, 1);
      bits = exchange(bits, rank & 2, 0x0F, 4, 2);
      kept |= bits << 4 * n;
    }
    return kept;
  }

  template <int kTiles>
  __device__ __forceinline__ uint32_t keep(const Head& at, const Place<true>& place) const {
    static_assert(kTiles % 2 == 0, "tiles come in pairs");
    const int rank = lane_index() >> 2;  // of the eight lanes with the same queries
    uint32_t kept = 0;
#pragma unroll 1
    for (int n = 0; n < kTiles; n += 2) {
      // Two tiles have eight groups of keys and query: lane `rank` draws for entry rank mod 4 of tile rank div 4. Bit g
      // of each is the key of lane g.
      uint32_t bits =
          kept_of_group(at, place.key + 8 * (rank >> 1 & 1), place.query + place.column(n + (rank >> 2), rank & 1));
      bits = exchange(bits, rank & 1, 0x55, 1, 4);
      bits = exchange(bits, rank & 2, 0x33, 2, 8);
      bits = exchange(bits, rank & 4, 0x0F, 4, 16);
      kept |= bits << 4 * n;
    }
    return kept;
  }

 private:
  // Bit j: whether key `key` + j is kept, of the eight from `key` on, a multiple of 8.
  __device__ __forceinline__ uint32_t kept_of_group(const Head& at, int key, int query) const {
    return kept_of_counter(static_cast<uint32_t>(key) / 8, static_cast<uint32_t>(query), static_cast<uint32_t>(at.head),
                           static_cast<uint32_t>(at.batch), key0, key1, dropped);
  }

  static __device__ MMER_CALL_OR_INLINE uint32_t kept_of_counter(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                                                 uint32_t key0, uint32_t key1, uint32_t dropped) {
    const PhiloxWords drawn = philox4x32({{c0, c1, c2, c3}}, key0, key1);
    uint32_t kept = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) kept |= ((drawn.w[j / 2] >> 16 * (j % 2) & 0xFFFFu) >= dropped ? 1u : 0u) << j;
    return kept;
  }

  // A step of transposing a matrix of bits of which each lane has a row. Two lanes `distance` apart exchange bits: the
  // upper one gives those at `firsts` for the other's, which are `shift` higher.
  static __device__ __forceinline__ uint32_t exchange(uint32_t bits, bool upper, uint32_t firsts, int shift,
                                                      int distance) {
    const uint32_t received = __shfl_xor_sync(kAllLanes, bits, distance);
    return upper ? (bits & ~firsts) | (received >> shift & firsts) : (bits & firsts) | (received & firsts) << shift;
  }
};

// Entries that are not kept become 0, the others are multiplied by `rescale`.
template <int kTiles>
__device__ __forceinline__ void drop(float (&x)[kTiles][4], uint32_t kept, float rescale) {
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) x[i / 4][i % 4] = kept >> i & 1u ? x[i / 4][i % 4] * rescale : 0.0f;
}

}  // namespace mmer
