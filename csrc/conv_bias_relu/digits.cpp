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
constexpr int64_t kChannels = kMostPixelBytes - 1;
constexpr int64_t kQuadBytes = 4;  // of a patch, that lie side by side for each output channel
constexpr int64_t kTile = kStepBytes * kVector;

// The largest number of three digits that has a negative, too.
constexpr double kMostSteps = 127 * 65536 + 127 * 256 + 127;
// The smallest weight, times the scale, whose steps are floats with all their bits.
constexpr double kLeast = 0x1p-90;
// Fewer multiplications are not what a call takes its time for: then the direct way is as fast, or
// faster, since it has less to do for each output.
constexpr int64_t kLeastTaps = 48;
// Pixels of a kernel whose products fit an int32.
constexpr int64_t kMostPixels = 1 << 14;
static_assert(int64_t{255} * 128 * kMostPixelBytes * kMostPixels <= INT32_MAX);
// Rows of the output that are computed at once leave fewer tiles half empty. Their lines should
// stay in the first-level cache; with more output channels than one pass over them is for, they and
// their patches in the second-level cache.
constexpr int64_t kNearBytes = 1 << 14, kFarBytes = 1 << 18;

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
  const int64_t pixels = args.kernel[0] * args.kernel[1];
  if (args.input_sizes[1] > kChannels || pixels * args.input_sizes[1] < kLeastTaps ||
      pixels > kMostPixels || !bounds.are_kept()) {
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

Digits::Digits(const ConvBiasReluArgs& args, const Bounds& bounds, int64_t padded_outputs)
    : step(static_cast<size_t>(padded_outputs), 1.0f) {
  plan.is_signed = !black_is_zero(args);
  plan.is_padded = bounds.is_padded();
  plan.pixel_bytes = args.input_sizes[1] + (plan.is_padded ? 1 : 0);
  const auto steps = [&](int64_t row) {
    return (args.kernel[0] * row + kStepBytes - 1) / kStepBytes;
  };
  const int64_t row_bytes = args.kernel[1] * plan.pixel_bytes;
  plan.steps = steps(row_bytes);
  // Rows that no end of a line of the caches divides are stored faster.
  const auto apart = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(row_bytes)));
  plan.row_step = steps(apart) == plan.steps ? apart : row_bytes;
  plan.step = step.data();
}

void Digits::choose_rows(const ConvBiasReluArgs& args, bool in_blocks) {
  const int64_t width = args.output_sizes[3], most = in_blocks ? kFarBytes : kNearBytes;
  const int64_t line_bytes = plan.pixel_bytes * ((width - 1) * args.stride[1] +
                                                 (args.kernel[1] - 1) * args.dilation[1] + 1);
  const auto lines = [&] {
    return (rows_at_once - 1) * args.stride[0] + (args.kernel[0] - 1) * args.dilation[0] + 1;
  };
  const auto patches_fit = [&] { return rows_at_once <= kFarBytes / plan.patch_bytes() / width; };
  rows_at_once = std::min(kItemRows, args.output_sizes[2]);
  while (rows_at_once > 1 && (lines() > most / line_bytes || (in_blocks && !patches_fit()))) {
    rows_at_once /= 2;
  }
  plan.is_gathered_once = in_blocks && patches_fit();
  const int64_t pixels = plan.is_gathered_once ? rows_at_once * width : kDigitsPixels;
  const int64_t whole_tiles = (pixels + kVector - 1) / kVector * kVector;
  plan.scratch_floats = kDigitsSumFloats + whole_tiles * plan.patch_bytes() / 4;
}

void Digits::pack_weight(const ConvBiasReluArgs& args, const Bounds& bounds,
                         const std::vector<bool>& dead, int8_t* packed) {
  const int64_t outputs = args.output_sizes[1], channels = args.input_sizes[1];
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
    if (plan.is_padded) {
      most = std::max(most, largest_offset_of(args, o, lines) / kInside);
      offsets = 0.0;
    }
    bias.push_back(
        static_cast<float>((args.bias != nullptr ? double{args.bias[o]} : 0.0) + offsets));
    if (most > 0.0) {
      step[o] = std::nextafter(static_cast<float>(most / kMostSteps), HUGE_VALF);
    }
  }
  // What each byte of a patch is multiplied with: weights[offset + c * strides[1]] * factors[c],
  // summed up over the channels [first, last).
  struct Byte {
    int64_t offset, first, last;
    double factors[kChannels];
  };
  std::vector<Byte> bytes(static_cast<size_t>(plan.patch_bytes()));  // else of no channel
  for (int64_t ky = 0; ky < args.kernel[0]; ++ky) {
    size_t at = static_cast<size_t>(ky * plan.row_step);
    for (int64_t kx = 0; kx < args.kernel[1]; ++kx) {
      const int64_t offset = ky * strides[2] + kx * strides[3];
      for (int64_t c = 0; c < channels; ++c) {
        bytes[at] = {offset, c, c + 1, {}};
        bytes[at++].factors[c] = lines[c].scale;
      }
      if (!plan.is_padded) continue;
      bytes[at] = {offset, 0, channels, {}};
      for (int64_t c = 0; c < channels; ++c) bytes[at].factors[c] = lines[c].offset / kInside;
      ++at;
    }
  }
  // A row of a tile at a time: neighbouring output channels, at four bytes of a patch.
  for (int64_t first = 0; first < outputs; first += kVector) {
    const int64_t count = std::min(kVector, outputs - first);
    const float* const weights = args.weight + first * strides[0];
    double per_step[kVector] = {};  // 0 also for what there is not
    for (int64_t o = 0; o < count; ++o) per_step[o] = dead[first + o] ? 0.0 : 1.0 / step[first + o];
    int8_t* const tiles = packed + first / kVector * kDigits * plan.steps * kTile;
    for (int64_t quad = 0; quad < plan.patch_bytes() / kQuadBytes; ++quad) {
      uint32_t of_byte[kQuadBytes][kVector];
      for (int64_t i = 0; i < kQuadBytes; ++i) {
        const Byte& byte = bytes[quad * kQuadBytes + i];
        double factors[kVector] = {};
        for (int64_t c = byte.first; c < byte.last; ++c) {
          const float* const weight = weights + byte.offset + c * strides[1];
          for (int64_t o = 0; o < count; ++o) {
            factors[o] += weight[o * strides[0]] * byte.factors[c];
          }
        }
        for (int64_t o = 0; o < kVector; ++o) of_byte[i][o] = digits_of(factors[o] * per_step[o]);
      }
      for (int64_t digit = 0; digit < kDigits; ++digit) {
        uint32_t row[kVector];  // of four bytes each
        for (int64_t o = 0; o < kVector; ++o) {
          const auto byte = [&](int64_t i) { return of_byte[i][o] >> (8 * digit) & 0xff; };
          row[o] = byte(0) | byte(1) << 8 | byte(2) << 16 | byte(3) << 24;
        }
        std::memcpy(tiles + digit * plan.steps * kTile + quad * kVector * kQuadBytes, row,
                    sizeof row);
      }
    }
  }
}

}  // namespace pixfuse
