// The operator on CUDA tensors: allocation, device and stream, and who convolves; hands plain
// pointers down.
#include "common/cuda_device.h"
#include "conv_bias_relu/conv_bias_relu_args.h"

namespace pixfuse {
namespace {

constexpr const char* kName = kConvBiasRelu;
constexpr int64_t kMaxStemChannels = 4;

// In the operator's schema, `way`. A benchmark asks for one; everybody else leaves it to the rule.
enum class Way : int64_t { by_rule = 0, own_kernel = 1, torch_convolution = 2 };

bool has_own_kernel(const ConvBiasReluCall& call) {
  return call.dtype != kFloat64 && (!call.bytes() || call.view.sizes[1] <= kMaxCudaByteChannels);
}

// The rule. Images of up to 4 channels go through our own kernel, which reads bytes and leaves no
// normalized image behind. Everything else goes through cuDNN and one more pass over its result:
// what cuDNN does well is not done a second time. Not yet measured on a GPU; where a measurement
// says otherwise, this is the place to say so.
Way choose_way(const ConvBiasReluCall& call, int64_t wanted) {
  check(wanted >= 0 && wanted <= 2, kName, "way from 0 to 2, got ", wanted);
  const auto way = static_cast<Way>(wanted);
  check(way != Way::own_kernel || has_own_kernel(call), kName,
        "way 0 or 2 for float64, and for bytes of more than ", kMaxCudaByteChannels, " channels");
  if (way != Way::by_rule) return way;
  const bool stem = call.groups == 1 && call.view.sizes[1] <= kMaxStemChannels;
  return stem && has_own_kernel(call) ? Way::own_kernel : Way::torch_convolution;
}

bool is_at_least_8_0(int32_t device) {
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess,
        kName, "the driver to know CUDA device ", device);
  return major >= 8;
}

// Tensor cores multiply bfloat16 and TF32 from compute capability 8.0 on, float16 on all GPUs that
// we compile for. Float32 means float32, unless torch allows TF32.
Multiplication multiplication_of(ElementType weight_type, bool allow_tf32, int32_t device) {
  switch (weight_type) {
    case ElementType::float16:
      return Multiplication::float16;
    case ElementType::bfloat16:
      return is_at_least_8_0(device) ? Multiplication::bfloat16 : Multiplication::ieee;
    default:
      return allow_tf32 && is_at_least_8_0(device) ? Multiplication::tf32 : Multiplication::ieee;
  }
}

Tensor empty_bytes(int64_t bytes, int32_t device) {
  const int64_t one = 1;
  return empty_cuda(kName, 1, &bytes, &one, aoti_torch_dtype_uint8(), device);
}

Tensor empty_output(const ConvBiasReluCall& call, int32_t device) {
  const int32_t type = call.dtype == kFloat64 ? aoti_torch_dtype_float64()
                                              : shim_dtype(static_cast<ElementType>(call.dtype));
  return empty_cuda(kName, 4, call.output_sizes, call.output_strides, type, device);
}

Tensor convolve(const ConvBiasReluCall& call, const ChannelActivity& activity, bool allow_tf32,
                int32_t device) {
  std::optional<NormalizeCall> normalization;
  ConvBiasReluCudaArgs args{};
  args.call = kernel_args(call, call.weight, normalization);
  std::optional<Tensor> bias;
  if (call.bias.has_value()) bias = torch::stable::contiguous(*call.bias);
  args.weight_type = float_type_of(kName, call.weight.scalar_type(), "weight");
  args.weight = call.weight.const_data_ptr();
  args.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  args.groups = call.groups;
  args.multiplication = multiplication_of(args.weight_type, allow_tf32, device);
  Tensor output = empty_output(call, device);
  args.call.output = output.mutable_data_ptr();
  args.call.activity = activity;
  const Tensor scratch = empty_bytes(conv_bias_relu_cuda_scratch_bytes(args), device);
  args.scratch = scratch.mutable_data_ptr();
  check_launch(kName, conv_bias_relu_cuda(args, current_cuda_stream(kName, device)));
  return output;
}

// torch picks cuDNN's kernel, without the bias: cuDNN's would be one more pass.
Tensor convolve_by_torch(const ConvBiasReluCall& call, const ChannelActivity& activity,
                         int32_t device) {
  ReluCountCudaArgs args{};
  ReluCountArgs& to = args.call;
  to.is_float64 = call.dtype == kFloat64;
  to.output_type = to.is_float64 ? ElementType::float32 : static_cast<ElementType>(call.dtype);
  Tensor input = call.input, weight = call.weight;
  std::optional<Tensor> bias = call.bias;
  if (call.bytes()) {
    // In the type of the output if that is the weights' too, else in float32.
    const bool alike = dtype_code_of(call.weight) == call.dtype;
    if (!alike) {
      weight = to_float32(weight);
      if (bias.has_value()) bias = to_float32(*bias);
    }
    to.input_type = alike ? to.output_type : ElementType::float32;
    input = normalized(call, input, static_cast<int64_t>(to.input_type));
  } else {
    to.input_type = to.output_type;
  }
  Tensor sums = convolution(call, input, weight, std::nullopt);
  if (!lies_as(sums, call.channels_last)) {
    sums = torch::stable::contiguous(sums, call.channels_last
                                               ? torch::headeronly::MemoryFormat::ChannelsLast
                                               : torch::headeronly::MemoryFormat::Contiguous);
  }
  // Where the types are alike, the result takes the place of what it is computed from.
  bool in_place = to.is_float64 || to.input_type == to.output_type;
  for (int d = 0; d < 4; ++d) in_place = in_place && sums.stride(d) == call.output_strides[d];
  Tensor output = in_place ? sums : empty_output(call, device);
  if (bias.has_value()) bias = torch::stable::contiguous(*bias);
  args.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  args.bias_type = to.input_type;
  to.input = sums.const_data_ptr();
  to.output = output.mutable_data_ptr();
  to.images = call.output_sizes[0];
  to.channels = call.output_sizes[1];
  to.pixels = call.output_sizes[2] * call.output_sizes[3];
  to.channels_last = call.channels_last;
  to.activity = activity;
  const Tensor scratch = empty_bytes(relu_count_cuda_scratch_bytes(to), device);
  args.scratch = scratch.mutable_data_ptr();
  check_launch(kName, relu_count_cuda(args, current_cuda_stream(kName, device)));
  return output;
}

std::tuple<Tensor, Tensor, Tensor> conv_bias_relu(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, const std::vector<double>& mean,
    const std::vector<double>& std, int64_t rounding, int64_t dtype, bool channels_last,
    bool allow_tf32, int64_t wanted_way) {
  ConvBiasReluCall call{input, weight,   bias,  stride,        padding, dilation, groups, mean,
                        std,   rounding, dtype, channels_last, {},      {},       {}};
  call.check_all();
  const Way way = choose_way(call, wanted_way);
  const int32_t device = input.get_device_index();
  const DeviceGuard guard(kName, device);
  const int64_t outputs = call.output_sizes[1];
  const int64_t counts_sizes[2] = {3, outputs}, counts_strides[2] = {outputs, 1}, one = 1;
  Tensor counts =
      empty_cuda(kName, 2, counts_sizes, counts_strides, aoti_torch_dtype_int64(), device);
  Tensor sums = empty_cuda(kName, 1, &outputs, &one, aoti_torch_dtype_float64(), device);
  int64_t* const numbers = static_cast<int64_t*>(counts.mutable_data_ptr());
  const ChannelActivity activity{numbers, numbers + outputs, numbers + 2 * outputs,
                                 static_cast<double*>(sums.mutable_data_ptr())};
  Tensor output = way == Way::own_kernel ? convolve(call, activity, allow_tf32, device)
                                         : convolve_by_torch(call, activity, device);
  return {output, counts, sums};
}

}  // namespace
}  // namespace pixfuse

STABLE_TORCH_LIBRARY_IMPL(pixfuse, CUDA, m) {
  m.impl("conv_bias_relu", TORCH_BOX(&pixfuse::conv_bias_relu));
}
