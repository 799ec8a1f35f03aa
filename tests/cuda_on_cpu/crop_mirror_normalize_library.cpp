// The CUDA operator as a function for ctypes, on plain pointers, with the checks, the geometry and
// the constants that the product's own operator would give it.
#include "crop_mirror_normalize/crop_mirror_normalize_args.h"

// `images` has a row of 7 for each image: address, height, width, channels, and the bytes from one
// row, pixel and channel to the next. `placements` is the operator's; sizes and strides are those
// of the output. `mean`, `std` and `fill` have one value per channel. Returns a cudaError_t.
extern "C" int crop_mirror_normalize_cuda_on_cpu(const int64_t* images, const int64_t* placements,
                                                 const int64_t* sizes, const int64_t* strides,
                                                 const double* mean, const double* std,
                                                 int32_t rounding, const double* fill,
                                                 bool fill_is_output, int32_t dtype, void* output,
                                                 uint8_t* mask) {
  std::vector<pixfuse::ImageSource> sources;
  for (int64_t n = 0; n < sizes[0]; ++n) {
    const int64_t* image = images + 7 * n;
    sources.push_back({reinterpret_cast<const uint8_t*>(image[0]), image[1], image[2], image[3],
                       image[4], image[5], image[6]});
  }
  const auto per_channel = [&](const double* values) {
    return std::vector<double>(values, values + sizes[1]);
  };
  pixfuse::CropMirrorNormalizeCall call(
      sources, reinterpret_cast<const pixfuse::Placement*>(placements), sizes[1], sizes[2],
      sizes[3], per_channel(mean), per_channel(std), rounding, per_channel(fill), fill_is_output);
  call.set_dtype(static_cast<pixfuse::ElementType>(dtype));
  call.set_output(output, strides, mask);
  return pixfuse::crop_mirror_normalize_cuda(call.args, nullptr);
}
