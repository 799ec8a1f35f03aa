// The operator on CUDA tensors: checks, allocation, device and stream; hands plain pointers to
// channel_histogram_cuda.
#include "channel_histogram/channel_histogram_args.h"
#include "common/cuda_call.h"

namespace pixfuse {
namespace {

torch::stable::Tensor channel_histogram(const torch::stable::Tensor& images, int64_t input_layout) {
  ChannelHistogramArgs args = histogram_args(images, input_layout);
  const CudaCall call("channel_histogram", images);
  const int64_t sizes[2] = {args.sizes[1], kByteValues};
  torch::stable::Tensor counts =
      zero_counts("channel_histogram", 2, sizes, aoti_torch_device_type_cuda(), call.device());
  args.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  call.check_launch(channel_histogram_cuda(args, call.stream()));
  return counts;
}

}  // namespace
}  // namespace pixfuse

STABLE_TORCH_LIBRARY_IMPL(pixfuse, CUDA, m) {
  m.impl("channel_histogram", TORCH_BOX(&pixfuse::channel_histogram));
}
