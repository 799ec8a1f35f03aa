// The kernel of `crop_mirror_normalize` and its launcher; no torch. What a block does is in
// normalize_tile.h; here is where its rows come from: a tile is some rows of one image's place in
// the batch, of which the image covers all, a part or nothing.
//
// One launch takes a whole batch, whatever the sizes and the layouts of its images: where each of
// them lies travels to the kernel as parameters. So nothing is copied to the device and nothing
// waited for, and a CUDA graph can hold the launch.
#include "crop_mirror_normalize/crop_mirror_normalize.h"

#include "normalize/normalize_tile.h"

namespace pixfuse {
namespace {

// Images of one launch: each launch pays for the parameters of that many, 12 KiB. CUDA allows 32
// (compute capability 7.0 and above, CUDA 12.1 and above).
constexpr int kMaxImages = 256;

template <class Steps>
struct BatchParameters {
  void* output;
  uint8_t* mask;              // [images, height, width] or null
  int64_t output_strides[4];  // N, C, H, W
  int64_t height, width;      // of the output
  unsigned tiles_per_image;
  TileShape shape;
  TileLaunch launch;
  Steps steps[kMaxChannels];
  float fill[kMaxChannels];
  PlacedImage images[kMaxImages];
};
template <class Steps>
constexpr bool kFits = sizeof(BatchParameters<Steps>) <= 32764;
static_assert(kFits<FloatSteps> && kFits<DoubleSteps> && kFits<NoSteps>);

__device__ __forceinline__ int between(int64_t low, int64_t value, int64_t high) {
  return static_cast<int>(value < low ? low : value > high ? high : value);
}

template <class Parameters>
struct BatchTile : Tile {
  const Parameters& parameters;
  unsigned n;
  int64_t row0, pixel0;

  __device__ __forceinline__ explicit BatchTile(const Parameters& p)
      : parameters(p), n(blockIdx.x / p.tiles_per_image) {
    const unsigned tile = blockIdx.x % p.tiles_per_image;
    row0 = static_cast<int64_t>(tile / p.shape.tiles_per_row) * p.shape.rows;
    pixel0 = static_cast<int64_t>(tile % p.shape.tiles_per_row) * p.shape.pixels;
    rows = smaller(p.shape.rows, p.height - row0);
    pixels = smaller(p.shape.pixels, p.width - pixel0);

    const PlacedImage& image = p.images[n];
    const int64_t top = image.top - row0, left = image.left - pixel0;
    first_row = between(0, top, rows);
    end_row = between(first_row, top + image.height, rows);
    first_pixel = between(0, left, pixels);
    end_pixel = between(first_pixel, left + image.width, pixels);
    if (first_pixel == end_pixel) {
      end_row = first_row;
      first_pixel = 0;
      end_pixel = 1;
    }
    const StagingPlan plan =
        plan_staging(image.pixel_stride, image.channel_stride, image.width, p.launch.channels);
    staging = plan.staging;
    run_pitch = plan.run_pitch(p.shape.pixels);
    pixel_step = plan.pixel_step;
    channel_step = plan.channel_step;
    run_start = smaller(0, (end_pixel - first_pixel - 1) * pixel_step) +
                smaller(0, (p.launch.channels - 1) * channel_step);
  }
  __device__ __forceinline__ Place place(int row, int channel) const {
    const PlacedImage& image = parameters.images[n];
    const int64_t* strides = parameters.output_strides;
    const uint8_t* source = nullptr;
    if (row >= first_row && row < end_row) {
      source = image.pixels + (row0 + row - image.top) * image.row_stride +
               (pixel0 + first_pixel - image.left) * image.pixel_stride +
               channel * image.channel_stride;
    }
    return {source, n * strides[0] + channel * strides[1] + (row0 + row) * strides[2] +
                        pixel0 * strides[3]};
  }
  __device__ __forceinline__ int64_t pixel_stride() const {
    return parameters.images[n].pixel_stride;
  }
};

// 1 where a pixel of the tile comes from the image, else 0.
template <class Parameters>
__device__ __forceinline__ void write_mask(const BatchTile<Parameters>& tile) {
  const Parameters& p = tile.parameters;
  uint8_t* const begin = p.mask + (tile.n * p.height + tile.row0) * p.width + tile.pixel0;
  ChunkWalk walk((tile.pixels + 2 * (kChunkBytes - 1)) / kChunkBytes);
  for (; walk.run < tile.rows; walk.advance()) {
    uint8_t* target = begin + walk.run * p.width;
    const int first = walk.chunk * kChunkBytes - offset_in_chunk(target);
    const bool inside = walk.run >= tile.first_row && walk.run < tile.end_row;
    const auto value = [&](int pixel) {
      return static_cast<uint8_t>(inside && pixel >= tile.first_pixel && pixel < tile.end_pixel);
    };
    if (first < 0 || first + kChunkBytes > tile.pixels) {
      for (int i = first < 0 ? 0 : first; i < smaller(first + kChunkBytes, tile.pixels); ++i) {
        target[i] = value(i);
      }
      continue;
    }
    uint8_t values[kChunkBytes];
#pragma unroll
    for (int i = 0; i < kChunkBytes; ++i) values[i] = value(first + i);
    uint4 packed;
    memcpy(&packed, values, sizeof packed);
    *reinterpret_cast<uint4*>(target + first) = packed;
  }
}

template <class T, class Steps, int Interleaved>
__global__ void __launch_bounds__(kThreads)
    crop_mirror_normalize_kernel(const BatchParameters<Steps> __grid_constant__ p) {
  const BatchTile<BatchParameters<Steps>> tile(p);
  if (p.mask != nullptr) write_mask(tile);
  convert_tile<T, Steps, Interleaved, true>(tile, p.launch, p.steps, p.fill,
                                            static_cast<T*>(p.output));
}

// Can each image be seen as one long row, which fewer and fuller chunks make up?
bool rows_follow_on(const CropMirrorNormalizeArgs& args) {
  const int64_t height = args.sizes[2], width = args.sizes[3];
  if (height * width > INT32_MAX || args.output_strides[2] != args.output_strides[3] * width) {
    return false;
  }
  for (int64_t n = 0; n < args.sizes[0]; ++n) {
    const PlacedImage& image = args.images[n];
    if (image.top != 0 || image.left != 0 || image.height != height || image.width != width ||
        image.row_stride != image.pixel_stride * width) {
      return false;
    }
  }
  return true;
}

// Some images and some channels of a call; the arguments are of these images.
template <class T, class Steps>
cudaError_t launch_part(const CropMirrorNormalizeArgs& args, int64_t first_channel,
                        int channel_count, cudaStream_t stream) {
  BatchParameters<Steps> p{};
  p.output = static_cast<T*>(args.output) + first_channel * args.output_strides[1];
  p.mask = first_channel == 0 ? args.mask : nullptr;
  for (int d = 0; d < 4; ++d) p.output_strides[d] = args.output_strides[d];
  const bool one_row = rows_follow_on(args);
  p.height = one_row ? 1 : args.sizes[2];
  p.width = one_row ? args.sizes[2] * args.sizes[3] : args.sizes[3];
  p.launch = {args.output_strides[3], channel_count, args.arithmetic, args.scale};
  for (int c = 0; c < channel_count; ++c) {
    p.steps[c].set(args.channels[first_channel + c]);
    p.fill[c] = args.fill[first_channel + c];
  }

  const auto plan_of = [&](const PlacedImage& image) {
    return plan_staging(image.pixel_stride, image.channel_stride, image.width, channel_count);
  };
  const auto covers = [](const PlacedImage& image) { return image.height > 0 && image.width > 0; };
  int pixel_bytes = channel_count;
  for (int64_t n = 0; n < args.sizes[0]; ++n) {
    PlacedImage& image = p.images[n];
    image = args.images[n];
    if (one_row) {
      image.height = 1;
      image.width = static_cast<int32_t>(p.width);
    }
    if (!covers(image)) continue;
    image.pixels += first_channel * image.channel_stride;
    pixel_bytes = larger(pixel_bytes, plan_of(image).pixel_bytes);
  }
  p.shape = tile_shape(p.height, p.width, channel_count, pixel_bytes);
  p.tiles_per_image =
      static_cast<unsigned>(divide_up(p.height, p.shape.rows) * p.shape.tiles_per_row);
  int64_t shared_bytes = 0;
  for (int64_t n = 0; n < args.sizes[0]; ++n) {
    if (!covers(p.images[n])) continue;
    const int64_t needed =
        plan_of(p.images[n]).shared_bytes(p.shape.rows, p.shape.pixels, channel_count);
    if (needed > shared_bytes) shared_bytes = needed;
  }

  const auto start = [&](auto* kernel) {
    const dim3 grid(static_cast<unsigned>(args.sizes[0]) * p.tiles_per_image);
    return launch(kernel, grid, dim3(kThreads), static_cast<size_t>(shared_bytes), stream, p);
  };
  if (args.output_strides[3] == 1 || p.width == 1) {
    return start(crop_mirror_normalize_kernel<T, Steps, 0>);
  }
  if (channel_count == 3) return start(crop_mirror_normalize_kernel<T, Steps, 3>);
  return start(crop_mirror_normalize_kernel<T, Steps, -1>);
}

template <class T, class Steps>
cudaError_t launch_steps(const CropMirrorNormalizeArgs& args, cudaStream_t stream) {
  for (int64_t n = 0; n < args.sizes[0]; n += kMaxImages) {
    CropMirrorNormalizeArgs part = args;
    part.images += n;
    part.sizes[0] = smaller(kMaxImages, args.sizes[0] - n);
    part.output = static_cast<T*>(args.output) + n * args.output_strides[0];
    if (args.mask != nullptr) part.mask += n * args.sizes[2] * args.sizes[3];
    for (int64_t c = 0; c < args.sizes[1]; c += kMaxChannels) {
      const int count = smaller(kMaxChannels, args.sizes[1] - c);
      const cudaError_t error = launch_part<T, Steps>(part, c, count, stream);
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

template <class T>
cudaError_t launch_type(const CropMirrorNormalizeArgs& args, cudaStream_t stream) {
  return args.arithmetic == Arithmetic::nearest ? launch_steps<T, DoubleSteps>(args, stream)
                                                : launch_steps<T, FloatSteps>(args, stream);
}

cudaError_t launch_all(const CropMirrorNormalizeArgs& args, cudaStream_t stream) {
  switch (args.dtype) {
    case ElementType::float32:
      return launch_type<float>(args, stream);
    case ElementType::float16:
      return launch_type<__half>(args, stream);
    case ElementType::bfloat16:
      return launch_type<__nv_bfloat16>(args, stream);
    case ElementType::uint8:
      return launch_steps<uint8_t, NoSteps>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int crop_mirror_normalize_cuda(const CropMirrorNormalizeArgs& args, void* stream) {
  for (int64_t size : args.sizes) {
    if (size == 0) return cudaSuccess;
  }
  return launch_all(args, static_cast<cudaStream_t>(stream));
}

}  // namespace pixfuse
