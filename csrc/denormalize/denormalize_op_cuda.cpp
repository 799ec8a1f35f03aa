// The operator on CUDA tensors: checks, allocation, device and stream; hands plain pointers to
// denormalize_cuda.
#include <tuple>

#include "common/counts.h"
#include "common/cuda_device.h"
#include "denormalize/denormalize_args.h"

namespace pixfuse {
namespace {

// Returns the tallies: empty when nothing is to be counted.
Tensor run(DenormalizeCall& call, int32_t device, bool count) {
  const int64_t size = count ? static_cast<int64_t>(Tally::count) : 0;
  Tensor tallies = zero_cuda_counts(call.kName, 1, &size, device);
  if (count) call.args.tallies = static_cast<int64_t*>(tallies.mutable_data_ptr());
  check_launch(call.kName, denormalize_cuda(call.args, current_cuda_stream(call.kName, device)));
  return tallies;
}

std::tuple<Tensor, Tensor> denormalize(const Tensor& values, const std::vector<double>& mean,
                                       const std::vector<double>& std, int64_t output_layout,
                                       bool count) {
  DenormalizeCall call(values, mean, std, output_layout);
  const int32_t device = values.get_device_index();
  const DeviceGuard guard(call.kName, device);
  const int64_t skip = 4 - call.rank;
  Tensor out = empty_cuda(call.kName, call.rank, call.output_sizes + skip,
                          call.output_strides + skip, aoti_torch_dtype_uint8(), device);
  call.args.output = static_cast<uint8_t*>(out.mutable_data_ptr());
  Tensor tallies = run(call, device, count);
  return {out, tallies};
}

Tensor denormalize_out(const Tensor& values, const std::vector<double>& mean,
                       const std::vector<double>& std, int64_t output_layout, bool count,
                       Tensor out) {
  DenormalizeCall call(values, mean, std, output_layout);
  const int32_t device = values.get_device_index();
  const DeviceGuard guard(call.kName, device);
  check(out.is_cuda() && out.get_device_index() == device, call.kName,
        "out on the device of tensor (CUDA device ", device, ")");
  call.set_output(out);
  return run(call, device, count);
}

}  // namespace
}  // namespace pixfuse

STABLE_TORCH_LIBRARY_IMPL(pixfuse, CUDA, m) {
  m.impl("denormalize", TORCH_BOX(&pixfuse::denormalize));
  m.impl("denormalize_out", TORCH_BOX(&pixfuse::denormalize_out));
}
