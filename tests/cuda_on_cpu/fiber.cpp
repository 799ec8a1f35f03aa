#include "fiber.h"

#include <cstdint>

#if defined(CUDA_ON_CPU_ADDRESS_SANITIZER)
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(CUDA_ON_CPU_HAS_UCONTEXT)
// Saves the registers that a callee must preserve and the stack pointer, loads the other stack's.
// `swapcontext` does the same with two system calls for the signal mask, which nobody needs here:
// a barrier would cost ten times as much.
extern "C" __attribute__((visibility("hidden"))) void cuda_on_cpu_switch_stack(void** save,
                                                                               void* load);
asm(R"(
.text
.hidden cuda_on_cpu_switch_stack
.globl cuda_on_cpu_switch_stack
.type cuda_on_cpu_switch_stack, @function
cuda_on_cpu_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch_stack, . - cuda_on_cpu_switch_stack
)");
#endif

namespace cuda_on_cpu {
namespace {

// The stack that `resume` is called on.
struct Scheduler {
  Context context{};
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
};
Scheduler scheduler;
Fiber* running = nullptr;

void switch_context(Context& from, Context& to) {
#if defined(CUDA_ON_CPU_HAS_UCONTEXT)
  swapcontext(&from, &to);
#else
  cuda_on_cpu_switch_stack(&from, to);
#endif
}

// AddressSanitizer must know which stack is in use: it is told before and after each switch.
void before_switch([[maybe_unused]] void** fake_stack, [[maybe_unused]] const void* to_stack,
                   [[maybe_unused]] size_t to_bytes) {
#if defined(CUDA_ON_CPU_ADDRESS_SANITIZER)
  __sanitizer_start_switch_fiber(fake_stack, to_stack, to_bytes);
#endif
}

void arrived_on_fiber([[maybe_unused]] void* fake_stack) {
#if defined(CUDA_ON_CPU_ADDRESS_SANITIZER)
  // The first to run comes from the scheduler, whose stack remains the same.
  const bool first = scheduler.stack == nullptr;
  __sanitizer_finish_switch_fiber(fake_stack, first ? &scheduler.stack : nullptr,
                                  first ? &scheduler.stack_bytes : nullptr);
#endif
}

void arrived_on_scheduler() {
#if defined(CUDA_ON_CPU_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
#endif
}

}  // namespace

void Fiber::prepare(std::byte* stack, size_t unused, void (*entry)()) {
  stack_ = stack;
  entry_ = entry;
#if defined(CUDA_ON_CPU_HAS_UCONTEXT)
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = kStackBytes - unused;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::begin, 0);
#else
  // What the switch pops: six registers, then the address to return to. Above it lies the return
  // address of `begin`, null; `begin` so finds the alignment that a call leaves.
  constexpr int kRegisters = 6;
  auto** top = reinterpret_cast<void**>(stack + kStackBytes - unused);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(&Fiber::begin);
  for (int i = 0; i < kRegisters; ++i) top[-3 - i] = nullptr;
  context_ = top - 2 - kRegisters;
#endif
}

void Fiber::begin() {
  arrived_on_fiber(nullptr);
  running->entry_();
}

void Fiber::resume() {
  running = this;
  before_switch(&scheduler.fake_stack, stack_, kStackBytes);
  switch_context(scheduler.context, context_);
  arrived_on_scheduler();
}

void Fiber::suspend() {
  before_switch(&fake_stack_, scheduler.stack, scheduler.stack_bytes);
  switch_context(context_, scheduler.context);
  arrived_on_fiber(fake_stack_);
}

void Fiber::suspend_for(Fiber& next) {
  running = &next;
  before_switch(&fake_stack_, next.stack_, kStackBytes);
  switch_context(context_, next.context_);
  arrived_on_fiber(fake_stack_);
}

}  // namespace cuda_on_cpu
