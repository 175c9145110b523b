// The threads of the blocks of a cluster as fibers: what a collective needs of them.
#pragma once

#include <cstdint>

namespace emulation {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 256;  // of a block
constexpr int kMaxBlocks = 16;    // of a cluster

// Work on the arguments that the 32 lanes of a warp came with.
using Collective = void (*)(void* const (&arguments)[kLanes]);

// Returns in every lane after the last one came, which did the work for all.
void collective(Collective work, void* arguments);

// Ends the launch with cudaErrorLaunchFailure, and says why on stderr.
[[noreturn]] void fail(const char* reason);

int current_thread();  // of the cluster
uint32_t random_number();
void forget_copies();  // that a block before did not wait for

}  // namespace emulation
