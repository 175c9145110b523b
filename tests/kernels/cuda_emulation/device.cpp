// The collectives of a warp and the functions of attention_warp.cuh on the host, with the fragment layouts of the PTX
// ISA.
//
// A sum of products is exact and then truncated towards zero, at least as coarse as tensor cores are.
#include <cmath>
#include <cstring>
#include <vector>

#include "../../../kernels/cuda/attention_warp.cuh"
#include "fibers.h"
#include "halves.h"

namespace mmer {
namespace {

using emulation::float_to_bfloat16;
using emulation::float_to_half;
using emulation::half_to_float;
using emulation::kLanes;

// As a GPU makes it: integer arithmetic that takes it for a number carries into its sign.
float nan_of_a_gpu() { return bits_float(0x7FFFFFFFu); }

float truncated(double x) {
  const float nearest = static_cast<float>(x);
  if (std::isnan(nearest)) return nan_of_a_gpu();
  if (!std::isfinite(nearest) || std::fabs(static_cast<double>(nearest)) <= std::fabs(x)) return nearest;
  return std::nextafter(nearest, 0.0f);
}

struct MatrixLoad {
  uint32_t* registers;
  const unsigned char* row;
};

void load_rows(void* const (&lanes)[kLanes], bool transposed) {
  uint16_t matrix[4][8][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const unsigned char* row = static_cast<MatrixLoad*>(lanes[lane])->row;
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulation::fail("ldmatrix of an unaligned row");
    std::memcpy(matrix[lane / 8][lane % 8], row, 16);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = transposed ? matrix[i][2 * t][g] : matrix[i][g][2 * t];
      const uint32_t high = transposed ? matrix[i][2 * t + 1][g] : matrix[i][g][2 * t + 1];
      static_cast<MatrixLoad*>(lanes[lane])->registers[i] = low | high << 16;
    }
  }
}

struct Product {
  float* sum;
  const uint32_t* a;
  uint32_t b[2];
};

// kDepth / 8 entries of 16 or 32 bits a register, `number` of them as a float.
template <int kDepth, class Number>
void multiply_fragments(void* const (&lanes)[kLanes], Number number) {
  constexpr int kPacked = kDepth / 8, kHalf = kDepth / 2;
  double a[16][kDepth], b[8][kDepth];
  for (int lane = 0; lane < kLanes; ++lane) {
    const Product& product = *static_cast<Product*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < kPacked; ++e) {
      const int k = kPacked * t + e;
      for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][k + kHalf * (i / 2)] = number(product.a[i], e);
      for (int i = 0; i < 2; ++i) b[g][k + kHalf * i] = number(product.b[i], e);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    float* sum = static_cast<Product*>(lanes[lane])->sum;
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
      double total = sum[e];
      for (int k = 0; k < kDepth; ++k) total += a[row][k] * b[column][k];
      sum[e] = truncated(total);
    }
  }
}

struct Copy {
  void* to;
  const void* from;
  int bytes;

  void land() const {
    std::memcpy(to, from, static_cast<size_t>(bytes));
    std::memset(static_cast<unsigned char*>(to) + bytes, 0, static_cast<size_t>(16 - bytes));
  }
};

std::vector<Copy> copies_under_way[emulation::kMaxBlocks * emulation::kMaxThreads];  // of each thread

}  // namespace

uint32_t dynamic_shared() { return 0; }

uint32_t load_word(uint32_t address) {
  uint32_t word;
  std::memcpy(&word, emulation::shared_memory(address), 4);
  return word;
}

void load_matrices(uint32_t (&r)[4], uint32_t row) {
  MatrixLoad load{r, emulation::shared_memory(row)};
  emulation::collective([](void* const(&lanes)[kLanes]) { load_rows(lanes, false); }, &load);
}

void load_matrices_transposed(uint32_t (&r)[4], uint32_t row) {
  MatrixLoad load{r, emulation::shared_memory(row)};
  emulation::collective([](void* const(&lanes)[kLanes]) { load_rows(lanes, true); }, &load);
}

void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16) {
  Product product{sum, a, {b0, b1}};
  emulation::collective(
      [](void* const(&lanes)[kLanes]) {
        multiply_fragments<16>(lanes, [](uint32_t r, int e) { return bits_float(r >> 16 * e << 16); });
      },
      &product);
}

void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half) {
  Product product{sum, a, {b0, b1}};
  emulation::collective(
      [](void* const(&lanes)[kLanes]) {
        multiply_fragments<16>(lanes, [](uint32_t r, int e) { return half_to_float(r >> 16 * e & 0xFFFFu); });
      },
      &product);
}

void mma_tf32(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Product product{sum, a, {b0, b1}};
  emulation::collective(
      [](void* const(&lanes)[kLanes]) {
        multiply_fragments<8>(lanes, [](uint32_t r, int) { return bits_float(r & 0xFFFFE000u); });
      },
      &product);
}

void copy_async(uint32_t address, const void* global, int bytes) {
  void* shared = emulation::shared_memory(address);
  if (bytes < 0 || bytes > 16) emulation::fail("cp.async of more than 16 bytes");
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || (bytes > 0 && reinterpret_cast<uintptr_t>(global) % 16 != 0)) {
    emulation::fail("cp.async between unaligned addresses");
  }
  const Copy copy{shared, global, bytes};
  if (emulation::random_number() % 2 == 0) {
    copy.land();
  } else {
    std::memset(shared, 0xFF, 16);
    copies_under_way[emulation::current_thread()].push_back(copy);
  }
}

void copy_wait() {
  auto& copies = copies_under_way[emulation::current_thread()];
  for (const Copy& copy : copies) copy.land();
  copies.clear();
}

float exp2_fast(float x) {
  const float y = std::exp2(x);
  if (std::isnan(y)) return nan_of_a_gpu();
  return y < 0x1p-126f ? 0.0f : y;
}

uint32_t pack(float low, float high, BFloat16) { return float_to_bfloat16(low) | float_to_bfloat16(high) << 16; }
uint32_t pack(float low, float high, Half) { return float_to_half(low) | float_to_half(high) << 16; }
float to_float(Half x) { return half_to_float(x.bits); }

}  // namespace mmer

namespace emulation {
namespace {

struct Shuffle {
  uint64_t sent, received;
  int source;
};

}  // namespace

uint64_t shuffle(uint64_t x, int source) {
  Shuffle shuffle{x, 0, source};
  collective(
      [](void* const(&lanes)[kLanes]) {
        for (void* lane : lanes) {
          auto* to = static_cast<Shuffle*>(lane);
          to->received = static_cast<Shuffle*>(lanes[to->source])->sent;
        }
      },
      &shuffle);
  return shuffle.received;
}

bool any(bool x) {
  collective(
      [](void* const(&lanes)[kLanes]) {
        bool any = false;
        for (void* lane : lanes) any = any || *static_cast<bool*>(lane);
        for (void* lane : lanes) *static_cast<bool*>(lane) = any;
      },
      &x);
  return x;
}

unsigned sum(unsigned x) {
  collective(
      [](void* const(&lanes)[kLanes]) {
        unsigned sum = 0;
        for (void* lane : lanes) sum += *static_cast<unsigned*>(lane);
        for (void* lane : lanes) *static_cast<unsigned*>(lane) = sum;
      },
      &x);
  return x;
}

void forget_copies() {
  for (auto& copies : mmer::copies_under_way) copies.clear();
}

}  // namespace emulation
