// The operator on CPU tensors: schema, checks, allocation; hands plain pointers down.
//
// Few input channels go through the direct convolution, and more where that is measured faster. The
// others go through torch's own one, and the last pass over its result while that is in a cache.
#include "common/cpu_output.h"
#include "common/isa.h"
#include "conv_bias_relu/conv_bias_relu_args.h"
#include "conv_bias_relu/conv_bias_relu_loop.h"

namespace pixfuse {
namespace {

using Call = ConvBiasReluCall;
constexpr const char* kName = kConvBiasRelu;

// An output of up to so many bytes is torch's own, with the last pass in place: it is still in a
// cache then. A larger one is recycled memory, as fresh memory costs more than a copy, and torch's
// convolution goes in slices of the batch: of a cache's size, as each costs some 0.1 ms, and of
// several times the weights, which oneDNN puts in order for each.
//
// For a contiguous output oneDNN copies input and output, to have blocks of channels side by side.
// There both count, and slices spare the fresh memory of these copies.
struct BatchBytes {
  int64_t whole, slice;
};
constexpr BatchBytes kChannelsLast{int64_t{16} << 20, int64_t{8} << 20};
constexpr BatchBytes kContiguous{int64_t{12} << 20, int64_t{7} << 19};
constexpr int64_t kSliceWeights = 4;

int64_t bytes_per_output(const Call& call) {
  return call.dtype == kFloat64 ? 8 : element_bytes(static_cast<ElementType>(call.dtype));
}

int64_t image_elements(const int64_t (&sizes)[4]) { return sizes[1] * sizes[2] * sizes[3]; }

// How many images torch's convolution takes at a time.
int64_t images_per_slice(const Call& call) {
  const int64_t images = call.output_sizes[0], output = image_elements(call.output_sizes);
  const int64_t input = image_elements(call.view.sizes);
  const int64_t elements =
      std::max<int64_t>(1, call.channels_last ? output : std::max(input, output));
  const int64_t image_bytes = elements * bytes_per_output(call);
  const BatchBytes& most = call.channels_last ? kChannelsLast : kContiguous;
  // Bytes are normalized first, to memory of their own.
  if (images * image_bytes <= most.whole && !call.bytes()) return images;
  const int64_t weight_bytes = call.weight.numel() * bytes_per_output(call);
  const int64_t slice_bytes = std::max(most.slice, kSliceWeights * weight_bytes);
  const int64_t slices = 1 + images * image_bytes / slice_bytes;
  return (images + slices - 1) / slices;  // all of about a size
}

Tensor empty_output(const Call& call) {
  const int32_t type = call.dtype == kFloat64 ? aoti_torch_dtype_float64()
                                              : shim_dtype(static_cast<ElementType>(call.dtype));
  return empty_cpu_output(4, call.output_sizes, call.output_strides, type, bytes_per_output(call));
}

// --- directly ---

// The one rule of who goes this way: images; and of more channels those where torch's convolution
// and the last pass over it are measured slower, and are no closer to the sum. That is on AVX-512,
// of float32. Other kernels than these, and small results, oneDNN sums up in parts, and errs by
// half as much.
//
// From pixels to pixels, whose channels lie side by side: with so few outputs that one vector holds
// them, values are loaded as often as they are multiplied. From planes to planes: both have to be
// turned, so there must be sums that take longer, and rows that fill vectors.
bool goes_directly(const Call& call) {
  constexpr int64_t kFewestPositions = 1024;
  constexpr int64_t kVectorOutputs = 16, kMostWeightsOfVector = 128;
  constexpr int64_t kFewestWeightsOfPlanes = 256, kFewestOutputsOfPlanes = 32, kFewestColumns = 14;
  // Weights of an output: more than the first only if the second-level cache holds all of them.
  constexpr int64_t kManyWeights = 576, kMostWeights = 2304;
  constexpr int64_t kFewestOutputs = 64, kMostWeightBytes = int64_t{3} << 19;
  if (call.groups != 1 || call.dtype == kFloat64) return false;
  const int64_t channels = call.view.sizes[1], outputs = call.output_sizes[1];
  if (channels <= kMaxDirectChannels) return true;
  if (common_isa() != Isa::avx512) return false;
  if (call.bytes() || call.dtype != static_cast<int64_t>(ElementType::float32)) return false;
  const int64_t side = call.weight.size(2), weights = channels * side * side;
  if ((side != 1 && side != 3) || call.weight.size(3) != side) return false;
  if (side != 1 && (call.dilation[0] != 1 || call.dilation[1] != 1)) return false;
  const auto &sizes = call.output_sizes, &strides = call.view.strides;
  if (sizes[0] * sizes[2] * sizes[3] < kFewestPositions) return false;
  if (weights > kManyWeights) {
    const bool is_dense = side == 3 && call.stride[0] == 1 && call.stride[1] == 1;
    const int64_t bytes = weights * outputs * static_cast<int64_t>(sizeof(float));
    if (!is_dense || weights > kMostWeights) return false;
    if (outputs < kFewestOutputs || bytes > kMostWeightBytes) return false;
  }
  if (call.channels_last) {
    return strides[1] == 1 && strides[3] == channels &&
           (outputs > kVectorOutputs || weights <= kMostWeightsOfVector);
  }
  return strides[3] == 1 && side == 3 && weights >= kFewestWeightsOfPlanes &&
         outputs >= kFewestOutputsOfPlanes && sizes[3] >= kFewestColumns;
}

Tensor convolve_directly(const Call& call, const ChannelActivity& activity) {
  Tensor output = empty_output(call);
  const Tensor weight = to_float32(call.weight);
  std::optional<NormalizeCall> normalization;
  ConvBiasReluArgs args = kernel_args(call, weight, normalization);
  std::optional<Tensor> bias;
  if (call.bias.has_value()) bias = torch::stable::contiguous(to_float32(*call.bias));
  args.weight = static_cast<const float*>(weight.const_data_ptr());
  args.bias = bias.has_value() ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  args.output = output.mutable_data_ptr();
  args.past_caches = is_best_past_caches(args.output_sizes, args.output_type);
  args.activity = activity;
  check(conv_bias_relu_cpu(args, torch_parallel_for) == 0, kName,
        "torch's threads to run the loop");
  return output;
}

// --- by torch ---

Tensor convolve_with_torch(const Call& call, const ChannelActivity& activity) {
  const int64_t images = call.output_sizes[0];
  const int64_t image_bytes = image_elements(call.output_sizes) * bytes_per_output(call);
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
  const int64_t step = images_per_slice(call);
  const bool whole = step == images && !call.bytes();
  std::optional<Tensor> output;
  if (!whole || images == 0) {
    output = empty_output(call);
    args.past_caches = is_best_past_caches(call.output_sizes, args.output_type);
  }
  Tensor input = call.input;
  for (int64_t first = 0; first < images; first += step) {
    args.images = std::min(step, images - first);
    Tensor slice = whole ? input : torch::stable::narrow(input, 0, first, args.images);
    if (call.bytes()) slice = normalized(call, slice, static_cast<int64_t>(ElementType::float32));
    Tensor sums = convolution(call, slice, weight, bias);
    if (!lies_as(sums, call.channels_last)) {
      sums = torch::stable::contiguous(sums, call.channels_last
                                                 ? torch::headeronly::MemoryFormat::ChannelsLast
                                                 : torch::headeronly::MemoryFormat::Contiguous);
    }
    if (whole) output = sums;
    args.input = sums.const_data_ptr();
    args.output = static_cast<char*>(output->mutable_data_ptr()) + first * image_bytes;
    check(relu_count_cpu(args, torch_parallel_for) == 0, kName, "torch's threads to run the loop");
  }
  return *output;
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
  const int64_t outputs = call.output_sizes[1];
  const int64_t counts_sizes[2] = {3, outputs}, counts_strides[2] = {outputs, 1}, one = 1;
  Tensor counts = empty_cpu_output(2, counts_sizes, counts_strides, aoti_torch_dtype_int64(), 8);
  Tensor sums = empty_cpu_output(1, &outputs, &one, aoti_torch_dtype_float64(), 8);
  int64_t* const numbers = static_cast<int64_t*>(counts.mutable_data_ptr());
  double* const sum = static_cast<double*>(sums.mutable_data_ptr());
  std::fill(numbers, numbers + 3 * outputs, 0);
  std::fill(sum, sum + outputs, 0.0);
  const ChannelActivity activity{numbers, numbers + outputs, numbers + 2 * outputs, sum};
  const Tensor output =
      goes_directly(call) ? convolve_directly(call, activity) : convolve_with_torch(call, activity);
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
