// The rule that decides for the convolution by digits.h, and what its loop is given.
#pragma once
#include <vector>

#include "conv_bias_relu/bounds.h"

namespace pixfuse {

// What multiplies the bytes: vectors, each digit or in pairs, or tiles. Kernels of more than a few
// thousand taps leave the words of pairs too few bits: they go by each digit.
enum class DigitsIn { vectors, pairs, tiles };

// Whether it is as good as torch's: for bytes of up to three channels, as what normalizes them
// bounds them, and for finite weights that are not mostly zeros, and not so small that their steps
// have no float. It does not depend on the number of images: a batch has the bits of its images.
bool digits_suit(const ConvBiasReluArgs& args, const Bounds& bounds, DigitsIn digits_in);

struct Digits {
  // normalized(x) = scale * (x - z) + offset.
  struct Line {
    double scale, offset;
  };
  // The taps of a kernel that lie inside the image, along one dimension.
  struct Part {
    int64_t first, last;
    bool operator==(const Part&) const = default;
  };

  DigitsPlan plan{};                           // points into `step`
  int64_t rows_at_once;                        // of the output
  std::vector<float> step;                     // of each output channel
  std::vector<int32_t> starts;                 // of each digit of each output channel
  std::vector<int64_t> row_bias, column_bias;  // of each output row, and of each output column
  std::vector<float> bias;  // [part of the kernel][padded outputs], with the offsets

  Digits(const ConvBiasReluArgs& args, const Bounds& bounds, int64_t padded_outputs,
         DigitsIn digits_in);
  Digits(const Digits&) = delete;
  Digits& operator=(const Digits&) = delete;

  // For all output channels at once, or one block of them after the other.
  void choose_rows(const ConvBiasReluArgs& args, bool in_blocks);
  // As digits.h has it, and the biases; zeros for a dead channel. `pack_vector`: pack_digits of
  // the instruction set.
  using PackVector = void (*)(const DigitsPlan&, const DigitsWeights&, int8_t*, int32_t*);
  void pack_weight(const ConvBiasReluArgs& args, const Bounds& bounds, const ChannelBlocks& blocks,
                   const std::vector<bool>& dead, PackVector pack_vector, int8_t* packed);

 private:
  void put_biases(const ConvBiasReluArgs& args, int64_t output, const Line* lines, double offsets);

  std::vector<Part> row_parts, column_parts;
};

}  // namespace pixfuse
