#include "conv_bias_relu/bounds.h"

#include <algorithm>

namespace pixfuse {
namespace {

constexpr double kLargest = 0x1p40;

bool reaches_beyond_the_image(const ConvBiasReluArgs& args) {
  for (int d = 0; d < 2; ++d) {
    const int64_t last = (args.output_sizes[2 + d] - 1) * args.stride[d] - args.padding[d] +
                         (args.kernel[d] - 1) * args.dilation[d];
    if (args.padding[d] > 0 || last >= args.input_sizes[2 + d]) return true;
  }
  return false;
}

double normalized(const ConvBiasReluArgs& args, const ChannelConstants& channel, float byte) {
  switch (args.arithmetic) {
    case Arithmetic::multiply:
      return ((byte * args.scale) - channel.mean) / channel.std;
    case Arithmetic::divide:
      return ((byte / 255.0f) - channel.mean) / channel.std;
    case Arithmetic::nearest:
      break;
  }
  const double centered = (double{byte} - channel.center_high) - channel.center_low;
  return static_cast<float>(centered * channel.inverse_width);
}

}  // namespace

Bounds::Bounds(const ConvBiasReluArgs& args, SumWeights sum_weights)
    : args(args), padded(reaches_beyond_the_image(args)) {
  const int64_t channels = args.input_sizes[1], rows = args.kernel[0], columns = args.kernel[1];
  const int64_t* strides = args.weight_strides;
  const int64_t taps = rows * columns;
  // All of an output channel, or of one and an input channel.
  const bool interleaved = strides[1] == 1 && strides[3] == channels;
  const bool side_by_side = (interleaved || strides[3] == 1) && strides[2] == columns * strides[3];
  std::vector<float> copied(static_cast<size_t>(side_by_side ? 0 : taps));
  sums.resize(static_cast<size_t>(args.output_sizes[1] * channels));
  for (int64_t o = 0; o < args.output_sizes[1]; ++o) {
    const float* const weights = args.weight + o * strides[0];
    WeightSums* const own = sums.data() + o * channels;
    if (side_by_side && interleaved) {
      sum_weights(weights, taps * channels, channels, own);
      continue;
    }
    for (int64_t c = 0; c < channels; ++c) {
      const float* plane = weights + c * strides[1];
      if (!side_by_side) {
        for (int64_t ky = 0; ky < rows; ++ky) {
          for (int64_t kx = 0; kx < columns; ++kx) {
            copied[ky * columns + kx] = plane[ky * strides[2] + kx * strides[3]];
          }
        }
        plane = copied.data();
      }
      sum_weights(plane, taps, 1, own + c);
    }
  }
  // Each step of the normalization keeps the order of what it is given, or turns it.
  for (int64_t c = 0; c < channels; ++c) {
    const double black = normalized(args, args.channels[c], 0.0f);
    const double white = normalized(args, args.channels[c], 255.0f);
    ranges[c] = {std::min(black, white), std::max(black, white)};
    hold_zero = hold_zero && ranges[c].least <= 0.0 && ranges[c].greatest >= 0.0;
  }
}

bool Bounds::are_kept() const {
  for (int64_t c = 0; c < args.input_sizes[1]; ++c) {
    if (!(-ranges[c].least <= kLargest && ranges[c].greatest <= kLargest)) return false;
  }
  return std::all_of(sums.begin(), sums.end(),
                     [](const WeightSums& some) { return some.largest <= kLargest; });  // no NaN
}

bool Bounds::are_dense() const {
  const int64_t channels = args.input_sizes[1], taps = args.kernel[0] * args.kernel[1] * channels;
  for (int64_t o = 0; o < args.output_sizes[1]; ++o) {
    int64_t zeros = 0;
    for (int64_t c = 0; c < channels; ++c) zeros += sums_of(o)[c].zeros;
    if (zeros > taps - zeros && zeros < taps) return false;
  }
  return true;
}

std::vector<bool> Bounds::dead_channels() const {
  std::vector<bool> dead;
  for (int64_t o = 0; o < args.output_sizes[1]; ++o) {
    const double most = padded && !hold_zero ? most_with_padding(o) : most_of_pixels(o);
    dead.push_back((args.bias != nullptr ? double{args.bias[o]} : 0.0) + most <= 0.0);
  }
  return dead;
}

double Bounds::most_of_pixels(int64_t output) const {
  double most = 0.0;
  for (int64_t c = 0; c < args.input_sizes[1]; ++c) {
    const WeightSums& some = sums_of(output)[c];
    most += some.positive * ranges[c].greatest + some.negative * ranges[c].least;
  }
  return most;
}

double Bounds::most_with_padding(int64_t output) const {
  const int64_t* strides = args.weight_strides;
  double most = 0.0;
  for (int64_t ky = 0; ky < args.kernel[0]; ++ky) {
    for (int64_t kx = 0; kx < args.kernel[1]; ++kx) {
      const float* weight = args.weight + output * strides[0] + ky * strides[2] + kx * strides[3];
      double tap = 0.0;
      for (int64_t c = 0; c < args.input_sizes[1]; ++c) {
        const double w = double{weight[c * strides[1]]};
        tap += w * (w > 0.0 ? ranges[c].greatest : ranges[c].least);
      }
      most += std::max(tap, 0.0);
    }
  }
  return most;
}

}  // namespace pixfuse
