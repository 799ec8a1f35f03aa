// From a torch tensor to ChannelHistogramArgs: what the CPU and the CUDA operator share.
#pragma once
#include "channel_histogram/channel_histogram.h"
#include "common/tensor_view.h"

namespace pixfuse {

// Everything but the counts.
inline ChannelHistogramArgs histogram_args(const torch::stable::Tensor& images,
                                           int64_t input_layout) {
  const TensorView view = view_bytes("channel_histogram", images, input_layout);
  ChannelHistogramArgs args{};
  args.images = static_cast<const uint8_t*>(images.const_data_ptr());
  for (int d = 0; d < 4; ++d) {
    args.sizes[d] = view.sizes[d];
    args.strides[d] = view.strides[d];
  }
  return args;
}

}  // namespace pixfuse
