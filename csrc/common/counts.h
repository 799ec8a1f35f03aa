// Results of counting: whole numbers that are added to.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "common/checks.h"

namespace pixfuse {

// A contiguous int64 tensor of zeros, of 3 dimensions at most.
inline torch::stable::Tensor zero_counts(const char* function, int64_t rank, const int64_t* sizes,
                                         int32_t device_type, int32_t device_index) {
  int64_t strides[3] = {1, 1, 1};
  for (int64_t d = rank - 2; d >= 0; --d) {
    strides[d] = strides[d + 1] * (sizes[d + 1] > 0 ? sizes[d + 1] : 1);
  }
  AtenTensorHandle handle = nullptr;
  check(aoti_torch_empty_strided(rank, sizes, strides, aoti_torch_dtype_int64(), device_type,
                                 device_index, &handle) == AOTI_TORCH_SUCCESS,
        function, "torch to allocate a result");
  torch::stable::Tensor counts(handle);
  check(aoti_torch_zero_(counts.get()) == AOTI_TORCH_SUCCESS, function,
        "torch to clear a result of counts");
  return counts;
}

inline torch::stable::Tensor zero_cpu_counts(const char* function, int64_t rank,
                                             const int64_t* sizes) {
  constexpr int32_t kNoDeviceIndex = -1;
  return zero_counts(function, rank, sizes, aoti_torch_device_type_cpu(), kNoDeviceIndex);
}

inline torch::stable::Tensor zero_cuda_counts(const char* function, int64_t rank,
                                              const int64_t* sizes, int32_t device) {
  return zero_counts(function, rank, sizes, aoti_torch_device_type_cuda(), device);
}

}  // namespace pixfuse
