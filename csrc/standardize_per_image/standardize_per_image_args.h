// From a torch tensor to StandardizeArgs: the checks and the shapes that the CPU and the CUDA
// operator share.
#pragma once
#include <cmath>

#include "common/tensor_view.h"
#include "standardize_per_image/standardize_per_image.h"

namespace pixfuse {

// Everything of a call but the output and what the launcher works with.
struct StandardizeCall {
  static constexpr const char* kName = "standardize_per_image";
  StandardizeArgs args{};
  int64_t rank;

  StandardizeCall(const Tensor& images, bool per_channel, double floor, int64_t input_layout,
                  int64_t dtype, int64_t memory_format) {
    const TensorView view = view_images(kName, images, input_layout);
    check(std::isfinite(floor) && floor >= 0.0, kName, "floor 0 (1 / sqrt(n)) or above, finite");
    check(floor == 0.0 || std::isfinite(1.0 / floor), kName, "floor with a finite reciprocal");
    rank = view.rank;
    args.images = static_cast<const uint8_t*>(images.const_data_ptr());
    args.per_channel = per_channel;
    args.floor = floor;
    args.dtype = float_type_of(kName, dtype);
    const bool channels_last = wants_channels_last(kName, view, memory_format);
    const auto strides = dense_strides(view.sizes, channels_last);
    for (int d = 0; d < 4; ++d) {
      args.sizes[d] = view.sizes[d];
      args.image_strides[d] = view.strides[d];
      args.output_strides[d] = strides[d];
    }
    // Sums of squares fit in 63 bits, and sums are exact as float64.
    constexpr int64_t kMost = int64_t{1} << 44;
    int64_t values = 1;
    for (int d = 1; d < 4; ++d) {
      check(!__builtin_mul_overflow(values, view.sizes[d], &values) && values < kMost, kName,
            "images of less than 2^44 values");
    }
  }
};

}  // namespace pixfuse
