// When the convolution by winograd.h pays, and what its loop needs.
#include <algorithm>

#include "conv_bias_relu/winograd_plan.h"

namespace pixfuse {
namespace {

// --- the rule ---

// Rules that accuracy makes: fewer terms, or fewer taps in all, and too little is paid back; and
// the largest error among few outputs varies so much that it can be more than twice torch's. Few of
// them would not save the time, either, that the weights take to be brought to their points.
constexpr int64_t kLeastTerms = 20;
constexpr int64_t kLeastTaps = 100;
constexpr int64_t kLeastOutputs = 1 << 16;

// Output channels whose weights are brought to their points together.
constexpr int64_t kWeightsAtOnce = 16;

// --- points ---

// The finite points of a piece; infinity comes after them.
using Points = std::vector<double>;

Points column_points(int64_t taps) {
  Points points;
  for (int64_t p = 0; p < kWinogradOutputs + taps - 2; ++p) {
    const int slot = kWinogradPointSlots[taps - 2][p];
    const double point = slot == kWinogradZero ? 0.0 : kWinogradPairPoints[slot / 2];
    points.push_back(slot % 2 == 0 ? point : -point);
  }
  return points;
}

Points row_points(int64_t taps) {
  Points points;
  for (int64_t p = 0; p < kWinogradRows + taps - 2; ++p) {
    points.push_back(kWinogradRowPoints[kWinogradRowPointSlots[taps - 1][p]]);
  }
  return points;
}

// B of winograd.h, for one of the points.
std::vector<double> input_factors(const Points& points, size_t point) {
  std::vector<double> factors(points.size() + 1);
  factors[0] = 1.0;
  for (size_t other = 0; other < points.size(); ++other) {
    if (other == point) continue;
    for (size_t i = points.size(); i > 0; --i) {
      factors[i] = factors[i - 1] - points[other] * factors[i];
    }
    factors[0] *= -points[other];
  }
  return factors;
}

// G of winograd.h, for one of the points and tap k.
double weight_factor(const Points& points, size_t point, int64_t k, int64_t taps) {
  if (point == points.size()) return k == taps - 1 ? 1.0 : 0.0;
  double factor = 1.0;
  for (int64_t i = 0; i < k; ++i) factor *= points[point];
  for (size_t other = 0; other < points.size(); ++other) {
    if (other != point) factor /= points[point] - points[other];
  }
  return factor;
}

// Calls add(first tap, taps) for each piece: of at most `most` taps, `step` apart.
template <class Add>
void cut(int64_t count, int64_t step, int64_t most, const Add& add) {
  for (int64_t phase = 0; phase < step && phase < count; ++phase) {
    int64_t left = (count - phase + step - 1) / step, first = phase;
    for (int64_t pieces = (left + most - 1) / most; pieces > 0; --pieces) {
      const int64_t taps = (left + pieces - 1) / pieces;
      add(first, taps);
      first += taps * step;
      left -= taps;
    }
  }
}

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace

bool winograd_suits(const ConvBiasReluArgs& args, const Bounds& bounds) {
  const int64_t terms = args.kernel[0] * args.input_sizes[1];
  return args.dilation[1] == 1 && args.kernel[1] >= 2 * args.stride[1] && terms >= kLeastTerms &&
         terms * args.kernel[1] >= kLeastTaps &&
         args.output_sizes[1] * args.output_sizes[2] * args.output_sizes[3] >= kLeastOutputs &&
         bounds.are_kept() && bounds.are_dense();
}

Winograd::Winograd(const ConvBiasReluArgs& args) {
  const int64_t stride = args.stride[1];
  cut(args.kernel[1], stride, kWinogradMostTaps,
      [&](int64_t first, int64_t taps) { add_piece(first, stride, taps); });
  // Taps of a piece are so far apart that the second output row sees the line of one where the
  // first one sees that of the next. If none are, each tap is a piece.
  const bool are_any = args.stride[0] % args.dilation[0] == 0;
  const int64_t step = are_any ? args.stride[0] / args.dilation[0] : args.kernel[0];
  for (int slot = 0; slot < kWinogradRowSlots; ++slot) {
    cut(args.kernel[0], step, kWinogradMostRowTaps,
        [&](int64_t first, int64_t taps) { add_line(slot, args.kernel[0], first, step, taps); });
    plan.first_line[slot + 1] = static_cast<int64_t>(lines.size());
  }
  put_sizes(args);
  put_runs(args.input_sizes[1]);
  plan.pieces = static_cast<int64_t>(pieces.size());
  plan.piece = pieces.data();
  plan.lines = lines.data();
  plan.runs = runs.data();
}

void Winograd::add_piece(int64_t first, int64_t step, int64_t taps) {
  const Points points = column_points(taps);
  WinogradPiece piece{first, taps, static_cast<int64_t>(points.size()) + 1, {}};
  for (size_t p = 0; p <= points.size(); ++p) {
    const std::vector<double> from = input_factors(points, p);
    for (size_t i = 0; i < from.size(); ++i) piece.input[p][i] = static_cast<float>(from[i]);
    Factors factors{first, step, taps, {}};
    for (int64_t k = 0; k < taps; ++k) factors.of[k] = weight_factor(points, p, k, taps);
    column_factors.push_back(factors);
  }
  pieces.push_back(piece);
}

// The point of a piece of `rows` kernel rows that is in the slot, if one is.
void Winograd::add_line(int slot, int64_t rows, int64_t first, int64_t step, int64_t taps) {
  const Points points = row_points(taps);
  const int* const slots = kWinogradRowPointSlots[taps - 1];
  const size_t p = static_cast<size_t>(std::find(slots, slots + points.size() + 1, slot) - slots);
  if (p > points.size()) return;
  // What the piece sees, from the line of its first tap of the first output row to the last one.
  const auto line_of = [&](size_t i) {
    const auto tap = static_cast<int64_t>(i);
    return tap < taps ? first + tap * step : rows + first + (taps - 1) * step;
  };
  // With these points it is one of them, and at most one other.
  const std::vector<double> from = input_factors(points, p);
  const size_t last = p == points.size() ? p : points.size() - 1;
  WinogradLine line{line_of(last), line_of(last), 0.0f};
  for (size_t i = 0; i < last; ++i) {
    if (from[i] != 0.0) line = {line.line, line_of(i), static_cast<float>(from[i])};
  }
  lines.push_back(line);
  Factors factors{first, step, taps, {}};
  for (int64_t k = 0; k < taps; ++k) factors.of[k] = weight_factor(points, p, k, taps);
  row_factors.push_back(factors);
}

void Winograd::put_sizes(const ConvBiasReluArgs& args) {
  const int64_t channels = args.input_sizes[1], stride = args.stride[1];
  plan.tiles = (args.output_sizes[3] + kWinogradOutputs - 1) / kWinogradOutputs;
  plan.residues = stride * kWinogradOutputs;
  const int64_t line_tiles =
      plan.tiles + ((kWinogradOutputs - 1) * stride + args.kernel[1] - 1) / plan.residues;
  line_pixels = plan.residues * line_tiles;
  // Vectors and runs of values go beyond the end.
  constexpr int64_t kBeyond = 16;
  plan.residue_floats = round_up(line_tiles * channels + kBeyond, 16);
  plan.points = static_cast<int64_t>(column_factors.size());
  plan.point_floats = round_up(plan.tiles * channels, 16);
  plan.input_floats = round_up(line_pixels * channels + kBeyond, 16);
}

void Winograd::hold_rows(int64_t rows) {
  plan.groups = (rows + kWinogradRows - 1) / kWinogradRows;
  plan.scratch_floats = kWinogradSumFloats + plan.groups * plan.group_floats() + plan.input_floats +
                        plan.residues * plan.residue_floats;
}

void Winograd::put_runs(int64_t channels) {
  const auto all = static_cast<int64_t>(lines.size());
  for (int slot = 0; slot < kWinogradSlots; ++slot) {
    for (int row_slot = 0; row_slot < kWinogradRowSlots; ++row_slot) {
      const int64_t begin = plan.first_line[row_slot];
      const int64_t count = plan.first_line[row_slot + 1] - begin;
      const int64_t parts =
          std::min(count, (count * channels + kWinogradTerms - 1) / kWinogradTerms);
      int64_t point = 0;
      for (const WinogradPiece& piece : pieces) {
        const int* const slots = kWinogradPointSlots[piece.taps - 2];
        const int64_t at = std::find(slots, slots + piece.points, slot) - slots;
        for (int64_t part = 0; at < piece.points && part < parts; ++part) {
          const int64_t first = part * count / parts, end = (part + 1) * count / parts;
          const int64_t line = begin + first;
          runs.push_back({((point + at) * all + line) * plan.point_floats, line, end - first});
          plan.weights_per_output += (end - first) * channels;
        }
        point += piece.points;
      }
      plan.first_run[slot * kWinogradRowSlots + row_slot + 1] = static_cast<int64_t>(runs.size());
    }
  }
}

void Winograd::pack_weight(const ConvBiasReluArgs& args, const ChannelBlocks& blocks,
                           const std::vector<bool>& dead, float* packed) const {
  const int64_t* const strides = args.weight_strides;
  const int64_t channels = args.input_sizes[1], kernel_rows = args.kernel[0];
  const auto line_count = static_cast<int64_t>(lines.size());
  // Of some output channels at once, side by side.
  struct Several {
    double of[kWeightsAtOnce];

    void add(double factor, const Several& other) {
      for (int64_t o = 0; o < kWeightsAtOnce; ++o) of[o] += factor * other.of[o];
    }
  };
  std::vector<Several> row(static_cast<size_t>(args.kernel[1]));
  std::vector<Several> in_points(static_cast<size_t>(channels * kernel_rows * plan.points));
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t begin = blocks.first_vector(block) * blocks.lanes;
    const int64_t end = blocks.first_vector(block + 1) * blocks.lanes;
    for (int64_t first = begin; first < end; first += kWeightsAtOnce) {
      const int64_t count = std::min(kWeightsAtOnce, end - first);
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t ky = 0; ky < kernel_rows; ++ky) {
          for (int64_t kx = 0; kx < args.kernel[1]; ++kx) {
            for (int64_t o = 0; o < kWeightsAtOnce; ++o) {
              const int64_t output = first + o;
              const bool is_zero = o >= count || output >= args.output_sizes[1] || dead[output];
              row[kx].of[o] = is_zero ? 0.0
                                      : double{args.weight[output * strides[0] + c * strides[1] +
                                                           ky * strides[2] + kx * strides[3]]};
            }
          }
          for (int64_t p = 0; p < plan.points; ++p) {
            const Factors& factors = column_factors[p];
            Several sum{};
            for (int64_t k = 0; k < factors.taps; ++k) {
              sum.add(factors.of[k], row[factors.first + k * factors.step]);
            }
            in_points[(c * kernel_rows + ky) * plan.points + p] = sum;
          }
        }
      }
      float* to = packed + first - begin;
      for (const WinogradRun& run : runs) {
        const int64_t point = run.offset / plan.point_floats / line_count;
        for (int64_t line = run.first_line; line < run.first_line + run.lines; ++line) {
          const Factors& factors = row_factors[line];
          for (int64_t c = 0; c < channels; ++c) {
            Several sum{};
            for (int64_t k = 0; k < factors.taps; ++k) {
              const int64_t ky = factors.first + k * factors.step;
              sum.add(factors.of[k], in_points[(c * kernel_rows + ky) * plan.points + point]);
            }
            for (int64_t o = 0; o < count; ++o) to[o] = static_cast<float>(sum.of[o]);
            to += end - begin;
          }
        }
      }
    }
    packed += plan.weights_per_output * (end - begin);
  }
}

}  // namespace pixfuse
