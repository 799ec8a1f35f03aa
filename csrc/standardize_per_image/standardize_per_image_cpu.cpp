// Sums an image, then converts it while it is in cache: the loops are those of `image_moments` and
// `normalize`.
#include "image_moments/image_moments.h"
#include "standardize_per_image/standardize_per_image.h"
#include "standardize_per_image/standardize_per_image_constants.h"

namespace pixfuse {
namespace {

// With fewer images than this, threads share each image instead of taking whole ones.
constexpr int64_t kManyImages = 8;

int32_t run_here(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*),
                 void* context) {
  body(begin, end, context);
  return 0;
}

int32_t standardize_image(const StandardizeArgs& args, int64_t n, ParallelFor parallel_for) {
  const int64_t channels = args.sizes[1], pixels = args.sizes[2] * args.sizes[3];
  ImageMomentsArgs moments{};
  NormalizeArgs convert{};
  for (int d = 0; d < 4; ++d) {
    moments.sizes[d] = convert.sizes[d] = d == 0 ? 1 : args.sizes[d];
    moments.strides[d] = convert.image_strides[d] = args.image_strides[d];
    convert.output_strides[d] = args.output_strides[d];
  }
  moments.images = convert.images = args.images + n * args.image_strides[0];
  moments.sums = args.sums + n * channels;
  moments.squares = args.squares + n * channels;
  if (const int32_t error = image_moments_cpu(moments, parallel_for)) return error;

  ChannelConstants* constants = args.constants + n * channels;
  int64_t sum = 0, squares = 0;
  for (int64_t c = 0; c < channels; ++c) {
    sum += moments.sums[c];
    squares += moments.squares[c];
  }
  const ChannelConstants of_image = standardization_of(pixels * channels, sum, squares, args.floor);
  for (int64_t c = 0; c < channels; ++c) {
    constants[c] = args.per_channel
                       ? standardization_of(pixels, moments.sums[c], moments.squares[c], args.floor)
                       : of_image;
  }
  convert.output =
      static_cast<uint8_t*>(args.output) + n * args.output_strides[0] * element_bytes(args.dtype);
  convert.dtype = args.dtype;
  convert.arithmetic = Arithmetic::nearest;
  convert.channels = constants;
  return normalize_cpu(convert, parallel_for);
}

}  // namespace

int32_t standardize_per_image_cpu(const StandardizeArgs& args, ParallelFor parallel_for) {
  for (int64_t size : args.sizes) {
    if (size == 0) return 0;
  }
  const int64_t images = args.sizes[0];
  if (images < kManyImages) {
    for (int64_t n = 0; n < images; ++n) {
      if (const int32_t error = standardize_image(args, n, parallel_for)) return error;
    }
    return 0;
  }
  const auto body = [](int64_t first, int64_t last, void* context) {
    const auto& args = *static_cast<const StandardizeArgs*>(context);
    for (int64_t n = first; n < last; ++n) standardize_image(args, n, run_here);
  };
  constexpr int64_t kGrainElements = 32768;
  const int64_t grain = 1 + kGrainElements / (args.sizes[1] * args.sizes[2] * args.sizes[3]);
  return parallel_for(0, images, grain, body, const_cast<StandardizeArgs*>(&args));
}

}  // namespace pixfuse
