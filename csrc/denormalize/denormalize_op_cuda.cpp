// The operator on CUDA tensors: checks, allocation, device and stream; hands plain pointers to
// denormalize_cuda.
#include <tuple>

#include "common/cuda_call.h"
#include "denormalize/denormalize_args.h"

namespace pixfuse {
namespace {

// Returns the tallies: empty when nothing is to be counted.
Tensor run(DenormalizeCall& call, const CudaCall& cuda, bool count) {
  const int64_t size = count ? static_cast<int64_t>(Tally::count) : 0;
  Tensor tallies = zero_counts(call.kName, 1, &size, aoti_torch_device_type_cuda(), cuda.device());
  if (count) call.args.tallies = static_cast<int64_t*>(tallies.mutable_data_ptr());
  cuda.check_launch(denormalize_cuda(call.args, cuda.stream()));
  return tallies;
}

std::tuple<Tensor, Tensor> denormalize(const Tensor& values, const std::vector<double>& mean,
                                       const std::vector<double>& std, int64_t output_layout,
                                       bool count) {
  DenormalizeCall call(values, mean, std, output_layout);
  const CudaCall cuda(call.kName, values);
  Tensor out =
      empty_contiguous(call.kName, call.rank, call.output_sizes + (4 - call.rank),
                       aoti_torch_dtype_uint8(), aoti_torch_device_type_cuda(), cuda.device());
  call.args.output = static_cast<uint8_t*>(out.mutable_data_ptr());
  Tensor tallies = run(call, cuda, count);
  return {out, tallies};
}

Tensor denormalize_out(const Tensor& values, const std::vector<double>& mean,
                       const std::vector<double>& std, int64_t output_layout, bool count,
                       Tensor out) {
  DenormalizeCall call(values, mean, std, output_layout);
  const CudaCall cuda(call.kName, values);
  check(out.is_cuda() && out.get_device_index() == cuda.device(), call.kName,
        "out on the device of tensor (CUDA device ", cuda.device(), ")");
  call.set_output(out);
  return run(call, cuda, count);
}

}  // namespace
}  // namespace pixfuse

STABLE_TORCH_LIBRARY_IMPL(pixfuse, CUDA, m) {
  m.impl("denormalize", TORCH_BOX(&pixfuse::denormalize));
  m.impl("denormalize_out", TORCH_BOX(&pixfuse::denormalize_out));
}
