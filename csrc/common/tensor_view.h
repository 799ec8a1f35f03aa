// What several operators ask of a tensor of images: its shape as N, C, H, W, checked.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "common/checks.h"

namespace pixfuse {

// Shape and strides as N, C, H, W, whatever order and rank the tensor has.
struct TensorView {
  int64_t sizes[4];
  int64_t strides[4];  // in elements; 0 where the tensor has no such dimension
  int64_t rank;        // 3 or 4; a tensor of rank 3 is a batch of one
};

// `layout` is 0 for NCHW, 1 for NHWC, as in python/pixfuse/_library.py. Sizes whose product, times
// `max_element_bytes`, would not fit in 63 bits are refused.
inline TensorView view_images(const char* function, const torch::stable::Tensor& tensor,
                              int64_t layout, const char* name, int64_t max_element_bytes = 8) {
  constexpr int kFromNchw[4] = {0, 1, 2, 3}, kFromNhwc[4] = {0, 3, 1, 2};
  check(layout == 0 || layout == 1, function, "the layout of ", name, " as 0 (NCHW) or 1 (NHWC)");
  const int* order = layout == 1 ? kFromNhwc : kFromNchw;
  TensorView view{};
  int32_t tensor_layout = -1;
  check(aoti_torch_get_layout(tensor.get(), &tensor_layout) == AOTI_TORCH_SUCCESS &&
            tensor_layout == aoti_torch_layout_strided(),
        function, name, " to be a dense tensor");
  view.rank = tensor.dim();
  check(view.rank == 3 || view.rank == 4, function, name, " to have 3 or 4 dimensions, got ",
        view.rank);
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t bytes = max_element_bytes;
  for (int d = 0; d < 4; ++d) {
    const int64_t from = order[d] - (4 - view.rank);
    view.sizes[d] = from < 0 ? 1 : sizes[from];
    view.strides[d] = from < 0 ? 0 : strides[from];
    check(!__builtin_mul_overflow(bytes, view.sizes[d], &bytes), function, name,
          " of a size that fits in memory");
  }
  return view;
}

inline TensorView view_bytes(const char* function, const torch::stable::Tensor& images,
                             int64_t input_layout) {
  check(images.scalar_type() == torch::headeronly::ScalarType::Byte, function,
        "images of dtype uint8");
  return view_images(function, images, input_layout, "images");
}

// A contiguous tensor, uninitialized. `shim_dtype` is the number that torch's C functions use.
inline torch::stable::Tensor empty_contiguous(const char* function, int64_t rank,
                                              const int64_t* sizes, int32_t shim_dtype,
                                              int32_t device_type, int32_t device_index) {
  int64_t strides[4] = {1, 1, 1, 1};
  for (int64_t d = rank - 2; d >= 0; --d) {
    strides[d] = strides[d + 1] * (sizes[d + 1] > 0 ? sizes[d + 1] : 1);
  }
  AtenTensorHandle handle = nullptr;
  check(aoti_torch_empty_strided(rank, sizes, strides, shim_dtype, device_type, device_index,
                                 &handle) == AOTI_TORCH_SUCCESS,
        function, "torch to allocate a result");
  return torch::stable::Tensor(handle);
}

// Whole numbers that are added to: all zero.
inline torch::stable::Tensor zero_counts(const char* function, int64_t rank, const int64_t* sizes,
                                         int32_t device_type, int32_t device_index) {
  torch::stable::Tensor counts =
      empty_contiguous(function, rank, sizes, aoti_torch_dtype_int64(), device_type, device_index);
  check(aoti_torch_zero_(counts.get()) == AOTI_TORCH_SUCCESS, function,
        "torch to clear a result of counts");
  return counts;
}

constexpr int32_t kNoDeviceIndex = -1;  // what torch's C functions expect for the CPU

inline torch::stable::Tensor zero_cpu_counts(const char* function, int64_t rank,
                                             const int64_t* sizes) {
  return zero_counts(function, rank, sizes, aoti_torch_device_type_cpu(), kNoDeviceIndex);
}

// Whether two spans of bytes have one in common.
inline bool share_bytes(const void* a, int64_t a_bytes, const void* b, int64_t b_bytes) {
  const auto a_begin = reinterpret_cast<uintptr_t>(a), b_begin = reinterpret_cast<uintptr_t>(b);
  return a_begin < b_begin + static_cast<uintptr_t>(b_bytes) &&
         b_begin < a_begin + static_cast<uintptr_t>(a_bytes);
}

// How many elements a view reaches over, gaps included.
inline int64_t reach(const TensorView& view) {
  int64_t last = 0;
  for (int d = 0; d < 4; ++d) {
    if (view.sizes[d] == 0) return 0;
    last += (view.sizes[d] - 1) * view.strides[d];
  }
  return last + 1;
}

}  // namespace pixfuse
