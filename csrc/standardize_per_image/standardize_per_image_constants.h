// From exact sums to the constants of the arithmetic; the same bits on the CPU and on a GPU.
#pragma once
#include "normalize/normalize.h"

#if defined(__CUDACC__)
#define PIXFUSE_HOST_DEVICE __host__ __device__
#else
#define PIXFUSE_HOST_DEVICE
#endif

namespace pixfuse {

// The nearest double, half to even. Compilers differ in whether they have this conversion.
PIXFUSE_HOST_DEVICE static inline double nearest_double(unsigned __int128 value) {
  double unit = 1.0;
  bool lost = false;
  while ((value >> 64) != 0) {
    lost = lost || (value & 1) != 0;
    value >>= 1;
    unit *= 2.0;
  }
  // 64 bits of which the last is far below a double's: it only has to say that something was lost.
  const auto kept = static_cast<uint64_t>(value) | (lost ? 1u : 0u);
  return static_cast<double>(kept) * unit;
}

PIXFUSE_HOST_DEVICE static inline double square_root(double value) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(value);
#else
  return __builtin_sqrt(value);
#endif
}

PIXFUSE_HOST_DEVICE static inline double fused_multiply_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

// Of `count` bytes, 1 or more, whose sum and sum of squares are given.
PIXFUSE_HOST_DEVICE static inline ChannelConstants standardization_of(int64_t count, int64_t sum,
                                                                      int64_t squares,
                                                                      double floor) {
  const auto n = static_cast<double>(count);
  ChannelConstants constants{};
  // The mean as a sum of two doubles: nothing is lost where x is near it.
  constants.center_high = static_cast<double>(sum) / n;
  constants.center_low =
      fused_multiply_add(-constants.center_high, n, static_cast<double>(sum)) / n;
  // count^2 times the variance: a whole number, without cancellation.
  const auto spread = static_cast<unsigned __int128>(count) * static_cast<uint64_t>(squares) -
                      static_cast<unsigned __int128>(sum) * static_cast<uint64_t>(sum);
  const double std = square_root(nearest_double(spread)) / n;
  const double least = floor > 0.0 ? floor : 1.0 / square_root(n);
  constants.inverse_width = 1.0 / (std > least ? std : least);
  return constants;
}

}  // namespace pixfuse
