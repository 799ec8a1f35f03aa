// Matrix multiplication by a warp: the one place with inline PTX. On the CPU, the tests supply the
// same instructions (tests/cuda_on_cpu/matrix_multiply.h).
//
// A warp multiplies 16 rows x 16 deep by 16 deep x 8 columns, in one instruction or in two. Which
// of the 16 a lane holds is up to the caller as long as rows and columns agree: here a lane holds
// four neighbours, a `Quad`, so that it loads them at once. Lane l = 4 * g + t holds quad t of the
// rows g and g + 8 and of column g, and the sums of these rows in columns 2 * t and 2 * t + 1.
//
// From compute capability 8.0 on, for all types; on 7.5, for __half alone.
#pragma once
#include "common/cuda_launch.h"

namespace pixfuse {

// A float32 of which a tensor core sees 10 bits of mantissa.
struct TensorFloat32 {
  float value;
};

// Four neighbours in depth.
template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T values[4];
};

namespace {

#if defined(__CUDACC__)

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define PIXFUSE_MMA(shape_and_types, d, a0, a1, a2, a3, b0, b1)                   \
  asm volatile("mma.sync.aligned." shape_and_types                                \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"((d)[0]), "+f"((d)[1]), "+f"((d)[2]), "+f"((d)[3])           \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
#else
#define PIXFUSE_MMA(shape_and_types, d, a0, a1, a2, a3, b0, b1) __trap()
#endif

__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4],
                                                 const unsigned (&b)[2]) {
  PIXFUSE_MMA("m16n8k16.row.col.f32.f16.f16.f32", d, a[0], a[1], a[2], a[3], b[0], b[1]);
}
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4],
                                                  const unsigned (&b)[2]) {
  PIXFUSE_MMA("m16n8k16.row.col.f32.bf16.bf16.f32", d, a[0], a[1], a[2], a[3], b[0], b[1]);
}
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4],
                                                 const unsigned (&b)[2]) {
  PIXFUSE_MMA("m16n8k8.row.col.f32.tf32.tf32.f32", d, a[0], a[1], a[2], a[3], b[0], b[1]);
}
#undef PIXFUSE_MMA

__device__ __forceinline__ void mma_m16n8k8_f16(float (&d)[4], unsigned a0, unsigned a1,
                                                unsigned b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// To the nearest, halves away from zero: as tensor cores want their operands.
__device__ __forceinline__ TensorFloat32 to_tensor_float32(float value) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return {__uint_as_float(bits)};
#else
  return {value};
#endif
}

// Does one instruction go 16 deep in __half?
__device__ __forceinline__ bool multiplies_16_deep() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  return true;
#else
  return false;
#endif
}

#else

using ::cuda_on_cpu::mma_m16n8k16_bf16;
using ::cuda_on_cpu::mma_m16n8k16_f16;
using ::cuda_on_cpu::mma_m16n8k8_f16;
using ::cuda_on_cpu::mma_m16n8k8_tf32;
using ::cuda_on_cpu::multiplies_16_deep;

inline TensorFloat32 to_tensor_float32(float value) {
  return {::cuda_on_cpu::round_to_tf32(value)};
}

#endif

// Two neighbours of a quad of 16-bit values, as a register holds them.
template <class T>
__device__ __forceinline__ unsigned register_of(const Quad<T>& quad, int half) {
  unsigned bits[2];
  memcpy(bits, &quad, sizeof bits);
  return bits[half];
}
__device__ __forceinline__ unsigned register_of(const Quad<TensorFloat32>& quad, int i) {
  return __float_as_uint(quad.values[i].value);
}

// sums += (upper and lower rows) * column; of `sums`, the first two are those of the upper row.
__device__ __forceinline__ void multiply_add(float (&sums)[4], const Quad<__half>& upper,
                                             const Quad<__half>& lower,
                                             const Quad<__half>& column) {
  if (multiplies_16_deep()) {
    mma_m16n8k16_f16(sums,
                     {register_of(upper, 0), register_of(lower, 0), register_of(upper, 1),
                      register_of(lower, 1)},
                     {register_of(column, 0), register_of(column, 1)});
  } else {
    mma_m16n8k8_f16(sums, register_of(upper, 0), register_of(lower, 0), register_of(column, 0));
    mma_m16n8k8_f16(sums, register_of(upper, 1), register_of(lower, 1), register_of(column, 1));
  }
}
__device__ __forceinline__ void multiply_add(float (&sums)[4], const Quad<__nv_bfloat16>& upper,
                                             const Quad<__nv_bfloat16>& lower,
                                             const Quad<__nv_bfloat16>& column) {
  mma_m16n8k16_bf16(
      sums,
      {register_of(upper, 0), register_of(lower, 0), register_of(upper, 1), register_of(lower, 1)},
      {register_of(column, 0), register_of(column, 1)});
}
__device__ __forceinline__ void multiply_add(float (&sums)[4], const Quad<TensorFloat32>& upper,
                                             const Quad<TensorFloat32>& lower,
                                             const Quad<TensorFloat32>& column) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    mma_m16n8k8_tf32(sums,
                     {register_of(upper, i), register_of(lower, i), register_of(upper, i + 1),
                      register_of(lower, i + 1)},
                     {register_of(column, i), register_of(column, i + 1)});
  }
}

}  // namespace
}  // namespace pixfuse
