// When the convolution by winograd.h pays, and what its loop needs.
#include <algorithm>

#include "conv_bias_relu/winograd_plan.h"

namespace pixfuse {
namespace {

// --- the rule ---

// Rules that accuracy makes: fewer terms, or fewer taps in all, and too little is paid back. And
// one that time makes: the weights are brought to their points in each call.
constexpr int64_t kLeastTerms = 20;
constexpr int64_t kLeastTaps = 100;
constexpr int64_t kLeastPixels = 128;

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

bool winograd_suits(const ConvBiasReluArgs& args, const Bounds& bounds) {
  const int64_t terms = args.kernel[0] * args.input_sizes[1];
  return args.dilation[1] == 1 && args.kernel[1] >= 2 * args.stride[1] && terms >= kLeastTerms &&
         terms * args.kernel[1] >= kLeastTaps &&
         args.output_sizes[2] * args.output_sizes[3] >= kLeastPixels && bounds.are_kept() &&
         bounds.are_dense();
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
                           const std::vector<bool>& dead, float* packed) const {
  const int64_t outputs = args.output_sizes[1];
  const int64_t* strides = args.weight_strides;
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
