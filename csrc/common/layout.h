// The orders in which a batch's dimensions can lie, and the strides of dense outputs. Without
// torch.
#pragma once
#include <stdint.h>

#include <array>

namespace pixfuse {

// Numbers of the operators' schemas, where strings would leak and torch's own enums take longer to
// pass. Their names are in python/pixfuse/_library.py; a `dtype` is an ElementType.
enum class InputLayout : int64_t { nchw = 0, nhwc = 1 };
enum class MemoryFormat : int64_t { contiguous = 0, channels_last = 1, preserve = 2 };

// Strides of N, C, H, W; `channels_last` puts the channels of a pixel side by side.
inline std::array<int64_t, 4> dense_strides(const int64_t (&sizes)[4], bool channels_last) {
  const int64_t channels = sizes[1], height = sizes[2], width = sizes[3];
  const int64_t image = channels * height * width;
  if (channels_last) return {image, 1, width * channels, channels};
  return {image, height * width, width, 1};
}

// Whether an output is to be channels-last; `preserve`: as the images lie, seen as N, C, H, W.
inline bool is_channels_last(MemoryFormat format, const int64_t (&sizes)[4],
                             const int64_t (&strides)[4]) {
  if (format != MemoryFormat::preserve) return format == MemoryFormat::channels_last;
  return sizes[1] > 1 && strides[1] == 1;
}

}  // namespace pixfuse
