// The CUDA operator as a function for ctypes, on plain pointers, with the constants that the
// product's own operator would give it.
#include <algorithm>
#include <vector>

#include "normalize/normalize_constants.h"

// Sizes and strides are N, C, H, W; strides in elements; `mean` and `std` one per channel. Returns
// a cudaError_t.
extern "C" int normalize_cuda_on_cpu(const uint8_t* images, void* output, const int64_t* sizes,
                                     const int64_t* image_strides, const int64_t* output_strides,
                                     int32_t dtype, const double* mean, const double* std,
                                     int32_t rounding) {
  pixfuse::NormalizeArgs args{};
  args.images = images;
  args.output = output;
  std::copy_n(sizes, 4, args.sizes);
  std::copy_n(image_strides, 4, args.image_strides);
  std::copy_n(output_strides, 4, args.output_strides);
  args.dtype = static_cast<pixfuse::ElementType>(dtype);
  std::vector<pixfuse::ChannelConstants> channels(static_cast<size_t>(sizes[1]));
  pixfuse::set_rounding(args, channels.data(), mean, std, sizes[1],
                        static_cast<pixfuse::Rounding>(rounding));
  return pixfuse::normalize_cuda(args, nullptr);
}
