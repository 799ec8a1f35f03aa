// The loops of `conv_bias_relu` without torch and Python, on memory of exactly the size that they
// may touch, against the sum written down once more, in float64.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <optional>
#include <vector>

#include "common/isa.h"
#include "conv_bias_relu/conv_bias_relu_loop.h"
#include "guarded_memory.h"
#include "loop_program.h"
#include "normalize/normalize_constants.h"

using namespace pixfuse;

namespace {

// --- memory that ends where nothing may be touched ---

struct Memory : GuardedMemory {
  explicit Memory(int64_t bytes) : GuardedMemory(bytes, /*at_end=*/true) {}
  float* floats() const { return reinterpret_cast<float*>(data()); }
};

// --- one call ---

float next_float() { return static_cast<float>(next_number() % 2001) / 1000.0f - 1.0f; }

void store_value(ElementType type, float value, uint8_t* element) {
  if (type == ElementType::float32) {
    std::memcpy(element, &value, sizeof value);
  } else if (type == ElementType::bfloat16) {
    const BFloat16 rounded = round_to<BFloat16>(value);
    std::memcpy(element, &rounded, sizeof rounded);
  } else {
    const Float16 rounded = round_to<Float16>(value);
    std::memcpy(element, &rounded, sizeof rounded);
  }
}

double precision_of(ElementType type) {
  return type == ElementType::float32 ? 0x1p-24 : type == ElementType::float16 ? 0x1p-11 : 0x1p-8;
}

void set_strides(int64_t (&strides)[4], const int64_t (&sizes)[4], bool channels_last) {
  const int64_t c = sizes[1], h = sizes[2], w = sizes[3];
  const int64_t last[4] = {c * h * w, 1, w * c, c}, first[4] = {c * h * w, h * w, w, 1};
  std::memcpy(strides, channels_last ? last : first, sizeof strides);
}

int64_t count_of(const int64_t (&sizes)[4]) { return sizes[0] * sizes[1] * sizes[2] * sizes[3]; }

// What a call counts, and room for it.
struct Counted {
  std::vector<int64_t> active, images, nan;
  std::vector<double> sum;
  explicit Counted(int64_t channels)
      : active(channels), images(channels), nan(channels), sum(channels) {}
  ChannelActivity pointers() { return {active.data(), images.data(), nan.data(), sum.data()}; }
};

// Whether the counts are those of the output.
bool counts_are_right(Counted& counted, const uint8_t* output, ElementType type,
                      const int64_t (&sizes)[4], const int64_t (&strides)[4]) {
  if (planted == Planted::wrong_count) ++counted.active[0];
  for (int64_t c = 0; c < sizes[1]; ++c) {
    int64_t active = 0, images = 0, nan = 0;
    double sum = 0;
    for (int64_t n = 0; n < sizes[0]; ++n) {
      int64_t here = 0;
      for (int64_t y = 0; y < sizes[2]; ++y) {
        for (int64_t x = 0; x < sizes[3]; ++x) {
          const int64_t at = n * strides[0] + c * strides[1] + y * strides[2] + x * strides[3];
          const double value = stored_value(type, output + at * element_bytes(type));
          here += value > 0;
          nan += std::isnan(value);
          sum += value;
        }
      }
      active += here;
      images += here > 0;
    }
    const bool sums_agree = std::isnan(sum) ? std::isnan(counted.sum[c])
                                            : std::fabs(counted.sum[c] - sum) <= 1e-5 * sum;
    if (active != counted.active[c] || images != counted.images[c] || nan != counted.nan[c] ||
        !sums_agree) {
      std::printf("channel %ld: counted %ld %ld %ld %.9g, found %ld %ld %ld %.9g\n",
                  static_cast<long>(c), static_cast<long>(counted.active[c]),
                  static_cast<long>(counted.images[c]), static_cast<long>(counted.nan[c]),
                  counted.sum[c], static_cast<long>(active), static_cast<long>(images),
                  static_cast<long>(nan), sum);
      return false;
    }
  }
  return true;
}

struct Case {
  int64_t channels, outputs, kernel[2], stride[2], dilation[2], padding[2], size[2];
};

constexpr int64_t kImages = 2;

// What a case is called with, densely, images and weights with the columns last; and the sums of
// its output, in the same order. Neither depends on a call's layouts, output or instruction set:
// the sums, which take longer than most calls, are computed once for all of them.
struct Problem {
  int64_t output_size[2];
  std::vector<uint8_t> input;  // elements of the input's type
  std::vector<float> weight, bias;
  std::vector<double> sums, magnitudes;
};

Problem make_problem(const Case& test, ElementType input_type) {
  Problem problem;
  const int64_t element = element_bytes(input_type), planes = kImages * test.channels;
  std::vector<double> values(planes * test.size[0] * test.size[1]);
  problem.input.resize(values.size() * element);
  for (size_t i = 0; i < values.size(); ++i) {
    uint8_t* const at = problem.input.data() + i * element;
    if (input_type == ElementType::uint8) {
      *at = static_cast<uint8_t>(next_number());
      values[i] = (*at / 255.0 - 0.45) / 0.25;
    } else {
      store_value(input_type, next_float(), at);
      values[i] = stored_value(input_type, at);
    }
  }
  const int64_t taps = test.channels * test.kernel[0] * test.kernel[1];
  problem.weight.resize(test.outputs * taps);
  problem.bias.resize(test.outputs);
  for (float& weight : problem.weight) weight = next_float();
  for (float& bias : problem.bias) bias = next_float();

  for (int d = 0; d < 2; ++d) {
    const int64_t reach = test.dilation[d] * (test.kernel[d] - 1) + 1;
    problem.output_size[d] = (test.size[d] + 2 * test.padding[d] - reach) / test.stride[d] + 1;
  }
  const auto value_at = [&](int64_t n, int64_t c, int64_t y, int64_t x) -> double {
    if (y < 0 || y >= test.size[0] || x < 0 || x >= test.size[1]) return 0.0;
    return values[((n * test.channels + c) * test.size[0] + y) * test.size[1] + x];
  };
  for (int64_t n = 0; n < kImages; ++n)
    for (int64_t o = 0; o < test.outputs; ++o)
      for (int64_t y = 0; y < problem.output_size[0]; ++y)
        for (int64_t x = 0; x < problem.output_size[1]; ++x) {
          double sum = problem.bias[o], magnitude = std::fabs(sum);
          const float* weight = problem.weight.data() + o * taps;
          for (int64_t c = 0; c < test.channels; ++c)
            for (int64_t ky = 0; ky < test.kernel[0]; ++ky)
              for (int64_t kx = 0; kx < test.kernel[1]; ++kx) {
                const double term =
                    *weight++ *
                    value_at(n, c, y * test.stride[0] - test.padding[0] + ky * test.dilation[0],
                             x * test.stride[1] - test.padding[1] + kx * test.dilation[1]);
                sum += term;
                magnitude += std::fabs(term);
              }
          problem.sums.push_back(sum);
          problem.magnitudes.push_back(magnitude);
        }
  return problem;
}

bool run_convolution(const Case& test, const Problem& problem, ElementType input_type,
                     ElementType output_type, bool input_last, bool output_last) {
  ConvBiasReluArgs args{};
  const int64_t input_sizes[4] = {kImages, test.channels, test.size[0], test.size[1]};
  std::memcpy(args.input_sizes, input_sizes, sizeof input_sizes);
  set_strides(args.input_strides, args.input_sizes, input_last);
  args.output_sizes[0] = kImages;
  args.output_sizes[1] = test.outputs;
  for (int d = 0; d < 2; ++d) {
    args.kernel[d] = test.kernel[d];
    args.stride[d] = test.stride[d];
    args.dilation[d] = test.dilation[d];
    args.padding[d] = test.padding[d];
    args.output_sizes[2 + d] = problem.output_size[d];
  }
  set_strides(args.output_strides, args.output_sizes, output_last);
  const int64_t weight_sizes[4] = {test.outputs, test.channels, test.kernel[0], test.kernel[1]};
  set_strides(args.weight_strides, weight_sizes, false);

  const int64_t inputs = count_of(args.input_sizes), weights = count_of(weight_sizes);
  const int64_t element = element_bytes(input_type);
  const Memory input(inputs * element - (planted == Planted::short_input));
  const Memory weight(weights * 4 - (planted == Planted::short_weight ? 4 : 0));
  const Memory bias(test.outputs * 4);
  const Memory output(count_of(args.output_sizes) * element_bytes(output_type) -
                      (planted == Planted::short_output));
  const int64_t whole = planted == Planted::short_input ? inputs - 1 : inputs;
  const uint8_t* from = problem.input.data();
  for (int64_t n = 0; n < kImages; ++n)
    for (int64_t c = 0; c < test.channels; ++c)
      for (int64_t y = 0; y < test.size[0]; ++y)
        for (int64_t x = 0; x < test.size[1]; ++x, from += element) {
          const int64_t at = n * args.input_strides[0] + c * args.input_strides[1] +
                             y * args.input_strides[2] + x * args.input_strides[3];
          if (at < whole) std::memcpy(input.data() + at * element, from, element);
        }
  std::memcpy(weight.data(), problem.weight.data(),
              4 * (weights - (planted == Planted::short_weight)));
  std::memcpy(bias.data(), problem.bias.data(), 4 * test.outputs);
  std::vector<double> mean(test.channels, 0.45), deviation(test.channels, 0.25);
  std::vector<ChannelConstants> constants(test.channels);
  NormalizeArgs normalization{};
  set_rounding(normalization, constants.data(), mean.data(), deviation.data(), test.channels,
               Rounding::torchvision);
  args.arithmetic = normalization.arithmetic;
  args.scale = normalization.scale;
  args.channels = constants.data();
  args.input = input.data();
  args.input_type = input_type;
  args.weight = weight.floats();
  args.bias = bias.floats();
  args.output = output.data();
  args.output_type = output_type;
  args.past_caches = next_number() % 2 == 0;
  Counted counted(test.outputs);
  args.activity = counted.pointers();
  if (conv_bias_relu_cpu(args, parallel_for) != 0) return false;

  int64_t i = 0;
  for (int64_t n = 0; n < kImages; ++n)
    for (int64_t o = 0; o < test.outputs; ++o)
      for (int64_t y = 0; y < args.output_sizes[2]; ++y)
        for (int64_t x = 0; x < args.output_sizes[3]; ++x, ++i) {
          const double magnitude = problem.magnitudes[i];
          double expected = std::max(problem.sums[i], 0.0);
          if (planted == Planted::wrong_value) expected += 0.01 * magnitude;
          const int64_t at = n * args.output_strides[0] + o * args.output_strides[1] +
                             y * args.output_strides[2] + x * args.output_strides[3];
          const double value =
              stored_value(output_type, output.data() + at * element_bytes(output_type));
          const double error = 0x1p-20 * magnitude + precision_of(output_type) * expected;
          if (std::fabs(value - expected) <= error) continue;
          std::printf(
              "%ld channels, %ld outputs, kernel %ld %ld, at %ld %ld %ld %ld: %.9g, "
              "expected %.9g within %.3g\n",
              static_cast<long>(test.channels), static_cast<long>(test.outputs),
              static_cast<long>(test.kernel[0]), static_cast<long>(test.kernel[1]),
              static_cast<long>(n), static_cast<long>(o), static_cast<long>(y),
              static_cast<long>(x), value, expected, error);
          return false;
        }
  return counts_are_right(counted, output.data(), output_type, args.output_sizes,
                          args.output_strides);
}

bool run_last_pass(ElementType input_type, ElementType output_type, bool channels_last,
                   int64_t channels, int64_t pixels) {
  const int64_t count = 2 * channels * pixels;
  const Memory input(count * element_bytes(input_type));
  const Memory output(count * element_bytes(output_type));
  for (int64_t i = 0; i < count; ++i) {
    uint8_t* const at = input.data() + i * element_bytes(input_type);
    store_value(input_type, next_float(), at);
    const uint32_t nan = input_type == ElementType::float16 ? 0x7e00 : 0x7fc0;
    if (i % 97 == 5 && input_type != ElementType::float32) std::memcpy(at, &nan, 2);
    if (i % 97 == 5 && input_type == ElementType::float32) {
      const float value = NAN;
      std::memcpy(at, &value, 4);
    }
  }
  ReluCountArgs args{};
  args.input = input.data();
  args.output = output.data();
  args.input_type = input_type;
  args.output_type = output_type;
  args.images = 2;
  args.channels = channels;
  args.pixels = pixels;
  args.channels_last = channels_last;
  Counted counted(channels);
  args.activity = counted.pointers();
  if (relu_count_cpu(args, parallel_for) != 0) return false;
  for (int64_t i = 0; i < count; ++i) {
    const double x = stored_value(input_type, input.data() + i * element_bytes(input_type));
    const double y = stored_value(output_type, output.data() + i * element_bytes(output_type));
    const double expected = x <= 0 ? 0 : x;
    if (std::isnan(x) ? std::isnan(y)
                      : std::fabs(y - expected) <= precision_of(output_type) * expected) {
      continue;
    }
    std::printf("last pass: %.9g at %ld, expected %.9g\n", y, static_cast<long>(i), expected);
    return false;
  }
  const int64_t sizes[4] = {2, channels, 1, pixels};
  int64_t strides[4];
  set_strides(strides, sizes, channels_last);
  return counts_are_right(counted, output.data(), output_type, sizes, strides);
}

// --- all calls ---

constexpr ElementType kFloats[] = {ElementType::float32, ElementType::float16,
                                   ElementType::bfloat16};
constexpr Case kCases[] = {
    {3, 64, {7, 7}, {2, 2}, {1, 1}, {3, 3}, {19, 40}},
    {3, 33, {3, 3}, {1, 1}, {1, 1}, {1, 1}, {9, 17}},
    {4, 96, {4, 4}, {4, 4}, {1, 1}, {0, 0}, {16, 12}},
    {1, 1, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {3, 50}},
    {2, 7, {3, 2}, {1, 2}, {2, 3}, {2, 0}, {11, 13}},
    {3, 130, {16, 16}, {16, 16}, {1, 1}, {0, 0}, {33, 32}},
    {3, 16, {5, 1}, {3, 1}, {1, 1}, {9, 1}, {4, 5}},
    {2, 20, {2, 2}, {3, 5}, {1, 1}, {0, 0}, {9, 21}},
    {4, 70, {5, 8}, {1, 2}, {2, 1}, {4, 2}, {13, 51}},
    {3, 36, {11, 11}, {4, 4}, {1, 1}, {2, 2}, {23, 150}},
    {1, 16, {9, 20}, {2, 1}, {1, 1}, {0, 9}, {14, 37}},
    {2, 20, {6, 6}, {2, 1}, {1, 2}, {3, 2}, {20, 50}},
    {3, 32, {5, 5}, {1, 1}, {1, 1}, {2, 2}, {12, 40}},   // planes of whole lines of the caches
    {3, 32, {3, 3}, {1, 1}, {1, 1}, {1, 1}, {3, 160}},   // the same, in wider rows
    {2, 64, {3, 4}, {2, 1}, {1, 1}, {2, 1}, {8, 16}},    // whole tiles, with padding left out
    {21, 50, {3, 3}, {1, 2}, {1, 1}, {1, 1}, {5, 117}},  // more channels than images have
    {37, 18, {3, 2}, {2, 1}, {1, 2}, {1, 2}, {6, 19}},
    // Of these bytes alone: so many outputs that it may be by winograd.h.
    {3, 64, {7, 7}, {2, 2}, {1, 1}, {3, 3}, {65, 64}},
    {4, 70, {5, 8}, {1, 2}, {2, 1}, {4, 2}, {37, 55}},
    {3, 70, {11, 11}, {4, 4}, {1, 1}, {2, 2}, {39, 471}},  // in blocks, for several pairs of rows
};
constexpr size_t kBytesAlone = std::size(kCases) - 3;

// Made when first asked for.
const Problem& problem_of(size_t number, int input) {
  static std::optional<Problem> problems[std::size(kCases)][4];
  std::optional<Problem>& problem = problems[number][input];
  if (!problem) problem = make_problem(kCases[number], static_cast<ElementType>(input));
  return *problem;
}

bool run_all(Isa, int64_t& cases) {
  for (size_t number = 0; number < std::size(kCases); ++number)
    // Bytes first: what a planted fault meets is then what only they go through.
    for (int input = 3; input >= 0; --input)
      for (const ElementType output : kFloats)
        for (int layouts = 0; layouts < 4; ++layouts) {
          // Large kernels take their time: each input, output and layout once, not all together.
          const Case& test = kCases[number];
          const int turn = input + layouts + static_cast<int>(output);
          const auto type = static_cast<ElementType>(input);
          const bool usual = type == ElementType::uint8 && output == ElementType::float32;
          if (turn % 4 != 0 && test.kernel[0] > 3 && !usual) continue;
          if (type == ElementType::uint8 && test.channels > kMaxDirectChannels) continue;
          if (type != ElementType::uint8 && number >= kBytesAlone) continue;
          const Problem& problem = problem_of(number, input);
          if (!run_convolution(test, problem, type, output, (layouts & 1) != 0,
                               (layouts & 2) != 0)) {
            return false;
          }
          ++cases;
        }
  for (const ElementType output : kFloats)
    for (const ElementType input : {ElementType::float32, output})
      for (const bool channels_last : {false, true})
        for (const int64_t channels : {1, 16, 21})
          for (const int64_t pixels : {1, 15, 64, 1100}) {
            if (!run_last_pass(input, output, channels_last, channels, pixels)) return false;
            ++cases;
          }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program(argc, argv, run_all, {Isa::vnni, Isa::gfni, Isa::amx});
}
