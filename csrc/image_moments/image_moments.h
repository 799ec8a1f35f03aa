// What `image_moments` needs, without torch: one plain struct, the launchers.
//
// This header is also compiled for higher instruction sets and by nvcc, so it includes no C++
// standard library and everything with a body has internal linkage.
#pragma once
#include <stdint.h>

#include "common/parallel_for.h"
#include "common/pixel_rows.h"

namespace pixfuse {

// One call. Sizes and strides are N, C, H, W; strides count bytes, 0 or more; that of
// the channels may be negative.
struct ImageMomentsArgs {
  const uint8_t* images;
  int64_t sizes[4];
  int64_t strides[4];
  int64_t* sums;     // [N, C], dense: of the bytes; what is found is added
  int64_t* squares;  // [N, C], dense: of the squares of the bytes; likewise
};

// Returns what `parallel_for` returned: 0 when all went well.
int32_t image_moments_cpu(const ImageMomentsArgs& args, ParallelFor parallel_for);

// Enqueues on `stream` (a cudaStream_t) of the current device; returns a cudaError_t.
int image_moments_cuda(const ImageMomentsArgs& args, void* stream);

}  // namespace pixfuse

// image_moments_cpu on torch's threads: what the module of Python's images calls in the CPU
// library.
extern "C" __attribute__((visibility("default"))) int32_t
pixfuse_image_moments(const pixfuse::ImageMomentsArgs* args);
