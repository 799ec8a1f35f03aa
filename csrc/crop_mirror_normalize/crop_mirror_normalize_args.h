// From images, wherever they lie, to CropMirrorNormalizeArgs: the checks and the geometry that the
// CPU operator, the CUDA operator and the module of Python's images share. No torch in it.
// Header-only, since each of the three libraries has its own copy.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/checks.h"
#include "crop_mirror_normalize/crop_mirror_normalize.h"
#include "normalize/normalize_constants.h"

namespace pixfuse {

constexpr const char* kCropMirrorNormalize = "crop_mirror_normalize";

// One image as it lies in memory. Strides are bytes, of any sign.
struct ImageSource {
  const uint8_t* pixels;  // row 0, column 0, channel 0
  int64_t height, width, channels;
  int64_t row_stride, pixel_stride, channel_stride;
};

// A row of the tensor `placements`: where the window begins in the image, and how it is turned.
struct Placement {
  int64_t top, left;  // negative where the window begins outside
  int64_t mirror, flip;
};
static_assert(sizeof(Placement) == 4 * sizeof(int64_t));

// Which pixels of an image a window of `output_size` pixels shows, and where; along one dimension.
struct Overlap {
  int64_t source;  // the pixel of the image that comes first in the output
  int64_t output;  // its place there
  int64_t count, step;
};

inline Overlap overlap(int64_t begin, int64_t image_size, int64_t output_size, bool reversed) {
  const int64_t first = begin < 0 ? -begin : 0;  // counted in the window
  const int64_t last = image_size - begin < output_size ? image_size - begin : output_size;
  if (first >= last) return {0, 0, 0, 1};
  if (reversed) return {begin + last - 1, output_size - last, last - first, -1};
  return {begin + first, first, last - first, 1};
}

// An image of 1 channel is repeated; of 4, the first 3 are taken where 3 are asked for.
inline bool channels_fit(int64_t from, int64_t to) {
  return from == to || from == 1 || (from == 4 && to == 3);
}

inline PlacedImage place(const ImageSource& image, const Placement& placement, int64_t channels,
                         int64_t height, int64_t width) {
  const Overlap rows = overlap(placement.top, image.height, height, placement.flip != 0);
  const Overlap columns = overlap(placement.left, image.width, width, placement.mirror != 0);
  PlacedImage placed{};
  if (rows.count == 0 || columns.count == 0) return placed;
  placed.pixels =
      image.pixels + rows.source * image.row_stride + columns.source * image.pixel_stride;
  placed.row_stride = rows.step * image.row_stride;
  placed.pixel_stride = columns.step * image.pixel_stride;
  placed.channel_stride = image.channels == 1 && channels > 1 ? 0 : image.channel_stride;
  placed.top = static_cast<int32_t>(rows.output);
  placed.left = static_cast<int32_t>(columns.output);
  placed.height = static_cast<int32_t>(rows.count);
  placed.width = static_cast<int32_t>(columns.count);
  return placed;
}

// First and one past the last byte that something reaches; equal when it has no elements.
struct ByteSpan {
  uintptr_t begin, end;
  bool overlaps(const ByteSpan& other) const { return begin < other.end && other.begin < end; }
};

inline ByteSpan span_of(const ImageSource& image) {
  const auto origin = reinterpret_cast<uintptr_t>(image.pixels);
  if (image.height <= 0 || image.width <= 0 || image.channels <= 0) return {origin, origin};
  int64_t low = 0, high = 0;
  const auto reach = [&](int64_t size, int64_t stride) {
    (stride < 0 ? low : high) += (size - 1) * stride;
  };
  reach(image.height, image.row_stride);
  reach(image.width, image.pixel_stride);
  reach(image.channels, image.channel_stride);
  return {origin + static_cast<uintptr_t>(low), origin + static_cast<uintptr_t>(high + 1)};
}

// Everything of a call but the output, checked; owns what `args` points to.
struct CropMirrorNormalizeCall {
  CropMirrorNormalizeArgs args{};

  CropMirrorNormalizeCall(const std::vector<ImageSource>& sources, const Placement* placements,
                          int64_t channels, int64_t height, int64_t width,
                          const std::vector<double>& mean, const std::vector<double>& std,
                          int64_t rounding, const std::vector<double>& fill, bool fill_is_output)
      : sources_(sources) {
    constexpr int64_t kMaxSide = std::numeric_limits<int32_t>::max();
    const auto count = static_cast<int64_t>(sources.size());
    const char* const name = kCropMirrorNormalize;
    check(channels > 0 && channels <= kMaxSide, name, "a positive number of channels, got ",
          channels);
    check(height > 0 && height <= kMaxSide && width > 0 && width <= kMaxSide, name,
          "a size from 1 to ", kMaxSide, ", got ", height, " x ", width);
    check(rounding >= 0 && rounding <= 4, name, "rounding from 0 to 4, got ", rounding);
    const int64_t sizes[4] = {count, channels, height, width};
    int64_t output_bytes = 4;  // at most, for each element
    for (int d = 0; d < 4; ++d) {
      args.sizes[d] = sizes[d];
      check(!__builtin_mul_overflow(output_bytes, sizes[d], &output_bytes), name,
            "a result that fits in memory");
    }
    set_images(placements);
    set_channels(mean, std, static_cast<Rounding>(rounding));
    set_fill(fill, fill_is_output);
  }

  CropMirrorNormalizeCall(const CropMirrorNormalizeCall&) = delete;
  CropMirrorNormalizeCall& operator=(const CropMirrorNormalizeCall&) = delete;

  // uint8 is bytes unchanged, so its fill is a byte too.
  void set_dtype(ElementType dtype) {
    args.dtype = dtype;
    if (dtype != ElementType::uint8) return;
    for (size_t c = 0; c < fill_.size(); ++c) {
      const double value = given_fill_[c];
      check(value >= 0.0 && value <= 255.0 && value == std::floor(value), kCropMirrorNormalize,
            "fill to be a whole number from 0 to 255 for uint8, got ", value);
      fill_[c] = static_cast<float>(value);
    }
  }

  // Strides are those of N, C, H, W in elements; `output` has room for all of them.
  void set_output(void* output, const int64_t* strides, uint8_t* mask) {
    // Fake tensors have none, nor has one whose storage was given back.
    check(output != nullptr || args.sizes[0] == 0, kCropMirrorNormalize, "out to have memory");
    args.output = output;
    args.mask = mask;
    int64_t elements = 1;
    for (int d = 0; d < 4; ++d) {
      args.output_strides[d] = strides[d];
      elements *= args.sizes[d];
    }
    const auto begin = reinterpret_cast<uintptr_t>(output);
    const ByteSpan written{begin,
                           begin + static_cast<uintptr_t>(elements * element_bytes(args.dtype))};
    for (size_t n = 0; n < sources_.size(); ++n) {
      check(!written.overlaps(span_of(sources_[n])), kCropMirrorNormalize,
            "out to share no memory with images, got an overlap with images[", n, "]");
    }
    if (mask == nullptr) return;
    const auto mask_begin = reinterpret_cast<uintptr_t>(mask);
    const auto mask_bytes = static_cast<uintptr_t>(elements / args.sizes[1]);
    const ByteSpan masked{mask_begin, mask_begin + mask_bytes};
    check(!masked.overlaps(written), kCropMirrorNormalize, "mask to share no memory with out");
    for (const ImageSource& source : sources_) {
      check(!masked.overlaps(span_of(source)), kCropMirrorNormalize,
            "mask to share no memory with images");
    }
  }

 private:
  const std::vector<ImageSource>& sources_;
  std::vector<PlacedImage> placed_;
  std::vector<ChannelConstants> channels_;
  std::vector<double> given_fill_;
  std::vector<float> fill_;

  void set_images(const Placement* placements) {
    constexpr int64_t kFar = std::numeric_limits<int32_t>::max();
    const auto [count, channels, height, width] = args.sizes;
    placed_.reserve(sources_.size());
    for (int64_t n = 0; n < count; ++n) {
      const ImageSource& image = sources_[static_cast<size_t>(n)];
      const Placement& placement = placements[n];
      check(channels_fit(image.channels, channels), kCropMirrorNormalize, "images[", n, "] of ",
            channels, " channels, got ", image.channels);
      check(placement.top >= -kFar && placement.top <= kFar && placement.left >= -kFar &&
                placement.left <= kFar,
            kCropMirrorNormalize, "the window of images[", n, "] within ", kFar,
            " pixels of it, got top ", placement.top, " and left ", placement.left);
      placed_.push_back(place(image, placement, channels, height, width));
    }
    args.images = placed_.data();
  }

  // One value for every channel, or one per channel; as many as there are channels.
  std::vector<double> per_channel(const std::vector<double>& values, const char* name) const {
    const auto channels = static_cast<size_t>(args.sizes[1]);
    check(values.size() == 1 || values.size() == channels, kCropMirrorNormalize, name,
          " with 1 value or one per channel (", channels, "), got ", values.size());
    return values.size() == channels ? values : std::vector<double>(channels, values.front());
  }

  void set_channels(const std::vector<double>& mean, const std::vector<double>& std,
                    Rounding rounding) {
    const std::vector<double> means = per_channel(mean, "mean"), stds = per_channel(std, "std");
    channels_.resize(means.size());
    NormalizeArgs normalize{};
    set_rounding(normalize, channels_.data(), means.data(), stds.data(), args.sizes[1], rounding);
    args.arithmetic = normalize.arithmetic;
    args.scale = normalize.scale;
    args.channels = normalize.channels;
    for (const ChannelConstants& channel : channels_) {
      check(std::isfinite(channel.mean), kCropMirrorNormalize, "mean finite in float32");
      check(std::isfinite(channel.std) && channel.std > 0.0f, kCropMirrorNormalize,
            "std above 0 and finite in float32");
    }
  }

  // In pixel units the fill takes the place of the byte in the arithmetic of the rounding.
  void set_fill(const std::vector<double>& fill, bool fill_is_output) {
    given_fill_ = per_channel(fill, "fill");
    fill_.resize(given_fill_.size());
    for (size_t c = 0; c < fill_.size(); ++c) {
      const double value = given_fill_[c];
      fill_[c] = fill_is_output ? static_cast<float>(value) : normalized(value, channels_[c]);
      check(std::isfinite(value) && std::isfinite(fill_[c]), kCropMirrorNormalize,
            "fill to be finite in float32, got ", value);
    }
    args.fill = fill_.data();
  }

  float normalized(double value, const ChannelConstants& c) const {
    const auto x = static_cast<float>(value);
    switch (args.arithmetic) {
      case Arithmetic::multiply:
        return ((x * args.scale) - c.mean) / c.std;
      case Arithmetic::divide:
        return ((x / 255.0f) - c.mean) / c.std;
      case Arithmetic::nearest:
        return static_cast<float>(((value - c.center_high) - c.center_low) * c.inverse_width);
    }
    return 0.0f;
  }
};

}  // namespace pixfuse
