// When the convolution by digits.h can be used, and what its loop needs.
#include "conv_bias_relu/digits.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "conv_bias_relu/digits_plan.h"

namespace pixfuse {
namespace {

constexpr int64_t kVector = 16;  // output channels side by side
constexpr int64_t kChannels = kQuadBytes - 1;
constexpr int64_t kTile = kTileQuads * kVector * kQuadBytes;

// The largest number of three digits that has a negative, too.
constexpr double kMostSteps = 127 * 65536 + 127 * 256 + 127;
// The smallest weight, times the scale, whose steps are floats with all their bits.
constexpr double kLeast = 0x1p-90;
// Fewer multiplications are not what a call takes its time for: then the direct way is as fast, or
// faster, since it has less to do for each output.
constexpr int64_t kLeastTaps = 64;
// Pixels of a kernel: 255 * 128 times 4 bytes of each fit an int32.
constexpr int64_t kMostPixels = 1 << 14;

// normalized(x) = scale * (x - z) + offset.
struct Line {
  double scale, offset;
};

Line line_of(const ConvBiasReluArgs& args, int64_t c, double z) {
  const ChannelConstants& channel = args.channels[c];
  if (args.arithmetic == Arithmetic::nearest) {
    return {channel.inverse_width,
            ((z - channel.center_high) - channel.center_low) * channel.inverse_width};
  }
  const double unit = args.arithmetic == Arithmetic::multiply ? double{args.scale} : 1.0 / 255.0;
  return {unit / channel.std, (z * unit - channel.mean) / channel.std};
}

bool black_is_zero(const ConvBiasReluArgs& args) {
  for (int64_t c = 0; c < args.input_sizes[1]; ++c) {
    if (line_of(args, c, 0.0).offset != 0.0) return false;
  }
  return true;
}

// Of a number of steps, rounded: the lowest digit in the lowest byte. With 128 added to each digit
// none is negative, and the bytes of the number are the digits; less 128, they have another sign.
uint32_t digits_of(double steps) {
  constexpr double kRound = 0x1.8p52;  // leaves no bits below 1
  constexpr uint32_t kOffsets = 0x808080;
  const auto whole = static_cast<int32_t>((steps + kRound) - kRound);
  return (static_cast<uint32_t>(whole) + kOffsets) ^ kOffsets;
}

}  // namespace

bool digits_suit(const ConvBiasReluArgs& args, const Bounds& bounds) {
  const int64_t reach = (args.kernel[1] - 1) * args.dilation[1] + 1;
  if (args.input_sizes[1] > kChannels || bounds.taps < kLeastTaps ||
      args.kernel[0] * reach > kMostPixels || !bounds.are_kept()) {
    return false;
  }
  double least_scale = HUGE_VAL;
  for (int64_t c = 0; c < args.input_sizes[1]; ++c) {
    least_scale = std::min(least_scale, std::fabs(line_of(args, c, 0.0).scale));
  }
  const std::vector<float>& largest = bounds.largest_weights();
  return std::all_of(largest.begin(), largest.end(), [&](float weight) {
    return weight == 0.0f || weight * least_scale >= kLeast;
  });
}

Digits::Digits(const ConvBiasReluArgs& args, int64_t padded_outputs)
    : step(static_cast<size_t>(padded_outputs), 1.0f) {
  plan.is_signed = !black_is_zero(args);
  const int64_t reach = (args.kernel[1] - 1) * args.dilation[1] + 1;
  plan.segment = kTileQuads;
  while (plan.segment / 2 >= reach) plan.segment /= 2;
  plan.pieces_per_row = (reach + plan.segment - 1) / plan.segment;
  const int64_t rows_per_step = kTileQuads / plan.segment;
  plan.steps = (args.kernel[0] + rows_per_step - 1) / rows_per_step * plan.pieces_per_row;
  plan.step = step.data();
  plan.scratch_floats = kDigitsSumFloats + plan.steps * kDigitsPixels * kTileQuads;
  const int64_t width = (args.output_sizes[3] + kVector - 1) / kVector * kVector;
  line_pixels = (width - 1) * args.stride[1] + plan.pieces_per_row * kTileQuads;
}

void Digits::pack_weight(const ConvBiasReluArgs& args, const Bounds& bounds,
                         const std::vector<bool>& dead, int8_t* packed) {
  const int64_t outputs = args.output_sizes[1], channels = args.input_sizes[1];
  std::memset(packed, 0, step.size() * static_cast<size_t>(weight_bytes_per_output()));
  Line lines[kChannels];
  for (int64_t c = 0; c < channels; ++c) lines[c] = line_of(args, c, plan.is_signed ? 128.0 : 0.0);
  const bool padded = bounds.is_padded();
  const int64_t rows_per_step = kTileQuads / plan.segment;
  std::vector<double> factors;  // of the bytes of each pixel, [kernel row][kernel column][4]
  for (int64_t o = 0; o < outputs; ++o) {
    const float* const weights = bounds.weights_of(o);
    factors.assign(static_cast<size_t>(bounds.taps / channels * kQuadBytes), 0.0);
    double* quad = factors.data();
    double offsets = 0.0, largest = 0.0;
    for (int64_t i = 0; i < bounds.taps; i += channels, quad += kQuadBytes) {
      double offset = 0.0;
      for (int64_t c = 0; c < channels; ++c) {
        quad[c] = weights[i + c] * lines[c].scale;
        offset += weights[i + c] * lines[c].offset;
        largest = std::max(largest, std::fabs(quad[c]));
      }
      offsets += offset;
      if (!padded) continue;
      quad[kChannels] = offset / kInside;
      largest = std::max(largest, std::fabs(quad[kChannels]));
    }
    const double own = args.bias != nullptr ? double{args.bias[o]} : 0.0;
    bias.push_back(static_cast<float>(padded ? own : own + offsets));
    if (dead[o] || largest == 0.0) continue;
    step[o] = std::nextafter(static_cast<float>(largest / kMostSteps), HUGE_VALF);
    const double per_step = 1.0 / step[o];
    int8_t* const column = packed + o / kVector * plan.steps * kDigits * kTile + o % kVector * 4;
    const double* factor = factors.data();
    for (int64_t ky = 0; ky < args.kernel[0]; ++ky) {
      for (int64_t kx = 0; kx < args.kernel[1]; ++kx, factor += kQuadBytes) {
        const int64_t reach = kx * args.dilation[1];
        const int64_t at = ky / rows_per_step * plan.pieces_per_row + reach / kTileQuads;
        const int64_t place = ky % rows_per_step * plan.segment + reach % kTileQuads;
        int8_t* const first = column + at * kDigits * kTile + place * kVector * kQuadBytes;
        uint8_t digits[kDigits][kQuadBytes];
        for (int64_t i = 0; i < kQuadBytes; ++i) {
          const uint32_t of_byte = digits_of(factor[i] * per_step);
          for (int64_t digit = 0; digit < kDigits; ++digit) {
            digits[digit][i] = static_cast<uint8_t>(of_byte >> (8 * digit));
          }
        }
        for (int64_t digit = 0; digit < kDigits; ++digit) {
          std::memcpy(first + digit * kTile, digits[digit], kQuadBytes);
        }
      }
    }
  }
}

}  // namespace pixfuse
