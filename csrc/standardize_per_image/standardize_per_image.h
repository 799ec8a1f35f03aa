// What `standardize_per_image` needs, without torch: one plain struct, the launchers.
//
// The result is `(x - mean) / max(std, floor)` of each image, or of each channel of each image, in
// the arithmetic of Rounding::nearest: float64 from exact sums, rounded to float32 once.
#pragma once
#include <stdint.h>

#include "normalize/normalize.h"

namespace pixfuse {

// One call. Sizes and strides are N, C, H, W; strides count elements (a byte each for images).
// Images may have any strides of 0 or more; the output is dense, contiguous or channels-last.
struct StandardizeArgs {
  const uint8_t* images;
  void* output;
  int64_t sizes[4];
  int64_t image_strides[4];
  int64_t output_strides[4];
  ElementType dtype;
  bool per_channel;
  double floor;  // of the std, in the units of bytes; 0 stands for 1 / sqrt(number of values)
  // [N, C], zero, where the launcher runs: what it works with. Null on a GPU: it goes in one pass.
  int64_t *sums, *squares;
  ChannelConstants* constants;  // [N, C] likewise; only on the CPU
};

// Returns what `parallel_for` returned: 0 when all went well.
int32_t standardize_per_image_cpu(const StandardizeArgs& args, ParallelFor parallel_for);

// How a GPU goes about it. In the operator's schema, `way`: a benchmark asks for one; everybody
// else leaves it to the rule.
enum class StandardizeWay : int64_t {
  by_rule,
  one_pass,     // each byte is read once; needs an image, or a plane of it, that fits shared memory
  two_kernels,  // one for the sums, one that converts
};

// Puts one of the two in the place of `by_rule`, for the current device. Returns a cudaError_t:
// cudaErrorInvalidValue if one pass is asked for and cannot be.
int choose_standardize_way(const StandardizeArgs& args, StandardizeWay& way);

// Enqueues on `stream` (a cudaStream_t) of the current device; returns a cudaError_t.
int standardize_per_image_cuda(const StandardizeArgs& args, void* stream);

}  // namespace pixfuse
