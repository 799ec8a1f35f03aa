// The operator on CPU tensors: schema, checks, allocation; hands plain pointers down.
//
// Few input channels go through the direct convolution. The others go through torch's own one, and
// the last pass over its result while that is in a cache.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "common/cpu_output.h"
#include "conv_bias_relu/conv_bias_relu_loop.h"
#include "normalize/normalize_args.h"

namespace pixfuse {
namespace {

constexpr const char* kName = "conv_bias_relu";

// An output of up to this many bytes is torch's own, with the last pass in place: it is still in a
// cache then. A larger one is recycled memory, as fresh memory costs more than a copy, and torch's
// convolution goes in slices of the batch: of a cache's size, as each costs some 0.1 ms.
constexpr int64_t kWholeBytes = int64_t{16} << 20;
constexpr int64_t kSliceBytes = int64_t{8} << 20;

// In the operator's schema, the number of float64; the others are those of ElementType.
constexpr int64_t kFloat64 = 4;

// Calls an operator of torch that returns one tensor; `stack` holds its arguments.
template <size_t count>
Tensor call_torch(const char* name, std::array<StableIValue, count> stack) {
  check(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
        kName, "torch to run ", name);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <class T>
StableIValue argument(const T& value) {
  return torch::stable::detail::from(value);
}

Tensor to_float32(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float ? tensor
                                                   : torch::stable::to(tensor, ScalarType::Float);
}

int64_t dtype_code_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::Byte:
      return -1;
    default:
      return static_cast<int64_t>(
          float_type_of(kName, tensor.scalar_type(), "input, weight and bias"));
  }
}

// A call, checked, with its outputs.
struct Call {
  const Tensor& input;
  const Tensor& weight;
  const std::optional<Tensor>& bias;
  const std::vector<int64_t>&stride, &padding, &dilation;
  int64_t groups;
  const std::vector<double>&mean, &std;
  int64_t rounding, dtype;
  bool channels_last;

  TensorView view{};          // of the input, as N, C, H, W
  int64_t output_sizes[4]{};  // N, O, H, W
  int64_t output_strides[4]{};
  bool bytes() const { return input.scalar_type() == ScalarType::Byte; }
  int64_t output_bytes() const {
    return dtype == kFloat64 ? 8 : element_bytes(static_cast<ElementType>(dtype));
  }
  Tensor empty_output() const;

  void check_all();
};

void Call::check_all() {
  check((dtype >= 0 && dtype <= 2) || dtype == kFloat64, kName,
        "dtype 0 (float32), 1 (float16), 2 (bfloat16) or 4 (float64), got ", dtype);
  check(stride.size() == 2 && dilation.size() == 2 && padding.size() == 4, kName,
        "2 strides, 2 dilations and 4 paddings (top, bottom, left, right)");
  check(groups >= 1, kName, "groups of at least 1, got ", groups);
  check(input.dim() == 4 && weight.dim() == 4, kName, "input and weight to have 4 dimensions");
  view = view_as_nchw(kName, input, InputLayout::nchw, "input");
  const auto weights = weight.sizes();
  check(weights[0] >= 1 && weights[2] >= 1 && weights[3] >= 1, kName, "weight without a size of 0");
  check(weights[0] % groups == 0 && view.sizes[1] == weights[1] * groups && weights[1] >= 1, kName,
        "input of ", weights[1] * groups, " channels in ", groups, " groups of outputs, got ",
        view.sizes[1], " channels and ", weights[0], " outputs");
  check(weight.is_cpu() && (!bias.has_value() || bias->is_cpu()), kName,
        "weight and bias on the device of input (cpu)");
  if (bias.has_value()) {
    check(bias->dim() == 1 && bias->size(0) == weights[0], kName, "bias of shape (", weights[0],
          ")");
  }
  const int64_t type = dtype_code_of(input), weight_type = dtype_code_of(weight);
  check(weight_type >= 0, kName, "weight of a float dtype");
  check(
      bytes() ? dtype != kFloat64 && weight_type != kFloat64 : type == weight_type && type == dtype,
      kName, "input, weight and output of the same dtype, or uint8 input and no float64");
  check(!bias.has_value() || dtype_code_of(*bias) == weight_type, kName,
        "bias of the dtype of weight");
  output_sizes[0] = view.sizes[0];
  output_sizes[1] = weights[0];
  int64_t elements = 8;  // bytes, at most, of each
  for (int d = 0; d < 2; ++d) {
    check(stride[d] >= 1 && dilation[d] >= 1, kName, "stride and dilation of at least 1");
    check(padding[2 * d] >= 0 && padding[2 * d + 1] >= 0, kName, "padding of at least 0");
    const int64_t reach = dilation[d] * (weights[2 + d] - 1) + 1;
    const int64_t padded = view.sizes[2 + d] + padding[2 * d] + padding[2 * d + 1];
    check(padded >= reach, kName, "a kernel that fits into the padded input (", padded,
          "), got one that reaches ", reach);
    output_sizes[2 + d] = (padded - reach) / stride[d] + 1;
  }
  for (const int64_t size : output_sizes) {
    check(!__builtin_mul_overflow(elements, size, &elements), kName, "a result that fits memory");
  }
  const auto strides = dense_strides(output_sizes, channels_last);
  std::copy(strides.begin(), strides.end(), output_strides);
}

Tensor Call::empty_output() const {
  const int32_t type =
      dtype == kFloat64 ? aoti_torch_dtype_float64() : shim_dtype(static_cast<ElementType>(dtype));
  return empty_cpu_output(4, output_sizes, output_strides, type, output_bytes());
}

// --- few input channels ---

Tensor convolve_directly(const Call& call, const ChannelActivity& activity) {
  Tensor output = call.empty_output();
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
  return output;
}

// --- many ---

Tensor normalized(const Call& call, const Tensor& images) {
  return call_torch<7>(
      "pixfuse::normalize",
      {argument(images), argument(call.mean), argument(call.std), argument(call.rounding),
       argument(int64_t{0}), argument(int64_t{0}), argument(int64_t{call.channels_last})});
}

Tensor convolution(const Call& call, const Tensor& input, const Tensor& weight,
                   const std::optional<Tensor>& bias) {
  const std::vector<int64_t>& p = call.padding;
  std::vector<int64_t> padding = {p[0], p[2]};
  Tensor padded = input;
  if (p[0] != p[1] || p[2] != p[3]) {  // torch pads both sides alike
    padded = torch::stable::pad(input, {p[2], p[3], p[0], p[1]});
    padding = {0, 0};
  }
  return call_torch<9>("aten::convolution",
                       {argument(padded), argument(weight), argument(bias), argument(call.stride),
                        argument(padding), argument(call.dilation), argument(false),
                        argument(std::vector<int64_t>{0, 0}), argument(call.groups)});
}

bool lies_as(const Tensor& tensor, bool channels_last) {
  int64_t sizes[4];
  for (int d = 0; d < 4; ++d) sizes[d] = tensor.size(d);
  const auto strides = dense_strides(sizes, channels_last);
  for (int d = 0; d < 4; ++d) {
    if (sizes[d] > 1 && tensor.stride(d) != strides[d]) return false;
  }
  return true;
}

Tensor convolve_with_torch(const Call& call, const ChannelActivity& activity) {
  const int64_t images = call.output_sizes[0];
  const int64_t image_elements = call.output_sizes[1] * call.output_sizes[2] * call.output_sizes[3];
  const int64_t bytes = call.output_bytes();
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
  const bool whole = images * image_elements * bytes <= kWholeBytes && !call.bytes();
  const int64_t step =
      whole ? images : std::max<int64_t>(1, kSliceBytes / (image_elements * bytes));
  std::optional<Tensor> output;
  if (!whole || images == 0) output = call.empty_output();
  Tensor input = call.input;
  for (int64_t first = 0; first < images; first += step) {
    args.images = std::min(step, images - first);
    Tensor slice = torch::stable::narrow(input, 0, first, args.images);
    if (call.bytes()) slice = normalized(call, slice);
    Tensor sums = convolution(call, slice, weight, bias);
    if (!lies_as(sums, call.channels_last)) {
      sums = torch::stable::contiguous(sums, call.channels_last
                                                 ? torch::headeronly::MemoryFormat::ChannelsLast
                                                 : torch::headeronly::MemoryFormat::Contiguous);
    }
    if (whole) output = sums;
    args.input = sums.const_data_ptr();
    args.output = static_cast<char*>(output->mutable_data_ptr()) + first * image_elements * bytes;
    check(relu_count_cpu(args, torch_parallel_for) == 0, kName, "torch's threads to run the loop");
  }
  return *output;
}

// --- the operator ---

std::tuple<Tensor, Tensor, Tensor> conv_bias_relu(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, const std::vector<double>& mean,
    const std::vector<double>& std, int64_t rounding, int64_t dtype, bool channels_last) {
  Call call{input, weight,   bias,  stride,        padding, dilation, groups, mean,
            std,   rounding, dtype, channels_last, {},      {},       {}};
  call.check_all();
  const int64_t outputs = call.output_sizes[1];
  const int64_t counts_sizes[2] = {3, outputs}, counts_strides[2] = {outputs, 1}, one = 1;
  Tensor counts = empty_cpu_output(2, counts_sizes, counts_strides, aoti_torch_dtype_int64(), 8);
  Tensor sums = empty_cpu_output(1, &outputs, &one, aoti_torch_dtype_float64(), 8);
  int64_t* const numbers = static_cast<int64_t*>(counts.mutable_data_ptr());
  double* const sum = static_cast<double*>(sums.mutable_data_ptr());
  std::fill(numbers, numbers + 3 * outputs, 0);
  std::fill(sum, sum + outputs, 0.0);
  const ChannelActivity activity{numbers, numbers + outputs, numbers + 2 * outputs, sum};
  const bool direct = groups == 1 && call.view.sizes[1] <= kMaxDirectChannels && dtype != kFloat64;
  const Tensor output =
      direct ? convolve_directly(call, activity) : convolve_with_torch(call, activity);
  return {output, counts, sums};
}

}  // namespace
}  // namespace pixfuse

STABLE_TORCH_LIBRARY_FRAGMENT(pixfuse, m) {
  m.def(
      "conv_bias_relu(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, "
      "int[] dilation, int groups, float[] mean, float[] std, int rounding, "
      "int dtype, bool channels_last) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pixfuse, CPU, m) {
  m.impl("conv_bias_relu", TORCH_BOX(&pixfuse::conv_bias_relu));
}
