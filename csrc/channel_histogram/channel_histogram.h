// What `channel_histogram` needs, without torch: one plain struct, the launchers.
//
// This header is also compiled for higher instruction sets and by nvcc, so it includes no C++
// standard library and everything with a body has internal linkage.
#pragma once
#include <stdint.h>

#include "common/parallel_for.h"
#include "common/pixel_rows.h"

namespace pixfuse {

constexpr int kByteValues = 256;

// One call. Sizes and strides are N, C, H, W; strides count bytes, 0 or more; that of
// the channels may be negative.
struct ChannelHistogramArgs {
  const uint8_t* images;
  int64_t sizes[4];
  int64_t strides[4];
  int64_t* counts;  // [C, 256], dense; what is counted is added
};

// Returns what `parallel_for` returned: 0 when all went well.
int32_t channel_histogram_cpu(const ChannelHistogramArgs& args, ParallelFor parallel_for);

// Enqueues on `stream` (a cudaStream_t) of the current device; returns a cudaError_t.
int channel_histogram_cuda(const ChannelHistogramArgs& args, void* stream);

}  // namespace pixfuse

// channel_histogram_cpu on torch's threads: what the module of Python's images calls in the CPU
// library.
extern "C" __attribute__((visibility("default"))) int32_t
pixfuse_channel_histogram(const pixfuse::ChannelHistogramArgs* args);
