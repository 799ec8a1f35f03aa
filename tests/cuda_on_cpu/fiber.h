// A stack of its own for every CUDA thread, all on one OS thread.
#pragma once
#include <cstddef>

#if defined(CUDA_ON_CPU_UCONTEXT) || !defined(__x86_64__)
#define CUDA_ON_CPU_HAS_UCONTEXT 1
#include <ucontext.h>
#endif

namespace cuda_on_cpu {

#if defined(CUDA_ON_CPU_HAS_UCONTEXT)
using Context = ucontext_t;
#else
using Context = void*;  // the stack pointer; everything else was pushed on the stack
#endif

class Fiber {
 public:
  static constexpr size_t kStackBytes = 256 * 1024;

  // The first `resume` calls `entry` on the stack that begins at `stack`, its lowest address, below
  // `unused` bytes at its other end, a multiple of 16. `entry` must not return.
  void prepare(std::byte* stack, size_t unused, void (*entry)());

  // The scheduler's side: runs the fiber until it suspends itself.
  void resume();

  // The fiber's side: goes back to the `resume` that it runs under.
  void suspend();

  // The fiber's side: another one runs in its place, under the same `resume`. One switch instead of
  // two.
  void suspend_for(Fiber& next);

 private:
  static void begin();

  Context context_{};
  std::byte* stack_ = nullptr;
  void (*entry_)() = nullptr;
  void* fake_stack_ = nullptr;  // what AddressSanitizer keeps for a stack that is not running
};

}  // namespace cuda_on_cpu
