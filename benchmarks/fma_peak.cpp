// The most that one core can multiply and add: a loop of fused multiply-adds on registers alone.
#define PIXFUSE_ISA native
#include "conv_bias_relu/vectors.h"

// Does `rounds` times one operation on each of the sums, and returns how many operations on single
// floats that were, a multiplication and an addition being two. `result` keeps the compiler honest.
extern "C" int64_t fma_rounds(int64_t rounds, float* result) {
  using namespace pixfuse::native;
#if defined(__AVX512F__) || defined(__ARM_NEON)
  constexpr int kSums = 24;  // of 32 registers
#else
  constexpr int kSums = 12;  // of 16
#endif
  const Vector factor = broadcast(result[0]), summand = broadcast(result[1]);
  Vector sums[kSums];
  for (Vector& sum : sums) sum = factor;
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 24
    for (int k = 0; k < kSums; ++k) sums[k] = multiply_add(sums[k], factor, summand);
  }
  Vector total{};
#pragma GCC unroll 24
  for (int k = 0; k < kSums; ++k) total += sums[k];
  for (int i = 0; i < kLanes; ++i) result[0] += total[i];
  return rounds * kSums * kLanes * 2;
}
