// What `conv_bias_relu` needs, without torch: plain structs, the formula, the launchers.
//
//   output[n, o, y, x] = relu(bias[o] + sum over c, ky, kx of
//       weight[o, c, ky, kx] * input[n, c, y * stride + ky * dilation - padding, ...])
//
// with zeros outside the input, in float32, rounded once to the type of the output. Bytes are
// normalized first, exactly as `normalize` does it, so zeros mean zero after the normalization.
// Beside it stands what the outputs of each channel were: how many are above 0, and so on.
//
// This header is also compiled for higher instruction sets, so it includes no C++ standard library
// and everything with a body has internal linkage.
#pragma once
#include <stdint.h>

#include "normalize/normalize.h"

namespace pixfuse {

// What became of each output channel; every pointer has room for one number per channel. On the CPU
// it is added to, on CUDA it is written.
struct ChannelActivity {
  int64_t* active;         // outputs above 0
  int64_t* active_images;  // images with such an output
  int64_t* nan;            // outputs that are not a number
  double* output_sum;      // of all outputs
};

// One direct convolution. Sizes and strides are N, C, H, W (of the weights O, C, H, W) and count
// elements; pairs are height, width. The output is dense, contiguous or channels-last.
struct ConvBiasReluArgs {
  const void* input;
  ElementType input_type;
  int64_t input_sizes[4];
  int64_t input_strides[4];
  // How bytes are normalized: as in NormalizeArgs.
  Arithmetic arithmetic;
  float scale;
  const ChannelConstants* channels;  // [C]
  const float* weight;
  int64_t weight_strides[4];
  const float* bias;  // [O], or null
  int64_t kernel[2];
  int64_t stride[2];
  int64_t dilation[2];
  int64_t padding[2];  // above and to the left; what is below and to the right, the output says
  void* output;
  ElementType output_type;
  int64_t output_sizes[4];
  int64_t output_strides[4];  // dense: contiguous, or channels-last
  bool past_caches;  // CPU: floats that fill whole lines of the caches are stored past them
  ChannelActivity activity;
};

// The last pass over the result of a convolution that somebody else computed: ReLU, rounding to
// the type of the output, activity. Input and output are dense and lie alike, contiguous or
// channels-last; the input is of the output's type, or float32, or both are float64.
struct ReluCountArgs {
  const void* input;
  void* output;
  bool is_float64;
  ElementType input_type, output_type;  // unless is_float64
  int64_t images, channels, pixels;
  bool channels_last;
  bool past_caches;  // CPU: floats that fill whole lines of the caches are stored past them
  ChannelActivity activity;
};

// Both return what `parallel_for` returned: 0 when all went well. The same bits for any split.
int32_t conv_bias_relu_cpu(const ConvBiasReluArgs& args, ParallelFor parallel_for);
int32_t relu_count_cpu(const ReluCountArgs& args, ParallelFor parallel_for);

// --- CUDA ---

// How the kernel multiplies, always summing up in float32: as IEEE 754 has it, or on tensor cores
// with operands rounded to one of three types.
enum class Multiplication : int32_t { ieee = 0, tf32 = 1, float16 = 2, bfloat16 = 3 };

// Weights and bias as they come, of one type; bytes become float32 by the normalization, then what
// the multiplication takes.
struct ConvBiasReluCudaArgs {
  ConvBiasReluArgs call;  // but its weight, bias and, beyond kMaxCudaByteChannels, its channels
  ElementType weight_type;
  const void* weight;
  const void* bias;  // [O], or null
  int64_t groups;
  Multiplication multiplication;
  int64_t blocks;  // at least as many as there are tiles for; 0 for what suits large GPUs
  void* scratch;   // conv_bias_relu_cuda_scratch_bytes of device memory
};

// Channels of bytes whose normalization fits the parameters of a launch.
constexpr int64_t kMaxCudaByteChannels = 32;

// The bias that the last pass adds before ReLU, since a convolution of cuDNN would add it in a pass
// of its own; and memory of the device.
struct ReluCountCudaArgs {
  ReluCountArgs call;  // input and output may be one
  const void* bias;    // [channels], or null; float64 if all are
  ElementType bias_type;
  void* scratch;  // relu_count_cuda_scratch_bytes of device memory
};

int64_t conv_bias_relu_cuda_scratch_bytes(const ConvBiasReluCudaArgs& args);
int64_t relu_count_cuda_scratch_bytes(const ReluCountArgs& args);

// Both enqueue on `stream` (a cudaStream_t) of the current device and return a cudaError_t. The
// same bits in every run.
int conv_bias_relu_cuda(const ConvBiasReluCudaArgs& args, void* stream);
int relu_count_cuda(const ReluCountCudaArgs& args, void* stream);

}  // namespace pixfuse
