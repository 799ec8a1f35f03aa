// From torch tensors to DenormalizeArgs: the checks and the shapes that the CPU and the CUDA
// operator share.
#pragma once
#include <cmath>
#include <vector>

#include "common/tensor_view.h"
#include "denormalize/denormalize.h"

namespace pixfuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Everything of a call but the output and the tallies, checked; owns what `args` points to.
struct DenormalizeCall {
  DenormalizeArgs args{};
  int64_t rank;
  int64_t output_sizes[4];    // of the output's own dimensions: the last `rank` count
  int64_t output_strides[4];  // likewise

  DenormalizeCall(const Tensor& values, const std::vector<double>& mean,
                  const std::vector<double>& std, int64_t output_layout) {
    const ScalarType dtype = values.scalar_type();
    check(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
          kName, "tensor of dtype float32, float16 or bfloat16");
    args.dtype = dtype == ScalarType::Float  ? ElementType::float32
                 : dtype == ScalarType::Half ? ElementType::float16
                                             : ElementType::bfloat16;
    const TensorView view = view_images(kName, values, 0, "tensor");
    check(output_layout == 0 || output_layout == 1, kName, "output_layout 0 (NCHW) or 1 (NHWC)");
    rank = view.rank;
    args.values = values.const_data_ptr();
    for (int d = 0; d < 4; ++d) {
      args.sizes[d] = view.sizes[d];
      args.value_strides[d] = view.strides[d];
    }
    const int64_t c = view.sizes[1], h = view.sizes[2], w = view.sizes[3];
    const bool nhwc = output_layout == 1;
    const int64_t strides_nchw[4] = {c * h * w, h * w, w, 1};
    const int64_t strides_nhwc[4] = {c * h * w, 1, w * c, c};
    constexpr int kNchw[4] = {0, 1, 2, 3}, kNhwc[4] = {0, 2, 3, 1};
    for (int d = 0; d < 4; ++d) {
      args.output_strides[d] = nhwc ? strides_nhwc[d] : strides_nchw[d];
    }
    for (int d = 0; d < 4; ++d) {
      const int from = nhwc ? kNhwc[d] : kNchw[d];
      output_sizes[d] = args.sizes[from];
      output_strides[d] = args.output_strides[from];
    }
    set_channels(mean, std);
  }
  DenormalizeCall(const DenormalizeCall&) = delete;
  DenormalizeCall& operator=(const DenormalizeCall&) = delete;

  // Takes over a caller's output, checked.
  void set_output(const Tensor& out) {
    check(out.scalar_type() == ScalarType::Byte, kName, "out of dtype uint8");
    check(out.dim() == rank, kName, "out with as many dimensions as tensor");
    const auto sizes = out.sizes(), strides = out.strides();
    bool empty = false, dense = true;
    for (int64_t d = 0; d < rank; ++d) {
      const int64_t expected = output_sizes[4 - rank + d];
      check(sizes[d] == expected, kName, "out of size ", expected, " in dimension ", d, ", got ",
            sizes[d]);
      empty = empty || sizes[d] == 0;
      dense = dense && (sizes[d] == 1 || strides[d] == output_strides[4 - rank + d]);
    }
    check(empty || dense, kName, "out to be contiguous");
    args.output = static_cast<uint8_t*>(out.mutable_data_ptr());
    TensorView values{};
    int64_t bytes = 1;
    for (int d = 0; d < 4; ++d) {
      values.sizes[d] = args.sizes[d];
      values.strides[d] = args.value_strides[d];
      bytes *= args.sizes[d];
    }
    check(!share_bytes(args.values, reach(values) * element_bytes(args.dtype), args.output, bytes),
          kName, "out to share no memory with tensor");
  }

  static constexpr const char* kName = "denormalize";

 private:
  std::vector<ChannelScale> channels_;

  void set_channels(const std::vector<double>& mean, const std::vector<double>& std) {
    const auto count = static_cast<size_t>(args.sizes[1]);
    for (const std::vector<double>* values : {&mean, &std}) {
      check(values->size() == 1 || values->size() == count, kName,
            "mean and std with 1 value or one per channel (", count, "), got ", values->size());
    }
    channels_.resize(count);
    for (size_t c = 0; c < count; ++c) {
      const double m = mean[mean.size() == 1 ? 0 : c], s = std[std.size() == 1 ? 0 : c];
      channels_[c] = {static_cast<float>(255.0 * s), static_cast<float>(255.0 * m)};
      check(std::isfinite(channels_[c].offset), kName, "255 * mean finite in float32");
      check(std::isfinite(channels_[c].scale) && channels_[c].scale > 0.0f, kName,
            "255 * std above 0 and finite in float32");
    }
    args.channels = channels_.data();
  }
};

}  // namespace pixfuse
