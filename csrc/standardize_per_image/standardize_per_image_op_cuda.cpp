// The operator on CUDA tensors: checks, allocation, device and stream; hands plain pointers to
// standardize_per_image_cuda.
#include "common/cuda_call.h"
#include "standardize_per_image/standardize_per_image_args.h"

namespace pixfuse {
namespace {

Tensor standardize_per_image(const Tensor& images, bool per_channel, double floor,
                             int64_t input_layout, int64_t dtype, int64_t memory_format) {
  StandardizeCall call(images, per_channel, floor, input_layout, dtype, memory_format);
  StandardizeArgs& args = call.args;
  const CudaCall cuda(call.kName, images);
  const int64_t skip = 4 - call.rank;
  AtenTensorHandle handle = nullptr;
  check(aoti_torch_empty_strided(call.rank, args.sizes + skip, args.output_strides + skip,
                                 call.shim_dtype, aoti_torch_device_type_cuda(), cuda.device(),
                                 &handle) == AOTI_TORCH_SUCCESS,
        call.kName, "torch to allocate the output on CUDA device ", cuda.device());
  Tensor out(handle);
  args.output = out.mutable_data_ptr();
  const int64_t sizes[3] = {2, args.sizes[0], args.sizes[1]};
  Tensor sums = zero_counts(call.kName, 3, sizes, aoti_torch_device_type_cuda(), cuda.device());
  args.sums = static_cast<int64_t*>(sums.mutable_data_ptr());
  args.squares = args.sums + args.sizes[0] * args.sizes[1];
  cuda.check_launch(standardize_per_image_cuda(args, cuda.stream()));
  return out;
}

}  // namespace
}  // namespace pixfuse

STABLE_TORCH_LIBRARY_IMPL(pixfuse, CUDA, m) {
  m.impl("standardize_per_image", TORCH_BOX(&pixfuse::standardize_per_image));
}
