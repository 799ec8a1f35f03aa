// From torch tensors to NormalizeArgs: the checks and the shapes that the CPU and the CUDA operator
// share. Header-only, since each of the two libraries has its own copy.
#pragma once
#include <array>
#include <cmath>
#include <vector>

#include "common/byte_span.h"
#include "common/tensor_view.h"
#include "normalize/normalize_constants.h"

namespace pixfuse {

// Everything of a call but the output, checked; owns the constants that `args` points to.
struct NormalizeCall {
  NormalizeArgs args{};
  TensorView images{};

  NormalizeCall(const Tensor& images_tensor, const std::vector<double>& mean,
                const std::vector<double>& std, int64_t rounding, int64_t input_layout) {
    images = view_images("normalize", images_tensor, input_layout);
    check(rounding >= 0 && rounding <= 4, "normalize", "rounding from 0 to 4, got ", rounding);
    args.images = static_cast<const uint8_t*>(images_tensor.const_data_ptr());
    for (int d = 0; d < 4; ++d) {
      args.sizes[d] = images.sizes[d];
      args.image_strides[d] = images.strides[d];
    }
    set_channels(mean, std, static_cast<Rounding>(rounding));
  }

  // The type and the strides of an output that the operator allocates.
  std::array<int64_t, 4> choose_output(int64_t dtype, int64_t memory_format) {
    args.dtype = float_type_of("normalize", dtype);
    const auto strides =
        dense_strides(args.sizes, wants_channels_last("normalize", images, memory_format));
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

// Checks a caller's output against the call and takes it over: dense, contiguous or channels-last.
inline void set_output(NormalizeCall& call, const Tensor& out) {
  NormalizeArgs& args = call.args;
  const TensorView view = view_as_nchw("normalize", out, InputLayout::nchw, "out");
  args.dtype = float_type_of("normalize", out.scalar_type(), "out");
  check(view.rank == call.images.rank, "normalize", "out with as many dimensions as images");
  const auto strides = strides_of_output("normalize", view, args.sizes);
  for (int d = 0; d < 4; ++d) args.output_strides[d] = strides[d];
  args.output = out.mutable_data_ptr();

  const ByteSpan read = span_of(args.images, args.sizes, args.image_strides, 1);
  const ByteSpan written =
      span_of(args.output, args.sizes, args.output_strides, element_bytes(args.dtype));
  check(!written.overlaps(read), "normalize", "out to share no memory with images");
}

}  // namespace pixfuse
