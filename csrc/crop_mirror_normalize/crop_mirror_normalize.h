// What `crop_mirror_normalize` needs, without torch: the place of each image in the batch, one
// plain struct for the call, the launchers.
//
// This header is also compiled by nvcc, so it includes no C++ standard library.
#pragma once
#include <stdint.h>

#include "normalize/normalize.h"

namespace pixfuse {

// One image and the part of its place in the batch that it covers. Crop, mirror and flip are in the
// address and the strides.
struct PlacedImage {
  const uint8_t* pixels;  // channel 0 of the pixel that lands on (top, left)
  // Bytes from one row, column and channel of the output to the next; any sign, 0 too.
  int64_t row_stride, pixel_stride, channel_stride;
  // What the image covers of the output; the rest is fill (height or width 0: all of it).
  int32_t top, left, height, width;
};

// One call. Sizes and strides are N, C, H, W; strides count elements.
struct CropMirrorNormalizeArgs {
  const PlacedImage* images;  // [N], in host memory
  int64_t sizes[4];           // of the output
  int64_t output_strides[4];  // dense, contiguous or channels-last
  void* output;
  uint8_t* mask;      // [N, H, W] of 1 where the pixel came from an image, else 0; or null
  ElementType dtype;  // uint8: the bytes unchanged, no arithmetic
  Arithmetic arithmetic;
  float scale;                       // of Arithmetic::multiply
  const ChannelConstants* channels;  // [C], in host memory
  bool past_caches;                  // as in NormalizeArgs
  const float* fill;  // [C], in host memory: results, rounded to dtype where they are written
};

// Returns what `parallel_for` returned: 0 when all went well.
int32_t crop_mirror_normalize_cpu(const CropMirrorNormalizeArgs& args, ParallelFor parallel_for);

// Enqueues on `stream` (a cudaStream_t) of the current device; returns a cudaError_t.
int crop_mirror_normalize_cuda(const CropMirrorNormalizeArgs& args, void* stream);

}  // namespace pixfuse

// crop_mirror_normalize_cpu on torch's threads: what the module of Python's images calls in the CPU
// library.
extern "C" __attribute__((visibility("default"))) int32_t
pixfuse_crop_mirror_normalize(const pixfuse::CropMirrorNormalizeArgs* args);
