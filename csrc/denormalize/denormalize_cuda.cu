// The kernel and its launcher; no torch.
//
// A thread makes 16 neighbouring bytes of the output and stores them at once; the first and last
// ones of a run that starts or ends off a 16-byte boundary, one by one. A `run` is what lies side
// by side in the output: a row of one channel, or a row of whole pixels. Values that lie in the
// same order are loaded 16 bytes at a time, too.
#include <string.h>

#include "common/cuda_launch.h"
#include "denormalize/denormalize.h"

namespace pixfuse {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 16;
constexpr int kMaxChannels = 32;       // of one launch: their constants travel as parameters
constexpr int64_t kMaxBlocks = 65536;  // and then each thread takes more
constexpr int kTallies = static_cast<int>(Tally::count);

struct Parameters {
  const void* values;
  uint8_t* output;
  int64_t value_strides[4], output_strides[4];
  int64_t height;  // of one image, after merging rows
  int64_t items;   // chunks of all runs
  int64_t chunks_per_run;
  int64_t run_elements;
  int64_t* tallies;  // or null
  int channels;
  bool planar;    // a run has one channel
  bool gaps;      // the pixels of a run have more channels than those of the launch
  bool in_order;  // the values of a run lie side by side, as its bytes do
  ChannelScale scales[kMaxChannels];
};

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__global__ void __launch_bounds__(kThreads) denormalize_kernel(const Parameters p) {
  __shared__ ChannelScale scales[kMaxChannels];  // parameters are slow to index by thread
  __shared__ unsigned long long tallies[kTallies];
  if (threadIdx.x < p.channels) scales[threadIdx.x] = p.scales[threadIdx.x];
  if (threadIdx.x < kTallies) tallies[threadIdx.x] = 0;
  __syncthreads();

  // Convert.
  unsigned long long clamped = 0, nonfinite = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t item = start; item < p.items; item += stride) {
    const int64_t run = item / p.chunks_per_run;
    const int64_t row = p.planar ? run / p.channels : run;
    const int run_channel = p.planar ? static_cast<int>(run % p.channels) : 0;
    const int64_t n = row / p.height, h = row % p.height;
    const T* source = static_cast<const T*>(p.values) + n * p.value_strides[0] +
                      run_channel * p.value_strides[1] + h * p.value_strides[2];
    uint8_t* target = p.output + n * p.output_strides[0] + run_channel * p.output_strides[1] +
                      h * p.output_strides[2];
    const int off_boundary = static_cast<int>(reinterpret_cast<uintptr_t>(target) % kChunk);
    const int64_t first = item % p.chunks_per_run * kChunk - off_boundary;
    const int64_t begin = first < 0 ? 0 : first;
    const int64_t end = first + kChunk < p.run_elements ? first + kChunk : p.run_elements;
    const bool whole = !p.gaps && end - begin == kChunk;

    int64_t pixel = p.planar ? begin : begin / p.channels;
    int channel = p.planar ? run_channel : static_cast<int>(begin % p.channels);
    uint8_t bytes[kChunk];
    constexpr int kLoads = kChunk * sizeof(T) / sizeof(uint4);
    uint4 loaded[kLoads] = {};
    const bool aligned = reinterpret_cast<uintptr_t>(source + begin) % sizeof(uint4) == 0;
    const bool together = whole && p.in_order && aligned;
    if (together) {
      const auto* from = reinterpret_cast<const uint4*>(source + begin);
#pragma unroll
      for (int k = 0; k < kLoads; ++k) loaded[k] = __ldg(from + k);
    }
    T values[kChunk];
    memcpy(values, loaded, sizeof values);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int64_t element = first + i;
      if (element < begin || element >= end) continue;
      const int64_t offset =
          pixel * p.value_strides[3] + (p.planar ? 0 : channel * p.value_strides[1]);
      const float x = widen(together ? values[i] : __ldg(source + offset));
      const float y = __fadd_rn(__fmul_rn(x, scales[channel].scale), scales[channel].offset);
      const float above = y > 0.0f ? y : 0.0f;  // NaN too
      const float inside = above < 255.0f ? above : 255.0f;
      const auto byte =
          static_cast<uint8_t>(__float_as_uint(__fadd_rn(inside, kRoundToInteger)) & 0xffu);
      if ((__float_as_uint(x) & 0x7f800000u) == 0x7f800000u) {
        ++nonfinite;
      } else if (y < -0.5f || y >= 255.5f) {  // rounds to a whole number outside of 0..255
        ++clamped;
      }
      if (whole) {
        bytes[i] = byte;
      } else {
        target[p.gaps ? pixel * p.output_strides[3] + channel : element] = byte;
      }
      if (p.planar || ++channel == p.channels) {
        ++pixel;
        if (!p.planar) channel = 0;
      }
    }
    if (whole) {
      uint4 packed;
      memcpy(&packed, bytes, sizeof packed);
      *reinterpret_cast<uint4*>(target + first) = packed;
    }
  }
  if (p.tallies != nullptr) {
    if (clamped != 0) atomicAdd(&tallies[static_cast<int>(Tally::clamped)], clamped);
    if (nonfinite != 0) atomicAdd(&tallies[static_cast<int>(Tally::nonfinite)], nonfinite);
  }
  __syncthreads();

  // Add up.
  if (p.tallies != nullptr && threadIdx.x < kTallies && tallies[threadIdx.x] != 0) {
    auto* total = reinterpret_cast<unsigned long long*>(p.tallies + threadIdx.x);
    atomicAdd(total, tallies[threadIdx.x]);
  }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
cudaError_t launch_channels(const DenormalizeArgs& args, int64_t first, int64_t count,
                            cudaStream_t stream) {
  Parameters p{};
  p.values = static_cast<const T*>(args.values) + first * args.value_strides[1];
  p.output = args.output + first * args.output_strides[1];
  for (int d = 0; d < 4; ++d) {
    p.value_strides[d] = args.value_strides[d];
    p.output_strides[d] = args.output_strides[d];
  }
  p.height = args.sizes[2];
  p.channels = static_cast<int>(count);
  p.planar = args.output_strides[3] == 1;
  p.gaps = !p.planar && args.output_strides[3] != count;
  p.in_order = p.planar ? args.value_strides[3] == 1
                        : args.value_strides[1] == 1 && args.value_strides[3] == count;
  p.tallies = args.tallies;
  for (int64_t c = 0; c < count; ++c) p.scales[c] = args.channels[first + c];
  const int64_t rows = args.sizes[0] * args.sizes[2];
  p.run_elements = args.sizes[3] * (p.planar ? 1 : count);
  // A run may start anywhere within a chunk.
  p.chunks_per_run = divide_up(p.run_elements + kChunk - 1, kChunk);
  p.items = rows * (p.planar ? count : 1) * p.chunks_per_run;
  const int64_t blocks = divide_up(p.items, kThreads);
  const dim3 grid(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
  return launch(denormalize_kernel<T>, grid, dim3(kThreads), 0, stream, p);
}

}  // namespace

int denormalize_cuda(const DenormalizeArgs& original, void* stream) {
  DenormalizeArgs args = original;
  for (int64_t size : args.sizes) {
    if (size == 0) return cudaSuccess;
  }
  merge_rows(args.sizes, args.value_strides, args.output_strides);
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
        break;
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace pixfuse
