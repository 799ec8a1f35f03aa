// When the convolution by winograd.h pays, and what its loop needs.
#include <algorithm>
#include <cmath>

#include "conv_bias_relu/winograd_plan.h"

namespace pixfuse {
namespace {

// --- bounds ---

// A rule that accuracy makes: fewer terms, and too little is paid back. And one that time makes:
// the weights are brought to their points in each call.
constexpr int64_t kLeastTerms = 20;
constexpr int64_t kLeastPixels = 128;

// Beyond this, sums of a few more terms than those of the direct convolution could overflow.
constexpr double kLargest = 0x1p40;

// The least and the greatest value of a channel of normalized bytes.
struct Range {
  double least, greatest;
};

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

bool is_padded(const ConvBiasReluArgs& args) {
  for (int d = 0; d < 2; ++d) {
    const int64_t last = (args.output_sizes[2 + d] - 1) * args.stride[d] - args.padding[d] +
                         (args.kernel[d] - 1) * args.dilation[d];
    if (args.padding[d] > 0 || last >= args.input_sizes[2 + d]) return true;
  }
  return false;
}

// Each step of the normalization keeps the order of what it is given, or turns it.
Range range_of(const ConvBiasReluArgs& args, int64_t channel) {
  const double black = normalized(args, args.channels[channel], 0.0f);
  const double white = normalized(args, args.channels[channel], 255.0f);
  const Range range{std::min(black, white), std::max(black, white)};
  if (!is_padded(args)) return range;
  return {std::min(range.least, 0.0), std::max(range.greatest, 0.0)};
}

template <class Body>
void for_each_weight(const ConvBiasReluArgs& args, int64_t output, const Body& body) {
  const int64_t* strides = args.weight_strides;
  for (int64_t c = 0; c < args.input_sizes[1]; ++c) {
    for (int64_t ky = 0; ky < args.kernel[0]; ++ky) {
      for (int64_t kx = 0; kx < args.kernel[1]; ++kx) {
        body(c,
             args.weight[output * strides[0] + c * strides[1] + ky * strides[2] + kx * strides[3]]);
      }
    }
  }
}

bool is_small(const ConvBiasReluArgs& args) {
  bool small = true;
  for (int64_t c = 0; c < args.input_sizes[1]; ++c) {
    const Range range = range_of(args, c);
    small = small && -range.least <= kLargest && range.greatest <= kLargest;
  }
  for (int64_t o = 0; o < args.output_sizes[1]; ++o) {
    for_each_weight(args, o, [&](int64_t, float weight) {
      small = small && std::fabs(double{weight}) <= kLargest;  // false for NaN
    });
  }
  return small;
}

// Whether no image can bring an output above 0.
bool is_dead(const ConvBiasReluArgs& args, int64_t output) {
  Range ranges[kMaxDirectChannels];
  for (int64_t c = 0; c < args.input_sizes[1]; ++c) ranges[c] = range_of(args, c);
  double most = args.bias != nullptr ? double{args.bias[output]} : 0.0;
  for_each_weight(args, output, [&](int64_t c, float weight) {
    most += double{weight} * (weight > 0.0f ? ranges[c].greatest : ranges[c].least);
  });
  return most <= 0.0;
}

// --- points ---

// Of the finite points; infinity is the last slot of a piece.
double point_of(int slot) {
  if (slot == kWinogradZero) return 0.0;
  const double point = kWinogradPairPoints[slot / 2];
  return slot % 2 == 0 ? point : -point;
}

WinogradPiece piece_of(int64_t first, int64_t taps) {
  WinogradPiece piece{};
  piece.first = first;
  piece.taps = taps;
  piece.points = kWinogradOutputs + taps - 1;
  const int* slots = kWinogradPointSlots[taps - 2];
  for (int64_t p = 0; p < piece.points; ++p) {
    // The product of (z - point) over all finite points but this one.
    double coefficients[kWinogradMostPoints + 1] = {1.0};
    for (int64_t other = 0; other < piece.points - 1; ++other) {
      if (other == p) continue;
      for (int64_t i = piece.points - 1; i >= 0; --i) {
        coefficients[i] =
            (i > 0 ? coefficients[i - 1] : 0.0) - point_of(slots[other]) * coefficients[i];
      }
    }
    for (int64_t i = 0; i < piece.points; ++i) {
      piece.input[p][i] = static_cast<float>(coefficients[i]);
    }
  }
  return piece;
}

// G of winograd.h, for the point of a piece that a product is at, and tap k.
double weight_factor(const WinogradPiece& piece, int64_t point, int64_t k) {
  if (point == piece.points - 1) return k == piece.taps - 1 ? 1.0 : 0.0;
  const int* slots = kWinogradPointSlots[piece.taps - 2];
  const double here = point_of(slots[point]);
  double factor = 1.0;
  for (int64_t i = 0; i < k; ++i) factor *= here;
  for (int64_t other = 0; other < piece.points - 1; ++other) {
    if (other != point) factor /= here - point_of(slots[other]);
  }
  return factor;
}

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace

bool winograd_suits(const ConvBiasReluArgs& args) {
  return args.input_type == ElementType::uint8 && args.dilation[1] == 1 &&
         args.kernel[1] >= 2 * args.stride[1] &&
         args.kernel[0] * args.input_sizes[1] >= kLeastTerms &&
         args.output_sizes[2] * args.output_sizes[3] >= kLeastPixels && is_small(args);
}

Winograd::Winograd(const ConvBiasReluArgs& args) {
  const int64_t channels = args.input_sizes[1], rows = args.kernel[0], width = args.kernel[1];
  const int64_t stride = args.stride[1];
  for (int64_t phase = 0; phase < stride; ++phase) {
    int64_t left = (width - phase + stride - 1) / stride, first = phase;
    for (int64_t count = (left + kWinogradMostTaps - 1) / kWinogradMostTaps; count > 0; --count) {
      const int64_t taps = (left + count - 1) / count;
      pieces.push_back(piece_of(first, taps));
      first += taps * stride;
      left -= taps;
    }
  }
  plan.tiles = (args.output_sizes[3] + kWinogradOutputs - 1) / kWinogradOutputs;
  plan.residues = stride * kWinogradOutputs;
  const int64_t line_tiles =
      plan.tiles + ((kWinogradOutputs - 1) * stride + width - 1) / plan.residues;
  line_pixels = plan.residues * line_tiles;
  // Vectors and runs of values go beyond the end.
  constexpr int64_t kBeyond = 16;
  plan.residue_floats = round_up(line_tiles * channels + kBeyond, 16);
  plan.point_floats = round_up(plan.tiles * channels, 16);
  plan.line_floats = round_up(line_pixels * channels + kBeyond, 16);
  plan.scratch_floats = kWinogradSumFloats + plan.line_floats + plan.residues * plan.residue_floats;
  std::vector<WinogradRun> runs_of[kWinogradSlots];
  const int64_t parts = std::min(rows, (rows * channels + kWinogradTerms - 1) / kWinogradTerms);
  for (const WinogradPiece& piece : pieces) {
    for (int64_t p = 0; p < piece.points; ++p) {
      const int slot =
          p == piece.points - 1 ? kWinogradInfinity : kWinogradPointSlots[piece.taps - 2][p];
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t row = part * rows / parts, end = (part + 1) * rows / parts;
        runs_of[slot].push_back({plan.points * plan.point_floats, row, end - row});
      }
      plan.weights_per_output += rows * channels;
      ++plan.points;
    }
  }
  for (int slot = 0; slot < kWinogradSlots; ++slot) {
    runs.insert(runs.end(), runs_of[slot].begin(), runs_of[slot].end());
    plan.first_run[slot + 1] = static_cast<int64_t>(runs.size());
  }
  plan.pieces = static_cast<int64_t>(pieces.size());
  plan.piece = pieces.data();
  plan.runs = runs.data();
}

void Winograd::pack_weight(const ConvBiasReluArgs& args, const ChannelBlocks& blocks,
                           float* packed) const {
  const int64_t outputs = args.output_sizes[1];
  const int64_t* strides = args.weight_strides;
  std::vector<bool> dead;
  for (int64_t o = 0; o < outputs; ++o) dead.push_back(is_dead(args, o));
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t first = blocks.first_vector(block) * blocks.lanes;
    const int64_t last = blocks.first_vector(block + 1) * blocks.lanes;
    for (const WinogradRun& run : runs) {
      // The piece that has this point.
      int64_t point = run.line_offset / plan.point_floats;
      const WinogradPiece* piece = pieces.data();
      for (; point >= piece->points; ++piece) point -= piece->points;
      double factors[kWinogradMostTaps];
      for (int64_t k = 0; k < piece->taps; ++k) factors[k] = weight_factor(*piece, point, k);
      for (int64_t ky = run.first_row; ky < run.first_row + run.rows; ++ky) {
        for (int64_t c = 0; c < args.input_sizes[1]; ++c) {
          const float* tap =
              args.weight + c * strides[1] + ky * strides[2] + piece->first * strides[3];
          for (int64_t o = first; o < last; ++o) {
            double sum = 0.0;
            for (int64_t k = 0; o < outputs && !dead[o] && k < piece->taps; ++k) {
              sum += factors[k] * double{tap[o * strides[0] + k * args.stride[1] * strides[3]]};
            }
            *packed++ = static_cast<float>(sum);
          }
        }
      }
    }
  }
}

}  // namespace pixfuse
