// What a convolution of bytes can come to: its weights in one place, and the values that normalized
// pixels can have. For the ways that need both to be in bounds, and for the channels that no image
// fires.
#pragma once
#include <vector>

#include "conv_bias_relu/conv_bias_relu_loop.h"

namespace pixfuse {

class Bounds {
 public:
  // Of bytes with at most kMaxDirectChannels channels.
  explicit Bounds(const ConvBiasReluArgs& args);

  // Whether the kernel reaches beyond the image.
  bool is_padded() const { return padded; }

  // Whether all weights and all values of the pixels are numbers of at most 2^40, so that no sum of
  // them overflows in an order other than the direct one.
  bool are_kept() const;

  // Which output channels no image can bring above 0.
  std::vector<bool> dead_channels() const;

  // The weights of an output channel, [kernel row][kernel column][input channel].
  const float* weights_of(int64_t output) const { return weights.data() + output * taps; }

  // Of each output channel; infinite or NaN if one of its weights is.
  const std::vector<float>& largest_weights() const { return largest; }

  const int64_t taps;  // of an output channel

 private:
  // The least and the greatest value of a channel of normalized bytes.
  struct Range {
    double least, greatest;
  };

  const ConvBiasReluArgs& args;
  const bool padded;
  std::vector<float> weights, largest;
  Range ranges[kMaxDirectChannels];
};

}  // namespace pixfuse
