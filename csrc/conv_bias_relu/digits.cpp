// When the convolution by digits.h can be used, and what its loop needs.
#include "conv_bias_relu/digits.h"

#include <algorithm>
#include <bit>
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

// Of the sums of weight * offset of the pixels of a kernel, the largest magnitude.
double largest_offset_of(const ConvBiasReluArgs& args, int64_t output, const Line* lines) {
  const int64_t* const strides = args.weight_strides;
  double largest = 0.0;
  for (int64_t ky = 0; ky < args.kernel[0]; ++ky) {
    for (int64_t kx = 0; kx < args.kernel[1]; ++kx) {
      const float* weight = args.weight + output * strides[0] + ky * strides[2] + kx * strides[3];
      double offset = 0.0;
      for (int64_t c = 0; c < args.input_sizes[1]; ++c) {
        offset += double{weight[c * strides[1]]} * lines[c].offset;
      }
      largest = std::max(largest, std::fabs(offset));
    }
  }
  return largest;
}

// Of a number of steps, rounded: the lowest digit in the lowest byte. With 128 added to each digit
// none is negative, and the bytes of the number are the digits; less 128, they have another sign.
uint32_t digits_of(double steps) {
  constexpr double kRound = 0x1.8p52;  // leaves no bits below 1, and a whole number in the low ones
  constexpr uint32_t kOffsets = 0x808080;
  return (static_cast<uint32_t>(std::bit_cast<uint64_t>(steps + kRound)) + kOffsets) ^ kOffsets;
}

}  // namespace

bool digits_suit(const ConvBiasReluArgs& args, const Bounds& bounds) {
  const int64_t reach = (args.kernel[1] - 1) * args.dilation[1] + 1;
  const int64_t taps = args.kernel[0] * args.kernel[1] * args.input_sizes[1];
  if (args.input_sizes[1] > kChannels || taps < kLeastTaps || reach > kMostPixels ||
      args.kernel[0] * reach > kMostPixels || !bounds.are_kept()) {
    return false;
  }
  double least_scale = HUGE_VAL;
  for (int64_t c = 0; c < args.input_sizes[1]; ++c) {
    least_scale = std::min(least_scale, std::fabs(line_of(args, c, 0.0).scale));
  }
  for (int64_t o = 0; o < args.output_sizes[1]; ++o) {
    float largest = 0.0f;
    for (int64_t c = 0; c < args.input_sizes[1]; ++c) {
      largest = std::max(largest, bounds.sums_of(o)[c].largest);
    }
    if (largest != 0.0f && largest * least_scale < kLeast) return false;
  }
  return true;
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
  if (args.kernel[0] * args.kernel[1] < plan.steps * kTileQuads) {  // else each place is written
    std::memset(packed, 0, step.size() * static_cast<size_t>(weight_bytes_per_output()));
  }
  Line lines[kChannels];
  for (int64_t c = 0; c < channels; ++c) lines[c] = line_of(args, c, plan.is_signed ? 128.0 : 0.0);
  const int64_t* const strides = args.weight_strides;
  for (int64_t o = 0; o < outputs; ++o) {
    const WeightSums* const sums = bounds.sums_of(o);
    double offsets = 0.0, most = 0.0;
    for (int64_t c = 0; c < channels; ++c) {
      offsets += sums[c].sum() * lines[c].offset;
      most = std::max(most, sums[c].largest * lines[c].scale);
    }
    if (bounds.is_padded()) {
      most = std::max(most, largest_offset_of(args, o, lines) / kInside);
      offsets = 0.0;
    }
    bias.push_back(
        static_cast<float>((args.bias != nullptr ? double{args.bias[o]} : 0.0) + offsets));
    if (most > 0.0) {
      step[o] = std::nextafter(static_cast<float>(most / kMostSteps), HUGE_VALF);
    }
  }
  // A row of a tile at a time: neighbouring output channels, at one pixel of the kernel.
  const int64_t rows_per_step = kTileQuads / plan.segment;
  for (int64_t first = 0; first < outputs; first += kVector) {
    const int64_t count = std::min(kVector, outputs - first);
    const float* const weights = args.weight + first * strides[0];
    double per_step[kVector] = {};  // 0 also for what there is not
    for (int64_t o = 0; o < count; ++o) per_step[o] = dead[first + o] ? 0.0 : 1.0 / step[first + o];
    for (int64_t ky = 0; ky < args.kernel[0]; ++ky) {
      for (int64_t kx = 0; kx < args.kernel[1]; ++kx) {
        const int64_t reach = kx * args.dilation[1];
        const int64_t at = ky / rows_per_step * plan.pieces_per_row + reach / kTileQuads;
        const int64_t place = ky % rows_per_step * plan.segment + reach % kTileQuads;
        const int64_t tap = ky * strides[2] + kx * strides[3];
        double factors[kQuadBytes][kVector] = {};
        for (int64_t c = 0; c < channels; ++c) {
          for (int64_t o = 0; o < count; ++o) {
            const double weight = weights[o * strides[0] + c * strides[1] + tap];
            factors[c][o] = weight * lines[c].scale;
            if (bounds.is_padded()) factors[kChannels][o] += weight * lines[c].offset / kInside;
          }
        }
        uint32_t of_byte[kQuadBytes][kVector];
        for (int64_t i = 0; i < kQuadBytes; ++i) {
          for (int64_t o = 0; o < kVector; ++o) {
            of_byte[i][o] = digits_of(factors[i][o] * per_step[o]);
          }
        }
        uint32_t digits[kDigits][kVector];  // of four bytes each
        for (int64_t digit = 0; digit < kDigits; ++digit) {
          for (int64_t o = 0; o < kVector; ++o) {
            const auto byte = [&](int64_t i) { return of_byte[i][o] >> (8 * digit) & 0xff; };
            digits[digit][o] = byte(0) | byte(1) << 8 | byte(2) << 16 | byte(3) << 24;
          }
        }
        int8_t* const row = packed + (first / kVector * plan.steps + at) * kDigits * kTile +
                            place * kVector * kQuadBytes;
        for (int64_t digit = 0; digit < kDigits; ++digit) {
          std::memcpy(row + digit * kTile, digits[digit], sizeof digits[digit]);
        }
      }
    }
  }
}

}  // namespace pixfuse
