// What the operators on CUDA tensors share: device, stream, and what a failed launch says.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "common/checks.h"

namespace pixfuse {

// The device of a tensor is current while this lives; on torch's current stream of it.
class CudaCall {
 public:
  CudaCall(const char* function, const torch::stable::Tensor& tensor)
      : function_(function), device_(tensor.get_device_index()) {
    check(aoti_torch_create_cuda_guard(device_, &guard_) == AOTI_TORCH_SUCCESS, function_,
          "CUDA device ", device_, " to become current");
  }
  CudaCall(const CudaCall&) = delete;
  CudaCall& operator=(const CudaCall&) = delete;
  ~CudaCall() { aoti_torch_delete_cuda_guard(guard_); }

  int32_t device() const { return device_; }

  void* stream() const {
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream(device_, &stream) == AOTI_TORCH_SUCCESS, function_,
          "torch to have a current stream on CUDA device ", device_);
    return stream;
  }

  // `code` is the cudaError_t of a launcher.
  void check_launch(int code) const {
    const auto error = static_cast<cudaError_t>(code);
    check(error == cudaSuccess, function_, "the CUDA kernel to start, got ",
          cudaGetErrorName(error), " (", cudaGetErrorString(error), ")", advice(error));
  }

 private:
  static const char* advice(cudaError_t error) {
    switch (error) {
      case cudaErrorInsufficientDriver:
      case cudaErrorUnsupportedPtxVersion:
        return "; the NVIDIA driver is older than the CUDA toolkit that pixfuse was built with: "
               "update the driver, or rebuild pixfuse with an older toolkit";
      case cudaErrorNoKernelImageForDevice:
        return "; pixfuse was built without code for this GPU: rebuild it with its architecture "
               "in CMAKE_CUDA_ARCHITECTURES";
      default:
        return "";
    }
  }

  const char* function_;
  int32_t device_;
  CUDAGuardHandle guard_ = nullptr;
};

}  // namespace pixfuse
