// The last pass over a convolution that somebody else computed: bias, ReLU, rounding, activity. No
// torch.
//
// A block takes a run of pixels of an image: of one channel where the output is contiguous, of 64
// neighbouring channels where it is channels-last. Threads go along the memory, 16 bytes each where
// it is aligned so. Input and output may be one: each thread writes where it has read.
#include "common/cuda_launch.h"
#include "conv_bias_relu/activity_records.h"
#include "conv_bias_relu/conv_bias_relu.h"

namespace pixfuse {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpThreads;
constexpr int kBlockChannels = 64;  // of a channels-last output
constexpr int kMostRows = kThreads / (kBlockChannels / 8);
constexpr int64_t kRunElements = 8192;  // of a block, about
constexpr int64_t kMaxGrid = 0x7fffffff;

struct Parameters {
  const void* input;
  void* output;
  const void* bias;
  ElementType bias_type;
  int64_t pixels, channels, channel_blocks;
  int64_t images, first_image;  // of all launches, of this one
  int64_t runs, run_pixels;
  bool vectors;  // are runs of 16 bytes aligned, and whole?
  Record* records;
};

__device__ __forceinline__ float value_of(float x) { return x; }
__device__ __forceinline__ float value_of(__half x) { return __half2float(x); }
__device__ __forceinline__ float value_of(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ double value_of(double x) { return x; }

__device__ __forceinline__ void round_result(float value, float& result) { result = value; }
__device__ __forceinline__ void round_result(float value, __half& result) {
  result = __float2half_rn(value);
}
__device__ __forceinline__ void round_result(float value, __nv_bfloat16& result) {
  result = __float2bfloat16_rn(value);
}
__device__ __forceinline__ void round_result(double value, double& result) { result = value; }

// Neighbours that are loaded or stored at once.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Vector {
  T values[kCount];
};

// What a thread, and then a block, has counted of a channel.
template <class Value>
struct Tally {
  unsigned active, nan;
  Value sum;
};

// `count` results from element `first` on; `count` is 1 or kVector. `kChannelStep` is 1 where each
// of them is of another channel.
template <class In, class Out, int kVector, int kChannelStep, class Value>
__device__ __forceinline__ void finish(const Parameters& p, int64_t first, int count,
                                       const Value* bias, Tally<Value>* tallies) {
  Vector<In, kVector> in;
  Vector<Out, kVector> out;
  const In* from = static_cast<const In*>(p.input) + first;
  Out* to = static_cast<Out*>(p.output) + first;
  if (count == kVector) {
    in = *reinterpret_cast<const Vector<In, kVector>*>(from);
  } else {
    in.values[0] = *from;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i < count) {
      const Value x = value_of(in.values[i]) + bias[i * kChannelStep];
      round_result(relu(x), out.values[i]);
      const Value y = value_of(out.values[i]);
      Tally<Value>& tally = tallies[i * kChannelStep];
      tally.active += y > Value(0) ? 1u : 0u;
      tally.nan += y != y ? 1u : 0u;
      tally.sum += y;
    }
  }
  if (count == kVector) {
    *reinterpret_cast<Vector<Out, kVector>*>(to) = out;
  } else {
    *to = out.values[0];
  }
}

template <class Value>
__device__ __forceinline__ Value bias_of(const Parameters& p, int64_t channel) {
  if (p.bias == nullptr) return Value(0);
  if constexpr (sizeof(Value) == 8) return __ldg(static_cast<const double*>(p.bias) + channel);
  return static_cast<Value>(load_float(p.bias, p.bias_type, channel));
}

template <class In, class Out>
__global__ void __launch_bounds__(kThreads) planar_kernel(const Parameters p) {
  using Value = decltype(value_of(In{}));
  constexpr int kVector =
      16 / static_cast<int>(sizeof(In) > sizeof(Out) ? sizeof(In) : sizeof(Out));
  __shared__ unsigned warp_active[kWarps], warp_nan[kWarps];
  __shared__ double warp_sum[kWarps];
  const int64_t run = blockIdx.x % p.runs, plane = blockIdx.x / p.runs;
  const int64_t channel = plane % p.channels, image = p.first_image + plane / p.channels;
  const Value bias = bias_of<Value>(p, channel);
  const int64_t begin = run * p.run_pixels;
  const int64_t end = begin + p.run_pixels < p.pixels ? begin + p.run_pixels : p.pixels;
  const int64_t origin = (image * p.channels + channel) * p.pixels;
  const int step = p.vectors ? kVector : 1;
  Tally<Value> tally{};
  for (int64_t i = begin + threadIdx.x * step; i < end; i += kThreads * step) {
    finish<In, Out, kVector, 0>(p, origin + i, step, &bias, &tally);
  }
  const unsigned active = sum_of_warp(tally.active), nan = sum_of_warp(tally.nan);
  const double sum = sum_of_warp(static_cast<double>(tally.sum));
  if (threadIdx.x % kWarpThreads == 0) {
    warp_active[threadIdx.x / kWarpThreads] = active;
    warp_nan[threadIdx.x / kWarpThreads] = nan;
    warp_sum[threadIdx.x / kWarpThreads] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    Record total{};
    for (int w = 0; w < kWarps; ++w) {
      total.active += warp_active[w];
      total.nan += warp_nan[w];
      total.sum += warp_sum[w];
    }
    p.records[(channel * p.images + image) * p.runs + run] = total;
  }
}

template <class In, class Out>
__global__ void __launch_bounds__(kThreads) interleaved_kernel(const Parameters p) {
  using Value = decltype(value_of(In{}));
  constexpr int kVector =
      16 / static_cast<int>(sizeof(In) > sizeof(Out) ? sizeof(In) : sizeof(Out));
  __shared__ Tally<Value> tallies[kMostRows][kBlockChannels];
  const int64_t block = blockIdx.x / p.runs;
  const int64_t run = blockIdx.x % p.runs, image = p.first_image + block / p.channel_blocks;
  const int64_t first_channel = block % p.channel_blocks * kBlockChannels;
  const int step = p.vectors ? kVector : 1;
  const int columns = kBlockChannels / step, rows = kThreads / columns;
  const int row = static_cast<int>(threadIdx.x) / columns;
  const int column = static_cast<int>(threadIdx.x) % columns * step;
  const int64_t channel = first_channel + column;
  const int64_t begin = run * p.run_pixels;
  const int64_t end = begin + p.run_pixels < p.pixels ? begin + p.run_pixels : p.pixels;
  Tally<Value> own[kVector] = {};
  if (channel < p.channels) {
    Value bias[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i < step) bias[i] = bias_of<Value>(p, channel + i);
    }
    for (int64_t pixel = begin + row; pixel < end; pixel += rows) {
      finish<In, Out, kVector, 1>(p, (image * p.pixels + pixel) * p.channels + channel, step, bias,
                                  own);
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i < step) tallies[row][column + i] = own[i];
  }
  __syncthreads();  // All tallies are there.
  const int64_t mine = first_channel + threadIdx.x;
  if (threadIdx.x < kBlockChannels && mine < p.channels) {
    Record total{};
    for (int r = 0; r < rows; ++r) {
      total.active += tallies[r][threadIdx.x].active;
      total.nan += tallies[r][threadIdx.x].nan;
      total.sum += static_cast<double>(tallies[r][threadIdx.x].sum);
    }
    p.records[(mine * p.images + image) * p.runs + run] = total;
  }
}

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t runs_of(const ReluCountArgs& args) {
  const int64_t channels = args.channels < kBlockChannels ? args.channels : kBlockChannels;
  const int64_t elements = args.pixels * (args.channels_last ? channels : 1);
  return runs_at_least(divide_up(elements, kRunElements), args.pixels);
}

int64_t bytes_of(const ReluCountArgs& args, ElementType type) {
  return args.is_float64 ? 8 : element_bytes(type);
}

bool is_aligned(const void* address, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) == 0;
}

template <class In, class Out>
cudaError_t launch_types(const ReluCountCudaArgs& args, Parameters p, cudaStream_t stream) {
  const bool channels_last = args.call.channels_last;
  const int64_t image_blocks = p.runs * p.channel_blocks;
  const int64_t launch_images = kMaxGrid / image_blocks;
  for (; p.first_image < p.images; p.first_image += launch_images) {
    const int64_t left = p.images - p.first_image;
    const int64_t blocks = (left < launch_images ? left : launch_images) * image_blocks;
    const cudaError_t error =
        launch(channels_last ? interleaved_kernel<In, Out> : planar_kernel<In, Out>,
               dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, p);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t launch_any(const ReluCountCudaArgs& args, const Parameters& p, cudaStream_t stream) {
  const bool from_float32 = args.call.input_type == ElementType::float32;
  if (args.call.is_float64) return launch_types<double, double>(args, p, stream);
  switch (args.call.output_type) {
    case ElementType::float32:
      return launch_types<float, float>(args, p, stream);
    case ElementType::float16:
      return from_float32 ? launch_types<float, __half>(args, p, stream)
                          : launch_types<__half, __half>(args, p, stream);
    case ElementType::bfloat16:
      return from_float32 ? launch_types<float, __nv_bfloat16>(args, p, stream)
                          : launch_types<__nv_bfloat16, __nv_bfloat16>(args, p, stream);
    case ElementType::uint8:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int64_t relu_count_cuda_scratch_bytes(const ReluCountArgs& args) {
  return static_cast<int64_t>(sizeof(Record)) * args.channels * args.images * runs_of(args);
}

int relu_count_cuda(const ReluCountCudaArgs& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const ReluCountArgs& call = args.call;
  Parameters p{};
  p.input = call.input;
  p.output = call.output;
  p.bias = args.bias;
  p.bias_type = args.bias_type;
  p.pixels = call.pixels;
  p.channels = call.channels;
  p.channel_blocks = call.channels_last ? divide_up(call.channels, kBlockChannels) : call.channels;
  p.images = call.images;
  p.runs = runs_of(call);
  p.records = static_cast<Record*>(args.scratch);

  // A vector is that of the wider type; the other side's is smaller and needs no more alignment.
  const int64_t in_bytes = bytes_of(call, call.input_type);
  const int64_t out_bytes = bytes_of(call, call.output_type);
  const int64_t vector = 16 / (in_bytes > out_bytes ? in_bytes : out_bytes);
  p.vectors = (call.channels_last ? call.channels : call.pixels) % vector == 0 &&
              is_aligned(call.input, vector * in_bytes) &&
              is_aligned(call.output, vector * out_bytes);
  // Runs of whole vectors.
  p.run_pixels = divide_up(divide_up(call.pixels, p.runs), vector) * vector;
  if (call.images > 0 && call.channels > 0 && call.pixels > 0) {
    const cudaError_t error = launch_any(args, p, cuda_stream);
    if (error != cudaSuccess) return error;
  }
  return add_records(args.scratch, p.images, p.runs, call.channels, call.activity, cuda_stream);
}

}  // namespace pixfuse
