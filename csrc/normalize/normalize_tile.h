// What the CUDA kernels that turn bytes into results share: how a block of threads takes a tile.
//
// A tile is some rows of some neighbouring pixels of the output, all channels. The block stages the
// bytes that it comes from in shared memory with 16-byte loads, in the order in which they lie in
// memory, and then writes the results with 16-byte stores, in the order of the output. So both
// sides of device memory see whole, aligned accesses whatever the two layouts are, and every byte
// moves once.
//
// A `run` is what lies side by side in memory: in a planar image the pixels of one row and channel,
// in an interleaved one the whole row. Where a run starts or ends off a 16-byte boundary, its first
// and last chunks are moved element by element. A run is staged forwards, also where the output
// wants it backwards: only the steps from one staged byte to the next are negative then.
#pragma once
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

// How the bytes of a tile come to shared memory: one run for each row and channel, one run for each
// row, or byte by byte.
enum class Staging : int { planar, interleaved, gathered };

// The tile of one block; the same for all its threads. A describer derives from it and adds where
// the bytes come from and where the results go (see `convert_tile`).
struct Tile {
  int rows, pixels;            // of the output
  int first_row, end_row;      // those of the rows that come from an image; the others are fill
  int first_pixel, end_pixel;  // the same of the pixels of such a row; at least one
  Staging staging;
  int run_pitch;                 // bytes from one staged run to the next: a multiple of 16
  int pixel_step, channel_step;  // from one staged byte to the next; `channel_step` within a run
  int run_start;                 // where a run begins, seen from its first pixel and channel: <= 0
};

// Of one row and channel of a tile.
struct Place {
  const uint8_t* source;  // of its first pixel inside; anything if the row is not
  int64_t target;         // the element of the output of its first pixel
};

// What all blocks of a launch know of the arithmetic and of the output.
struct TileLaunch {
  int64_t output_pixel_stride;  // elements
  int channels;
  Arithmetic arithmetic;
  float scale;
};

__device__ __forceinline__ void convert(float value, float& result) { result = value; }
__device__ __forceinline__ void convert(float value, __half& result) {
  result = __float2half_rn(value);
}
__device__ __forceinline__ void convert(float value, __nv_bfloat16& result) {
  result = __float2bfloat16_rn(value);
}
__device__ __forceinline__ void convert(float value, uint8_t& result) {
  result = static_cast<uint8_t>(value);  // an integer from 0 to 255: a fill
}
__device__ __forceinline__ void convert(int value, uint8_t& result) {
  result = static_cast<uint8_t>(value);
}

__host__ __device__ __forceinline__ int smaller(int64_t a, int64_t b) {
  return static_cast<int>(a < b ? a : b);
}
__host__ __device__ __forceinline__ int larger(int64_t a, int64_t b) {
  return static_cast<int>(a < b ? b : a);
}

__host__ __device__ __forceinline__ int64_t magnitude(int64_t a) { return a < 0 ? -a : a; }

__device__ __forceinline__ int offset_in_chunk(const void* address) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) % kChunkBytes);
}

// What a channel needs for its arithmetic, in float32 or in float64. Each step is rounded, as in
// the reference: no contraction.
struct FloatSteps {
  float mean, std;
  void set(const ChannelConstants& channel) {
    mean = channel.mean;
    std = channel.std;
  }
  __device__ __forceinline__ float apply(int x, const TileLaunch& launch) const {
    const float scaled = launch.arithmetic == Arithmetic::divide
                             ? __fdiv_rn(static_cast<float>(x), 255.0f)
                             : __fmul_rn(static_cast<float>(x), launch.scale);
    return __fdiv_rn(__fsub_rn(scaled, mean), std);
  }
};
struct DoubleSteps {
  double center_high, center_low, inverse_width;
  void set(const ChannelConstants& channel) {
    center_high = channel.center_high;
    center_low = channel.center_low;
    inverse_width = channel.inverse_width;
  }
  __device__ __forceinline__ float apply(int x, const TileLaunch&) const {
    const double centered = __dsub_rn(__dsub_rn(static_cast<double>(x), center_high), center_low);
    return __double2float_rn(__dmul_rn(centered, inverse_width));
  }
};
// Bytes that stay what they are.
struct NoSteps {
  void set(const ChannelConstants&) {}
  __device__ __forceinline__ int apply(int x, const TileLaunch&) const { return x; }
};

// Walks over runs of `chunks` chunks each, one chunk per thread at a time, without a division for
// each.
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

// Writes the results of one tile. `tile` is a Tile with
//   Place place(int row, int channel)
//   int64_t pixel_stride()   of device memory, in bytes; for Staging::gathered
// `steps` and `fill` have one entry per channel. `Interleaved` is the number of channels side by
// side in the output: 0 for a planar output, 3 or 4 known when compiled, -1 for any other number.
// Without `Borders`, all of the tile comes from images.
template <class T, class Steps, int Interleaved, bool Borders, class DescribedTile>
__device__ __forceinline__ void convert_tile(const DescribedTile& tile, const TileLaunch& launch,
                                             const Steps* all_steps, const float* all_fill,
                                             T* output) {
  constexpr int kVector = kChunkBytes / static_cast<int>(sizeof(T));
  const int channels = Interleaved > 0 ? Interleaved : launch.channels;
  const int rows = tile.rows, pixels = tile.pixels;

  PIXFUSE_DYNAMIC_SHARED(uint8_t, staged);
  __shared__ const uint8_t* run_source[kMaxRuns];  // lowest byte in device memory
  __shared__ int run_begin[kMaxRuns];              // the run's first pixel among the staged
  __shared__ T* run_target[kMaxRuns];              // first result in device memory
  __shared__ Steps steps[kMaxChannels];            // parameters are slow to index by thread
  __shared__ float fill[Borders ? kMaxChannels : 1];
  const auto row_inside = [&](int row) {
    return !Borders || (row >= tile.first_row && row < tile.end_row);
  };

  // Describe the runs: of each row and channel, whether or not its neighbours share a staged run.
  const int described = threadIdx.x;
  const bool one_run_per_row = tile.staging == Staging::interleaved;
  if (described < rows * channels) {
    const int row = described / channels, channel = described % channels;
    const Place place = tile.place(row, channel);
    run_target[described] = output + place.target;
    if (row_inside(row)) {
      const int in_run = (one_run_per_row ? channel * tile.channel_step : 0) - tile.run_start;
      const int staged_run = one_run_per_row ? row : described;
      const uint8_t* source = place.source - in_run;
      const int offset = tile.staging == Staging::gathered ? 0 : offset_in_chunk(source);
      run_source[described] = source;
      run_begin[described] =
          staged_run * tile.run_pitch + offset + in_run - tile.first_pixel * tile.pixel_step;
    }
  }
  if (threadIdx.x < channels) {
    steps[threadIdx.x] = all_steps[threadIdx.x];
    if constexpr (Borders) fill[threadIdx.x] = all_fill[threadIdx.x];
  }
  __syncthreads();

  // Stage the bytes.
  const int pixels_inside = tile.end_pixel - tile.first_pixel;
  const int rows_inside = tile.end_row - tile.first_row;
  if (tile.staging == Staging::gathered) {
    ChunkWalk walk(pixels_inside);
    for (; walk.run < rows_inside * channels; walk.advance()) {
      const int run = tile.first_row * channels + walk.run;
      staged[run * tile.run_pitch + walk.chunk] =
          __ldg(run_source[run] + walk.chunk * tile.pixel_stride());
    }
  } else {
    const int run_count = one_run_per_row ? rows_inside : rows_inside * channels;
    const int pixel_bytes = one_run_per_row ? tile.pixel_step : 1;
    const int channel_bytes = one_run_per_row ? (channels - 1) * tile.channel_step : 0;
    const int run_bytes = (pixels_inside - 1) * abs(pixel_bytes) + abs(channel_bytes) + 1;
    ChunkWalk walk((run_bytes + 2 * (kChunkBytes - 1)) / kChunkBytes);
    for (; walk.run < run_count; walk.advance()) {
      const int staged_run = tile.first_row * (one_run_per_row ? 1 : channels) + walk.run;
      const uint8_t* source = run_source[one_run_per_row ? staged_run * channels : staged_run];
      uint8_t* target = staged + staged_run * tile.run_pitch + offset_in_chunk(source);
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
    convert(channel_steps.apply(staged[address], launch), result);
    return result;
  };
  constexpr bool kPlanar = Interleaved == 0;
  const int run_count = kPlanar ? rows * channels : rows;
  const int run_elements = kPlanar ? pixels : pixels * channels;
  // A launch that takes only some of the channels leaves gaps between its pixels.
  const bool gaps = !kPlanar && launch.output_pixel_stride != channels;
  ChunkWalk walk((run_elements + 2 * (kVector - 1)) / kVector);
  for (; walk.run < run_count; walk.advance()) {
    const int first_run = kPlanar ? walk.run : walk.run * channels;
    T* target = run_target[first_run];
    const int first = walk.chunk * kVector - offset_in_chunk(target) / static_cast<int>(sizeof(T));
    const bool inside = row_inside(kPlanar ? walk.run / channels : walk.run);
    const auto pixel_of = [&](int element) { return kPlanar ? element : element / channels; };
    const auto channel_of = [&](int element) { return (kPlanar ? walk.run : element) % channels; };
    const auto pixel_inside = [&](int pixel) {
      return !Borders || (inside && pixel >= tile.first_pixel && pixel < tile.end_pixel);
    };
    const auto element = [&](int i) {
      const int pixel = pixel_of(i), channel = channel_of(i);
      if constexpr (Borders) {
        if (!pixel_inside(pixel)) {
          T result;
          convert(fill[channel], result);
          return result;
        }
      }
      const int run = kPlanar ? first_run : first_run + channel;
      return result_of(run_begin[run] + pixel * tile.pixel_step, steps[channel]);
    };
    if (gaps || first < 0 || first + kVector > run_elements) {
      for (int i = first < 0 ? 0 : first; i < smaller(first + kVector, run_elements); ++i) {
        target[gaps ? pixel_of(i) * launch.output_pixel_stride + channel_of(i) : i] = element(i);
      }
      continue;
    }
    T results[kVector];
    if (pixel_inside(pixel_of(first)) && pixel_inside(pixel_of(first + kVector - 1))) {
      // The elements of a vector take turns through `kTurn` channels, from some channel on. What a
      // channel needs is looked up once for each turn, not for each element.
      constexpr int kTurn = kPlanar ? 1 : Interleaved > 0 ? Interleaved : kVector;
      int address[kTurn];
      Steps turn[kTurn];
#pragma unroll
      for (int k = 0; k < kTurn; ++k) {
        const int channel = channel_of(first + k);
        address[k] = run_begin[kPlanar ? first_run : first_run + channel] +
                     pixel_of(first + k) * tile.pixel_step;
        turn[k] = steps[channel];
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        results[i] = result_of(address[i % kTurn] + i / kTurn * tile.pixel_step, turn[i % kTurn]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) results[i] = element(first + i);
    }
    uint4 packed;
    memcpy(&packed, results, sizeof packed);
    *reinterpret_cast<uint4*>(target + first) = packed;
  }
}

// --- Planning a launch ---

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the bytes of an image reach shared memory, and how many of them a pixel takes there.
struct StagingPlan {
  Staging staging;
  int pixel_step, channel_step;
  int pixel_bytes;

  // Bytes from one run to the next. A run starts where its address does within a chunk: up to 15
  // bytes later.
  __host__ __device__ __forceinline__ int run_pitch(int pixels) const {
    const int run_bytes = staging == Staging::interleaved ? pixels * pixel_bytes : pixels;
    return (run_bytes + 2 * (kChunkBytes - 1)) / kChunkBytes * kChunkBytes;
  }
  int64_t shared_bytes(int rows, int pixels, int channels) const {
    const int64_t run_count = staging == Staging::interleaved ? rows : rows * channels;
    return run_count * run_pitch(pixels);
  }
};

// For rows of `width` pixels; strides in bytes, of any sign.
__host__ __device__ __forceinline__ StagingPlan plan_staging(int64_t pixel_stride,
                                                             int64_t channel_stride, int64_t width,
                                                             int channels) {
  const int64_t pixel = magnitude(pixel_stride);
  const int64_t channel = channels == 1 ? 0 : magnitude(channel_stride);
  if (width == 1) return {Staging::planar, 1, 0, 1};
  if (pixel == 1 && channel != 0) return {Staging::planar, static_cast<int>(pixel_stride), 0, 1};
  // The channels of a pixel lie side by side, or are one and the same.
  if (pixel <= 2 * channels && channel < pixel && (channels - 1) * channel < pixel) {
    return {Staging::interleaved, static_cast<int>(pixel_stride),
            channels == 1 ? 0 : static_cast<int>(channel_stride), static_cast<int>(pixel)};
  }
  return {Staging::gathered, 1, 0, 1};
}

// How many rows and pixels a tile has, out of `row_count` rows of `width` pixels each.
struct TileShape {
  int rows, pixels;
  unsigned tiles_per_row;  // 32 bits: every thread divides by it
};
inline TileShape tile_shape(int64_t row_count, int64_t width, int channels, int pixel_bytes) {
  if (pixel_bytes < channels) pixel_bytes = channels;
  int64_t pixels = kTileBytes / pixel_bytes / kChunkBytes * kChunkBytes;  // keeps runs aligned
  if (pixels > width) pixels = width;
  int64_t rows = kTileBytes / (pixel_bytes * pixels);
  if (pixels < width || rows < 1) rows = 1;
  if (rows > kMaxRuns / channels) rows = kMaxRuns / channels;
  if (rows > row_count) rows = row_count;
  return {static_cast<int>(rows), static_cast<int>(pixels),
          static_cast<unsigned>(divide_up(width, pixels))};
}

}  // namespace
}  // namespace pixfuse
