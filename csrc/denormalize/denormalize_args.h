// From torch tensors to DenormalizeArgs: the checks and the shapes that the CPU and the CUDA
// operator share.
#pragma once
#include <cmath>
#include <vector>

#include "common/byte_span.h"
#include "common/tensor_view.h"
#include "denormalize/denormalize.h"

namespace pixfuse {

// Everything of a call but the output and the tallies, checked; owns what `args` points to.
struct DenormalizeCall {
  DenormalizeArgs args{};
  int64_t rank;
  int64_t output_sizes[4];    // of the output's own dimensions: the last `rank` count
  int64_t output_strides[4];  // likewise

  DenormalizeCall(const Tensor& values, const std::vector<double>& mean,
                  const std::vector<double>& std, int64_t output_layout) {
    args.dtype = float_type_of(kName, values.scalar_type(), "tensor");
    const TensorView view = view_as_nchw(kName, values, InputLayout::nchw, "tensor");
    check(output_layout == 0 || output_layout == 1, kName, "output_layout 0 (NCHW) or 1 (NHWC)");
    rank = view.rank;
    args.values = values.const_data_ptr();
    for (int d = 0; d < 4; ++d) {
      args.sizes[d] = view.sizes[d];
      args.value_strides[d] = view.strides[d];
    }
    const bool nhwc = output_layout == 1;
    const auto strides = dense_strides(args.sizes, nhwc);
    for (int d = 0; d < 4; ++d) args.output_strides[d] = strides[d];
    constexpr int kNchw[4] = {0, 1, 2, 3}, kNhwc[4] = {0, 2, 3, 1};
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
    const ByteSpan read =
        span_of(args.values, args.sizes, args.value_strides, element_bytes(args.dtype));
    const ByteSpan written = span_of(args.output, args.sizes, args.output_strides, 1);
    check(!written.overlaps(read), kName, "out to share no memory with tensor");
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
