// The part of the emulator that knows of grids, blocks and threads: what the CUDA language of
// cuda_on_cpu.h is made of, and what the race checker asks for.
#pragma once
#include <driver_types.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>

namespace cuda_on_cpu {

constexpr unsigned kWarpLanes = 32;

// Where a barrier or a warp operation stands in the source; as a default argument, `current` gives
// the line of the caller.
struct SourceLocation {
  const char* file = nullptr;
  unsigned line = 0;

  static constexpr SourceLocation current(const char* file = __builtin_FILE(),
                                          unsigned line = __builtin_LINE()) {
    return {file, line};
  }
};

// threadIdx, blockIdx, blockDim and gridDim of the running thread.
struct BuiltinVariables {
  uint3 thread_index{};
  uint3 block_index{};
  dim3 block_dim;
  dim3 grid_dim;
};
extern BuiltinVariables builtin_variables;

// A kernel with its arguments: `call(arguments)` runs one thread.
struct Kernel {
  void (*call)(const void* arguments);
  const void* arguments;
  size_t argument_bytes;
  const void* function;  // which one it is
};

// What the emulated device has; a test may change it.
struct Device {
  int64_t shared_bytes = 64 * 1024;  // of a block, for a kernel that asks for more than 48 KiB
  int64_t multiprocessors = 4;
};
extern Device device;

// Lets launches of a kernel have up to so many bytes of dynamic shared memory, as
// cudaFuncAttributeMaxDynamicSharedMemorySize does.
cudaError_t allow_shared_memory(const void* function, size_t dynamic_bytes);

// Runs the grid to its end. Errors of the launch are those of CUDA; an error of the kernel (a
// divergent barrier, a shuffle from a lane outside the mask) prints where it happened and aborts.
cudaError_t run_grid(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes);

void* dynamic_shared_memory();

void block_barrier(SourceLocation where);

// What the lanes of a warp operation gave, each up to the operands of a matrix instruction.
struct LaneValues {
  static constexpr size_t kMaxBytes = 24;
  unsigned lanes = 0;  // the lanes that take part: those of the mask which exist
  alignas(8) std::byte bytes[kWarpLanes][kMaxBytes];
};

// Waits for the lanes of `mask`; the reference stays valid until the lane's next warp operation.
const LaneValues& exchange_in_warp(unsigned mask, const void* value, size_t bytes,
                                   SourceLocation where);

// The same wait; what the lanes of `mask` wrote before it is visible to all of them after it.
void synchronize_warp(unsigned mask, SourceLocation where);

unsigned current_lane();

[[noreturn]] void fail(SourceLocation where, const char* what);

// Of the mistakes that a kernel was compiled with (toolchain.py), it makes the one of the number in
// CUDA_ON_CPU_MISTAKE.
bool has_mistake(int number);

// --- For the race checker ---

// The running thread and how far it has come.
struct Moment {
  uint32_t launch;       // from 1
  uint32_t block;        // linear, from 0
  uint32_t thread;       // linear in its block
  uint32_t block_epoch;  // block barriers passed
  uint32_t lane_epoch;   // from 1; warp barriers passed by this thread
};
bool in_kernel();
Moment current_moment();

// Has a warp barrier brought what lane `lane` did in its epoch `lane_epoch` before the running
// thread, which is of the same warp?
bool synchronized_with_lane(unsigned lane, uint32_t lane_epoch);

enum class Memory { thread_private, shared, global };
Memory memory_of(const void* address);

// When set, called for every atomic operation of a kernel.
extern void (*atomic_observer)(const void* address, size_t bytes, const void* code);

}  // namespace cuda_on_cpu
