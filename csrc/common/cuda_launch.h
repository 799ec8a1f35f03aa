// How a kernel is launched. Kernels include this header and no other of CUDA's.
//
// nvcc compiles them for GPUs. To any other compiler, `cuda_on_cpu.h` supplies the language; only
// the tests have it on their include path (tests/cuda_on_cpu), where kernels run on the CPU.
#pragma once
#include <stddef.h>

#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// In a kernel: declares `T* const name`, the `shared_bytes` of the launch, aligned to 16 bytes.
#define PIXFUSE_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char pixfuse_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(pixfuse_dynamic_shared)

#else
#include "cuda_on_cpu.h"

#define PIXFUSE_DYNAMIC_SHARED(T, name) \
  T* const name = static_cast<T*>(::cuda_on_cpu::dynamic_shared_memory())

#endif

namespace pixfuse {

// Enqueues `kernel` on `stream` of the current device. The arguments convert as in a plain call.
// A block has 48 KiB of shared memory, static and dynamic together: more needs an opt-in that no
// kernel asks for yet.
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, std::type_identity_t<Parameters>... arguments) {
#if defined(__CUDACC__)
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
#else
  (void)stream;  // a launch on the CPU has ended when it returns
  return ::cuda_on_cpu::launch(kernel, grid, block, shared_bytes, arguments...);
#endif
}

}  // namespace pixfuse
