// The operator on CUDA tensors: checks, allocation, device and stream; hands plain pointers to
// image_moments_cuda, which is in channel_histogram_cuda.cu: the sums follow from the counts.
#include <tuple>

#include "common/cuda_call.h"
#include "image_moments/image_moments_args.h"

namespace pixfuse {
namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> image_moments(const Tensor& images, int64_t input_layout) {
  constexpr const char* kName = "image_moments";
  ImageMomentsArgs args = moments_args(kName, images, input_layout);
  const CudaCall call(kName, images);
  const int32_t cuda = aoti_torch_device_type_cuda();
  Tensor sums = zero_counts(kName, 2, args.sizes, cuda, call.device());
  Tensor squares = zero_counts(kName, 2, args.sizes, cuda, call.device());
  args.sums = static_cast<int64_t*>(sums.mutable_data_ptr());
  args.squares = static_cast<int64_t*>(squares.mutable_data_ptr());
  call.check_launch(image_moments_cuda(args, call.stream()));
  return {sums, squares};
}

}  // namespace
}  // namespace pixfuse

STABLE_TORCH_LIBRARY_IMPL(pixfuse, CUDA, m) {
  m.impl("image_moments", TORCH_BOX(&pixfuse::image_moments));
}
