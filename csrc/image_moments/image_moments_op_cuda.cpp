// The operator on CUDA tensors: checks, allocation, device and stream; hands plain pointers to
// image_moments_cuda, which is in channel_histogram_cuda.cu: the sums follow from the counts.
#include <tuple>

#include "common/counts.h"
#include "common/cuda_device.h"
#include "image_moments/image_moments_args.h"

namespace pixfuse {
namespace {

std::tuple<Tensor, Tensor> image_moments(const Tensor& images, int64_t input_layout) {
  constexpr const char* kName = "image_moments";
  ImageMomentsArgs args = moments_args(kName, images, input_layout);
  const int32_t device = images.get_device_index();
  const DeviceGuard guard(kName, device);
  Tensor sums = zero_cuda_counts(kName, 2, args.sizes, device);
  Tensor squares = zero_cuda_counts(kName, 2, args.sizes, device);
  args.sums = static_cast<int64_t*>(sums.mutable_data_ptr());
  args.squares = static_cast<int64_t*>(squares.mutable_data_ptr());
  check_launch(kName, image_moments_cuda(args, current_cuda_stream(kName, device)));
  return {sums, squares};
}

}  // namespace
}  // namespace pixfuse

STABLE_TORCH_LIBRARY_IMPL(pixfuse, CUDA, m) {
  m.impl("image_moments", TORCH_BOX(&pixfuse::image_moments));
}
