// What a convolution of bytes can come to, from sums of its weights and the values that normalized
// pixels can have. For the ways that need both to be in bounds, and for the channels that no image
// fires.
#pragma once
#include <vector>

#include "conv_bias_relu/conv_bias_relu_loop.h"

namespace pixfuse {

class Bounds {
 public:
  // Of bytes with at most kMaxDirectChannels channels. `sum_weights`: that of the instruction set.
  using SumWeights = void (*)(const float* weights, int64_t count, int64_t channels,
                              WeightSums* sums);
  Bounds(const ConvBiasReluArgs& args, SumWeights sum_weights);

  // Whether the kernel reaches beyond the image.
  bool is_padded() const { return padded; }

  // Whether all weights and all values of the pixels are numbers of at most 2^40, so that no sum of
  // them overflows in an order other than the direct one.
  bool are_kept() const;

  // Whether no output channel has more weights that are 0 than others, unless all are. The direct
  // sum, like torch's, is the more accurate the fewer terms are added up; no other way is.
  bool are_dense() const;

  // Which output channels no image can bring above 0. For weights and values that are kept.
  std::vector<bool> dead_channels() const;

  // Of an output channel, for each input channel.
  const WeightSums* sums_of(int64_t output) const {
    return sums.data() + output * args.input_sizes[1];
  }

 private:
  // The least and the greatest value of a channel of normalized bytes.
  struct Range {
    double least, greatest;
  };

  // What the sum over the kernel can come to for an output channel, at most: where each range holds
  // 0, or nothing is padded; and where a pixel may be 0 in all channels at once.
  double most_of_pixels(int64_t output) const;
  double most_with_padding(int64_t output) const;

  const ConvBiasReluArgs& args;
  const bool padded;
  bool hold_zero = true;  // each of `ranges`
  std::vector<WeightSums> sums;
  Range ranges[kMaxDirectChannels];
};

}  // namespace pixfuse
