// Fibers by ucontext; switches by setjmp and longjmp, which unlike swapcontext make no system call.
#include "fibers.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t kStack = 256 * 1024;

struct Fiber {
  jmp_buf place;
  ucontext_t begin;
  bool begun = false;
  unsigned char* stack = nullptr;
};

enum class Wait { kNo, kBlock, kCluster, kEnd };  // at a barrier of the block or the cluster; at the end of the kernel

struct Warp {
  int arrived, next;  // lanes at the collective; the lane that goes on first
  Collective work;
  void* arguments[kLanes];
  Wait wait;
};

struct SharedMemory {
  unsigned char *begin, *end;
};

Fiber fibers[kMaxBlocks * kMaxThreads];  // block by block, warp by warp
Warp warps[kMaxBlocks * kMaxThreads / kLanes];
SharedMemory shared[kMaxBlocks];
int blocks = 0, warps_of_block = 0, current = 0;
unsigned first_block = 0;
const std::function<void()>* body = nullptr;
jmp_buf launch;
sigjmp_buf failure;
uint64_t random_state = 1;
int launches = 0, multiprocessors = 3;
unsigned resident = kLargestCluster;

int warp_count() { return blocks * warps_of_block; }
Warp& current_warp() { return warps[current / kLanes]; }
int current_block() { return current / kLanes / warps_of_block; }

void run_fiber();

void resume(int thread) {
  current = thread;
  threadIdx.x = static_cast<unsigned>(thread % (warps_of_block * kLanes));
  blockIdx.x = first_block + static_cast<unsigned>(current_block());
  Fiber& fiber = fibers[thread];
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  if (fiber.stack == nullptr) {
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) std::abort();
    fiber.stack = static_cast<unsigned char*>(stack);
  }
  getcontext(&fiber.begin);
  fiber.begin.uc_stack.ss_sp = fiber.stack;
  fiber.begin.uc_stack.ss_size = kStack;
  makecontext(&fiber.begin, run_fiber, 0);
  setcontext(&fiber.begin);
}

void switch_to(int thread) {
  if (_setjmp(fibers[current].place) == 0) resume(thread);
}

bool all_wait(int first, int count, Wait wait) {
  for (int w = first; w < first + count; ++w) {
    if (warps[w].wait != wait) return false;
  }
  return true;
}

void pass_barrier(int first, int count, Wait barrier) {
  if (!all_wait(first, count, barrier)) return;
  for (int w = first; w < first + count; ++w) warps[w].wait = Wait::kNo;
}

// On to a warp that can run, or back to the launch where all are done.
void next_warp() {
  for (int block = 0; block < blocks; ++block) pass_barrier(block * warps_of_block, warps_of_block, Wait::kBlock);
  pass_barrier(0, warp_count(), Wait::kCluster);
  int able = 0;
  for (int w = 0; w < warp_count(); ++w) able += warps[w].wait == Wait::kNo;
  if (able == 0) {
    if (!all_wait(0, warp_count(), Wait::kEnd)) fail("some warps wait at a barrier that others do not come to");
    if (_setjmp(fibers[current].place) == 0) _longjmp(launch, 1);
    return;
  }
  int chosen = static_cast<int>(random_number() % static_cast<uint32_t>(able));
  for (int w = 0; w < warp_count(); ++w) {
    if (warps[w].wait != Wait::kNo || chosen-- != 0) continue;
    const int thread = w * kLanes + warps[w].next;
    if (thread != current) switch_to(thread);
    return;
  }
}

void stop(Wait reason) {
  current_warp().wait = reason;
  current_warp().next = current % kLanes;
}

void at_barrier(void* const (&)[kLanes]) {
  stop(Wait::kBlock);
  next_warp();
}

void at_cluster_barrier(void* const (&)[kLanes]) {
  stop(Wait::kCluster);
  next_warp();
}

void clear(const SharedMemory& memory) {
  std::memset(memory.begin, 0xFF, static_cast<size_t>(memory.end - memory.begin));
}

void at_end(void* const (&)[kLanes]) {
  stop(Wait::kEnd);
  const int block = current_block();
  if (all_wait(block * warps_of_block, warps_of_block, Wait::kEnd)) clear(shared[block]);
  next_warp();
}

void run_fiber() {
  for (;;) {
    (*body)();
    collective(at_end, nullptr);
  }
}

void begin_again() {
  for (Fiber& fiber : fibers) fiber.begun = false;
  for (Warp& warp : warps) warp.next = 0;
}

// `bytes` for a block, before a page without access.
void make_shared_memory(SharedMemory& memory, size_t bytes) {
  if (memory.end == nullptr) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), size = (kSharedLimit + page - 1) / page * page;
    void* pages = mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) std::abort();
    memory.end = static_cast<unsigned char*>(pages) + size;
    if (mprotect(memory.end, page, PROT_NONE) != 0) std::abort();
  }
  memory.begin = memory.end - (bytes + 1023) / 1024 * 1024;
  clear(memory);
}

void on_fault(int signal) {
  fail(signal == SIGILL ? "an access of an unaligned vector" : "a memory access out of bounds");
}

void run_cluster(size_t shared_bytes) {
  for (int block = 0; block < blocks; ++block) make_shared_memory(shared[block], shared_bytes);
  for (int w = 0; w < warp_count(); ++w) {
    warps[w].arrived = 0;
    warps[w].wait = Wait::kNo;  // `next` stays: that lane stopped last, at the end of the block before
  }
  forget_copies();
  if (_setjmp(launch) == 0) {
    const int first = static_cast<int>(random_number() % static_cast<uint32_t>(warp_count()));
    resume(first * kLanes + warps[first].next);
  }
}

}  // namespace

void fail(const char* reason) {
  std::fprintf(stderr, "block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, reason);
  siglongjmp(failure, 1);
}

int current_thread() { return current; }

unsigned char* shared_memory(uint32_t address) { return shared[current_block()].begin + address; }

unsigned char* shared_memory_of(unsigned rank, const void* own) {
  if (rank >= static_cast<unsigned>(blocks)) fail("shared memory of a block that the cluster does not have");
  return shared[rank].begin + (static_cast<const unsigned char*>(own) - shared[current_block()].begin);
}

void cluster_barrier() { collective(at_cluster_barrier, nullptr); }

uint32_t random_number() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return static_cast<uint32_t>((random_state * 0x2545F4914F6CDD1Dull) >> 32);
}

void collective(Collective work, void* arguments) {
  Warp& warp = current_warp();
  const int lane = current % kLanes;
  if (warp.arrived > 0 && warp.work != work) fail("the lanes of a warp are at different collectives");
  warp.work = work;
  warp.arguments[lane] = arguments;
  if (++warp.arrived == kLanes) {
    warp.arrived = 0;
    work(warp.arguments);
  } else {
    switch_to(current - lane + (lane + 1) % kLanes);
  }
}

unsigned cluster_of(const cudaLaunchConfig_t& config) {
  unsigned size = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) size = config.attrs[i].val.clusterDim.x;
  }
  return size;
}

unsigned resident_cluster() { return resident; }

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  const unsigned threads = config.blockDim.x, cluster = cluster_of(config);
  if (threads == 0 || threads > kMaxThreads || threads % kLanes != 0 || config.gridDim.x == 0) {
    return cudaErrorInvalidValue;
  }
  if (cluster == 0 || cluster > resident || config.gridDim.x % cluster != 0) return cudaErrorInvalidValue;
  struct sigaction action{}, previous_segv, previous_bus, previous_ill;
  action.sa_handler = on_fault;
  sigaction(SIGSEGV, &action, &previous_segv);
  sigaction(SIGBUS, &action, &previous_bus);
  sigaction(SIGILL, &action, &previous_ill);  // what -fsanitize=alignment ends in
  body = &thread;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  ++launches;
  blocks = static_cast<int>(cluster);
  warps_of_block = static_cast<int>(threads) / kLanes;
  cudaError_t status = cudaSuccess;
  if (sigsetjmp(failure, 1) == 0) {
    for (first_block = 0; first_block < config.gridDim.x; first_block += cluster) run_cluster(config.dynamicSmemBytes);
  } else {
    begin_again();
    status = cudaErrorLaunchFailure;
  }
  sigaction(SIGSEGV, &previous_segv, nullptr);
  sigaction(SIGBUS, &previous_bus, nullptr);
  sigaction(SIGILL, &previous_ill, nullptr);
  return status;
}

}  // namespace emulation

void __syncthreads() { emulation::collective(emulation::at_barrier, nullptr); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = emulation::multiprocessors; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = emulation::kSharedLimit + 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulation::kSharedLimit; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
  }
  return cudaSuccess;
}

extern "C" {

void emulation_seed(uint64_t seed) { emulation::random_state = seed * 2 + 1; }
int emulation_launches() { return emulation::launches; }
void emulation_multiprocessors(int count) { emulation::multiprocessors = count; }
void emulation_resident_cluster(unsigned blocks) { emulation::resident = blocks; }
int emulation_last_cluster() { return emulation::blocks; }

}  // extern "C"
