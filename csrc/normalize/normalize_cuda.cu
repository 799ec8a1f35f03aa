// The kernel and its launcher; no torch.
//
// A block of threads takes a tile: some rows of some neighbouring pixels, all channels. It stages
// the tile's bytes in shared memory with 16-byte loads, in the order in which they lie in memory,
// and then writes the results with 16-byte stores, in the order of the output. So both sides of
// device memory see whole, aligned accesses whatever the two layouts are, and every byte moves
// once.
//
// A `run` is what lies side by side in memory: in a planar image the pixels of one row and channel,
// in an interleaved one the whole row. Where a run starts or ends off a 16-byte boundary, its first
// and last chunks are moved element by element.
#include <string.h>

#include "common/cuda_launch.h"
#include "normalize/normalize.h"

namespace pixfuse {
namespace {

constexpr int kThreads = 256;
constexpr int kChunkBytes = 16;
constexpr int kTileBytes = 4096;    // one 16-byte load for each thread
constexpr int kMaxRuns = kThreads;  // one thread describes each run
constexpr int kMaxChannels = 32;    // of one launch: their constants travel as parameters

enum class Staging : int { planar, interleaved, gathered };

struct TileParameters {
  const uint8_t* images;
  void* output;
  int64_t image_strides[4];   // N, C, H, W
  int64_t output_strides[4];  // N, C, H, W
  int64_t row_count;          // of all images
  int64_t height, width;      // of one image, after merging rows
  unsigned tiles_per_row;     // 32 bits: every thread divides by it
  int channels;
  int tile_rows, tile_pixels;
  int run_pitch;  // bytes from one staged run to the next: a multiple of 16
  Staging staging;
  Arithmetic arithmetic;
  float scale;
  ChannelConstants constants[kMaxChannels];
};

__device__ __forceinline__ void convert(float value, float& result) { result = value; }
__device__ __forceinline__ void convert(float value, __half& result) {
  result = __float2half_rn(value);
}
__device__ __forceinline__ void convert(float value, __nv_bfloat16& result) {
  result = __float2bfloat16_rn(value);
}

__device__ __forceinline__ int smaller(int64_t a, int64_t b) {
  return static_cast<int>(a < b ? a : b);
}

__device__ __forceinline__ int offset_in_chunk(const void* address) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) % kChunkBytes);
}

// What a channel needs for its arithmetic, in float32 or in float64. Each step is rounded, as in
// the reference: no contraction.
struct FloatSteps {
  float mean, std;
  __device__ __forceinline__ void set(const ChannelConstants& channel) {
    mean = channel.mean;
    std = channel.std;
  }
  __device__ __forceinline__ float apply(int x, const TileParameters& tile) const {
    const float scaled = tile.arithmetic == Arithmetic::divide
                             ? __fdiv_rn(static_cast<float>(x), 255.0f)
                             : __fmul_rn(static_cast<float>(x), tile.scale);
    return __fdiv_rn(__fsub_rn(scaled, mean), std);
  }
};
struct DoubleSteps {
  double center_high, center_low, inverse_width;
  __device__ __forceinline__ void set(const ChannelConstants& channel) {
    center_high = channel.center_high;
    center_low = channel.center_low;
    inverse_width = channel.inverse_width;
  }
  __device__ __forceinline__ float apply(int x, const TileParameters&) const {
    const double centered = __dsub_rn(__dsub_rn(static_cast<double>(x), center_high), center_low);
    return __double2float_rn(__dmul_rn(centered, inverse_width));
  }
};

// Walks over `run_count` runs of `chunks` chunks each, one chunk per thread at a time, without a
// division for each.
struct ChunkWalk {
  int run, chunk, chunks;
  __device__ __forceinline__ explicit ChunkWalk(int chunks_per_run)
      : run(threadIdx.x / chunks_per_run),
        chunk(threadIdx.x % chunks_per_run),
        chunks(chunks_per_run) {}
  __device__ __forceinline__ void advance() {
    chunk += kThreads;
    while (chunk >= chunks) {
      chunk -= chunks;
      ++run;
    }
  }
};

// `Interleaved` is the number of channels side by side in the output: 0 for a planar output, 3 or 4
// known when compiled, -1 for any other number.
template <class T, class Steps, int Interleaved>
__global__ void __launch_bounds__(kThreads) normalize_kernel(const TileParameters tile) {
  constexpr int kVector = kChunkBytes / static_cast<int>(sizeof(T));
  const int channels = Interleaved > 0 ? Interleaved : tile.channels;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x / tile.tiles_per_row) * tile.tile_rows;
  const int64_t pixel0 = static_cast<int64_t>(blockIdx.x % tile.tiles_per_row) * tile.tile_pixels;
  const int rows = smaller(tile.tile_rows, tile.row_count - row0);
  const int pixels = smaller(tile.tile_pixels, tile.width - pixel0);

  PIXFUSE_DYNAMIC_SHARED(uint8_t, staged);
  __shared__ const uint8_t* run_source[kMaxRuns];  // first byte in device memory
  __shared__ int run_begin[kMaxRuns];              // the same byte among the staged ones
  __shared__ T* run_target[kMaxRuns];              // first result in device memory
  __shared__ Steps steps[kMaxChannels];            // parameters are slow to index by thread

  // Describe the runs: of each row and channel, whether or not its neighbours share a staged run.
  const int described = threadIdx.x;
  if (described < rows * channels) {
    const int row = described / channels, channel = described % channels;
    const int64_t n = (row0 + row) / tile.height, h = (row0 + row) % tile.height;
    const uint8_t* row_source = tile.images + n * tile.image_strides[0] +
                                h * tile.image_strides[2] + pixel0 * tile.image_strides[3];
    const uint8_t* source = row_source + channel * tile.image_strides[1];
    run_source[described] = source;
    run_begin[described] = tile.staging == Staging::planar
                               ? described * tile.run_pitch + offset_in_chunk(source)
                           : tile.staging == Staging::interleaved
                               ? row * tile.run_pitch + offset_in_chunk(row_source) + channel
                               : described * tile.run_pitch;
    run_target[described] = static_cast<T*>(tile.output) + n * tile.output_strides[0] +
                            channel * tile.output_strides[1] + h * tile.output_strides[2] +
                            pixel0 * tile.output_strides[3];
  }
  if (threadIdx.x < channels) steps[threadIdx.x].set(tile.constants[threadIdx.x]);
  __syncthreads();

  // Stage the bytes.
  const int pixel_step =
      tile.staging == Staging::interleaved ? static_cast<int>(tile.image_strides[3]) : 1;
  if (tile.staging == Staging::gathered) {
    ChunkWalk walk(pixels);
    for (; walk.run < rows * channels; walk.advance()) {
      staged[run_begin[walk.run] + walk.chunk] =
          __ldg(run_source[walk.run] + walk.chunk * tile.image_strides[3]);
    }
  } else {
    const bool one_run_per_row = tile.staging == Staging::interleaved;
    const int run_count = one_run_per_row ? rows : rows * channels;
    const int run_bytes = one_run_per_row ? (pixels - 1) * pixel_step + channels : pixels;
    ChunkWalk walk((run_bytes + 2 * (kChunkBytes - 1)) / kChunkBytes);
    for (; walk.run < run_count; walk.advance()) {
      const int described_run = one_run_per_row ? walk.run * channels : walk.run;
      const uint8_t* source = run_source[described_run];
      uint8_t* target = staged + run_begin[described_run];
      const int first = walk.chunk * kChunkBytes - offset_in_chunk(source);
      if (first >= 0 && first + kChunkBytes <= run_bytes) {
        *reinterpret_cast<uint4*>(target + first) =
            __ldg(reinterpret_cast<const uint4*>(source + first));
      } else {
        for (int i = first < 0 ? 0 : first; i < smaller(first + kChunkBytes, run_bytes); ++i) {
          target[i] = __ldg(source + i);
        }
      }
    }
  }
  __syncthreads();

  // Convert, in the order of the output.
  const auto result_of = [&](int address, const Steps& channel_steps) {
    T result;
    convert(channel_steps.apply(staged[address], tile), result);
    return result;
  };
  constexpr bool kPlanar = Interleaved == 0;
  const int run_count = kPlanar ? rows * channels : rows;
  const int run_elements = kPlanar ? pixels : pixels * channels;
  // A launch that takes only some of the channels leaves gaps between its pixels.
  const bool gaps = !kPlanar && tile.output_strides[3] != channels;
  ChunkWalk walk((run_elements + 2 * (kVector - 1)) / kVector);
  for (; walk.run < run_count; walk.advance()) {
    const int first_run = kPlanar ? walk.run : walk.run * channels;
    T* target = run_target[first_run];
    const int first = walk.chunk * kVector - offset_in_chunk(target) / static_cast<int>(sizeof(T));
    if (gaps || first < 0 || first + kVector > run_elements) {
      for (int i = first < 0 ? 0 : first; i < smaller(first + kVector, run_elements); ++i) {
        const int pixel = kPlanar ? i : i / channels;
        const int channel = kPlanar ? walk.run % channels : i % channels;
        const int run = kPlanar ? first_run : first_run + channel;
        target[gaps ? pixel * tile.output_strides[3] + channel : i] =
            result_of(run_begin[run] + pixel * pixel_step, steps[channel]);
      }
      continue;
    }
    // The elements of a vector take turns through `kTurn` channels, from some channel on. What a
    // channel needs is looked up once for each turn, not for each element.
    constexpr int kTurn = kPlanar ? 1 : Interleaved > 0 ? Interleaved : kVector;
    int address[kTurn];
    Steps turn[kTurn];
#pragma unroll
    for (int k = 0; k < kTurn; ++k) {
      const int pixel = kPlanar ? first : (first + k) / channels;
      const int channel = kPlanar ? walk.run % channels : (first + k) % channels;
      address[k] = run_begin[kPlanar ? first_run : first_run + channel] + pixel * pixel_step;
      turn[k] = steps[channel];
    }
    T results[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      results[i] = result_of(address[i % kTurn] + i / kTurn * pixel_step, turn[i % kTurn]);
    }
    uint4 packed;
    memcpy(&packed, results, sizeof packed);
    *reinterpret_cast<uint4*>(target + first) = packed;
  }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The tile's shape and how its bytes are staged; returns the bytes of shared memory.
int64_t plan(TileParameters& tile) {
  const int64_t pixel_step = tile.image_strides[3];
  const int64_t channels = tile.channels;
  if (pixel_step == 1 || tile.width == 1) {
    tile.staging = Staging::planar;
  } else if (tile.image_strides[1] == 1 && pixel_step >= channels && pixel_step <= 2 * channels) {
    tile.staging = Staging::interleaved;
  } else {
    tile.staging = Staging::gathered;
  }
  const bool interleaved = tile.staging == Staging::interleaved;
  const int64_t pixel_bytes = interleaved ? pixel_step : channels;

  int64_t pixels = kTileBytes / pixel_bytes / kChunkBytes * kChunkBytes;  // keeps runs aligned
  if (pixels > tile.width) pixels = tile.width;
  int64_t rows = kTileBytes / (pixel_bytes * pixels);
  if (pixels < tile.width || rows < 1) rows = 1;
  if (rows > kMaxRuns / channels) rows = kMaxRuns / channels;
  if (rows > tile.row_count) rows = tile.row_count;
  tile.tile_pixels = static_cast<int>(pixels);
  tile.tile_rows = static_cast<int>(rows);
  tile.tiles_per_row = static_cast<unsigned>(divide_up(tile.width, pixels));

  const int64_t run_bytes = interleaved ? pixels * pixel_step : pixels;
  const int64_t run_count = interleaved ? rows : rows * channels;
  // A run starts where its address does within a chunk: up to 15 bytes later.
  tile.run_pitch =
      static_cast<int>(divide_up(run_bytes + kChunkBytes - 1, kChunkBytes)) * kChunkBytes;
  return run_count * tile.run_pitch;
}

template <class T, class Steps>
cudaError_t launch_for(const TileParameters& tile, int64_t shared_bytes, cudaStream_t stream) {
  const dim3 grid(
      static_cast<unsigned>(divide_up(tile.row_count, tile.tile_rows) * tile.tiles_per_row));
  const dim3 block(kThreads);
  const auto start = [&](void (*kernel)(TileParameters)) {
    return launch(kernel, grid, block, static_cast<size_t>(shared_bytes), stream, tile);
  };
  if (tile.output_strides[3] == 1 || tile.width == 1) return start(normalize_kernel<T, Steps, 0>);
  if (tile.channels == 3) return start(normalize_kernel<T, Steps, 3>);
  if (tile.channels == 4) return start(normalize_kernel<T, Steps, 4>);
  return start(normalize_kernel<T, Steps, -1>);
}

template <class T>
cudaError_t launch_channels(const NormalizeArgs& args, int64_t first, int64_t count,
                            cudaStream_t stream) {
  TileParameters tile{};
  tile.images = args.images + first * args.image_strides[1];
  tile.output = static_cast<T*>(args.output) + first * args.output_strides[1];
  for (int d = 0; d < 4; ++d) {
    tile.image_strides[d] = args.image_strides[d];
    tile.output_strides[d] = args.output_strides[d];
  }
  tile.row_count = args.sizes[0] * args.sizes[2];
  tile.height = args.sizes[2];
  tile.width = args.sizes[3];
  tile.channels = static_cast<int>(count);
  tile.arithmetic = args.arithmetic;
  tile.scale = args.scale;
  for (int64_t c = 0; c < count; ++c) tile.constants[c] = args.channels[first + c];
  const int64_t shared_bytes = plan(tile);
  return args.arithmetic == Arithmetic::nearest
             ? launch_for<T, DoubleSteps>(tile, shared_bytes, stream)
             : launch_for<T, FloatSteps>(tile, shared_bytes, stream);
}

}  // namespace

int normalize_cuda(const NormalizeArgs& original, void* stream) {
  NormalizeArgs args = original;
  for (int64_t size : args.sizes) {
    if (size == 0) return cudaSuccess;
  }
  merge_rows(args);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  for (int64_t first = 0; first < args.sizes[1]; first += kMaxChannels) {
    const int64_t left = args.sizes[1] - first;
    const int64_t count = left < kMaxChannels ? left : kMaxChannels;
    cudaError_t error = cudaErrorInvalidValue;
    switch (args.dtype) {
      case ElementType::float32:
        error = launch_channels<float>(args, first, count, cuda_stream);
        break;
      case ElementType::float16:
        error = launch_channels<__half>(args, first, count, cuda_stream);
        break;
      case ElementType::bfloat16:
        error = launch_channels<__nv_bfloat16>(args, first, count, cuda_stream);
        break;
      case ElementType::uint8:
        break;  // not a type of normalize
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace pixfuse
