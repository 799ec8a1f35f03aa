// From torch tensors to NormalizeArgs: the checks and the shapes that the CPU and the CUDA operator
// share. Header-only, since each of the two libraries has its own copy.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cmath>
#include <vector>

#include "common/checks.h"
#include "normalize/normalize_constants.h"

namespace pixfuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Numbers of the operator's schema, where strings would leak and torch's own enums take longer to
// pass. Their names are in python/pixfuse/_library.py; `dtype` is an ElementType.
enum class InputLayout : int64_t { nchw = 0, nhwc = 1 };
enum class MemoryFormat : int64_t { contiguous = 0, channels_last = 1, preserve = 2 };

// Shape and strides as N, C, H, W, whatever order and rank the tensor has.
struct ImageView {
  int64_t sizes[4];
  int64_t strides[4];
  int64_t rank;  // 3 or 4; a tensor of rank 3 is a batch of one
};

inline ImageView view_as_nchw(const Tensor& tensor, InputLayout layout, const char* name) {
  constexpr int kFromNchw[4] = {0, 1, 2, 3}, kFromNhwc[4] = {0, 3, 1, 2};
  const int* order = layout == InputLayout::nhwc ? kFromNhwc : kFromNchw;
  ImageView view{};
  int32_t tensor_layout = -1;
  check(aoti_torch_get_layout(tensor.get(), &tensor_layout) == AOTI_TORCH_SUCCESS &&
            tensor_layout == aoti_torch_layout_strided(),
        "normalize", name, " to be a dense tensor");
  view.rank = tensor.dim();
  check(view.rank == 3 || view.rank == 4, "normalize", name, " to have 3 or 4 dimensions, got ",
        view.rank);
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (int d = 0; d < 4; ++d) {
    const int64_t from = order[d] - (4 - view.rank);
    view.sizes[d] = from < 0 ? 1 : sizes[from];
    view.strides[d] = from < 0 ? 0 : strides[from];
  }
  return view;
}

// Strides of a dense output; `channels_last` puts the channels of a pixel side by side.
inline std::array<int64_t, 4> dense_strides(const int64_t (&sizes)[4], bool channels_last) {
  const int64_t channels = sizes[1], height = sizes[2], width = sizes[3];
  const int64_t image = channels * height * width;
  if (channels_last) return {image, 1, width * channels, channels};
  return {image, height * width, width, 1};
}

// memory_format=preserve: as the images lie, seen as NCHW.
inline bool wants_channels_last(const ImageView& images, int64_t memory_format) {
  check(memory_format >= 0 && memory_format <= 2, "normalize",
        "memory_format 0 (contiguous), 1 (channels_last) or 2 (preserve), got ", memory_format);
  const auto format = static_cast<MemoryFormat>(memory_format);
  if (format != MemoryFormat::preserve) return format == MemoryFormat::channels_last;
  return images.sizes[1] > 1 && images.strides[1] == 1;
}

inline ElementType float_type_of(int64_t dtype) {
  check(dtype >= 0 && dtype <= 2, "normalize",
        "dtype 0 (float32), 1 (float16) or 2 (bfloat16), got ", dtype);
  return static_cast<ElementType>(dtype);
}

inline ElementType float_type_of(ScalarType dtype) {
  check(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
        "normalize", "out.dtype to be float32, float16 or bfloat16");
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

// Everything of a call but the output, checked; owns the constants that `args` points to.
struct NormalizeCall {
  NormalizeArgs args{};
  ImageView images{};

  NormalizeCall(const Tensor& images_tensor, const std::vector<double>& mean,
                const std::vector<double>& std, int64_t rounding, int64_t input_layout) {
    check(images_tensor.scalar_type() == ScalarType::Byte, "normalize", "images of dtype uint8");
    check(input_layout == 0 || input_layout == 1, "normalize", "input_layout 0 (NCHW) or 1 (NHWC)");
    check(rounding >= 0 && rounding <= 4, "normalize", "rounding from 0 to 4, got ", rounding);
    images = view_as_nchw(images_tensor, static_cast<InputLayout>(input_layout), "images");
    args.images = static_cast<const uint8_t*>(images_tensor.const_data_ptr());
    int64_t output_bytes = 4;  // at most, for each element
    for (int d = 0; d < 4; ++d) {
      args.sizes[d] = images.sizes[d];
      args.image_strides[d] = images.strides[d];
      check(!__builtin_mul_overflow(output_bytes, args.sizes[d], &output_bytes), "normalize",
            "images whose result fits in memory");
    }
    set_channels(mean, std, static_cast<Rounding>(rounding));
  }

  // The type and the strides of an output that the operator allocates.
  std::array<int64_t, 4> choose_output(int64_t dtype, int64_t memory_format) {
    args.dtype = float_type_of(dtype);
    const auto strides = dense_strides(args.sizes, wants_channels_last(images, memory_format));
    for (int d = 0; d < 4; ++d) args.output_strides[d] = strides[d];
    return strides;
  }

  NormalizeCall(const NormalizeCall&) = delete;
  NormalizeCall& operator=(const NormalizeCall&) = delete;

 private:
  static constexpr int64_t kInlineChannels = 4;  // no allocation for the usual images
  ChannelConstants inline_channels_[kInlineChannels];
  std::vector<ChannelConstants> more_channels_;

  void set_channels(const std::vector<double>& mean, const std::vector<double>& std,
                    Rounding rounding) {
    const int64_t count = args.sizes[1];
    std::vector<double> means = mean, stds = std;
    for (std::vector<double>* values : {&means, &stds}) {
      check(values->size() == 1 || static_cast<int64_t>(values->size()) == count, "normalize",
            "mean and std with 1 value or one per channel (", count, "), got ", values->size());
      values->resize(static_cast<size_t>(count), values->empty() ? 0.0 : values->front());
    }
    ChannelConstants* channels = inline_channels_;
    if (count > kInlineChannels) {
      more_channels_.resize(static_cast<size_t>(count));
      channels = more_channels_.data();
    }
    set_rounding(args, channels, means.data(), stds.data(), count, rounding);
    for (int64_t c = 0; c < count; ++c) {
      check(std::isfinite(channels[c].mean), "normalize", "mean finite in float32");
      check(std::isfinite(channels[c].std) && channels[c].std > 0.0f, "normalize",
            "std above 0 and finite in float32");
    }
  }
};

// First and one past the last byte that a tensor reaches; equal when it has no elements.
struct ByteRange {
  uintptr_t begin, end;
};
inline ByteRange bytes_reached(const void* data, const int64_t (&sizes)[4],
                               const int64_t (&strides)[4], int64_t element_bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  int64_t last = 0;
  for (int d = 0; d < 4; ++d) {
    if (sizes[d] == 0) return {begin, begin};
    last += (sizes[d] - 1) * strides[d];
  }
  return {begin, begin + static_cast<uintptr_t>((last + 1) * element_bytes)};
}

// Checks a caller's output against the call and takes it over: dense, contiguous or channels-last.
inline void set_output(NormalizeCall& call, const Tensor& out) {
  NormalizeArgs& args = call.args;
  const ImageView view = view_as_nchw(out, InputLayout::nchw, "out");
  args.dtype = float_type_of(out.scalar_type());
  check(view.rank == call.images.rank, "normalize", "out with as many dimensions as images");
  bool empty = false, dense[2] = {true, true};
  for (int d = 0; d < 4; ++d) {
    check(view.sizes[d] == args.sizes[d], "normalize", "out of shape (N, C, H, W) = (",
          args.sizes[0], ", ", args.sizes[1], ", ", args.sizes[2], ", ", args.sizes[3],
          "), got size ", view.sizes[d], " in dimension ", d);
    empty = empty || view.sizes[d] == 0;
  }
  for (const bool channels_last : {false, true}) {
    const std::array<int64_t, 4> strides = dense_strides(args.sizes, channels_last);
    for (int d = 0; d < 4; ++d) {
      if (view.sizes[d] > 1 && view.strides[d] != strides[d]) dense[channels_last] = false;
    }
  }
  check(empty || dense[false] || dense[true], "normalize",
        "out to be contiguous or channels_last, without gaps");
  const std::array<int64_t, 4> strides = dense_strides(args.sizes, !dense[false]);
  for (int d = 0; d < 4; ++d) args.output_strides[d] = strides[d];
  args.output = out.mutable_data_ptr();

  const ByteRange in = bytes_reached(args.images, args.sizes, args.image_strides, 1);
  const ByteRange written =
      bytes_reached(args.output, args.sizes, args.output_strides, element_bytes(args.dtype));
  check(in.end <= written.begin || written.end <= in.begin, "normalize",
        "out to share no memory with images");
}

}  // namespace pixfuse
