// Compiled once per instruction set, with PIXFUSE_ISA naming its namespace.
#include "common/element_type.h"
#include "conv_bias_relu/conv_bias_relu_loop.h"

namespace pixfuse::PIXFUSE_ISA {

namespace {

// Several sums of each kind take turns, and a sign is a mask: then the compiler uses vectors.
template <int channels>
void sum_each(const float* weights, int64_t count, WeightSums* sums) {
  constexpr int kTurns = channels < 3 ? 16 : 8 * channels;
  double positive[kTurns] = {}, negative[kTurns] = {};
  // The bits of magnitudes are in the order of the magnitudes, with NaN above all of them.
  int32_t largest[kTurns] = {};
  int32_t zeros[kTurns] = {};
  const auto add = [&](const float* from, int turns) __attribute__((always_inline)) {
    for (int k = 0; k < turns; ++k) {
      const auto bits = static_cast<int32_t>(bits_of(from[k]));
      const int32_t sign = bits >> 31, magnitude = bits & 0x7fffffff;
      positive[k] += double{float_of(static_cast<uint32_t>(bits & ~sign))};
      negative[k] += double{float_of(static_cast<uint32_t>(bits & sign))};
      largest[k] = largest[k] > magnitude ? largest[k] : magnitude;
      zeros[k] += magnitude == 0;
    }
  };
  int64_t i = 0;
  for (; i + kTurns <= count; i += kTurns) add(weights + i, kTurns);
  add(weights + i, static_cast<int>(count - i));
  for (int c = 0; c < channels; ++c) {
    sums[c] = WeightSums{};
    int32_t most = 0;
    for (int k = c; k < kTurns; k += channels) {
      sums[c].positive += positive[k];
      sums[c].negative += negative[k];
      most = most > largest[k] ? most : largest[k];
      sums[c].zeros += zeros[k];
    }
    sums[c].largest = float_of(static_cast<uint32_t>(most));
  }
}

}  // namespace

void sum_weights(const float* weights, int64_t count, int64_t channels, WeightSums* sums) {
  switch (channels) {
    case 1:
      return sum_each<1>(weights, count, sums);
    case 2:
      return sum_each<2>(weights, count, sums);
    case 3:
      return sum_each<3>(weights, count, sums);
    default:
      return sum_each<4>(weights, count, sums);
  }
}

}  // namespace pixfuse::PIXFUSE_ISA
