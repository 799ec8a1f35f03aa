// From a torch tensor to ImageMomentsArgs: what the CPU and the CUDA operator share.
#pragma once
#include "common/tensor_view.h"
#include "image_moments/image_moments.h"

namespace pixfuse {

// Everything but the sums.
inline ImageMomentsArgs moments_args(const char* function, const torch::stable::Tensor& images,
                                     int64_t input_layout) {
  const TensorView view = view_bytes(function, images, input_layout);
  ImageMomentsArgs args{};
  args.images = static_cast<const uint8_t*>(images.const_data_ptr());
  for (int d = 0; d < 4; ++d) {
    args.sizes[d] = view.sizes[d];
    args.strides[d] = view.strides[d];
  }
  return args;
}

}  // namespace pixfuse
