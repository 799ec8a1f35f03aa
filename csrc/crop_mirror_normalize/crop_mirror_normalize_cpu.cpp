// Splits the batch over threads by rows of the output, and describes what each image covers of such
// a band to the loops of `normalize`; fills what no image covers, and writes the mask.
#include "crop_mirror_normalize/crop_mirror_normalize.h"

#include <algorithm>
#include <cstring>

#include "common/isa.h"
#include "normalize/normalize_loop.h"

namespace pixfuse {
namespace {

// Below this, starting threads costs more than they save.
constexpr int64_t kGrainElements = 32768;

// So many images share what a thread prepares for the channels.
constexpr int64_t kMaxParts = 64;

using Loop = void (*)(const NormalizeArgs* parts, int64_t count);

Loop loop_for(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
      return avx2::normalize_parts;
    case Isa::avx512:
      return avx512::normalize_parts;
#elif defined(__aarch64__)
    case Isa::neon:
      return neon::normalize_parts;
#endif
    default:
      return portable::normalize_parts;
  }
}

// Rows [first, last) of output n.
struct Band {
  int64_t n, first, last;
};

int64_t element_offset(const CropMirrorNormalizeArgs& args, int64_t n, int64_t h, int64_t w) {
  const auto& strides = args.output_strides;
  return n * strides[0] + h * strides[2] + w * strides[3];
}

// What the image covers of the band.
Band covered(const CropMirrorNormalizeArgs& args, const Band& band) {
  const PlacedImage& image = args.images[band.n];
  const int64_t height = image.width > 0 ? image.height : 0;
  const int64_t first = std::clamp<int64_t>(image.top, band.first, band.last);
  const int64_t last = std::clamp<int64_t>(image.top + height, first, band.last);
  return {band.n, first, last};
}

NormalizeArgs part_of(const CropMirrorNormalizeArgs& args, const Band& rows) {
  const PlacedImage& image = args.images[rows.n];
  NormalizeArgs part{};
  part.images = image.pixels + (rows.first - image.top) * image.row_stride;
  part.output = static_cast<uint8_t*>(args.output) +
                element_offset(args, rows.n, rows.first, image.left) * element_bytes(args.dtype);
  const int64_t sizes[4] = {1, args.sizes[1], rows.last - rows.first, image.width};
  const int64_t strides[4] = {0, image.channel_stride, image.row_stride, image.pixel_stride};
  for (int d = 0; d < 4; ++d) {
    part.sizes[d] = sizes[d];
    part.image_strides[d] = strides[d];
    part.output_strides[d] = args.output_strides[d];
  }
  part.dtype = args.dtype;
  part.arithmetic = args.arithmetic;
  part.scale = args.scale;
  part.channels = args.channels;
  part.past_caches = args.past_caches;
  merge_rows(part.sizes, part.image_strides, part.output_strides);
  return part;
}

template <class T>
T stored(float value) {
  return round_to<T>(value);
}
template <>
uint8_t stored<uint8_t>(float value) {
  return static_cast<uint8_t>(value);
}

// `count` pixels of fill from column w of row h on; they may go on over the following rows.
template <class T>
void fill_pixels(const CropMirrorNormalizeArgs& args, int64_t n, int64_t h, int64_t w,
                 int64_t count) {
  const int64_t channels = args.sizes[1];
  T* const out = static_cast<T*>(args.output) + element_offset(args, n, h, w);
  for (int64_t c = 0; c < channels; ++c) {
    const T value = stored<T>(args.fill[c]);
    T* const channel = out + c * args.output_strides[1];
    if (args.output_strides[3] == 1) {
      std::fill_n(channel, count, value);
    } else {
      for (int64_t i = 0; i < count; ++i) channel[i * args.output_strides[3]] = value;
    }
  }
}

void fill_run(const CropMirrorNormalizeArgs& args, int64_t n, int64_t h, int64_t w, int64_t count) {
  if (count <= 0) return;
  switch (args.dtype) {
    case ElementType::float32:
      return fill_pixels<float>(args, n, h, w, count);
    case ElementType::float16:
      return fill_pixels<Float16>(args, n, h, w, count);
    case ElementType::bfloat16:
      return fill_pixels<BFloat16>(args, n, h, w, count);
    case ElementType::uint8:
      return fill_pixels<uint8_t>(args, n, h, w, count);
  }
}

// Everything of the band around what the image covers.
void fill_around(const CropMirrorNormalizeArgs& args, const Band& band, const Band& rows) {
  const PlacedImage& image = args.images[band.n];
  const int64_t width = args.sizes[3], right = image.left + image.width;
  fill_run(args, band.n, band.first, 0, (rows.first - band.first) * width);
  fill_run(args, band.n, rows.last, 0, (band.last - rows.last) * width);
  if (image.width == width) return;
  for (int64_t h = rows.first; h < rows.last; ++h) {
    fill_run(args, band.n, h, 0, image.left);
    fill_run(args, band.n, h, right, width - right);
  }
}

void write_mask(const CropMirrorNormalizeArgs& args, const Band& band, const Band& rows) {
  const PlacedImage& image = args.images[band.n];
  const int64_t width = args.sizes[3];
  uint8_t* const mask = args.mask + band.n * args.sizes[2] * width;
  std::memset(mask + band.first * width, 0, static_cast<size_t>((band.last - band.first) * width));
  for (int64_t h = rows.first; h < rows.last; ++h) {
    std::memset(mask + h * width + image.left, 1, static_cast<size_t>(image.width));
  }
}

}  // namespace

int32_t crop_mirror_normalize_cpu(const CropMirrorNormalizeArgs& args, ParallelFor parallel_for) {
  struct Job {
    const CropMirrorNormalizeArgs& args;
    Loop loop;
  } job{args, loop_for(common_isa())};
  for (int64_t size : args.sizes) {
    if (size == 0) return 0;
  }

  // Rows are counted over the whole batch.
  const auto body = [](int64_t first, int64_t last, void* context) {
    const auto& [args, loop] = *static_cast<const Job*>(context);
    const int64_t height = args.sizes[2];
    NormalizeArgs parts[kMaxParts];
    int64_t count = 0;
    for (int64_t row = first; row < last;) {
      const int64_t n = row / height, h = row % height;
      const Band band{n, h, std::min(height, h + last - row)};
      const Band rows = covered(args, band);
      fill_around(args, band, rows);
      if (args.mask != nullptr) write_mask(args, band, rows);
      if (rows.first < rows.last) parts[count++] = part_of(args, rows);
      if (count == kMaxParts) {
        loop(parts, count);
        count = 0;
      }
      row += band.last - band.first;
    }
    loop(parts, count);
  };
  const int64_t rows = args.sizes[0] * args.sizes[2];
  const int64_t grain = 1 + kGrainElements / (args.sizes[1] * args.sizes[3]);
  if (rows <= grain) {
    body(0, rows, &job);
    return 0;
  }
  return parallel_for(0, rows, grain, body, &job);
}

}  // namespace pixfuse
