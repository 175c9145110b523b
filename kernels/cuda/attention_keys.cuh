// The keys and values of a head, tile by tile through shared memory, for a block that owns queries.
//
// A software pipeline of three stages, under way at the same time: the products with tile t, the copies of tile t + 1,
// and the loads of the weights of tile t + 2, which say what is copied at all: excluded keys are never read, and are 0
// in the tile.
#pragma once

#include "attention_scores.cuh"

namespace mmer {

template <class T, int kKeys, int kWidth>
class KeyPipeline {
 public:
  using Rows = Tile<T, kKeys, kWidth>;
  static constexpr int kBytes = 4 * Rows::kBytes + 3 * kKeys * static_cast<int>(sizeof(KeyFactor));
  static_assert(kKeys <= kThreads, "a thread a key");

  // `end`: keys behind it are not visited.
  __device__ __forceinline__ KeyPipeline(const AttentionInputs& in, const Plan& plan, const Head& at, int end,
                                         uint32_t shared)
      : shared_(shared), weights_(in, at), tiles_((end + kKeys - 1) / kKeys) {
    const int64_t key_head = static_cast<unsigned>(at.head) / plan.group;
    k_ = token_rows<T>(in.k, at.batch, key_head, at.key_first, in.width, plan.k);
    v_ = token_rows<T>(in.v, at.batch, key_head, at.key_first, in.width, plan.v);
  }

  __device__ __forceinline__ int tiles() const { return tiles_; }
  __device__ __forceinline__ Rows keys(int tile) const {
    return {shared_ + static_cast<uint32_t>(tile % 2 * 2 * Rows::kBytes)};
  }
  __device__ __forceinline__ Rows values(int tile) const { return {keys(tile).base + Rows::kBytes}; }
  __device__ __forceinline__ KeyFactor* factors(int tile) const {
    return shared_pointer<KeyFactor>(shared_ + 4 * Rows::kBytes) + tile % 3 * kKeys;
  }
  // Whether some m of the tile is not 1.
  __device__ __forceinline__ bool factored(int tile) const {
    return !weights_.uniform() || (tile + 1) * kKeys > weights_.count;
  }

  __device__ __forceinline__ void start() {
    for (int tile = 0; tile < 2; ++tile) {
      load_factor(tile);
      store_factor(tile);
    }
    __syncthreads();  // the factors, for the copies
    if (tiles_ > 0) copy(0);
  }

  // Afterwards the tile is there. Every warp is done with the one before it, whose memory the copies and the factors
  // that are begun here may take.
  __device__ __forceinline__ void begin(int tile) {
    copy_wait();
    __syncthreads();
    if (tile + 1 < tiles_) copy(tile + 1);
    load_factor(tile + 2);
  }

  __device__ __forceinline__ void end(int tile) { store_factor(tile + 2); }

 private:
  __device__ __forceinline__ void load_factor(int tile) {
    if (threadIdx.x < kKeys) next_ = KeyFactor::of(weights_, tile * kKeys + static_cast<int>(threadIdx.x));
  }
  __device__ __forceinline__ void store_factor(int tile) {
    if (threadIdx.x < kKeys) factors(tile)[threadIdx.x] = next_;
  }

  __device__ __forceinline__ void copy(int tile) {
    const KeyFactor* here = factors(tile);
    const auto taken = [&](int row) { return !here[row].excluded(); };
    copy_rows(keys(tile), k_, tile * kKeys, taken);
    copy_rows(values(tile), v_, tile * kKeys, taken);
  }

  uint32_t shared_;
  KeyWeights weights_;
  int tiles_;
  TokenRows<T> k_, v_;
  KeyFactor next_;
};

}  // namespace mmer
