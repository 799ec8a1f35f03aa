// CUDA C++ for a host compiler: as much of it as the kernels use.
//
// Types, half and bfloat16 come from CUDA's own headers, which compile on the host. What is
// missing there is the language of kernels: the keywords, threadIdx and its kin, barriers, warp
// operations, atomics, intrinsics.
#pragma once

#if defined(__CUDACC__)
#error "cuda_on_cpu.h stands in for nvcc and cannot be used with it"
#endif
#if defined(__FAST_MATH__)
#error "kernels promise exact results; fast-math would change them"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "emulator.h"
#include "matrix_multiply.h"

// --- Keywords ---

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// After the type of a parameter: all threads see one copy of it, as on a device.
#define __grid_constant__ &
// Blocks run one after another, so one copy of a block's memory serves them all; the emulator
// finds it by its linker section (shared_memory.ld).
#define __shared__ static __attribute__((noinit))

// --- Built-in variables ---

inline const uint3& threadIdx = ::cuda_on_cpu::builtin_variables.thread_index;
inline const uint3& blockIdx = ::cuda_on_cpu::builtin_variables.block_index;
inline const dim3& blockDim = ::cuda_on_cpu::builtin_variables.block_dim;
inline const dim3& gridDim = ::cuda_on_cpu::builtin_variables.grid_dim;
constexpr int warpSize = ::cuda_on_cpu::kWarpLanes;

// --- Launch ---

namespace cuda_on_cpu {

// From compute capability 7.0 and CUDA 12.1 on.
constexpr size_t kMaxParameterBytes = 32764;

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   std::type_identity_t<Parameters>... arguments) {
  static_assert((std::is_trivially_copyable_v<std::remove_cvref_t<Parameters>> && ...),
                "CUDA copies the arguments of a kernel to the device byte by byte");
  static_assert((sizeof(Parameters) + ... + 0) <= kMaxParameterBytes,
                "a kernel takes up to 32,764 bytes of parameters");
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::remove_cvref_t<Parameters>...> arguments;
  };
  const Call call{kernel, {arguments...}};
  const auto run_thread = [](const void* erased) {
    const Call& call = *static_cast<const Call*>(erased);
    std::apply(call.kernel, call.arguments);
  };
  return run_grid({run_thread, &call, sizeof call, reinterpret_cast<const void*>(kernel)}, grid,
                  block, shared_bytes);
}

}  // namespace cuda_on_cpu

// --- Barriers and warp operations ---

#define CUDA_ON_CPU_WHERE \
  ::cuda_on_cpu::SourceLocation where = ::cuda_on_cpu::SourceLocation::current()

inline void __syncthreads(CUDA_ON_CPU_WHERE) { ::cuda_on_cpu::block_barrier(where); }

inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_WHERE) {
  ::cuda_on_cpu::synchronize_warp(mask, where);
}

namespace cuda_on_cpu {

template <class T>
T value_of_lane(const LaneValues& values, unsigned lane, SourceLocation where) {
  if (!(values.lanes >> lane & 1)) fail(where, "shuffle reads a lane that does not take part");
  T value;
  std::memcpy(&value, values.bytes[lane], sizeof value);
  return value;
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source_lane, SourceLocation where) {
  static_assert(sizeof(T) <= LaneValues::kMaxBytes);
  return value_of_lane<T>(exchange_in_warp(mask, &value, sizeof value, where), source_lane, where);
}

}  // namespace cuda_on_cpu

// `width` divides the warp into segments; a lane whose source lies outside its segment gets its own
// value back.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, CUDA_ON_CPU_WHERE) {
  const unsigned segment = ::cuda_on_cpu::current_lane() & ~(width - 1u);
  return ::cuda_on_cpu::shuffle(mask, value, segment | (source & (width - 1u)), where);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CUDA_ON_CPU_WHERE) {
  const unsigned lane = ::cuda_on_cpu::current_lane();
  const bool inside = (lane & (width - 1u)) >= delta;
  return ::cuda_on_cpu::shuffle(mask, value, inside ? lane - delta : lane, where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   CUDA_ON_CPU_WHERE) {
  const unsigned lane = ::cuda_on_cpu::current_lane();
  const bool inside = (lane & (width - 1u)) + delta < static_cast<unsigned>(width);
  return ::cuda_on_cpu::shuffle(mask, value, inside ? lane + delta : lane, where);
}

// Unlike the others, this one may read an earlier segment.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, CUDA_ON_CPU_WHERE) {
  const unsigned lane = ::cuda_on_cpu::current_lane();
  const unsigned source = lane ^ static_cast<unsigned>(lane_mask);
  const bool inside = source <= (lane | (width - 1u));
  return ::cuda_on_cpu::shuffle(mask, value, inside ? source : lane, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_WHERE) {
  const auto& values = ::cuda_on_cpu::exchange_in_warp(mask, &predicate, sizeof predicate, where);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < ::cuda_on_cpu::kWarpLanes; ++lane) {
    if (!(values.lanes >> lane & 1)) continue;
    if (::cuda_on_cpu::value_of_lane<int>(values, lane, where)) ballot |= 1u << lane;
  }
  return ballot;
}

inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_WHERE) {
  return __ballot_sync(mask, predicate, where) != 0;
}

inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_WHERE) {
  return __ballot_sync(mask, !predicate, where) == 0;
}

// --- Atomics ---

namespace cuda_on_cpu {

// A plain update is atomic here, as no other thread runs meanwhile. The race checker must not take
// it for one, so it is told apart.
template <class T, class Update>
__attribute__((noinline, no_sanitize("thread"))) T update_atomically(T* address, Update update) {
  if (atomic_observer) atomic_observer(address, sizeof(T), __builtin_return_address(0));
  const T old = *address;
  *address = update(old);
  return old;
}

}  // namespace cuda_on_cpu

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return ::cuda_on_cpu::update_atomically(address, [&](T old) -> T { return old + value; });
}

// --- Memory ---

// A cache hint changes no value.
template <class T>
T __ldg(const T* address) {
  return *address;
}

// --- Arithmetic ---

// Each operation is rounded on its own: these files are compiled with -ffp-contract=off.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }

inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

inline float __double2float_rn(double a) { return static_cast<float>(a); }

namespace cuda_on_cpu {

template <class To, class From>
To same_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

}  // namespace cuda_on_cpu

inline unsigned __float_as_uint(float a) { return ::cuda_on_cpu::same_bits<unsigned>(a); }
inline float __uint_as_float(unsigned a) { return ::cuda_on_cpu::same_bits<float>(a); }

// `c` plus the products of the four bytes of `a` with those of `b`.
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; ++i) c += (a >> (8 * i) & 0xffu) * (b >> (8 * i) & 0xffu);
  return c;
}

// As in CUDA, min and max take mixed arithmetic types; for floating point a NaN loses.
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
  return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
  return T(a) < T(b) ? T(b) : T(a);
}
