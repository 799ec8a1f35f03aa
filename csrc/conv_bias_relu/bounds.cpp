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

float largest_of(const float* weights, int64_t count) {
  // The bits of magnitudes are in the order of the magnitudes, with NaN above all of them.
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    largest = std::max(largest, bits_of(weights[i]) & 0x7fffffffu);
  }
  return float_of(largest);
}

}  // namespace

Bounds::Bounds(const ConvBiasReluArgs& args)
    : taps(args.kernel[0] * args.kernel[1] * args.input_sizes[1]),
      args(args),
      padded(reaches_beyond_the_image(args)),
      weights(static_cast<size_t>(args.output_sizes[1] * taps)) {
  const int64_t channels = args.input_sizes[1];
  const int64_t* strides = args.weight_strides;
  float* to = weights.data();
  for (int64_t o = 0; o < args.output_sizes[1]; ++o) {
    for (int64_t ky = 0; ky < args.kernel[0]; ++ky) {
      for (int64_t c = 0; c < channels; ++c) {
        const float* from = args.weight + o * strides[0] + c * strides[1] + ky * strides[2];
        for (int64_t kx = 0; kx < args.kernel[1]; ++kx)
          to[kx * channels + c] = from[kx * strides[3]];
      }
      to += args.kernel[1] * channels;
    }
    largest.push_back(largest_of(weights_of(o), taps));
  }
  // Each step of the normalization keeps the order of what it is given, or turns it.
  for (int64_t c = 0; c < channels; ++c) {
    const double black = normalized(args, args.channels[c], 0.0f);
    const double white = normalized(args, args.channels[c], 255.0f);
    ranges[c] = {std::min(black, white), std::max(black, white)};
    if (padded) ranges[c] = {std::min(ranges[c].least, 0.0), std::max(ranges[c].greatest, 0.0)};
  }
}

bool Bounds::are_kept() const {
  for (int64_t c = 0; c < args.input_sizes[1]; ++c) {
    if (!(-ranges[c].least <= kLargest && ranges[c].greatest <= kLargest)) return false;
  }
  return std::all_of(largest.begin(), largest.end(),
                     [](float weight) { return weight <= kLargest; });  // false for NaN
}

std::vector<bool> Bounds::dead_channels() const {
  const int64_t channels = args.input_sizes[1];
  std::vector<bool> dead;
  for (int64_t o = 0; o < args.output_sizes[1]; ++o) {
    const float* const weight = weights_of(o);
    double most[kMaxDirectChannels] = {};
    for (int64_t i = 0; i < taps; i += channels) {
      for (int64_t c = 0; c < channels; ++c) {
        most[c] += std::max(weight[i + c] * ranges[c].greatest, weight[i + c] * ranges[c].least);
      }
    }
    double sum = args.bias != nullptr ? double{args.bias[o]} : 0.0;
    for (int64_t c = 0; c < channels; ++c) sum += most[c];
    dead.push_back(sum <= 0.0);
  }
  return dead;
}

}  // namespace pixfuse
