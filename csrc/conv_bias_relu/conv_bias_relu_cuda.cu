// The convolution as an implicit matrix multiplication, and its launcher. No torch.
//
// Rows are output pixels, columns output channels, and what is summed over are the taps of the
// kernel. A block takes tiles of 128 pixels by 64 channels of one image. The part of the input that
// a tile reaches, its patch, is brought to shared memory once, normalized, with true zeros where
// the padding is; the overlapping windows of the pixels are then read from there. So bytes leave
// device memory once, and no matrix of windows exists anywhere.
//
// A patch holds quads, four channels of a pixel: what a lane loads at once for a tensor core. (An
// image of three channels wastes a quarter; loading without shuffling is worth more.) The weights
// are brought by a small kernel before into the order in which lanes need them. All blocks of a
// multiprocessor read the same ones with 16-byte loads, which its first cache serves: in shared
// memory, they would need room and barriers.
//
// A kernel that is too large for the shared memory is cut into slices, of rows, of columns, then of
// channels. One block does not load while it multiplies; other blocks of the multiprocessor do.
#include <string.h>

#include "common/cuda_launch.h"
#include "common/tensor_core.h"
#include "conv_bias_relu/activity_records.h"
#include "conv_bias_relu/conv_bias_relu.h"

namespace pixfuse {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpThreads;
constexpr int kTilePixels = 128;                   // 32 of each warp
constexpr int kTileChannels = 64;                  // all of each warp
constexpr int kStageChannels = kTileChannels / 2;  // of the results that are stored together
constexpr int kStepQuads = 4;                      // taps are multiplied 16 at a time
constexpr int kStepWeights = kStepQuads * 4 * kTileChannels;
constexpr int kChunkBytes = 16;

// Four blocks share a multiprocessor: by their registers, and on most GPUs by their memory.
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int64_t kPatchBytes = 24 * 1024;

// An image is cut into runs of tiles until there are as many blocks: a few for each that runs at
// one time on the largest GPUs. The number is fixed so that sums are the same on all of them.
constexpr int64_t kBlocksWanted = 2048;
constexpr int64_t kMaxRuns = 4096;
constexpr int64_t kMaxGrid = 0x7fffffff;

// Rows of the staged results lie so that neither writing nor reading them meets a bank twice.
constexpr int kStagePixelPitch = kStageChannels + 8;
constexpr int kStageChannelPitch = kTilePixels + 4;
constexpr int kStageBytes = 4 * kTilePixels * kStagePixelPitch;

// One axis of a patch: where the taps of the pixels lie. As in the input where windows overlap;
// where they leave gaps, side by side.
struct Axis {
  int stride, dilation, padding;  // in the input
  int size;                       // of the input
  int kernel;                     // taps in all
  int slice;                      // taps at a time
  int slices;
  bool gathered;    // windows side by side
  int pixel_step;   // in the patch, from one pixel's window to the next
  int tap_step;     // in the patch, from one tap to the next
  int patch;        // size in the patch
  int output;       // pixels
  int tile, tiles;  // pixels of a tile, tiles
  // The place in the input of place `i` of the patch of a tile and a slice; `size` or more, or
  // below 0, where there is none.
  __device__ __forceinline__ int input_place(int i, int first_pixel, int first_tap) const {
    const int start = first_pixel * stride + first_tap * dilation - padding;
    if (!gathered) return start + i;
    const int pixel = i / pixel_step, tap = i - pixel * pixel_step;
    return tap < slice ? start + pixel * stride + tap * dilation : -1;
  }
};

struct Parameters {
  const void* input;
  ElementType input_type;
  int64_t input_strides[4];
  int group_channels;    // of the input
  bool whole_quads;      // four channels can be loaded at once
  bool channels_inside;  // of the input: neighbouring channels are nearer than neighbouring pixels
  Axis rows, columns;
  int slice_quads, quad_slices;
  int slice_steps;
  int tile_width_log2;

  Arithmetic arithmetic;
  float scale;
  ChannelConstants channels[kMaxCudaByteChannels];

  const void* packed_weight;
  const void* bias;
  ElementType weight_type;

  void* output;
  ElementType output_type;
  int64_t output_strides[4];
  bool channels_last;
  int vector_log2;  // results that are stored at once

  int groups, group_outputs, channel_blocks;  // blocks of kTileChannels outputs of a group
  int64_t images, first_image;                // of all launches, of this one
  int64_t runs;                               // of tiles, to an image
  int run_tiles;
  Record* records;
};

// --- multiplication ---

// The sums of a thread: kRows pixels by kColumns channels of the tile. The lanes whose numbers
// differ in the bits kLanesOfColumn have the same channels.
template <class T>
struct OnTensorCores {
  using Element = T;
  static constexpr int kRows = 4, kColumns = 16;
  static constexpr unsigned kLanesOfColumn = 4 | 8 | 16;
  float sums[2][8][4];  // 16 pixels and 8 channels; pixels g and g + 8, channels 2t and 2t + 1

  __device__ __forceinline__ float& at(int row, int column) {
    return sums[row / 2][column / 2][row % 2 * 2 + column % 2];
  }
  static __device__ __forceinline__ int row_of(int lane, int i) {
    return i / 2 * 16 + i % 2 * 8 + lane / 4;
  }
  static __device__ __forceinline__ int column_of(int lane, int j) {
    return j / 2 * 8 + lane % 4 * 2 + j % 2;
  }

  // Of packed weight `i` of a step: 16 bytes of a lane have one quad or two.
  struct Place {
    int quad, element, column;
  };
  static constexpr int kQuadsPerLoad = kChunkBytes / static_cast<int>(sizeof(Quad<T>));
  static __device__ __forceinline__ Place place_of(int i) {
    const int element = i % 4, lane = i / 4 / kQuadsPerLoad % kWarpThreads;
    const int tile = i / (4 * kQuadsPerLoad * kWarpThreads) * kQuadsPerLoad + i / 4 % kQuadsPerLoad;
    return {lane % 4, element, tile * 8 + lane / 4};
  }

  // `windows` are the places of the thread's pixels in the patch; a tap below 0 is none.
  __device__ __forceinline__ void multiply_step(const Quad<T>* patch, const int (&windows)[kRows],
                                                const int* taps, const T* weights, int lane,
                                                int channels) {
    const int tap = taps[lane % 4];
    Quad<T> pixels[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      pixels[i] = Quad<T>{};
      if (tap >= 0) pixels[i] = patch[windows[i] + tap];
    }
    const uint4* loads = reinterpret_cast<const uint4*>(weights) + lane;
#pragma unroll
    for (int j = 0; j < 8; j += kQuadsPerLoad) {
      if (j * 8 < channels) {
        const uint4 loaded = __ldg(loads + j / kQuadsPerLoad * kWarpThreads);
        Quad<T> columns[kQuadsPerLoad];
        memcpy(columns, &loaded, sizeof columns);
#pragma unroll
        for (int k = 0; k < kQuadsPerLoad; ++k) {
          multiply_add(sums[0][j + k], pixels[0], pixels[1], columns[k]);
          multiply_add(sums[1][j + k], pixels[2], pixels[3], columns[k]);
        }
      }
    }
  }
};

// A thread has 8 pixels by 8 channels, in two runs of 4: each number that it loads is used 8 times.
struct WithIeeeArithmetic {
  using Element = float;
  static constexpr int kRows = 8, kColumns = 8;
  static constexpr unsigned kLanesOfColumn = 8 | 16;
  float sums[kRows][kColumns];

  __device__ __forceinline__ float& at(int row, int column) { return sums[row][column]; }
  static __device__ __forceinline__ int row_of(int lane, int i) { return i * 4 + lane / 8; }
  static __device__ __forceinline__ int column_of(int lane, int j) {
    return j / 4 * 32 + lane % 8 * 4 + j % 4;
  }

  struct Place {
    int quad, element, column;
  };
  static __device__ __forceinline__ Place place_of(int i) {
    return {i / (4 * kTileChannels), i / kTileChannels % 4, i % kTileChannels};
  }

  __device__ __forceinline__ void multiply_step(const Quad<float>* patch,
                                                const int (&windows)[kRows], const int* taps,
                                                const float* weights, int lane, int channels) {
    for (int quad = 0; quad < kStepQuads; ++quad) {
      const int tap = taps[quad];
      if (tap < 0) continue;
      Quad<float> pixels[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) pixels[i] = patch[windows[i] + tap];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float* row = weights + (quad * 4 + k) * kTileChannels;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (half * 32 < channels) {
            const float4 w = __ldg(reinterpret_cast<const float4*>(row + half * 32) + lane % 8);
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
              const float pixel = pixels[i].values[k];
              float* const sum = sums[i] + half * 4;
              sum[0] = __fmaf_rn(pixel, w.x, sum[0]);
              sum[1] = __fmaf_rn(pixel, w.y, sum[1]);
              sum[2] = __fmaf_rn(pixel, w.z, sum[2]);
              sum[3] = __fmaf_rn(pixel, w.w, sum[3]);
            }
          }
        }
      }
    }
  }
};

__device__ __forceinline__ void round_operand(float value, float& result) { result = value; }
__device__ __forceinline__ void round_operand(float value, __half& result) {
  result = __float2half_rn(value);
}
__device__ __forceinline__ void round_operand(float value, __nv_bfloat16& result) {
  result = __float2bfloat16_rn(value);
}
__device__ __forceinline__ void round_operand(float value, TensorFloat32& result) {
  result = to_tensor_float32(value);
}

// --- the weights ---

struct PackParameters {
  const void* weight;
  ElementType type;
  int64_t strides[4];
  int group_channels, group_outputs, channel_blocks;
  int kernel[2], slice[2], slices[2];
  int slice_quads, quad_slices, slice_steps;
  int64_t count;
  void* packed;  // [group][channel block][slice: quads, rows, columns][step][kStepWeights]
};

constexpr int kPackThreads = 256;

template <class Math>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const PackParameters p) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kPackThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x; i < p.count;
       i += stride) {
    const auto place = Math::place_of(static_cast<int>(i % kStepWeights));
    int64_t left = i / kStepWeights;
    const int tap = static_cast<int>(left % p.slice_steps) * kStepQuads + place.quad;
    left /= p.slice_steps;
    const int column_slice = static_cast<int>(left % p.slices[1]);
    left /= p.slices[1];
    const int row_slice = static_cast<int>(left % p.slices[0]);
    left /= p.slices[0];
    const int quad_slice = static_cast<int>(left % p.quad_slices);
    left /= p.quad_slices;
    const int block = static_cast<int>(left % p.channel_blocks);
    const int64_t group = left / p.channel_blocks;

    const int channel = (quad_slice * p.slice_quads + tap % p.slice_quads) * 4 + place.element;
    const int pixel = tap / p.slice_quads;
    const int row = pixel / p.slice[1], column = pixel % p.slice[1];
    const int ky = row_slice * p.slice[0] + row, kx = column_slice * p.slice[1] + column;
    const int output = block * kTileChannels + place.column;
    const bool exists = channel < p.group_channels && row < p.slice[0] && ky < p.kernel[0] &&
                        kx < p.kernel[1] && output < p.group_outputs;
    float value = 0.0f;
    if (exists) {
      value = load_float(p.weight, p.type,
                         (group * p.group_outputs + output) * p.strides[0] +
                             channel * p.strides[1] + ky * p.strides[2] + kx * p.strides[3]);
    }
    round_operand(value, static_cast<typename Math::Element*>(p.packed)[i]);
  }
}

// --- the input ---

__device__ __forceinline__ float normalized(float x, const ChannelConstants& channel,
                                            Arithmetic arithmetic, float scale) {
  if (arithmetic == Arithmetic::nearest) {
    const double centered =
        __dsub_rn(__dsub_rn(static_cast<double>(x), channel.center_high), channel.center_low);
    return __double2float_rn(__dmul_rn(centered, channel.inverse_width));
  }
  const float scaled =
      arithmetic == Arithmetic::divide ? __fdiv_rn(x, 255.0f) : __fmul_rn(x, scale);
  return __fdiv_rn(__fsub_rn(scaled, channel.mean), channel.std);
}

// Four neighbouring channels, from element `i` on, at an address that allows it.
__device__ __forceinline__ void load_four(const void* from, ElementType type, int64_t i,
                                          float (&values)[4]) {
  if (type == ElementType::float32) {
    const float4 four = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(from) + i));
    memcpy(values, &four, sizeof four);
  } else if (type == ElementType::uint8) {
    const uchar4 four =
        __ldg(reinterpret_cast<const uchar4*>(static_cast<const uint8_t*>(from) + i));
    values[0] = four.x;
    values[1] = four.y;
    values[2] = four.z;
    values[3] = four.w;
  } else {
    const uint2 four = __ldg(reinterpret_cast<const uint2*>(static_cast<const __half*>(from) + i));
    if (type == ElementType::float16) {
      __half halves[4];
      memcpy(halves, &four, sizeof four);
      for (int k = 0; k < 4; ++k) values[k] = __half2float(halves[k]);
    } else {
      __nv_bfloat16 halves[4];
      memcpy(halves, &four, sizeof four);
      for (int k = 0; k < 4; ++k) values[k] = __bfloat162float(halves[k]);
    }
  }
}

// The place of a block's image and channels, and of the tile and the slice that it works on.
struct Position {
  int64_t image_offset;         // elements, to the first channel of the group
  int first_row, first_column;  // of the output
  int row_tap, column_tap, first_quad;
};

// Brings the patch, normalized and rounded to what is multiplied.
template <class T>
__device__ __forceinline__ void stage_patch(const Parameters& p, const Position& at,
                                            const ChannelConstants* channels, Quad<T>* patch) {
  const int width = p.columns.patch, row_items = width * p.slice_quads;
  // One thread, one quad at a time, without a division for each.
  int row = static_cast<int>(threadIdx.x) / row_items;
  int item = static_cast<int>(threadIdx.x) % row_items;
  while (row < p.rows.patch) {
    const int quad = p.channels_inside ? item % p.slice_quads : item / width;
    const int place = p.channels_inside ? item / p.slice_quads : item % width;
    const int y = p.rows.input_place(row, at.first_row, at.row_tap);
    const int x = p.columns.input_place(place, at.first_column, at.column_tap);
    const int first_channel = (at.first_quad + quad) * 4;
    float values[4] = {};
    if (y >= 0 && y < p.rows.size && x >= 0 && x < p.columns.size) {
      const int64_t offset = at.image_offset + first_channel * p.input_strides[1] +
                             y * p.input_strides[2] + x * p.input_strides[3];
      const int left = p.group_channels - first_channel;
      if (p.whole_quads) {
        if (left > 0) load_four(p.input, p.input_type, offset, values);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (k < left) {
            values[k] = load_float(p.input, p.input_type, offset + k * p.input_strides[1]);
          }
        }
      }
      if (p.input_type == ElementType::uint8) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (k < left) {
            values[k] = normalized(values[k], channels[first_channel + k], p.arithmetic, p.scale);
          }
        }
      }
    }
    Quad<T> rounded;
#pragma unroll
    for (int k = 0; k < 4; ++k) round_operand(values[k], rounded.values[k]);
    patch[(row * width + place) * p.slice_quads + quad] = rounded;
    item += kThreads;
    while (item >= row_items) {
      item -= row_items;
      ++row;
    }
  }
}

// Where the taps of a slice lie in the patch, from a window's first one; -1 where there is none.
__device__ __forceinline__ void place_taps(const Parameters& p, const Position& at, int* taps) {
  for (int i = threadIdx.x; i < p.slice_steps * kStepQuads; i += kThreads) {
    const int quad = i % p.slice_quads, pixel = i / p.slice_quads;
    const int row = pixel / p.columns.slice, column = pixel % p.columns.slice;
    const bool exists = row < p.rows.slice && at.row_tap + row < p.rows.kernel &&
                        at.column_tap + column < p.columns.kernel &&
                        (at.first_quad + quad) * 4 < p.group_channels;
    const int place = row * p.rows.tap_step * p.columns.patch + column * p.columns.tap_step;
    taps[i] = exists ? place * p.slice_quads + quad : -1;
  }
}

// --- the results ---

// Adds up what lanes of the same channels have of half of them: afterwards each of these lanes has
// the total of one channel, the first. Half of what is left is handed over in each step.
template <class Math, class T>
__device__ __forceinline__ T total_over_lanes(T (&values)[Math::kColumns / 2], int lane) {
  int count = Math::kColumns / 2;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    if ((Math::kLanesOfColumn & distance) != 0) {
      count /= 2;
      const bool upper = (lane & distance) != 0;
#pragma unroll
      for (int j = 0; j < Math::kColumns / 4; ++j) {
        if (j < count) {
          const T kept = upper ? values[j + count] : values[j];
          const T given = upper ? values[j] : values[j + count];
          values[j] = kept + __shfl_xor_sync(kAllLanes, given, distance);
        }
      }
    }
  }
  return values[0];
}

// Which of the channels of its half it is.
template <class Math>
__device__ __forceinline__ int column_of_total(int lane) {
  int column = 0, count = Math::kColumns / 2;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    if ((Math::kLanesOfColumn & distance) != 0) {
      count /= 2;
      if ((lane & distance) != 0) column += count;
    }
  }
  return column;
}

// What the warps have counted of the half of a tile's channels.
struct TileActivity {
  unsigned counts[kWarps][kStageChannels];  // of active outputs, and 65536 times those of NaN
  float sums[kWarps][kStageChannels];
};

__device__ __forceinline__ uint4 pack_results(ElementType type, const float* from) {
  uint4 packed;
  if (type == ElementType::float32) {
    memcpy(&packed, from, sizeof packed);
    return packed;
  }
  float values[8];
  memcpy(values, from, sizeof values);
  unsigned short bits[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    bits[i] = type == ElementType::float16 ? __half_as_ushort(__float2half_rn(values[i]))
                                           : __bfloat16_as_ushort(__float2bfloat16_rn(values[i]));
  }
  memcpy(&packed, bits, sizeof packed);
  return packed;
}

__device__ __forceinline__ void store_result(void* output, ElementType type, int64_t i,
                                             float value) {
  if (type == ElementType::float32) {
    static_cast<float*>(output)[i] = value;
  } else if (type == ElementType::float16) {
    static_cast<__half*>(output)[i] = __float2half_rn(value);
  } else {
    static_cast<__nv_bfloat16*>(output)[i] = __float2bfloat16_rn(value);
  }
}

// Stores kStageChannels channels of a tile in the order of the output. The values are rounded.
__device__ __forceinline__ void store_stage(const Parameters& p, const float* stage,
                                            int64_t output_offset, int channels,
                                            const Position& at) {
  const int vector = 1 << p.vector_log2;
  const int items = kStageChannels * kTilePixels >> p.vector_log2;
  for (int item = threadIdx.x; item < items; item += kThreads) {
    const int first = item << p.vector_log2;
    const int channel = p.channels_last ? first % kStageChannels : first / kTilePixels;
    const int pixel = p.channels_last ? first / kStageChannels : first % kTilePixels;
    const int y = at.first_row + (pixel >> p.tile_width_log2);
    const int x = at.first_column + (pixel & (p.columns.tile - 1));
    if (channel >= channels || y >= p.rows.output || x >= p.columns.output) continue;
    const int64_t offset = output_offset + channel * p.output_strides[1] + y * p.output_strides[2] +
                           x * p.output_strides[3];
    const float* from = p.channels_last ? stage + pixel * kStagePixelPitch + channel
                                        : stage + channel * kStageChannelPitch + pixel;
    if (vector == 1) {
      store_result(p.output, p.output_type, offset, *from);
    } else {
      const int64_t bytes = offset * (kChunkBytes / vector);
      *reinterpret_cast<uint4*>(static_cast<char*>(p.output) + bytes) =
          pack_results(p.output_type, from);
    }
  }
}

// --- the kernel ---

template <class Math>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    conv_bias_relu_kernel(const Parameters p) {
  using T = typename Math::Element;
  constexpr int kRows = Math::kRows, kColumns = Math::kColumns;
  PIXFUSE_DYNAMIC_SHARED(unsigned char, shared);
  __shared__ ChannelConstants constants[kMaxCudaByteChannels];
  __shared__ TileActivity activity;
  // The patch and, when it is done with, results on their way out; behind them the taps.
  Quad<T>* const patch = reinterpret_cast<Quad<T>*>(shared);
  float* const stage = reinterpret_cast<float*>(shared);
  const int patch_bytes =
      p.rows.patch * p.columns.patch * p.slice_quads * static_cast<int>(sizeof(Quad<T>));
  int* const taps = reinterpret_cast<int*>(
      shared + (patch_bytes < kStageBytes ? kStageBytes : (patch_bytes + 15) / 16 * 16));

  const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  int64_t block = blockIdx.x;
  const int channel_block = static_cast<int>(block % p.channel_blocks);
  block /= p.channel_blocks;
  const int group = static_cast<int>(block % p.groups);
  block /= p.groups;
  const int64_t run = block % p.runs, image = p.first_image + block / p.runs;

  const int first_channel = group * p.group_outputs + channel_block * kTileChannels;
  const int channels_left = p.group_outputs - channel_block * kTileChannels;
  const int channels = channels_left < kTileChannels ? channels_left : kTileChannels;
  const int slices = p.quad_slices * p.rows.slices * p.columns.slices;
  const int64_t slice_weights = static_cast<int64_t>(p.slice_steps) * kStepWeights;
  const T* const weights =
      static_cast<const T*>(p.packed_weight) +
      (static_cast<int64_t>(group) * p.channel_blocks + channel_block) * slices * slice_weights;
  const int64_t output_offset = image * p.output_strides[0] + first_channel * p.output_strides[1];

  Position at{};
  at.image_offset = image * p.input_strides[0] +
                    static_cast<int64_t>(group) * p.group_channels * p.input_strides[1];
  const ChannelConstants* const group_constants = constants + group * p.group_channels;
  if (p.input_type == ElementType::uint8 && threadIdx.x < p.groups * p.group_channels) {
    constants[threadIdx.x] = p.channels[threadIdx.x];
  }

  // The thread's pixels, and their windows in the patch.
  int windows[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int pixel = warp * 32 + Math::row_of(lane, i);
    const int row = pixel >> p.tile_width_log2, column = pixel & (p.columns.tile - 1);
    windows[i] =
        (row * p.rows.pixel_step * p.columns.patch + column * p.columns.pixel_step) * p.slice_quads;
  }

  // Of channel threadIdx.x of the block.
  unsigned active = 0, nan = 0;
  double sum = 0.0;

  const int tiles = p.rows.tiles * p.columns.tiles;
  const int first_tile = static_cast<int>(run) * p.run_tiles;
  const int last_tile = first_tile + p.run_tiles < tiles ? first_tile + p.run_tiles : tiles;
  for (int tile = first_tile; tile < last_tile; ++tile) {
    at.first_row = tile / p.columns.tiles * p.rows.tile;
    at.first_column = tile % p.columns.tiles * p.columns.tile;

    Math math{};
    for (int slice = 0; slice < slices; ++slice) {
      at.column_tap = slice % p.columns.slices * p.columns.slice;
      at.row_tap = slice / p.columns.slices % p.rows.slices * p.rows.slice;
      at.first_quad = slice / p.columns.slices / p.rows.slices * p.slice_quads;
      __syncthreads();  // the memory is free
      stage_patch(p, at, group_constants, patch);
      place_taps(p, at, taps);
      __syncthreads();  // the patch is there
      const T* step_weights = weights + slice * slice_weights;
      for (int step = 0; step < p.slice_steps; ++step) {
        math.multiply_step(patch, windows, taps + step * kStepQuads, step_weights, lane, channels);
        step_weights += kStepWeights;
      }
    }

    unsigned inside = 0;  // one bit for each of the thread's pixels
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int pixel = warp * 32 + Math::row_of(lane, i);
      if (at.first_row + (pixel >> p.tile_width_log2) < p.rows.output &&
          at.first_column + (pixel & (p.columns.tile - 1)) < p.columns.output) {
        inside |= 1u << i;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      constexpr int kHalf = kColumns / 2;
      const int begin = half * kStageChannels;
      // Bias, ReLU, rounding; then the counts of what the output will hold.
      unsigned counts[kHalf];
      float sums[kHalf];
#pragma unroll
      for (int j = 0; j < kHalf; ++j) {
        const int channel = Math::column_of(lane, half * kHalf + j);
        float bias = 0.0f;
        if (p.bias != nullptr && channel < channels) {
          bias = load_float(p.bias, p.weight_type, first_channel + channel);
        }
        counts[j] = 0;
        sums[j] = 0.0f;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          float& value = math.at(i, half * kHalf + j);
          value = rounded_to(p.output_type, relu(__fadd_rn(value, bias)));
          if ((inside >> i & 1u) != 0) {
            counts[j] += value > 0.0f ? 1u : value != value ? 0x10000u : 0u;
            sums[j] += value;
          }
        }
      }
      const unsigned count = total_over_lanes<Math>(counts, lane);
      const float total = total_over_lanes<Math>(sums, lane);

      __syncthreads();  // nobody reads the patch, or the half before, any more
#pragma unroll
      for (int j = 0; j < kHalf; ++j) {
        const int channel = Math::column_of(lane, half * kHalf + j) - begin;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int pixel = warp * 32 + Math::row_of(lane, i);
          stage[p.channels_last ? pixel * kStagePixelPitch + channel
                                : channel * kStageChannelPitch + pixel] =
              math.at(i, half * kHalf + j);
        }
      }
      const int counted = Math::column_of(lane, column_of_total<Math>(lane));
      activity.counts[warp][counted] = count;
      activity.sums[warp][counted] = total;
      __syncthreads();  // the results are there
      store_stage(p, stage, output_offset + begin * p.output_strides[1], channels - begin, at);
      const int own = static_cast<int>(threadIdx.x) - begin;
      if (own >= 0 && own < kStageChannels) {
        for (int w = 0; w < kWarps; ++w) {
          active += activity.counts[w][own] & 0xffffu;
          nan += activity.counts[w][own] >> 16;
          sum += static_cast<double>(activity.sums[w][own]);
        }
      }
    }
  }
  if (threadIdx.x < channels) {
    p.records[(first_channel + threadIdx.x) * p.images * p.runs + image * p.runs + run] = {
        sum, active, nan};
  }
}

// --- planning a launch ---

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Decides how an axis of the patch lies for tiles of `tile` pixels and `slice` taps at a time.
// Neighbouring windows that lie side by side get a gap: their steps would share a bank.
void plan_axis(Axis& axis, int tile, int slice, bool innermost) {
  axis.tile = tile;
  axis.tiles = static_cast<int>(divide_up(axis.output, tile));
  axis.slice = slice;
  axis.slices = static_cast<int>(divide_up(axis.kernel, slice));
  const int gathered_step = innermost ? slice | 1 : slice;
  const int64_t overlapping = static_cast<int64_t>(tile - 1) * axis.stride +
                              static_cast<int64_t>(slice - 1) * axis.dilation + 1;
  const int64_t gathered = static_cast<int64_t>(tile) * gathered_step;
  axis.gathered = gathered < overlapping;
  axis.pixel_step = axis.gathered ? gathered_step : axis.stride;
  axis.tap_step = axis.gathered ? 1 : axis.dilation;
  axis.patch = static_cast<int>(axis.gathered ? gathered : overlapping);
}

int64_t patch_quads(const Parameters& p) {
  return static_cast<int64_t>(p.rows.patch) * p.columns.patch * p.slice_quads;
}

// The shape of a tile that covers the output with the fewest tiles, and of those with the smallest
// patch; then as many taps at a time as fit.
void plan_tiles(Parameters& p, int64_t quad_bytes) {
  int64_t best_tiles = 0, best_quads = 0;
  int best = 0;
  for (int log2 = 7; log2 >= 3; --log2) {
    plan_axis(p.rows, kTilePixels >> log2, p.rows.kernel, false);
    plan_axis(p.columns, 1 << log2, p.columns.kernel, true);
    const int64_t tiles = static_cast<int64_t>(p.rows.tiles) * p.columns.tiles;
    const int64_t quads = patch_quads(p);
    if (log2 == 7 || tiles < best_tiles || (tiles == best_tiles && quads < best_quads)) {
      best = log2;
      best_tiles = tiles;
      best_quads = quads;
    }
  }
  p.tile_width_log2 = best;
  const auto fits = [&](int rows, int columns) {
    plan_axis(p.rows, kTilePixels >> best, rows, false);
    plan_axis(p.columns, 1 << best, columns, true);
    return patch_quads(p) * quad_bytes <= kPatchBytes;
  };
  int rows = p.rows.kernel, columns = p.columns.kernel;
  while (!fits(rows, columns) && rows > 1) --rows;
  while (!fits(rows, columns) && columns > 1) --columns;
}

bool are_multiples(const int64_t (&numbers)[4], int64_t divisor, int left_out) {
  for (int d = 0; d < 4; ++d) {
    if (d != left_out && numbers[d] % divisor != 0) return false;
  }
  return true;
}

int64_t magnitude(int64_t a) { return a < 0 ? -a : a; }

bool is_aligned(const void* address, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) == 0;
}

constexpr int N = 0, C = 1, H = 2, W = 3;

int64_t operand_bytes(Multiplication multiplication) {
  const bool wide =
      multiplication == Multiplication::ieee || multiplication == Multiplication::tf32;
  return wide ? 4 : 2;
}

// Sizes beyond 32 bits are refused before.
Parameters plan(const ConvBiasReluCudaArgs& args) {
  const ConvBiasReluArgs& call = args.call;
  Parameters p{};
  p.input = call.input;
  p.input_type = call.input_type;
  p.output = call.output;
  p.output_type = call.output_type;
  for (int d = 0; d < 4; ++d) {
    p.input_strides[d] = call.input_strides[d];
    p.output_strides[d] = call.output_strides[d];
  }
  p.groups = static_cast<int>(args.groups);
  p.group_channels = static_cast<int>(call.input_sizes[C] / args.groups);
  p.group_outputs = static_cast<int>(call.output_sizes[C] / args.groups);
  p.channel_blocks = static_cast<int>(divide_up(p.group_outputs, kTileChannels));
  for (int d = 0; d < 2; ++d) {
    Axis& axis = d == 0 ? p.rows : p.columns;
    axis.stride = static_cast<int>(call.stride[d]);
    axis.dilation = static_cast<int>(call.dilation[d]);
    axis.padding = static_cast<int>(call.padding[d]);
    axis.size = static_cast<int>(call.input_sizes[H + d]);
    axis.kernel = static_cast<int>(call.kernel[d]);
    axis.output = static_cast<int>(call.output_sizes[H + d]);
  }
  const auto quads = static_cast<int>(divide_up(p.group_channels, 4));
  p.slice_quads = quads >= 3 ? 4 : quads;
  p.quad_slices = static_cast<int>(divide_up(quads, p.slice_quads));
  plan_tiles(p, 4 * operand_bytes(args.multiplication));
  p.slice_steps = static_cast<int>(
      divide_up(static_cast<int64_t>(p.rows.slice) * p.columns.slice * p.slice_quads, kStepQuads));

  const int64_t input_bytes = element_bytes(call.input_type);
  p.whole_quads = call.input_strides[C] == 1 && p.group_channels % 4 == 0 &&
                  are_multiples(call.input_strides, 4, C) &&
                  is_aligned(call.input, 4 * input_bytes);
  p.channels_inside =
      p.slice_quads == 1 || magnitude(call.input_strides[C]) < magnitude(call.input_strides[W]);

  p.arithmetic = call.arithmetic;
  p.scale = call.scale;
  if (call.input_type == ElementType::uint8) {
    for (int64_t c = 0; c < call.input_sizes[C]; ++c) p.channels[c] = call.channels[c];
  }
  p.bias = args.bias;
  p.weight_type = args.weight_type;

  // A chunk is inside or outside as a whole when every run that it can be in has whole chunks.
  p.channels_last = call.output_strides[C] == 1 && call.output_sizes[C] > 1;
  const int64_t vector = kChunkBytes / element_bytes(call.output_type);
  const int innermost = p.channels_last ? C : W;
  const bool whole = p.channels_last
                         ? p.group_outputs % vector == 0
                         : call.output_sizes[W] % vector == 0 && call.output_strides[W] == 1;
  if (whole && are_multiples(call.output_strides, vector, innermost) &&
      is_aligned(call.output, kChunkBytes)) {
    p.vector_log2 = vector == 4 ? 2 : 3;
  }

  p.images = call.output_sizes[N];
  const int64_t tiles = static_cast<int64_t>(p.rows.tiles) * p.columns.tiles;
  const int64_t others = p.images * p.groups * p.channel_blocks;
  const int64_t wanted = args.blocks > 0 ? args.blocks : kBlocksWanted;
  p.runs = runs_at_least(others > 0 ? divide_up(wanted, others) : 1,
                         tiles < kMaxRuns ? tiles : kMaxRuns);
  p.run_tiles = static_cast<int>(divide_up(tiles, p.runs));
  return p;
}

int64_t packed_count(const Parameters& p) {
  return static_cast<int64_t>(p.groups) * p.channel_blocks * p.quad_slices * p.rows.slices *
         p.columns.slices * p.slice_steps * kStepWeights;
}

int64_t record_bytes(const Parameters& p) {
  return static_cast<int64_t>(sizeof(Record)) * p.groups * p.group_outputs * p.images * p.runs;
}

template <class Math>
cudaError_t pack_weight(const ConvBiasReluCudaArgs& args, const Parameters& p, void* packed,
                        cudaStream_t stream) {
  PackParameters pack{};
  pack.weight = args.weight;
  pack.type = args.weight_type;
  for (int d = 0; d < 4; ++d) pack.strides[d] = args.call.weight_strides[d];
  pack.group_channels = p.group_channels;
  pack.group_outputs = p.group_outputs;
  pack.channel_blocks = p.channel_blocks;
  for (int d = 0; d < 2; ++d) {
    const Axis& axis = d == 0 ? p.rows : p.columns;
    pack.kernel[d] = axis.kernel;
    pack.slice[d] = axis.slice;
    pack.slices[d] = axis.slices;
  }
  pack.slice_quads = p.slice_quads;
  pack.quad_slices = p.quad_slices;
  pack.slice_steps = p.slice_steps;
  pack.count = packed_count(p);
  pack.packed = packed;
  constexpr int64_t kMostBlocks = 1024;
  const int64_t blocks = divide_up(pack.count, kPackThreads);
  return launch(pack_kernel<Math>,
                dim3(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks)),
                dim3(kPackThreads), 0, stream, pack);
}

template <class Math>
cudaError_t convolve(const ConvBiasReluCudaArgs& args, Parameters p, cudaStream_t stream) {
  p.records = static_cast<Record*>(args.scratch);
  void* const packed = static_cast<char*>(args.scratch) + record_bytes(p);
  p.packed_weight = packed;
  cudaError_t error = pack_weight<Math>(args, p, packed, stream);

  const int64_t quad_bytes = sizeof(Quad<typename Math::Element>);
  const int64_t patch_bytes = divide_up(patch_quads(p) * quad_bytes, 16) * 16;
  const int64_t shared = (patch_bytes < kStageBytes ? kStageBytes : patch_bytes) +
                         static_cast<int64_t>(sizeof(int)) * p.slice_steps * kStepQuads;
  const int64_t image_blocks = p.runs * p.groups * p.channel_blocks;
  const int64_t launch_images = kMaxGrid / image_blocks;
  for (; p.first_image < p.images && error == cudaSuccess; p.first_image += launch_images) {
    const int64_t left = p.images - p.first_image;
    const int64_t blocks = (left < launch_images ? left : launch_images) * image_blocks;
    error = launch(conv_bias_relu_kernel<Math>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                   static_cast<size_t>(shared), stream, p);
  }
  return error;
}

bool fits_32_bits(const ConvBiasReluArgs& call) {
  constexpr int64_t kMost = 1 << 30;
  bool fits = true;
  for (int d = 0; d < 2; ++d) {
    const int64_t reach = (call.output_sizes[H + d] - 1) * call.stride[d] + call.padding[d] +
                          call.kernel[d] * call.dilation[d];
    fits = fits && reach < kMost && call.input_sizes[H + d] < kMost &&
           kTilePixels * call.stride[d] < kMost;
  }
  const int64_t pixels = call.output_sizes[H] * call.output_sizes[W];
  return fits && call.output_sizes[C] < kMost && call.input_sizes[C] < kMost &&
         pixels / kTilePixels + call.output_sizes[H] + call.output_sizes[W] < kMost;
}

}  // namespace

int64_t conv_bias_relu_cuda_scratch_bytes(const ConvBiasReluCudaArgs& args) {
  if (!fits_32_bits(args.call)) return 0;
  const Parameters p = plan(args);
  return record_bytes(p) + packed_count(p) * operand_bytes(args.multiplication);
}

int conv_bias_relu_cuda(const ConvBiasReluCudaArgs& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const ConvBiasReluArgs& call = args.call;
  if (!fits_32_bits(call) ||
      (call.input_type == ElementType::uint8 && call.input_sizes[C] > kMaxCudaByteChannels)) {
    return cudaErrorInvalidValue;
  }
  const Parameters p = plan(args);
  cudaError_t error = cudaSuccess;
  if (p.images > 0) {
    switch (args.multiplication) {
      case Multiplication::ieee:
        error = convolve<WithIeeeArithmetic>(args, p, cuda_stream);
        break;
      case Multiplication::tf32:
        error = convolve<OnTensorCores<TensorFloat32>>(args, p, cuda_stream);
        break;
      case Multiplication::float16:
        error = convolve<OnTensorCores<__half>>(args, p, cuda_stream);
        break;
      case Multiplication::bfloat16:
        error = convolve<OnTensorCores<__nv_bfloat16>>(args, p, cuda_stream);
        break;
    }
  }
  if (error != cudaSuccess) return error;
  return add_records(args.scratch, p.images, p.runs, call.output_sizes[C], call.activity,
                     cuda_stream);
}

}  // namespace pixfuse
