// The instruction set of the CPU kernels, chosen once at run time: the best that the machine has, or what the
// environment variable MMER_FAST_CPU_ISA (baseline, avx2, avx512) lowers it to.
#pragma once

namespace mmer {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

Isa cpu_isa();
const char* cpu_isa_name();

}  // namespace mmer
