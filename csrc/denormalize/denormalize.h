// What `denormalize` needs, without torch: one plain struct, the formula, the launchers.
//
// This header is also compiled for higher instruction sets and by nvcc, so it includes no C++
// standard library and everything with a body has internal linkage.
#pragma once
#include <stdint.h>

#include "common/element_type.h"
#include "common/parallel_for.h"

namespace pixfuse {

// A byte is `(value * scale) + offset` in float32, each step rounded; then clamped to 0..255 and
// rounded half to even; 0 for NaN.
struct ChannelScale {
  float scale;   // 255 * std
  float offset;  // 255 * mean
};

// Adding this to a float32 of 0..255 rounds it half to even into the last bits of the sum.
constexpr float kRoundToInteger = 8388608.0f;

// What is counted on request; the order is the operator's schema.
enum class Tally : int { clamped = 0, nonfinite = 1, count = 2 };

// One call. Sizes and strides are N, C, H, W; strides count elements, 0 or more for the values. The
// output is dense, of shape NCHW or NHWC.
struct DenormalizeArgs {
  const void* values;
  uint8_t* output;
  int64_t sizes[4];
  int64_t value_strides[4];
  int64_t output_strides[4];
  ElementType dtype;             // of the values
  const ChannelScale* channels;  // [C], in host memory
  int64_t* tallies;              // [Tally::count], added to; or null: nothing is counted
};

// Returns what `parallel_for` returned: 0 when all went well.
int32_t denormalize_cpu(const DenormalizeArgs& args, ParallelFor parallel_for);

// Enqueues on `stream` (a cudaStream_t) of the current device; returns a cudaError_t.
int denormalize_cuda(const DenormalizeArgs& args, void* stream);

// Makes as few and as long rows as the strides allow: when both sides go from one row of pixels
// straight to the next, the rows are one; likewise the images.
static inline void merge_rows(DenormalizeArgs& args) {
  constexpr int N = 0, H = 2, W = 3;
  const auto merge = [&](int outer, int inner) {
    const int64_t out = args.sizes[outer], in = args.sizes[inner];
    const bool follows_on = out == 1 || in == 1 ||
                            (args.value_strides[outer] == args.value_strides[inner] * in &&
                             args.output_strides[outer] == args.output_strides[inner] * in);
    if (!follows_on) return false;
    if (in == 1) {  // its strides meant nothing
      args.value_strides[inner] = args.value_strides[outer];
      args.output_strides[inner] = args.output_strides[outer];
    }
    args.sizes[inner] = out * in;
    args.sizes[outer] = 1;
    return true;
  };
  if (merge(H, W)) {
    merge(N, W);
  } else {
    merge(N, H);
  }
}

}  // namespace pixfuse
