// What the operators ask of tensors of images: shapes as N, C, H, W, dtypes and dense outputs, each
// checked in the words of the operator `function`. Header-only, since the CPU and the CUDA library
// have their own copies.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>

#include "common/checks.h"
#include "common/element_type.h"
#include "common/layout.h"

namespace pixfuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Shape and strides as N, C, H, W, whatever order and rank the tensor has.
struct TensorView {
  int64_t sizes[4];
  int64_t strides[4];  // in elements; 0 where the tensor has no such dimension
  int64_t rank;        // 3 or 4; a tensor of rank 3 is a batch of one
};

// A storage can be given back, or made smaller, while tensors still look into it.
inline void check_memory(const char* function, const Tensor& tensor, const char* name) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const auto element_bytes = static_cast<int64_t>(tensor.element_size());
  int64_t needed = 1, there = 0;
  bool fits = aoti_torch_get_storage_offset(tensor.get(), &needed) == AOTI_TORCH_SUCCESS &&
              aoti_torch_get_storage_size(tensor.get(), &there) == AOTI_TORCH_SUCCESS &&
              !__builtin_add_overflow(needed, int64_t{1}, &needed);
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    int64_t reach = 0;
    if (sizes[d] == 0) return;
    fits = fits && !__builtin_mul_overflow(sizes[d] - 1, strides[d], &reach) &&
           !__builtin_add_overflow(needed, reach, &needed);
  }
  fits = fits && !__builtin_mul_overflow(needed, element_bytes, &needed) && needed <= there;
  check(fits && tensor.const_data_ptr() != nullptr, function, name, " to have memory for ", needed,
        " bytes, got a storage of ", there, "; was it freed or resized?");
}

inline void check_dense(const char* function, const Tensor& tensor, const char* name) {
  int32_t layout = -1;
  check(aoti_torch_get_layout(tensor.get(), &layout) == AOTI_TORCH_SUCCESS &&
            layout == aoti_torch_layout_strided(),
        function, name, " to be a dense tensor");
  check_memory(function, tensor, name);
}

// Sizes whose elements could not be counted in bytes, whatever the dtype, are refused.
inline TensorView view_as_nchw(const char* function, const Tensor& tensor, InputLayout layout,
                               const char* name) {
  constexpr int kFromNchw[4] = {0, 1, 2, 3}, kFromNhwc[4] = {0, 3, 1, 2};
  const int* order = layout == InputLayout::nhwc ? kFromNhwc : kFromNchw;
  TensorView view{};
  check_dense(function, tensor, name);
  view.rank = tensor.dim();
  check(view.rank == 3 || view.rank == 4, function, name, " to have 3 or 4 dimensions, got ",
        view.rank);
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t bytes = 8;  // at most, for each element
  for (int d = 0; d < 4; ++d) {
    const int64_t from = order[d] - (4 - view.rank);
    view.sizes[d] = from < 0 ? 1 : sizes[from];
    view.strides[d] = from < 0 ? 0 : strides[from];
    check(!__builtin_mul_overflow(bytes, view.sizes[d], &bytes), function, name,
          " of a size that fits in memory");
  }
  return view;
}

// The argument `images` of an operator that reads bytes.
inline TensorView view_images(const char* function, const Tensor& images, int64_t input_layout) {
  check(images.scalar_type() == ScalarType::Byte, function, "images of dtype uint8");
  check(input_layout == 0 || input_layout == 1, function, "input_layout 0 (NCHW) or 1 (NHWC), got ",
        input_layout);
  return view_as_nchw(function, images, static_cast<InputLayout>(input_layout), "images");
}

// --- dtypes ---

inline ElementType float_type_of(const char* function, int64_t dtype) {
  check(dtype >= 0 && dtype <= 2, function, "dtype 0 (float32), 1 (float16) or 2 (bfloat16), got ",
        dtype);
  return static_cast<ElementType>(dtype);
}

inline ElementType float_type_of(const char* function, ScalarType dtype, const char* name) {
  check(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
        function, name, ".dtype to be float32, float16 or bfloat16");
  return dtype == ScalarType::Float  ? ElementType::float32
         : dtype == ScalarType::Half ? ElementType::float16
                                     : ElementType::bfloat16;
}

// The number by which torch's C functions know a dtype.
inline int32_t shim_dtype(ElementType dtype) {
  switch (dtype) {
    case ElementType::float32:
      return aoti_torch_dtype_float32();
    case ElementType::float16:
      return aoti_torch_dtype_float16();
    case ElementType::bfloat16:
      return aoti_torch_dtype_bfloat16();
    case ElementType::uint8:
      return aoti_torch_dtype_uint8();
  }
  return -1;
}

// --- dense outputs ---

inline bool wants_channels_last(const char* function, const TensorView& images,
                                int64_t memory_format) {
  check(memory_format >= 0 && memory_format <= 2, function,
        "memory_format 0 (contiguous), 1 (channels_last) or 2 (preserve), got ", memory_format);
  return is_channels_last(static_cast<MemoryFormat>(memory_format), images.sizes, images.strides);
}

inline bool has_strides(const TensorView& view, const std::array<int64_t, 4>& strides) {
  for (int d = 0; d < 4; ++d) {
    if (view.sizes[d] > 1 && view.strides[d] != strides[d]) return false;
  }
  return true;
}

// Of a caller's output, checked: of the shape `sizes`, and contiguous or channels-last.
inline std::array<int64_t, 4> strides_of_output(const char* function, const TensorView& out,
                                                const int64_t (&sizes)[4]) {
  bool empty = false;
  for (int d = 0; d < 4; ++d) {
    check(out.sizes[d] == sizes[d], function, "out of shape (N, C, H, W) = (", sizes[0], ", ",
          sizes[1], ", ", sizes[2], ", ", sizes[3], "), got size ", out.sizes[d], " in dimension ",
          d);
    empty = empty || sizes[d] == 0;
  }
  const std::array<int64_t, 4> contiguous = dense_strides(sizes, false);
  if (has_strides(out, contiguous)) return contiguous;
  const std::array<int64_t, 4> channels_last = dense_strides(sizes, true);
  check(empty || has_strides(out, channels_last), function,
        "out to be contiguous or channels_last, without gaps");
  return channels_last;
}

}  // namespace pixfuse
