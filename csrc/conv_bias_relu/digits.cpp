// When the convolution by digits.h can be used, and what its loop needs.
#include "conv_bias_relu/digits.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "conv_bias_relu/digits_plan.h"

namespace pixfuse {
namespace {

constexpr int64_t kVector = 16;  // output channels side by side
constexpr int64_t kChannels = kMostPixelBytes;

// The largest number of three digits that has a negative, too.
constexpr double kMostSteps = 127 * 65536 + 127 * 256 + 127;
// In pairs: the largest of which the word stays one with a byte added, and the number of pixels and
// channels for which words leave the sums room.
constexpr double kMostPairedSteps = (32767 - 255) * 256 + 127;
constexpr int64_t kMostPairedTaps = 4096;
// The smallest weight, times the scale, whose steps are floats with all their bits.
constexpr double kLeast = 0x1p-90;
// Fewer multiplications are not what a call takes its time for: then the direct way is as fast, or
// faster, since it has less to do for each output. By digits, vectors save the least of them.
constexpr int64_t kLeastTaps = 48, kLeastTapsOfVectors = 64;
// Pixels of a kernel whose products fit an int32.
constexpr int64_t kMostPixels = 1 << 14;
static_assert(int64_t{255} * 128 * kMostPixelBytes * kMostPixels <= INT32_MAX);
// Biases: of so many output channels times parts of a kernel.
constexpr int64_t kMostBiases = 1 << 22;
// Rows of the output that are computed at once leave fewer tiles half empty. Their lines should
// stay in the first-level cache; with more output channels than one pass over them is for, they and
// their patches in the second-level cache.
constexpr int64_t kNearBytes = 1 << 14, kFarBytes = 1 << 18;

// Of an input channel.
Digits::Line line_of(const ConvBiasReluArgs& args, int64_t c, double z) {
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

// The parts of the kernel that outputs have inside the image, each once. They change from one
// output to the next, if they do, by a tap more or less at either end: there are at most two for
// each tap, and one.
std::vector<Digits::Part> parts_of(const ConvBiasReluArgs& args, int d,
                                   std::vector<int64_t>& part_of) {
  const int64_t size = args.input_sizes[2 + d], dilation = args.dilation[d];
  const auto taps_below = [&](int64_t pixels) {
    return std::clamp((pixels + dilation - 1) / dilation, int64_t{0}, args.kernel[d]);
  };
  std::vector<Digits::Part> parts;
  for (int64_t i = 0; i < args.output_sizes[2 + d]; ++i) {
    const int64_t start = i * args.stride[d] - args.padding[d];
    const Digits::Part part{start < 0 ? taps_below(-start) : 0,
                            start < size ? taps_below(size - start) : 0};
    if (parts.empty() || parts.back() != part) parts.push_back(part);
    part_of.push_back(static_cast<int64_t>(parts.size()) - 1);
  }
  return parts;
}

// Sums of weight * offset over the channels, for each tap of one output channel.
std::vector<double> offsets_of(const ConvBiasReluArgs& args, int64_t output,
                               const Digits::Line* lines) {
  const int64_t* const strides = args.weight_strides;
  std::vector<double> offsets;
  for (int64_t ky = 0; ky < args.kernel[0]; ++ky) {
    for (int64_t kx = 0; kx < args.kernel[1]; ++kx) {
      const float* weight = args.weight + output * strides[0] + ky * strides[2] + kx * strides[3];
      double offset = 0.0;
      for (int64_t c = 0; c < args.input_sizes[1]; ++c) {
        offset += double{weight[c * strides[1]]} * lines[c].offset;
      }
      offsets.push_back(offset);
    }
  }
  return offsets;
}

WeightRuns runs_of(const int32_t* offsets) {
  WeightRuns runs{};
  int count = 0;
  for (int i = 0; i < kVector; ++i) {
    const auto offset_in = [&](int run) { return offsets[i] - runs.starts[run]; };
    int run = 0;
    while (run < count && !(offset_in(run) >= 0 && offset_in(run) < 8)) ++run;
    if (run == 3) return runs;
    if (run == count) runs.starts[count++] = offsets[i];
    runs.order[i] = run * 8 + offset_in(run);
    runs.used[run] = static_cast<uint8_t>(runs.used[run] | 1 << offset_in(run));
  }
  runs.are_all = true;
  return runs;
}

}  // namespace

bool digits_suit(const ConvBiasReluArgs& args, const Bounds& bounds, DigitsIn digits_in) {
  const int64_t least = digits_in == DigitsIn::vectors ? kLeastTapsOfVectors : kLeastTaps;
  const int64_t pixels = args.kernel[0] * args.kernel[1];
  if (args.input_sizes[1] > kChannels || pixels * args.input_sizes[1] < least ||
      pixels > kMostPixels || !bounds.are_kept() || !bounds.are_dense()) {
    return false;
  }
  int64_t last_weight = 0;  // of an output channel, whose offsets are 32 bits
  for (int d = 1; d < 4; ++d) {
    const int64_t size = d == 1 ? args.input_sizes[1] : args.kernel[d - 2];
    last_weight += (size - 1) * args.weight_strides[d];
  }
  if (last_weight > INT32_MAX) return false;
  const int64_t most_parts = (2 * args.kernel[0] + 1) * (2 * args.kernel[1] + 1);
  if (bounds.is_padded() && most_parts > kMostBiases / args.output_sizes[1]) return false;
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

Digits::Digits(const ConvBiasReluArgs& args, const Bounds& bounds, int64_t padded_outputs,
               DigitsIn digits_in)
    : step(static_cast<size_t>(padded_outputs), 1.0f), starts(step.size() * kDigits) {
  const int64_t taps = args.kernel[0] * args.kernel[1] * args.input_sizes[1];
  const bool in_tiles = digits_in == DigitsIn::tiles;
  plan.is_signed = !black_is_zero(args);
  plan.in_pairs = digits_in == DigitsIn::pairs && taps <= kMostPairedTaps;
  plan.group_pixels = in_tiles ? kTilesPixels : plan.in_pairs ? kPairsPixels : kVectorsPixels;
  const auto steps = [&](int64_t row) {
    return (args.kernel[0] * row + kStepBytes - 1) / kStepBytes;
  };
  const int64_t row_bytes = args.kernel[1] * args.input_sizes[1];
  plan.steps = steps(row_bytes);
  // Rows that no end of a line of the caches divides are stored faster.
  const auto apart = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(row_bytes)));
  plan.row_step = in_tiles && steps(apart) == plan.steps ? apart : row_bytes;
  plan.quads = (args.kernel[0] * plan.row_step + kQuadBytes - 1) / kQuadBytes;
  plan.step = step.data();
  plan.starts = starts.data();
  if (bounds.is_padded() && plan.is_signed) {
    row_parts = parts_of(args, 0, row_bias);
    column_parts = parts_of(args, 1, column_bias);
  } else {
    // The offsets are those of a whole kernel, or none.
    row_parts = {{0, args.kernel[0]}};
    column_parts = {{0, args.kernel[1]}};
    row_bias.resize(static_cast<size_t>(args.output_sizes[2]));
    column_bias.resize(static_cast<size_t>(args.output_sizes[3]));
  }
  for (int64_t& at : column_bias) at *= padded_outputs;
  for (int64_t& at : row_bias) at *= padded_outputs * static_cast<int64_t>(column_parts.size());
  bias.resize(row_parts.size() * column_parts.size() * step.size());
  plan.row_bias = row_bias.data();
  plan.column_bias = column_bias.data();
}

void Digits::choose_rows(const ConvBiasReluArgs& args, bool in_blocks) {
  const int64_t width = args.output_sizes[3], most = in_blocks ? kFarBytes : kNearBytes;
  const int64_t line_bytes = args.input_sizes[1] * ((width - 1) * args.stride[1] +
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
  const int64_t pixels = plan.is_gathered_once ? rows_at_once * width : plan.group_pixels;
  plan.held_pixels = (pixels + kVector - 1) / kVector * kVector;
  const int64_t patch_floats = plan.held_pixels * plan.patch_bytes() / 4;
  plan.scratch_floats =
      plan.in_pairs ? kPairsSums + 3 * patch_floats + plan.held_pixels : kTilesSums + patch_floats;
}

// `offsets`: those of the whole kernel.
void Digits::put_biases(const ConvBiasReluArgs& args, int64_t output, const Digits::Line* lines,
                        double offsets) {
  const double added = args.bias != nullptr ? double{args.bias[output]} : 0.0;
  float* to = bias.data() + output;
  const std::vector<Part> all_rows{{0, args.kernel[0]}}, all_columns{{0, args.kernel[1]}};
  if (row_parts == all_rows && column_parts == all_columns) {
    *to = static_cast<float>(added + offsets);
    return;
  }
  // Only what is inside is added up, not a whole less the rest: nothing is 0 to the last bit.
  const std::vector<double> offset = offsets_of(args, output, lines);
  const int64_t rows = args.kernel[0], columns = args.kernel[1];
  std::vector<double> of_row;  // [column part][kernel row]
  for (const Part& x : column_parts) {
    for (int64_t ky = 0; ky < rows; ++ky) {
      double sum = 0.0;
      for (int64_t kx = x.first; kx < x.last; ++kx)
        sum += offset[static_cast<size_t>(ky * columns + kx)];
      of_row.push_back(sum);
    }
  }
  for (const Part& y : row_parts) {
    for (size_t x = 0; x < column_parts.size(); ++x) {
      double sum = added;
      for (int64_t ky = y.first; ky < y.last; ++ky) {
        sum += of_row[x * static_cast<size_t>(rows) + static_cast<size_t>(ky)];
      }
      *to = static_cast<float>(sum);
      to += step.size();
    }
  }
}

void Digits::pack_weight(const ConvBiasReluArgs& args, const Bounds& bounds,
                         const ChannelBlocks& blocks, const std::vector<bool>& dead,
                         PackVector pack_vector, int8_t* packed) {
  const int64_t outputs = args.output_sizes[1], channels = args.input_sizes[1];
  Line lines[kChannels];
  for (int64_t c = 0; c < channels; ++c) lines[c] = line_of(args, c, plan.is_signed ? 128.0 : 0.0);
  const int64_t* const strides = args.weight_strides;
  // Steps of all weights whose words, times the largest byte, add up to 32 bits: a word has a half
  // more than its share of them, and a weight a half more than that.
  const double most_paired = 256.0 * (0x1p31 / (plan.is_signed ? 128.0 : 255.0) - kMostPairedTaps);
  for (int64_t o = 0; o < outputs; ++o) {
    const WeightSums* const sums = bounds.sums_of(o);
    double offsets = 0.0, most = 0.0, total = 0.0;
    for (int64_t c = 0; c < channels; ++c) {
      offsets += sums[c].sum() * lines[c].offset;
      most = std::max(most, sums[c].largest * lines[c].scale);
      total += (sums[c].positive - sums[c].negative) * lines[c].scale;
    }
    if (!dead[o]) put_biases(args, o, lines, offsets);
    if (most > 0.0) {
      const double least = plan.in_pairs ? std::max(most / kMostPairedSteps, total / most_paired)
                                         : most / kMostSteps;
      step[o] = std::nextafter(static_cast<float>(least), HUGE_VALF);
    }
  }
  std::vector<int32_t> offsets(static_cast<size_t>(plan.patch_bytes()));
  std::vector<double> scales(offsets.size());  // 0 where a patch has no pixel
  for (int64_t ky = 0; ky < args.kernel[0]; ++ky) {
    size_t at = static_cast<size_t>(ky * plan.row_step);
    for (int64_t kx = 0; kx < args.kernel[1]; ++kx) {
      for (int64_t c = 0; c < channels; ++c) {
        scales[at] = lines[c].scale;
        offsets[at++] = static_cast<int32_t>(c * strides[1] + ky * strides[2] + kx * strides[3]);
      }
    }
  }
  std::vector<WeightRuns> runs;
  for (size_t at = 0; at < offsets.size(); at += kVector) runs.push_back(runs_of(&offsets[at]));
  const auto pack = [&](int64_t vector, int64_t quad_bytes, int8_t* to) {
    const int64_t first = vector * kVector, count = std::min(kVector, outputs - first);
    double per_step[kVector] = {};
    for (int64_t o = 0; o < count; ++o) per_step[o] = dead[first + o] ? 0.0 : 1.0 / step[first + o];
    const DigitsWeights weights{args.weight + first * strides[0],
                                strides[0],
                                count,
                                per_step,
                                offsets.data(),
                                scales.data(),
                                runs.data(),
                                quad_bytes};
    pack_vector(plan, weights, to, &starts[static_cast<size_t>(first * kDigits)]);
  };
  constexpr int64_t kQuad = kDigits * kStepBytes;
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t begin = blocks.first_vector(block), end = blocks.first_vector(block + 1);
    for (int64_t vector = begin; vector < end; ++vector) {
      if (plan.in_pairs) {
        pack(vector, (end - begin) * kQuad,
             packed + begin * plan.weight_bytes_per_vector() + (vector - begin) * kQuad);
      } else {
        pack(vector, kQuad, packed + vector * plan.weight_bytes_per_vector());
      }
    }
  }
}

}  // namespace pixfuse
