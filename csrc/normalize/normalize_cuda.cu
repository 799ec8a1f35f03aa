// The kernel of `normalize` and its launcher; no torch. What a block does is in normalize_tile.h;
// here is where its rows come from: a tile is some rows of all images.
#include "normalize/normalize_tile.h"

namespace pixfuse {
namespace {

template <class Steps>
struct TileParameters {
  const uint8_t* images;
  void* output;
  int64_t image_strides[4];   // N, C, H, W
  int64_t output_strides[4];  // N, C, H, W
  int64_t row_count;          // of all images
  int64_t height, width;      // of one image, after merging rows
  TileLaunch launch;
  TileShape shape;
  StagingPlan plan;
  int run_pitch;
  Steps steps[kMaxChannels];
};

template <class Steps>
struct DenseTile : Tile {
  const TileParameters<Steps>& parameters;
  int64_t row0, pixel0;

  __device__ __forceinline__ explicit DenseTile(const TileParameters<Steps>& p) : parameters(p) {
    row0 = static_cast<int64_t>(blockIdx.x / p.shape.tiles_per_row) * p.shape.rows;
    pixel0 = static_cast<int64_t>(blockIdx.x % p.shape.tiles_per_row) * p.shape.pixels;
    first_row = first_pixel = 0;
    end_row = rows = smaller(p.shape.rows, p.row_count - row0);
    end_pixel = pixels = smaller(p.shape.pixels, p.width - pixel0);
    staging = p.plan.staging;
    run_pitch = p.run_pitch;
    pixel_step = p.plan.pixel_step;
    channel_step = p.plan.channel_step;
    run_start = 0;
  }
  __device__ __forceinline__ Place place(int row, int channel) const {
    const int64_t n = (row0 + row) / parameters.height, h = (row0 + row) % parameters.height;
    const auto offset = [&](const int64_t (&strides)[4]) {
      return n * strides[0] + channel * strides[1] + h * strides[2] + pixel0 * strides[3];
    };
    return {parameters.images + offset(parameters.image_strides),
            offset(parameters.output_strides)};
  }
  __device__ __forceinline__ int64_t pixel_stride() const { return parameters.image_strides[3]; }
};

template <class T, class Steps, int Interleaved>
__global__ void __launch_bounds__(kThreads)
    normalize_kernel(const TileParameters<Steps> parameters) {
  convert_tile<T, Steps, Interleaved, false>(DenseTile<Steps>(parameters), parameters.launch,
                                             parameters.steps, nullptr,
                                             static_cast<T*>(parameters.output));
}

template <class T, class Steps>
cudaError_t launch_channels(const NormalizeArgs& args, int64_t first, int count,
                            cudaStream_t stream) {
  TileParameters<Steps> tile{};
  tile.images = args.images + first * args.image_strides[1];
  tile.output = static_cast<T*>(args.output) + first * args.output_strides[1];
  for (int d = 0; d < 4; ++d) {
    tile.image_strides[d] = args.image_strides[d];
    tile.output_strides[d] = args.output_strides[d];
  }
  tile.row_count = args.sizes[0] * args.sizes[2];
  tile.height = args.sizes[2];
  tile.width = args.sizes[3];
  tile.launch = {args.output_strides[3], count, args.arithmetic, args.scale};
  for (int c = 0; c < count; ++c) tile.steps[c].set(args.channels[first + c]);
  tile.plan = plan_staging(args.image_strides[3], args.image_strides[1], tile.width, count);
  tile.shape = tile_shape(tile.row_count, tile.width, count, tile.plan.pixel_bytes);
  tile.run_pitch = tile.plan.run_pitch(tile.shape.pixels);

  const dim3 grid(
      static_cast<unsigned>(divide_up(tile.row_count, tile.shape.rows) * tile.shape.tiles_per_row));
  const auto start = [&](void (*kernel)(TileParameters<Steps>)) {
    const int64_t shared = tile.plan.shared_bytes(tile.shape.rows, tile.shape.pixels, count);
    return launch(kernel, grid, dim3(kThreads), static_cast<size_t>(shared), stream, tile);
  };
  if (args.output_strides[3] == 1 || tile.width == 1) return start(normalize_kernel<T, Steps, 0>);
  if (count == 3) return start(normalize_kernel<T, Steps, 3>);
  if (count == 4) return start(normalize_kernel<T, Steps, 4>);
  return start(normalize_kernel<T, Steps, -1>);
}

template <class T>
cudaError_t launch_type(const NormalizeArgs& args, cudaStream_t stream) {
  for (int64_t first = 0; first < args.sizes[1]; first += kMaxChannels) {
    const int count = smaller(kMaxChannels, args.sizes[1] - first);
    const cudaError_t error = args.arithmetic == Arithmetic::nearest
                                  ? launch_channels<T, DoubleSteps>(args, first, count, stream)
                                  : launch_channels<T, FloatSteps>(args, first, count, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

int normalize_cuda(const NormalizeArgs& original, void* stream) {
  NormalizeArgs args = original;
  for (int64_t size : args.sizes) {
    if (size == 0) return cudaSuccess;
  }
  merge_rows(args);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case ElementType::float32:
      return launch_type<float>(args, cuda_stream);
    case ElementType::float16:
      return launch_type<__half>(args, cuda_stream);
    case ElementType::bfloat16:
      return launch_type<__nv_bfloat16>(args, cuda_stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace pixfuse
