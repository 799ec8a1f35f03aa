// The operator on CUDA tensors: checks, allocation, device and stream; hands plain pointers to
// normalize_cuda.
#include <cuda_runtime_api.h>

#include "normalize/normalize_args.h"

namespace pixfuse {
namespace {

const char* advice(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver:
    case cudaErrorUnsupportedPtxVersion:
      return "; the NVIDIA driver is older than the CUDA toolkit that pixfuse was built with: "
             "update the driver, or rebuild pixfuse with an older toolkit";
    case cudaErrorNoKernelImageForDevice:
      return "; pixfuse was built without code for this GPU: rebuild it with its architecture in "
             "CMAKE_CUDA_ARCHITECTURES";
    default:
      return "";
  }
}

// The device of a tensor is current while this lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) {
    check(aoti_torch_create_cuda_guard(device, &guard_) == AOTI_TORCH_SUCCESS, "normalize",
          "CUDA device ", device, " to become current");
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() { aoti_torch_delete_cuda_guard(guard_); }

 private:
  CUDAGuardHandle guard_ = nullptr;
};

// On torch's current stream; no synchronization.
void run(const NormalizeCall& call, int32_t device) {
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS, "normalize",
        "torch to have a current stream on CUDA device ", device);
  const auto error = static_cast<cudaError_t>(normalize_cuda(call.args, stream));
  check(error == cudaSuccess, "normalize", "the CUDA kernel to start, got ",
        cudaGetErrorName(error), " (", cudaGetErrorString(error), ")", advice(error));
}

Tensor normalize(const Tensor& images, const std::vector<double>& mean,
                 const std::vector<double>& std, int64_t rounding, int64_t input_layout,
                 int64_t dtype, int64_t memory_format) {
  NormalizeCall call(images, mean, std, rounding, input_layout);
  const auto strides = call.choose_output(dtype, memory_format);

  const int32_t device = images.get_device_index();
  const DeviceGuard guard(device);
  const int64_t skip = 4 - call.images.rank;
  AtenTensorHandle handle = nullptr;
  check(aoti_torch_empty_strided(call.images.rank, call.args.sizes + skip, strides.data() + skip,
                                 shim_dtype(call.args.dtype), aoti_torch_device_type_cuda(), device,
                                 &handle) == AOTI_TORCH_SUCCESS,
        "normalize", "torch to allocate the output on CUDA device ", device);
  Tensor out(handle);
  call.args.output = out.mutable_data_ptr();
  run(call, device);
  return out;
}

void normalize_out(const Tensor& images, const std::vector<double>& mean,
                   const std::vector<double>& std, int64_t rounding, int64_t input_layout,
                   Tensor out) {
  NormalizeCall call(images, mean, std, rounding, input_layout);
  const int32_t device = images.get_device_index();
  check(out.is_cuda() && out.get_device_index() == device, "normalize",
        "out on the device of images (CUDA device ", device, ")");
  set_output(call, out);
  const DeviceGuard guard(device);
  run(call, device);
}

}  // namespace
}  // namespace pixfuse

STABLE_TORCH_LIBRARY_IMPL(pixfuse, CUDA, m) {
  m.impl("normalize", TORCH_BOX(&pixfuse::normalize));
  m.impl("normalize_out", TORCH_BOX(&pixfuse::normalize_out));
}
