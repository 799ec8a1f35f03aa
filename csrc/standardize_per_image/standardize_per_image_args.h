// From a torch tensor to StandardizeArgs: the checks and the shapes that the CPU and the CUDA
// operator share.
#pragma once
#include <array>
#include <cmath>

#include "common/tensor_view.h"
#include "standardize_per_image/standardize_per_image.h"

namespace pixfuse {

using torch::stable::Tensor;

// Everything of a call but the output and what the launcher works with.
struct StandardizeCall {
  static constexpr const char* kName = "standardize_per_image";
  StandardizeArgs args{};
  int64_t rank;
  int32_t shim_dtype;

  StandardizeCall(const Tensor& images, bool per_channel, double floor, int64_t input_layout,
                  int64_t dtype, int64_t memory_format) {
    const TensorView view = view_bytes(kName, images, input_layout);
    check(std::isfinite(floor) && floor >= 0.0, kName, "floor 0 (1 / sqrt(n)) or above, finite");
    check(floor == 0.0 || std::isfinite(1.0 / floor), kName, "floor with a finite reciprocal");
    check(dtype >= 0 && dtype <= 2, kName, "dtype 0 (float32), 1 (float16) or 2 (bfloat16), got ",
          dtype);
    check(memory_format >= 0 && memory_format <= 2, kName,
          "memory_format 0 (contiguous), 1 (channels_last) or 2 (preserve), got ", memory_format);
    rank = view.rank;
    args.images = static_cast<const uint8_t*>(images.const_data_ptr());
    args.per_channel = per_channel;
    args.floor = floor;
    args.dtype = static_cast<ElementType>(dtype);
    shim_dtype = args.dtype == ElementType::float32   ? aoti_torch_dtype_float32()
                 : args.dtype == ElementType::float16 ? aoti_torch_dtype_float16()
                                                      : aoti_torch_dtype_bfloat16();
    const int64_t c = view.sizes[1], h = view.sizes[2], w = view.sizes[3];
    const bool channels_last =
        memory_format == 2 ? c > 1 && view.strides[1] == 1 : memory_format == 1;
    const std::array<int64_t, 4> planar = {c * h * w, h * w, w, 1},
                                 pixels = {c * h * w, 1, w * c, c};
    for (int d = 0; d < 4; ++d) {
      args.sizes[d] = view.sizes[d];
      args.image_strides[d] = view.strides[d];
      args.output_strides[d] = channels_last ? pixels[d] : planar[d];
    }
    // Sums of squares fit in 63 bits, and sums are exact as float64.
    constexpr int64_t kMost = int64_t{1} << 44;
    int64_t values = 1;
    for (const int64_t size : {c, h, w}) {
      check(!__builtin_mul_overflow(values, size, &values) && values < kMost, kName,
            "images of less than 2^44 values");
    }
  }
};

}  // namespace pixfuse
