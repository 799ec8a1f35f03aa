// The operator on CUDA tensors: checks, allocation, device and stream; hands plain pointers to
// standardize_per_image_cuda.
#include <optional>

#include "common/counts.h"
#include "common/cuda_device.h"
#include "standardize_per_image/standardize_per_image_args.h"

namespace pixfuse {
namespace {

// On torch's current stream; no synchronization. `device` is current.
void run(StandardizeCall& call, int32_t device, int64_t wanted) {
  StandardizeArgs& args = call.args;
  check(wanted >= 0 && wanted <= 2, call.kName, "way from 0 to 2, got ", wanted);
  auto way = static_cast<StandardizeWay>(wanted);
  const int error = choose_standardize_way(args, way);
  check(error != cudaErrorInvalidValue, call.kName,
        "way 0 or 2 for images of which a block's shared memory cannot hold one, got ", wanted);
  check_launch(call.kName, error);
  std::optional<Tensor> sums;
  if (way == StandardizeWay::two_kernels) {
    const int64_t sizes[3] = {2, args.sizes[0], args.sizes[1]};
    sums = zero_cuda_counts(call.kName, 3, sizes, device);
    args.sums = static_cast<int64_t*>(sums->mutable_data_ptr());
    args.squares = args.sums + args.sizes[0] * args.sizes[1];
  }
  check_launch(call.kName,
               standardize_per_image_cuda(args, current_cuda_stream(call.kName, device)));
}

Tensor standardize_per_image(const Tensor& images, bool per_channel, double floor,
                             int64_t input_layout, int64_t dtype, int64_t memory_format,
                             int64_t way) {
  StandardizeCall call(images, per_channel, floor, input_layout);
  call.choose_output(dtype, memory_format);
  StandardizeArgs& args = call.args;
  const int32_t device = images.get_device_index();
  const DeviceGuard guard(call.kName, device);
  const int64_t skip = 4 - call.view.rank;
  Tensor out = empty_cuda(call.kName, call.view.rank, args.sizes + skip, args.output_strides + skip,
                          shim_dtype(args.dtype), device);
  args.output = out.mutable_data_ptr();
  run(call, device, way);
  return out;
}

void standardize_per_image_out(const Tensor& images, bool per_channel, double floor,
                               int64_t input_layout, Tensor out, int64_t way) {
  StandardizeCall call(images, per_channel, floor, input_layout);
  const int32_t device = images.get_device_index();
  check(out.is_cuda() && out.get_device_index() == device, call.kName,
        "out on the device of images (CUDA device ", device, ")");
  call.set_output(out);
  const DeviceGuard guard(call.kName, device);
  run(call, device, way);
}

}  // namespace
}  // namespace pixfuse

STABLE_TORCH_LIBRARY_IMPL(pixfuse, CUDA, m) {
  m.impl("standardize_per_image", TORCH_BOX(&pixfuse::standardize_per_image));
  m.impl("standardize_per_image_out", TORCH_BOX(&pixfuse::standardize_per_image_out));
}
