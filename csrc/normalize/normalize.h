// What `normalize` needs, without torch: one plain struct, the formula, the launchers.
//
// This header is also compiled for higher instruction sets and by nvcc, so it includes no C++
// standard library and everything with a body has internal linkage.
#pragma once
#include <stdint.h>

#include "common/element_type.h"
#include "common/parallel_for.h"
#include "common/pixel_rows.h"

namespace pixfuse {

// The numbers are the operator's schema; the names and their meaning live in
// python/pixfuse/normalization.py.
enum class Rounding : int32_t {
  torchvision = 0,
  torchvision_v1 = 1,
  timm = 2,
  transformers = 3,
  nearest = 4,
};

// The arithmetic that a Rounding asks for. Several roundings share one; only constants differ.
enum class Arithmetic : int32_t {
  multiply = 0,  // ((x * scale) - mean) / std, float32, each step rounded
  divide = 1,    // ((x / 255) - mean) / std, float32, each step rounded
  nearest = 2,   // ((x - center_high) - center_low) * inverse_width, float64, then to float32
};

struct ChannelConstants {
  float mean;          // in the units of x * scale (or of x / 255)
  float std;           // the same units
  double center_high;  // 255 * mean = center_high + center_low, exactly
  double center_low;
  double inverse_width;  // 1 / (255 * std)
};

// One call. Sizes and strides are N, C, H, W; strides count elements (a byte each for images).
// Images may have any strides, negative ones and 0 too; the output is dense, contiguous or
// channels-last, or a part of such a one.
struct NormalizeArgs {
  const uint8_t* images;
  void* output;
  int64_t sizes[4];
  int64_t image_strides[4];
  int64_t output_strides[4];
  ElementType dtype;
  Arithmetic arithmetic;
  float scale;                       // of Arithmetic::multiply
  const ChannelConstants* channels;  // [C], in host memory
  bool past_caches;                  // CPU: floats on whole cache lines are stored past them
};

// Returns what `parallel_for` returned: 0 when all went well.
int32_t normalize_cpu(const NormalizeArgs& args, ParallelFor parallel_for);

// Enqueues on `stream` (a cudaStream_t) of the current device; returns a cudaError_t.
int normalize_cuda(const NormalizeArgs& args, void* stream);

}  // namespace pixfuse

// normalize_cpu on torch's threads: what the module of Python's images calls in the CPU library.
extern "C" __attribute__((visibility("default"))) int32_t
pixfuse_normalize(const pixfuse::NormalizeArgs* args);
