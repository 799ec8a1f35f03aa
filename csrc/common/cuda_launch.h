// How a kernel is launched. Kernels include this header and no other of CUDA's.
//
// nvcc compiles them for GPUs. To any other compiler, `cuda_on_cpu.h` supplies the language; only
// the tests have it on their include path (tests/cuda_on_cpu), where kernels run on the CPU.
#pragma once
#include <stddef.h>
#include <stdint.h>

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

// What a block has of shared memory, static and dynamic together, without `allow_shared_memory`.
constexpr int64_t kSharedBytesOfEveryKernel = 48 * 1024;

// What the current device has for a kernel.
struct DeviceLimits {
  int64_t shared_bytes;  // of a block, static and dynamic together, with `allow_shared_memory`
  int64_t multiprocessors;
};
inline cudaError_t read_limits(DeviceLimits& limits) {
#if defined(__CUDACC__)
  int device = 0, shared_bytes = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  limits = {shared_bytes, multiprocessors};
  return error;
#else
  limits = {::cuda_on_cpu::device.shared_bytes, ::cuda_on_cpu::device.multiprocessors};
  return cudaSuccess;
#endif
}

// Lets launches of `kernel` on the current device have up to `dynamic_bytes` of shared memory
// beside what it declares.
template <class... Parameters>
cudaError_t allow_shared_memory(void (*kernel)(Parameters...), int64_t dynamic_bytes) {
#if defined(__CUDACC__)
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(dynamic_bytes));
#else
  return ::cuda_on_cpu::allow_shared_memory(reinterpret_cast<const void*>(kernel),
                                            static_cast<size_t>(dynamic_bytes));
#endif
}

// Enqueues `kernel` on `stream` of the current device. The arguments convert as in a plain call.
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
