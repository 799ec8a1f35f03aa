// The operator on CPU tensors: schema, checks, allocation; hands plain pointers to
// channel_histogram_cpu.
#include "channel_histogram/channel_histogram_args.h"
#include "common/counts.h"

namespace pixfuse {
namespace {

Tensor channel_histogram(const Tensor& images, int64_t input_layout) {
  ChannelHistogramArgs args = histogram_args(images, input_layout);
  const int64_t sizes[2] = {args.sizes[1], kByteValues};
  Tensor counts = zero_cpu_counts("channel_histogram", 2, sizes);
  args.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  check(channel_histogram_cpu(args, torch_parallel_for) == 0, "channel_histogram",
        "torch's threads to run the loop");
  return counts;
}

}  // namespace
}  // namespace pixfuse

int32_t pixfuse_channel_histogram(const pixfuse::ChannelHistogramArgs* args) {
  return pixfuse::channel_histogram_cpu(*args, torch_parallel_for);
}

STABLE_TORCH_LIBRARY_FRAGMENT(pixfuse, m) {
  m.def("channel_histogram(Tensor images, int input_layout) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pixfuse, CPU, m) {
  m.impl("channel_histogram", TORCH_BOX(&pixfuse::channel_histogram));
}
