// From torch tensors to a convolution: the checks, and the calls of torch's own operators, that the
// CPU and the CUDA operator share. Header-only, since each of the two libraries has its own copy.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "conv_bias_relu/conv_bias_relu.h"
#include "normalize/normalize_args.h"

namespace pixfuse {

inline constexpr const char* kConvBiasRelu = "conv_bias_relu";

// In the operator's schema, the number of float64; the others are those of ElementType.
inline constexpr int64_t kFloat64 = 4;

// Calls an operator of torch that returns one tensor; `stack` holds its arguments.
template <size_t count>
inline Tensor call_torch(const char* name, std::array<StableIValue, count> stack) {
  check(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
        kConvBiasRelu, "torch to run ", name);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <class T>
inline StableIValue argument(const T& value) {
  return torch::stable::detail::from(value);
}

inline Tensor to_float32(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float ? tensor
                                                   : torch::stable::to(tensor, ScalarType::Float);
}

inline int64_t dtype_code_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::Byte:
      return -1;
    default:
      return static_cast<int64_t>(
          float_type_of(kConvBiasRelu, tensor.scalar_type(), "input, weight and bias"));
  }
}

// A call, checked, with its outputs.
struct ConvBiasReluCall {
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

  void check_all();
};

inline void ConvBiasReluCall::check_all() {
  check((dtype >= 0 && dtype <= 2) || dtype == kFloat64, kConvBiasRelu,
        "dtype 0 (float32), 1 (float16), 2 (bfloat16) or 4 (float64), got ", dtype);
  check(stride.size() == 2 && dilation.size() == 2 && padding.size() == 4, kConvBiasRelu,
        "2 strides, 2 dilations and 4 paddings (top, bottom, left, right)");
  check(groups >= 1, kConvBiasRelu, "groups of at least 1, got ", groups);
  check(input.dim() == 4 && weight.dim() == 4, kConvBiasRelu,
        "input and weight to have 4 dimensions");
  view = view_as_nchw(kConvBiasRelu, input, InputLayout::nchw, "input");
  check_dense(kConvBiasRelu, weight, "weight");
  const auto weights = weight.sizes();
  check(weights[0] >= 1 && weights[2] >= 1 && weights[3] >= 1, kConvBiasRelu,
        "weight without a size of 0");
  check(weights[0] % groups == 0 && view.sizes[1] == weights[1] * groups && weights[1] >= 1,
        kConvBiasRelu, "input of ", weights[1] * groups, " channels in ", groups,
        " groups of outputs, got ", view.sizes[1], " channels and ", weights[0], " outputs");
  const auto beside_input = [&](const Tensor& tensor) {
    return tensor.is_cpu() == input.is_cpu() &&
           tensor.get_device_index() == input.get_device_index();
  };
  check(beside_input(weight) && (!bias.has_value() || beside_input(*bias)), kConvBiasRelu,
        "weight and bias on the device of input");
  if (bias.has_value()) {
    check_dense(kConvBiasRelu, *bias, "bias");
    check(bias->dim() == 1 && bias->size(0) == weights[0], kConvBiasRelu, "bias of shape (",
          weights[0], ")");
  }
  const int64_t type = dtype_code_of(input), weight_type = dtype_code_of(weight);
  check(weight_type >= 0, kConvBiasRelu, "weight of a float dtype");
  check(
      bytes() ? dtype != kFloat64 && weight_type != kFloat64 : type == weight_type && type == dtype,
      kConvBiasRelu, "input, weight and output of the same dtype, or uint8 input and no float64");
  check(!bias.has_value() || dtype_code_of(*bias) == weight_type, kConvBiasRelu,
        "bias of the dtype of weight");
  output_sizes[0] = view.sizes[0];
  output_sizes[1] = weights[0];
  int64_t elements = 8;  // bytes, at most, of each
  for (int d = 0; d < 2; ++d) {
    check(stride[d] >= 1 && dilation[d] >= 1, kConvBiasRelu, "stride and dilation of at least 1");
    check(padding[2 * d] >= 0 && padding[2 * d + 1] >= 0, kConvBiasRelu, "padding of at least 0");
    int64_t reach = 0, padded = 0;
    const bool fits = !__builtin_mul_overflow(dilation[d], weights[2 + d] - 1, &reach) &&
                      !__builtin_add_overflow(reach, int64_t{1}, &reach) &&
                      !__builtin_add_overflow(padding[2 * d], padding[2 * d + 1], &padded) &&
                      !__builtin_add_overflow(padded, view.sizes[2 + d], &padded);
    check(fits, kConvBiasRelu, "a kernel and a padded input of less than 2^63, got padding ",
          padding[2 * d], " and ", padding[2 * d + 1], ", dilation ", dilation[d]);
    check(padded >= reach, kConvBiasRelu, "a kernel that fits into the padded input (", padded,
          "), got one that reaches ", reach);
    output_sizes[2 + d] = (padded - reach) / stride[d] + 1;
  }
  for (const int64_t size : output_sizes) {
    check(!__builtin_mul_overflow(elements, size, &elements), kConvBiasRelu,
          "a result that fits memory, got one of ", output_sizes[0], " x ", output_sizes[1], " x ",
          output_sizes[2], " x ", output_sizes[3]);
  }
  const auto strides = dense_strides(output_sizes, channels_last);
  std::copy(strides.begin(), strides.end(), output_strides);
}

// --- our own kernels ---

// What a kernel is told of a call; the values of the weight, the bias, the output and the activity
// are added by whoever has them. `weight` lies as they will; `normalization` keeps the constants.
inline ConvBiasReluArgs kernel_args(const ConvBiasReluCall& call, const Tensor& weight,
                                    std::optional<NormalizeCall>& normalization) {
  ConvBiasReluArgs args{};
  args.input = call.input.const_data_ptr();
  args.output_type = static_cast<ElementType>(call.dtype);
  if (call.bytes()) {
    args.input_type = ElementType::uint8;
    normalization.emplace(call.input, call.mean, call.std, call.rounding,
                          static_cast<int64_t>(InputLayout::nchw));
    args.arithmetic = normalization->args.arithmetic;
    args.scale = normalization->args.scale;
    args.channels = normalization->args.channels;
  } else {
    args.input_type = float_type_of(kConvBiasRelu, call.input.scalar_type(), "input");
  }
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
  return args;
}

// --- torch's own convolution ---

inline Tensor normalized(const ConvBiasReluCall& call, const Tensor& images, int64_t dtype) {
  return call_torch<7>(
      "pixfuse::normalize",
      {argument(images), argument(call.mean), argument(call.std), argument(call.rounding),
       argument(int64_t{0}), argument(dtype), argument(int64_t{call.channels_last})});
}

inline Tensor convolution(const ConvBiasReluCall& call, const Tensor& input, const Tensor& weight,
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

inline bool lies_as(const Tensor& tensor, bool channels_last) {
  int64_t sizes[4];
  for (int d = 0; d < 4; ++d) sizes[d] = tensor.size(d);
  const auto strides = dense_strides(sizes, channels_last);
  for (int d = 0; d < 4; ++d) {
    if (sizes[d] > 1 && tensor.stride(d) != strides[d]) return false;
  }
  return true;
}

}  // namespace pixfuse
