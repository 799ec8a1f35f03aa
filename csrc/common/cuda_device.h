// What the CUDA operators ask of torch and of the driver: the device, the stream, memory; and what
// a user can do about an error. Header-only, and for the CUDA library alone.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/tensor.h>

#include "common/checks.h"

namespace pixfuse {

// The device of a tensor is current while this lives.
class DeviceGuard {
 public:
  DeviceGuard(const char* function, int32_t device) {
    check(aoti_torch_create_cuda_guard(device, &guard_) == AOTI_TORCH_SUCCESS, function,
          "CUDA device ", device, " to become current");
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() { aoti_torch_delete_cuda_guard(guard_); }

 private:
  CUDAGuardHandle guard_ = nullptr;
};

inline void* current_cuda_stream(const char* function, int32_t device) {
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS, function,
        "torch to have a current stream on CUDA device ", device);
  return stream;
}

// Uninitialized; `shim_dtype` is the number that torch's C functions use.
inline torch::stable::Tensor empty_cuda(const char* function, int64_t rank, const int64_t* sizes,
                                        const int64_t* strides, int32_t shim_dtype,
                                        int32_t device) {
  AtenTensorHandle handle = nullptr;
  check(aoti_torch_empty_strided(rank, sizes, strides, shim_dtype, aoti_torch_device_type_cuda(),
                                 device, &handle) == AOTI_TORCH_SUCCESS,
        function, "torch to allocate the output on CUDA device ", device);
  return torch::stable::Tensor(handle);
}

inline const char* advice(cudaError_t error) {
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

// `launched` is what a launcher returned: a cudaError_t.
inline void check_launch(const char* function, int launched) {
  const auto error = static_cast<cudaError_t>(launched);
  check(error == cudaSuccess, function, "the CUDA kernel to start, got ", cudaGetErrorName(error),
        " (", cudaGetErrorString(error), ")", advice(error));
}

}  // namespace pixfuse
