// The operator on CPU tensors: schema, checks, allocation; hands plain pointers down.
//
// Few input channels go through the direct convolution. The others go through torch's own one, in
// slices of the batch that stay in the cache for the last pass.
#include "common/cpu_output.h"
#include "conv_bias_relu/conv_bias_relu_args.h"
#include "conv_bias_relu/conv_bias_relu_loop.h"

namespace pixfuse {
namespace {

using Call = ConvBiasReluCall;
constexpr const char* kName = kConvBiasRelu;

// Output bytes of a slice of the batch, as much as stays in the caches of a core; but some times
// the weights, which torch brings into oneDNN's order for each slice anew.
constexpr int64_t kSliceBytes = int64_t{1} << 20;
constexpr int64_t kSliceWeights = 2;

// --- few input channels ---

void convolve_directly(const Call& call, Tensor& output, const ChannelActivity& activity) {
  ConvBiasReluArgs args{};
  args.input = call.input.const_data_ptr();
  args.input_type =
      call.bytes() ? ElementType::uint8 : float_type_of(kName, call.input.scalar_type(), "input");
  std::optional<NormalizeCall> normalization;
  if (call.bytes()) {
    normalization.emplace(call.input, call.mean, call.std, call.rounding,
                          static_cast<int64_t>(InputLayout::nchw));
    args.arithmetic = normalization->args.arithmetic;
    args.scale = normalization->args.scale;
    args.channels = normalization->args.channels;
  }
  const Tensor weight = to_float32(call.weight);
  std::optional<Tensor> bias;
  if (call.bias.has_value()) bias = torch::stable::contiguous(to_float32(*call.bias));
  args.weight = static_cast<const float*>(weight.const_data_ptr());
  args.bias = bias.has_value() ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  for (int d = 0; d < 4; ++d) {
    args.input_sizes[d] = call.view.sizes[d];
    args.input_strides[d] = call.view.strides[d];
    args.weight_strides[d] = weight.strides()[d];
    args.output_sizes[d] = call.output_sizes[d];
    args.output_strides[d] = call.output_strides[d];
  }
  for (int d = 0; d < 2; ++d) {
    args.kernel[d] = weight.size(2 + d);
    args.stride[d] = call.stride[d];
    args.dilation[d] = call.dilation[d];
    args.padding[d] = call.padding[2 * d];
  }
  args.output = output.mutable_data_ptr();
  args.output_type = static_cast<ElementType>(call.dtype);
  args.activity = activity;
  check(conv_bias_relu_cpu(args, torch_parallel_for) == 0, kName,
        "torch's threads to run the loop");
}

// --- many ---

void convolve_in_slices(const Call& call, Tensor& output, const ChannelActivity& activity) {
  const int64_t images = call.output_sizes[0];
  const int64_t image_elements = call.output_sizes[1] * call.output_sizes[2] * call.output_sizes[3];
  const int64_t bytes =
      call.dtype == kFloat64 ? 8 : element_bytes(static_cast<ElementType>(call.dtype));
  const Tensor weight = call.bytes() ? to_float32(call.weight) : call.weight;
  std::optional<Tensor> bias = call.bias;
  if (call.bytes() && bias.has_value()) bias = to_float32(*bias);

  ReluCountArgs args{};
  args.is_float64 = call.dtype == kFloat64;
  args.output_type = args.is_float64 ? ElementType::float32 : static_cast<ElementType>(call.dtype);
  args.input_type = call.bytes() ? ElementType::float32 : args.output_type;
  args.channels = call.output_sizes[1];
  args.pixels = call.output_sizes[2] * call.output_sizes[3];
  args.channels_last = call.channels_last;
  args.activity = activity;
  const int64_t slice_bytes = std::max(kSliceBytes, kSliceWeights * weight.numel() * bytes);
  const int64_t step = std::max<int64_t>(1, slice_bytes / (image_elements * bytes));
  Tensor input = call.input;
  char* const out = static_cast<char*>(output.mutable_data_ptr());
  for (int64_t first = 0; first < images; first += step) {
    args.images = std::min(step, images - first);
    Tensor slice = torch::stable::narrow(input, 0, first, args.images);
    if (call.bytes()) slice = normalized(call, slice, static_cast<int64_t>(ElementType::float32));
    Tensor sums = convolution(call, slice, weight, bias);
    if (!lies_as(sums, call.channels_last)) {
      sums = torch::stable::contiguous(sums, call.channels_last
                                                 ? torch::headeronly::MemoryFormat::ChannelsLast
                                                 : torch::headeronly::MemoryFormat::Contiguous);
    }
    args.input = sums.const_data_ptr();
    args.output = out + first * image_elements * bytes;
    check(relu_count_cpu(args, torch_parallel_for) == 0, kName, "torch's threads to run the loop");
  }
}

// --- the operator ---

std::tuple<Tensor, Tensor, Tensor> conv_bias_relu(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, const std::vector<double>& mean,
    const std::vector<double>& std, int64_t rounding, int64_t dtype, bool channels_last,
    bool /*allow_tf32*/, int64_t /*way*/) {
  Call call{input, weight,   bias,  stride,        padding, dilation, groups, mean,
            std,   rounding, dtype, channels_last, {},      {},       {}};
  call.check_all();
  const bool is_float64 = dtype == kFloat64;
  const int32_t type =
      is_float64 ? aoti_torch_dtype_float64() : shim_dtype(static_cast<ElementType>(dtype));
  Tensor output = empty_cpu_output(4, call.output_sizes, call.output_strides, type,
                                   is_float64 ? 8 : element_bytes(static_cast<ElementType>(dtype)));
  const int64_t outputs = call.output_sizes[1];
  const int64_t counts_sizes[2] = {3, outputs}, counts_strides[2] = {outputs, 1}, one = 1;
  Tensor counts = empty_cpu_output(2, counts_sizes, counts_strides, aoti_torch_dtype_int64(), 8);
  Tensor sums = empty_cpu_output(1, &outputs, &one, aoti_torch_dtype_float64(), 8);
  int64_t* const numbers = static_cast<int64_t*>(counts.mutable_data_ptr());
  double* const sum = static_cast<double*>(sums.mutable_data_ptr());
  std::fill(numbers, numbers + 3 * outputs, 0);
  std::fill(sum, sum + outputs, 0.0);
  const ChannelActivity activity{numbers, numbers + outputs, numbers + 2 * outputs, sum};
  if (groups == 1 && call.view.sizes[1] <= kMaxDirectChannels && !is_float64) {
    convolve_directly(call, output, activity);
  } else {
    convolve_in_slices(call, output, activity);
  }
  return {output, counts, sums};
}

}  // namespace
}  // namespace pixfuse

STABLE_TORCH_LIBRARY_FRAGMENT(pixfuse, m) {
  m.def(
      "conv_bias_relu(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, "
      "int[] dilation, int groups, float[] mean, float[] std, int rounding, "
      "int dtype, bool channels_last, bool allow_tf32=False, int way=0) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pixfuse, CPU, m) {
  m.impl("conv_bias_relu", TORCH_BOX(&pixfuse::conv_bias_relu));
}
