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

dim3 threadIdx, blockIdx, gridDim;

namespace emulation {
namespace {

constexpr size_t kStack = 256 * 1024;

struct Fiber {
  jmp_buf place;
  ucontext_t begin;
  bool begun = false;
  unsigned char* stack = nullptr;
};

struct Warp {
  int arrived, next;  // lanes at the collective; the lane that goes on first
  Collective work;
  void* arguments[kLanes];
  bool waiting, done;  // at the block's barrier; at the end of the kernel
};

Fiber fibers[kMaxThreads];
Warp warps[kMaxThreads / kLanes];
int warp_count = 0, current = 0;
const std::function<void()>* body = nullptr;
jmp_buf launch;
sigjmp_buf failure;
unsigned char *shared_end = nullptr, *shared_begin = nullptr;
uint64_t random_state = 1;
int launches = 0, multiprocessors = 3;

void resume(int thread) {
  current = thread;
  threadIdx.x = static_cast<unsigned>(thread);
  Fiber& fiber = fibers[thread];
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.begin);
}

void switch_to(int thread) {
  if (_setjmp(fibers[current].place) == 0) resume(thread);
}

// On to a warp that can run, or back to the launch where all are done.
void next_warp() {
  int able = 0, done = 0;
  for (int w = 0; w < warp_count; ++w) {
    done += warps[w].done;
    able += !warps[w].waiting && !warps[w].done;
  }
  if (able == 0 && done > 0 && done < warp_count) fail("some warps ended, others wait at a barrier");
  if (able == 0 && done == 0) {
    for (int w = 0; w < warp_count; ++w) warps[w].waiting = false;
    able = warp_count;
  }
  if (able == 0) {
    if (_setjmp(fibers[current].place) == 0) _longjmp(launch, 1);
    return;
  }
  int chosen = static_cast<int>(random_number() % static_cast<uint32_t>(able));
  for (int w = 0; w < warp_count; ++w) {
    if (warps[w].waiting || warps[w].done || chosen-- != 0) continue;
    const int thread = w * kLanes + warps[w].next;
    if (thread != current) switch_to(thread);
    return;
  }
}

Warp& current_warp() { return warps[current / kLanes]; }

void at_barrier(void* const (&)[kLanes]) {
  current_warp().waiting = true;
  current_warp().next = current % kLanes;
  next_warp();
}

void at_end(void* const (&)[kLanes]) {
  current_warp().done = true;
  current_warp().next = current % kLanes;
  next_warp();
}

void run_fiber() {
  for (;;) {
    (*body)();
    collective(at_end, nullptr);
  }
}

void begin_again() {
  for (Fiber& fiber : fibers) {
    if (fiber.stack == nullptr) {
      fiber.stack = static_cast<unsigned char*>(
          mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      if (fiber.stack == MAP_FAILED) std::abort();
    }
    getcontext(&fiber.begin);
    fiber.begin.uc_stack.ss_sp = fiber.stack;
    fiber.begin.uc_stack.ss_size = kStack;
    makecontext(&fiber.begin, run_fiber, 0);
    fiber.begun = false;
  }
  for (Warp& warp : warps) warp.next = 0;
}

void make_shared_memory() {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), size = (kSharedLimit + page - 1) / page * page;
  void* memory = mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  shared_end = static_cast<unsigned char*>(memory) + size;
  if (mprotect(shared_end, page, PROT_NONE) != 0) std::abort();
}

void on_fault(int signal) {
  fail(signal == SIGILL ? "an access of an unaligned vector" : "a memory access out of bounds");
}

void run_block(size_t shared_bytes) {
  shared_begin = shared_end - (shared_bytes + 1023) / 1024 * 1024;
  std::memset(shared_begin, 0xFF, static_cast<size_t>(shared_end - shared_begin));
  for (int w = 0; w < warp_count; ++w) {
    warps[w].arrived = 0;
    warps[w].waiting = warps[w].done = false;  // `next` stays: that lane stopped last, at the end of the block before
  }
  forget_copies();
  if (_setjmp(launch) == 0) {
    const int first = static_cast<int>(random_number() % static_cast<uint32_t>(warp_count));
    resume(first * kLanes + warps[first].next);
  }
}

}  // namespace

void fail(const char* reason) {
  std::fprintf(stderr, "block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, reason);
  siglongjmp(failure, 1);
}

int current_thread() { return current; }
unsigned char* shared_memory(uint32_t address) { return shared_begin + address; }

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

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  const unsigned threads = config.blockDim.x;
  if (threads == 0 || threads > kMaxThreads || threads % kLanes != 0 || config.gridDim.x == 0) {
    return cudaErrorInvalidValue;
  }
  if (shared_end == nullptr) {
    make_shared_memory();
    begin_again();
  }
  struct sigaction action{}, previous_segv, previous_bus, previous_ill;
  action.sa_handler = on_fault;
  sigaction(SIGSEGV, &action, &previous_segv);
  sigaction(SIGBUS, &action, &previous_bus);
  sigaction(SIGILL, &action, &previous_ill);  // what -fsanitize=alignment ends in
  body = &thread;
  gridDim = config.gridDim;
  ++launches;
  warp_count = static_cast<int>(threads) / kLanes;
  cudaError_t status = cudaSuccess;
  if (sigsetjmp(failure, 1) == 0) {
    for (blockIdx.x = 0; blockIdx.x < config.gridDim.x; ++blockIdx.x) run_block(config.dynamicSmemBytes);
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

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = emulation::multiprocessors, cudaSuccess;
}

extern "C" {

void emulation_seed(uint64_t seed) { emulation::random_state = seed * 2 + 1; }
int emulation_launches() { return emulation::launches; }
void emulation_multiprocessors(int count) { emulation::multiprocessors = count; }

}  // extern "C"
