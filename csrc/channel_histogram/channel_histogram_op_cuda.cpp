// The operator on CUDA tensors: checks, allocation, device and stream; hands plain pointers to
// channel_histogram_cuda.
#include "channel_histogram/channel_histogram_args.h"
#include "common/counts.h"
#include "common/cuda_device.h"

namespace pixfuse {
namespace {

constexpr const char* kName = "channel_histogram";

Tensor channel_histogram(const Tensor& images, int64_t input_layout) {
  ChannelHistogramArgs args = histogram_args(images, input_layout);
  const int32_t device = images.get_device_index();
  const DeviceGuard guard(kName, device);
  const int64_t sizes[2] = {args.sizes[1], kByteValues};
  Tensor counts = zero_cuda_counts(kName, 2, sizes, device);
  args.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  check_launch(kName, channel_histogram_cuda(args, current_cuda_stream(kName, device)));
  return counts;
}

}  // namespace
}  // namespace pixfuse

STABLE_TORCH_LIBRARY_IMPL(pixfuse, CUDA, m) {
  m.impl("channel_histogram", TORCH_BOX(&pixfuse::channel_histogram));
}
