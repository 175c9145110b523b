// What this library would otherwise take from a glibc or libstdc++ newer than those that torch asks for (manylinux_2_28).
// The functions that exist there under an older version are bound to it at link time: see kernels/sources.json.
#include <sstream>

// glibc 2.32: std::shared_ptr skips its atomics while the process has one thread. Never, here.
extern "C" {
char __libc_single_threaded = 0;
}

// GLIBCXX_3.4.26, in the messages of STD_TORCH_CHECK.
template std::ostringstream::basic_ostringstream();
template std::stringstream::basic_stringstream();
