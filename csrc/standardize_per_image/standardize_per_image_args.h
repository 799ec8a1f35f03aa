// From a torch tensor to StandardizeArgs: the checks and the shapes that the CPU and the CUDA
// operator share.
#pragma once
#include <cmath>

#include "common/byte_span.h"
#include "common/tensor_view.h"
#include "standardize_per_image/standardize_per_image.h"

namespace pixfuse {

// Everything of a call but the output and what the launcher works with.
struct StandardizeCall {
  static constexpr const char* kName = "standardize_per_image";
  StandardizeArgs args{};
  TensorView view{};

  StandardizeCall(const Tensor& images, bool per_channel, double floor, int64_t input_layout) {
    view = view_images(kName, images, input_layout);
    check(std::isfinite(floor) && floor >= 0.0, kName, "floor 0 (1 / sqrt(n)) or above, finite");
    check(floor == 0.0 || std::isfinite(1.0 / floor), kName, "floor with a finite reciprocal");
    args.images = static_cast<const uint8_t*>(images.const_data_ptr());
    args.per_channel = per_channel;
    args.floor = floor;
    for (int d = 0; d < 4; ++d) {
      args.sizes[d] = view.sizes[d];
      args.image_strides[d] = view.strides[d];
    }
    // Sums of squares fit in 63 bits, and sums are exact as float64.
    constexpr int64_t kMost = int64_t{1} << 44;
    int64_t values = 1;
    for (int d = 1; d < 4; ++d) {
      check(!__builtin_mul_overflow(values, view.sizes[d], &values) && values < kMost, kName,
            "images of less than 2^44 values");
    }
  }

  // The type and the strides of an output that the operator allocates.
  void choose_output(int64_t dtype, int64_t memory_format) {
    args.dtype = float_type_of(kName, dtype);
    const auto strides = dense_strides(args.sizes, wants_channels_last(kName, view, memory_format));
    for (int d = 0; d < 4; ++d) args.output_strides[d] = strides[d];
  }

  // Checks a caller's output and takes it over: dense, contiguous or channels-last.
  void set_output(const Tensor& out) {
    const TensorView written = view_as_nchw(kName, out, InputLayout::nchw, "out");
    args.dtype = float_type_of(kName, out.scalar_type(), "out");
    check(written.rank == view.rank, kName, "out with as many dimensions as images");
    const auto strides = strides_of_output(kName, written, args.sizes);
    for (int d = 0; d < 4; ++d) args.output_strides[d] = strides[d];
    args.output = out.mutable_data_ptr();
    const ByteSpan from = span_of(args.images, args.sizes, args.image_strides, 1);
    const ByteSpan to =
        span_of(args.output, args.sizes, args.output_strides, element_bytes(args.dtype));
    check(!to.overlaps(from), kName, "out to share no memory with images");
  }
};

}  // namespace pixfuse
