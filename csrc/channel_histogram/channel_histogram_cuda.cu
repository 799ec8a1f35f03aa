// The kernel that counts bytes, and the launchers of the two operators that stand on it:
// `channel_histogram` and `image_moments`, whose sums follow from the counts. No torch.
//
// A block counts into shared memory, in one table per warp so that fewer threads wait for each
// other, and adds what it found to device memory at the end. Bytes are read 16 at a time.
//
// A `run` is what is read as neighbours: a row of whole pixels where they lie side by side,
// otherwise a row of one channel.
#include "channel_histogram/channel_histogram.h"
#include "common/cuda_launch.h"
#include "image_moments/image_moments.h"

namespace pixfuse {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpThreads = 32;
constexpr int kTables = kThreads / kWarpThreads;
constexpr int kMaxChannels = 4;  // of one launch
constexpr int kChunk = 16;       // bytes that a thread takes at a time
constexpr int64_t kChunksPerThread = 8;
constexpr int64_t kMaxBlocks = 65536;  // and then each thread takes more

struct CountParameters {
  const uint8_t* images;
  int64_t* counts;          // [channels, 256] of the launch, or null:
  int64_t *sums, *squares;  // of group g and channel c at [g * result_stride + c]
  int64_t result_stride;
  int64_t group_stride;          // what is counted together: all images, or each alone
  int64_t sizes[3], strides[3];  // rows of make_long_rows
  int64_t channel_stride;
  int64_t items;  // chunks of all runs of a group
  int64_t chunks_per_run;
  int64_t run_elements, run_step;
  unsigned blocks_per_group;
  int channels;
  bool whole_pixels;  // a run has all channels of the launch, in turn
};

using Counter = unsigned long long;  // what CUDA can add to atomically

__device__ __forceinline__ void add(int64_t* total, Counter value) {
  if (value != 0) atomicAdd(reinterpret_cast<Counter*>(total), value);
}

__device__ __forceinline__ Counter sum_of_warp(Counter value) {
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, distance);
  }
  return value;
}

__global__ void __launch_bounds__(kThreads) count_kernel(const CountParameters p) {
  __shared__ unsigned tables[kTables][kMaxChannels * kByteValues];
  const int entries = p.channels * kByteValues;
  for (int i = threadIdx.x; i < kTables * entries; i += kThreads)
    tables[i / entries][i % entries] = 0;
  __syncthreads();

  // Count.
  unsigned* table = tables[threadIdx.x / kWarpThreads];
  const int64_t group = blockIdx.x / p.blocks_per_group;
  const int64_t stride = static_cast<int64_t>(p.blocks_per_group) * kThreads;
  const int64_t start = static_cast<int64_t>(blockIdx.x % p.blocks_per_group) * kThreads;
  for (int64_t item = start + threadIdx.x; item < p.items; item += stride) {
    const int64_t run = item / p.chunks_per_run;
    const int64_t row = p.whole_pixels ? run : run / p.channels;
    int channel = p.whole_pixels ? 0 : static_cast<int>(run % p.channels);
    const uint8_t* source = p.images + group * p.group_stride + row / p.sizes[1] * p.strides[0] +
                            row % p.sizes[1] * p.strides[1] + channel * p.channel_stride;
    const int64_t off_boundary =
        p.run_step == 1 ? static_cast<int64_t>(reinterpret_cast<uintptr_t>(source) % kChunk) : 0;
    const int64_t first = item % p.chunks_per_run * kChunk - off_boundary;
    if (p.run_step == 1 && first >= 0 && first + kChunk <= p.run_elements) {
      const uint4 chunk = __ldg(reinterpret_cast<const uint4*>(source + first));
      const unsigned words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
      if (p.whole_pixels) channel = static_cast<int>(first % p.channels);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const unsigned byte = words[i / 4] >> (8 * (i % 4)) & 0xffu;
        atomicAdd(&table[channel * kByteValues + byte], 1u);
        if (p.whole_pixels) channel = channel + 1 == p.channels ? 0 : channel + 1;
      }
      continue;
    }
    const int64_t last = first + kChunk < p.run_elements ? first + kChunk : p.run_elements;
    for (int64_t i = first < 0 ? 0 : first; i < last; ++i) {
      if (p.whole_pixels) channel = static_cast<int>(i % p.channels);
      const unsigned byte = __ldg(source + i * p.run_step);
      atomicAdd(&table[channel * kByteValues + byte], 1u);
    }
  }
  __syncthreads();

  // Add up: a thread takes one byte value of each channel.
  for (int channel = 0; channel < p.channels; ++channel) {
    const int value = threadIdx.x, entry = channel * kByteValues + value;
    Counter count = 0;
    for (int k = 0; k < kTables; ++k) count += tables[k][entry];
    if (p.counts != nullptr) {
      add(p.counts + entry, count);
    } else {
      const Counter sum = sum_of_warp(count * value);
      const Counter square = sum_of_warp(count * value * value);
      if (threadIdx.x % kWarpThreads == 0) {
        add(p.sums + group * p.result_stride + channel, sum);
        add(p.squares + group * p.result_stride + channel, square);
      }
    }
  }
}
static_assert(kThreads == kByteValues);

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Counts `channels` channels in groups of what one launch takes; `set_result` says where they go.
template <class SetResult>
cudaError_t count(CountParameters p, int64_t groups, int64_t channels, void* stream,
                  SetResult set_result) {
  const uint8_t* images = p.images;
  const bool whole_pixels =
      channels > 1 && channels <= kMaxChannels && p.channel_stride == 1 && p.strides[2] == channels;
  for (int64_t first = 0; first < channels; first += kMaxChannels) {
    const int64_t left = channels - first;
    p.channels = static_cast<int>(left < kMaxChannels ? left : kMaxChannels);
    p.images = images + first * p.channel_stride;
    p.whole_pixels = whole_pixels;
    p.run_elements = whole_pixels ? p.sizes[2] * channels : p.sizes[2];
    p.run_step = whole_pixels || p.sizes[2] == 1 ? 1 : p.strides[2];
    // A run may start anywhere within a chunk.
    p.chunks_per_run = divide_up(p.run_elements + (p.run_step == 1 ? kChunk - 1 : 0), kChunk);
    const int64_t runs = p.sizes[0] * p.sizes[1] * (whole_pixels ? 1 : p.channels);
    p.items = runs * p.chunks_per_run;
    int64_t blocks = divide_up(p.items, kThreads * kChunksPerThread);
    const int64_t most = groups < kMaxBlocks ? kMaxBlocks / groups : 1;
    if (blocks > most) blocks = most;
    p.blocks_per_group = static_cast<unsigned>(blocks);
    set_result(p, first);
    const cudaError_t error = launch(count_kernel, dim3(static_cast<unsigned>(groups * blocks)),
                                     dim3(kThreads), 0, static_cast<cudaStream_t>(stream), p);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

constexpr int N = 0, C = 1, H = 2, W = 3;

bool is_empty(const int64_t (&sizes)[4]) {
  return sizes[N] == 0 || sizes[C] == 0 || sizes[H] == 0 || sizes[W] == 0;
}

}  // namespace

int channel_histogram_cuda(const ChannelHistogramArgs& args, void* stream) {
  if (is_empty(args.sizes)) return cudaSuccess;
  CountParameters p{};
  p.images = args.images;
  p.channel_stride = args.strides[C];
  int d = 0;
  for (const int dimension : {N, H, W}) {
    p.sizes[d] = args.sizes[dimension];
    p.strides[d++] = args.strides[dimension];
  }
  make_long_rows(p.sizes, p.strides, 3);
  return count(p, 1, args.sizes[C], stream, [&](CountParameters& part, int64_t first) {
    part.counts = args.counts + first * kByteValues;
  });
}

int image_moments_cuda(const ImageMomentsArgs& args, void* stream) {
  if (is_empty(args.sizes)) return cudaSuccess;
  CountParameters p{};
  p.images = args.images;
  p.channel_stride = args.strides[C];
  p.group_stride = args.strides[N];
  p.result_stride = args.sizes[C];
  p.sizes[0] = 1;
  for (const int d : {1, 2}) {
    p.sizes[d] = args.sizes[d + 1];
    p.strides[d] = args.strides[d + 1];
  }
  make_long_rows(p.sizes + 1, p.strides + 1, 2);
  return count(p, args.sizes[N], args.sizes[C], stream, [&](CountParameters& part, int64_t first) {
    part.sums = args.sums + first;
    part.squares = args.squares + first;
  });
}

}  // namespace pixfuse
