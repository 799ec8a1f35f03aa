// One pass over memory: the kernel that keeps an image in shared memory, and the plan of its
// launch.
//
// A block takes a group: what has a mean and a std of its own, an image or one plane of it. It
// stages the group's bytes in shared memory with 16-byte loads and adds them up meanwhile, computes
// from the sums what each of the 256 values of a byte becomes, and writes the results with 16-byte
// stores in the order of the output. So every byte is read once, whatever the two layouts are, and
// the arithmetic in float64, which many GPUs do slowly, is done for 256 values and not for each
// pixel.
//
// A `run` is what lies side by side in memory: in a planar image the pixels of one row and channel,
// in an interleaved one the whole row. Rows that follow one another without a gap are one. Where a
// run starts or ends off a 16-byte boundary, its first and last bytes are moved one by one.
#pragma once
#include <limits.h>
#include <string.h>

#include "common/pixel_rows.h"
#include "normalize/normalize_tile.h"
#include "standardize_per_image/standardize_per_image.h"
#include "standardize_per_image/standardize_per_image_constants.h"

namespace pixfuse {
namespace {

constexpr int kWarpThreads = 32;
constexpr int kMostThreads = 1024;  // of a block with a large group, which has an SM for itself
constexpr int kMostWarps = kMostThreads / kWarpThreads;
constexpr int kFewThreads = 256;
constexpr int64_t kSmallGroupBytes = 32 * 1024;  // of which an SM takes several at a time
constexpr int kLoadsInFlight = 4;                // of a thread
constexpr int kByteValues = 256;

struct OnePassParameters {
  const uint8_t* images;
  void* output;
  int64_t image_strides[4];    // N, C, H, W
  int64_t output_strides[4];   // N, C, H, W
  unsigned planes;             // groups of an image, next to each other along C
  int channels, rows, pixels;  // of a group, after merging rows
  StagingPlan plan;
  int run_pitch;
  int staged_bytes;          // a multiple of 16; the tables of results follow
  bool summed_while_staged;  // all staged bytes count, each once and to one sum
  bool per_channel;
  double floor;
};

// Walks over runs of `items` items each, `step` items at a time, with one division at the start.
struct Walk {
  int run, item, items, run_step, item_step;
  __device__ __forceinline__ Walk(int items_per_run, int start, int step)
      : run(start / items_per_run),
        item(start % items_per_run),
        items(items_per_run),
        run_step(step / items_per_run),
        item_step(step % items_per_run) {}
  __device__ __forceinline__ void advance() {
    run += run_step;
    item += item_step;
    if (item >= items) {
      item -= items;
      ++run;
    }
  }
};

using Total = unsigned long long;

__device__ __forceinline__ Total sum_of_warp(Total value) {
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, distance);
  }
  return value;
}

// The sum of bytes and that of their squares. In 32 bits: a thread has a 32nd of shared memory at
// most, and that times 255^2 fits.
struct ByteSums {
  unsigned sum = 0, squares = 0;
  __device__ __forceinline__ void add(unsigned byte) {
    sum += byte;
    squares += byte * byte;
  }
  __device__ __forceinline__ void add(const uint4& bytes) {
    for (const unsigned word : {bytes.x, bytes.y, bytes.z, bytes.w}) {
      sum = __dp4a(word, 0x01010101u, sum);
      squares = __dp4a(word, word, squares);
    }
  }
};

// What a block declares beside its bytes and its tables.
struct OnePassBlock {
  // Of each warp, or of each channel and each of the parts that warps take of it.
  Total sums[kMostWarps], squares[kMostWarps];
  DoubleSteps steps[kMaxChannels];
};
static_assert(kMaxChannels <= kMostWarps);

// `Interleaved` is the number of channels of an interleaved output: 3, 4 or -1 for another; 0
// stands for a planar one.
template <class T, int Interleaved>
__global__ void __launch_bounds__(kMostThreads) one_pass_kernel(const OnePassParameters p) {
  PIXFUSE_DYNAMIC_SHARED(uint8_t, staged);
  T* const tables = reinterpret_cast<T*>(staged + p.staged_bytes);
  __shared__ OnePassBlock block;
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int64_t n = blockIdx.x / p.planes, plane = blockIdx.x % p.planes;
  const uint8_t* image = p.images + n * p.image_strides[0] + plane * p.image_strides[1];
  const int channels = Interleaved > 0 ? Interleaved : p.channels;
  const bool interleaved = p.plan.staging == Staging::interleaved;
  const int runs = interleaved ? p.rows : channels * p.rows;
  const auto source_of = [&](int channel, int row) {
    return image + channel * p.image_strides[1] + row * p.image_strides[2];
  };
  // Of a run of one channel; rows are mostly merged to one.
  const auto channel_of_run = [&](int run) { return p.rows == 1 ? run : run / p.rows; };
  const auto source_of_run = [&](int run) {
    const int channel = interleaved ? 0 : channel_of_run(run);
    return source_of(channel, run - channel * p.rows);
  };
  // Where a run begins among the staged bytes: as far behind a 16-byte boundary as in device
  // memory.
  const auto begin_of_run = [&](int run, const uint8_t* source) {
    const bool gathered = p.plan.staging == Staging::gathered;
    return run * p.run_pitch + (gathered ? 0 : offset_in_chunk(source));
  };
  // And where the first pixel of a row and channel is.
  const auto begin_of = [&](int channel, int row) {
    return interleaved ? begin_of_run(row, source_of(0, row)) + channel * p.plan.channel_step
                       : begin_of_run(channel * p.rows + row, source_of(channel, row));
  };

  // Stage the bytes.
  ByteSums own;
  if (p.plan.staging == Staging::gathered) {
    for (Walk walk(p.pixels, thread, threads); walk.run < runs; walk.advance()) {
      const uint8_t* source = source_of_run(walk.run);
      const uint8_t byte = __ldg(source + walk.item * p.image_strides[3]);
      staged[begin_of_run(walk.run, source) + walk.item] = byte;
      own.add(byte);
    }
  } else {
    const int run_bytes =
        (p.pixels - 1) * p.plan.pixel_step + (channels - 1) * p.plan.channel_step + 1;
    Walk walk((run_bytes + 2 * (kChunkBytes - 1)) / kChunkBytes, thread, threads);
    while (walk.run < runs) {
      const uint8_t* source[kLoadsInFlight] = {};
      uint8_t* target[kLoadsInFlight] = {};
      int first[kLoadsInFlight] = {};
      uint4 bytes[kLoadsInFlight] = {};
      const auto whole = [&](int k) {
        return first[k] >= 0 && first[k] + kChunkBytes <= run_bytes;
      };
#pragma unroll
      for (int k = 0; k < kLoadsInFlight; ++k) {
        first[k] = run_bytes;  // nothing
        if (walk.run < runs) {
          source[k] = source_of_run(walk.run);
          target[k] = staged + begin_of_run(walk.run, source[k]);
          first[k] = walk.item * kChunkBytes - offset_in_chunk(source[k]);
          if (whole(k)) bytes[k] = __ldg(reinterpret_cast<const uint4*>(source[k] + first[k]));
        }
        walk.advance();
      }
#pragma unroll
      for (int k = 0; k < kLoadsInFlight; ++k) {
        if (whole(k)) {
          *reinterpret_cast<uint4*>(target[k] + first[k]) = bytes[k];
          own.add(bytes[k]);
          continue;
        }
        const int end = smaller(first[k] + kChunkBytes, run_bytes);
#pragma unroll 1
        for (int i = first[k] < 0 ? 0 : first[k]; i < end; ++i) {
          const uint8_t byte = __ldg(source[k] + i);
          target[k][i] = byte;
          own.add(byte);
        }
      }
    }
  }
  __syncthreads();  // All bytes are staged.

  // Add them up.
  const int warp = thread / kWarpThreads, lane = thread % kWarpThreads;
  const int warps = threads / kWarpThreads;
  const int parts = p.summed_while_staged ? warps : larger(warps / channels, 1);
  const int items = p.summed_while_staged ? warps : parts * channels;
  for (int item = warp; item < items; item += warps) {
    if (!p.summed_while_staged) {
      const int channel = item % channels, start = item / channels * kWarpThreads + lane;
      own = {};
      for (Walk walk(p.pixels, start, parts * kWarpThreads); walk.run < p.rows; walk.advance()) {
        own.add(staged[begin_of(channel, walk.run) + walk.item * p.plan.pixel_step]);
      }
    }
    const Total sum = sum_of_warp(own.sum), square = sum_of_warp(own.squares);
    if (lane == 0) {
      block.sums[item] = sum;
      block.squares[item] = square;
    }
  }
  __syncthreads();  // All parts are added up.

  if (thread < channels) {
    Total sum = 0, square = 0;
    for (int item = 0; item < items; ++item) {
      if (p.per_channel && item % channels != thread) continue;
      sum += block.sums[item];
      square += block.squares[item];
    }
    const int64_t count = int64_t{p.rows} * p.pixels * (p.per_channel ? 1 : channels);
    const ChannelConstants constants =
        standardization_of(count, static_cast<int64_t>(sum), static_cast<int64_t>(square), p.floor);
    block.steps[thread] = {constants.center_high, constants.center_low, constants.inverse_width};
  }
  __syncthreads();  // The constants are there.

  const int table_values = (p.per_channel ? channels : 1) * kByteValues;
  for (int i = thread; i < table_values; i += threads) {
    T result;
    convert(block.steps[i / kByteValues].apply(i % kByteValues, TileLaunch{}), result);
    tables[i] = result;
  }
  __syncthreads();  // The tables are there.

  // Write, in the order of the output.
  constexpr bool kPlanar = Interleaved == 0;
  constexpr int kVector = kChunkBytes / static_cast<int>(sizeof(T));
  T* output = static_cast<T*>(p.output) + n * p.output_strides[0] + plane * p.output_strides[1];
  const int output_runs = kPlanar ? channels * p.rows : p.rows;
  const int elements = kPlanar ? p.pixels : p.pixels * channels;
  Walk walk((elements + 2 * (kVector - 1)) / kVector, thread, threads);
  for (; walk.run < output_runs; walk.advance()) {
    const int run_channel = kPlanar ? channel_of_run(walk.run) : 0;
    const int row = walk.run - run_channel * p.rows;
    T* target = output + run_channel * p.output_strides[1] + row * p.output_strides[2];
    const int first = walk.item * kVector - offset_in_chunk(target) / static_cast<int>(sizeof(T));
    const auto channel_of = [&](int i) { return kPlanar ? run_channel : i % channels; };
    const auto address_of = [&](int i) {
      return begin_of(channel_of(i), row) + (kPlanar ? i : i / channels) * p.plan.pixel_step;
    };
    const auto table_of = [&](int i) {
      return tables + (p.per_channel ? channel_of(i) * kByteValues : 0);
    };
    if (first < 0 || first + kVector > elements) {
#pragma unroll 1
      for (int i = first < 0 ? 0 : first; i < smaller(first + kVector, elements); ++i) {
        target[i] = table_of(i)[staged[address_of(i)]];
      }
      continue;
    }
    // The elements of a vector take turns through `kTurn` channels, from some channel on. What a
    // channel needs is looked up once for each turn, not for each element.
    constexpr int kTurn = kPlanar ? 1 : Interleaved > 0 ? Interleaved : kVector;
    int address[kTurn];
    const T* table[kTurn];
#pragma unroll
    for (int k = 0; k < kTurn; ++k) {
      address[k] = address_of(first + k);
      table[k] = table_of(first + k);
    }
    T results[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const int later = i / kTurn * p.plan.pixel_step;
      results[i] = table[i % kTurn][staged[address[i % kTurn] + later]];
    }
    uint4 packed;
    memcpy(&packed, results, sizeof packed);
    *reinterpret_cast<uint4*>(target + first) = packed;
  }
}

// --- Planning a launch ---

struct OnePass {
  bool fits = false;  // the other fields are only then there
  OnePassParameters parameters{};
  bool planar = false;  // the output
  int64_t groups = 0, shared_bytes = 0;
};

// `args` has pixels.
inline OnePass plan_one_pass(const StandardizeArgs& args, const DeviceLimits& limits) {
  OnePass found;
  OnePassParameters& p = found.parameters;
  // The rows of one image: those of the next one are another group's.
  int64_t sizes[4] = {1, args.sizes[1], args.sizes[2], args.sizes[3]};
  for (int d = 0; d < 4; ++d) {
    p.image_strides[d] = args.image_strides[d];
    p.output_strides[d] = args.output_strides[d];
  }
  merge_rows(sizes, p.image_strides, p.output_strides);
  p.image_strides[0] = args.image_strides[0];
  p.output_strides[0] = args.output_strides[0];
  const int64_t rows = sizes[2], pixels = sizes[3];
  found.planar = pixels == 1 || p.output_strides[3] == 1;
  // Planes are smaller groups, and more. Where one side is interleaved, they would share its bytes.
  const bool by_planes =
      args.per_channel && found.planar && (pixels == 1 || p.image_strides[3] == 1);
  const int64_t channels = by_planes ? 1 : args.sizes[1];
  found.groups = args.sizes[0] * (by_planes ? args.sizes[1] : 1);
  // Also keeps what follows within 32 bits.
  const int64_t room = limits.shared_bytes - static_cast<int64_t>(sizeof(OnePassBlock));
  if (found.groups > INT_MAX || channels > kMaxChannels || rows * pixels > room / channels) {
    return found;
  }
  p.planes = by_planes ? static_cast<unsigned>(args.sizes[1]) : 1;
  p.channels = static_cast<int>(channels);
  p.rows = static_cast<int>(rows);
  p.pixels = static_cast<int>(pixels);
  p.plan = plan_staging(p.image_strides[3], p.image_strides[1], pixels, p.channels);
  p.run_pitch = p.plan.run_pitch(p.pixels);
  const int64_t staged = p.plan.shared_bytes(p.rows, p.pixels, p.channels);
  const int64_t tables = args.per_channel ? channels : 1;
  found.shared_bytes = staged + tables * kByteValues * element_bytes(args.dtype);
  p.staged_bytes = smaller(staged, INT_MAX);
  found.fits = found.shared_bytes <= room;
  const bool dense = p.plan.pixel_bytes == channels && (channels == 1 || p.plan.channel_step == 1);
  p.summed_while_staged =
      (channels == 1 || !args.per_channel) && (p.plan.staging != Staging::interleaved || dense);
  p.per_channel = args.per_channel;
  p.floor = args.floor;
  p.images = args.images;
  p.output = args.output;
  return found;
}

template <class T>
cudaError_t launch_one_pass(const OnePass& plan, cudaStream_t stream) {
  const OnePassParameters& p = plan.parameters;
  const auto start = [&](void (*kernel)(OnePassParameters)) {
    const int threads = plan.shared_bytes > kSmallGroupBytes ? kMostThreads : kFewThreads;
    if (plan.shared_bytes + static_cast<int64_t>(sizeof(OnePassBlock)) >
        kSharedBytesOfEveryKernel) {
      const cudaError_t error = allow_shared_memory(kernel, plan.shared_bytes);
      if (error != cudaSuccess) return error;
    }
    return launch(kernel, dim3(static_cast<unsigned>(plan.groups)), dim3(threads),
                  static_cast<size_t>(plan.shared_bytes), stream, p);
  };
  if (plan.planar) return start(one_pass_kernel<T, 0>);
  if (p.channels == 3) return start(one_pass_kernel<T, 3>);
  if (p.channels == 4) return start(one_pass_kernel<T, 4>);
  return start(one_pass_kernel<T, -1>);
}

}  // namespace
}  // namespace pixfuse
