// The CUDA kernel of `conv_bias_relu` against sums in float64, over exactly sized buffers.
//
//   test_conv_bias_relu shapes   kernels, strides, dilations, groups, layouts, types,
//   multiplications test_conv_bias_relu values   roundings, NaN and infinity, types of the output
//   test_conv_bias_relu far      offsets beyond 2^32, in memory that is mostly not there
//   test_conv_bias_relu few      a little of the first, for the race checker
#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "conv_bias_relu/conv_bias_relu.h"
#include "matrix_multiply.h"
#include "normalize/normalize_constants.h"
#include "pixel_values.h"
#include "share.h"

namespace {

using pixfuse::Multiplication;
using Four = std::array<int64_t, 4>;
using Two = std::array<int64_t, 2>;
constexpr int N = 0, C = 1, H = 2, W = 3;

int64_t calls = 0, failures = 0;

// --- numbers ---

uint32_t random_state = 1;
double random_number() {  // from -1 to 1
  random_state = random_state * 1664525u + 1013904223u;
  return static_cast<double>(random_state >> 8) / (1 << 23) - 1.0;
}

double from_bits(uint32_t bits, ElementType type) {
  if (type == ElementType::uint8) return bits;
  if (type == ElementType::float32) return ::pixfuse::float_of(bits);
  if (type == ElementType::bfloat16) return ::pixfuse::float_of(bits << 16);
  const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double sign = bits >> 15 != 0 ? -1.0 : 1.0;
  if (exponent == 31) return fraction != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(1024 + fraction, static_cast<int>(exponent) - 25);
}

uint32_t to_bits(double value, ElementType type) {
  const auto rounded = static_cast<float>(value);
  if (std::isfinite(rounded) || type == ElementType::float32) return bits_as(type, rounded);
  const uint32_t infinity = type == ElementType::float16 ? 0x7c00u : 0x7f80u;
  if (std::isnan(rounded)) return infinity | 0x40u;
  return infinity | (rounded < 0 ? 0x8000u : 0u);
}

// As the multiplication sees it.
double as_operand(double value, Multiplication multiplication) {
  if (!std::isfinite(value)) return value;
  switch (multiplication) {
    case Multiplication::ieee:
      return value;
    case Multiplication::tf32: {
      if (value == 0) return 0;
      const double unit = std::ldexp(1.0, std::ilogb(value) - 10);
      return std::copysign(std::floor(std::fabs(value) / unit + 0.5) * unit, value);
    }
    case Multiplication::float16:
      return from_bits(to_bits(value, ElementType::float16), ElementType::float16);
    case Multiplication::bfloat16:
      return from_bits(to_bits(value, ElementType::bfloat16), ElementType::bfloat16);
  }
  return NAN;
}

// --- memory ---

int64_t offset_of(const Four& strides, int64_t a, int64_t b, int64_t c, int64_t d) {
  return a * strides[0] + b * strides[1] + c * strides[2] + d * strides[3];
}

int64_t extent(const Four& sizes, const Four& strides) {
  int64_t last = 0;
  for (size_t d = 0; d < 4; ++d) {
    if (sizes[d] == 0) return 0;
    last += (sizes[d] - 1) * strides[d];
  }
  return last + 1;
}

Four planar(const Four& s) { return {s[C] * s[H] * s[W], s[H] * s[W], s[W], 1}; }
Four interleaved(const Four& s) { return {s[C] * s[H] * s[W], 1, s[W] * s[C], s[C]}; }

// --- a call and what it should give ---

struct Geometry {
  int64_t channels, outputs;
  Two kernel, size;
  Two stride = {1, 1};
  Four padding = {0, 0, 0, 0};  // top, bottom, left, right
  Two dilation = {1, 1};
  int64_t groups = 1;
  int64_t images = 1;
};

struct Case {
  std::string name;
  Geometry g;
  ElementType input_type, weight_type, output_type;
  Multiplication multiplication;
  bool channels_last_input, channels_last_output;
  Rounding rounding = Rounding::torchvision;
  bool bias = true;
  int64_t blocks = 0;
  int64_t offset = 0;      // elements before the input and the output
  int special_values = 0;  // NaN and infinity among the inputs
  double weight_scale = 1.0;

  Four input_sizes() const { return {g.images, g.channels, g.size[0], g.size[1]}; }
  Four weight_sizes() const { return {g.outputs, g.channels / g.groups, g.kernel[0], g.kernel[1]}; }
  Four output_sizes() const {
    Four sizes = {g.images, g.outputs, 0, 0};
    for (size_t d = 0; d < 2; ++d) {
      const int64_t reach = g.dilation[d] * (g.kernel[d] - 1) + 1;
      sizes[2 + d] =
          (g.size[d] + g.padding[2 * d] + g.padding[2 * d + 1] - reach) / g.stride[d] + 1;
    }
    return sizes;
  }
};

void fail(const Case& test, const std::string& what) {
  if (++failures > 3) std::exit(1);
  std::fprintf(stderr,
               "wrong value: %s, %lld to %lld channels, kernel %lldx%lld, types %d %d %d, "
               "multiplication %d, channels last %d %d: %s\n",
               test.name.c_str(), static_cast<long long>(test.g.channels),
               static_cast<long long>(test.g.outputs), static_cast<long long>(test.g.kernel[0]),
               static_cast<long long>(test.g.kernel[1]), static_cast<int>(test.input_type),
               static_cast<int>(test.weight_type), static_cast<int>(test.output_type),
               static_cast<int>(test.multiplication), test.channels_last_input ? 1 : 0,
               test.channels_last_output ? 1 : 0, what.c_str());
}

void write_element(uint8_t* data, ElementType type, int64_t i, uint32_t bits) {
  const int64_t bytes = pixfuse::element_bytes(type);
  std::memcpy(data + i * bytes, &bits, static_cast<size_t>(bytes));
}
double read_element(const uint8_t* data, ElementType type, int64_t i) {
  return from_bits(element_bits(data, i, pixfuse::element_bytes(type)), type);
}

// How far a sum of `terms` numbers in float32 may be off, and what rounding it adds.
double allowed_error(double exact, double magnitude, double terms, ElementType type) {
  const double of_sum = 4 * 0x1p-24 * std::sqrt(terms) * magnitude;
  const double of_rounding = type == ElementType::float32   ? 0x1p-24
                             : type == ElementType::float16 ? 0x1p-11
                                                            : 0x1p-8;
  const double least = type == ElementType::float16 ? 0x1p-24 : 0x1p-130;
  return of_sum + of_rounding * (std::fabs(exact) + of_sum) + least;
}

struct Memory {
  uint8_t *input, *output;
  Four input_strides, output_strides;
};

void check(const Case& test, const Memory& memory) {
  const Geometry& g = test.g;
  const Four in = test.input_sizes(), weights = test.weight_sizes(), out = test.output_sizes();

  // Weights and bias: strided, so that nothing relies on their order.
  const Four weight_strides = calls % 2 == 0 ? planar(weights) : interleaved(weights);
  Buffer weight(extent(weights, weight_strides) * pixfuse::element_bytes(test.weight_type), 0, 0);
  const double scale =
      test.weight_scale / std::sqrt(static_cast<double>(weights[C] * weights[H] * weights[W]));
  for (int64_t i = 0; i < weights[N] * weights[C] * weights[H] * weights[W]; ++i) {
    write_element(weight.data(), test.weight_type, i,
                  to_bits(2 * scale * random_number(), test.weight_type));
  }
  Buffer bias(g.outputs * pixfuse::element_bytes(test.weight_type), 0, 0);
  for (int64_t o = 0; o < g.outputs; ++o) {
    write_element(bias.data(), test.weight_type, o, to_bits(random_number() / 4, test.weight_type));
  }

  std::vector<double> means, stds;
  for (int64_t c = 0; c < g.channels; ++c) {
    means.push_back(mean_of(c));
    stds.push_back(std_of(c));
  }
  std::vector<pixfuse::ChannelConstants> constants(static_cast<size_t>(g.channels));
  pixfuse::NormalizeArgs normalization{};
  pixfuse::set_rounding(normalization, constants.data(), means.data(), stds.data(), g.channels,
                        test.rounding);

  const auto channels = static_cast<size_t>(g.outputs);
  std::vector<int64_t> active(channels, -1), images(channels, -1), nan(channels, -1);
  std::vector<double> sum(channels, -1.0);
  pixfuse::ConvBiasReluCudaArgs args{};
  pixfuse::ConvBiasReluArgs& call = args.call;
  call.input = memory.input;
  call.input_type = test.input_type;
  call.arithmetic = normalization.arithmetic;
  call.scale = normalization.scale;
  call.channels = constants.data();
  call.output = memory.output;
  call.output_type = test.output_type;
  for (size_t d = 0; d < 4; ++d) {
    call.input_sizes[d] = in[d];
    call.input_strides[d] = memory.input_strides[d];
    call.weight_strides[d] = weight_strides[d];
    call.output_sizes[d] = out[d];
    call.output_strides[d] = memory.output_strides[d];
  }
  for (size_t d = 0; d < 2; ++d) {
    call.kernel[d] = g.kernel[d];
    call.stride[d] = g.stride[d];
    call.dilation[d] = g.dilation[d];
    call.padding[d] = g.padding[2 * d];
  }
  call.activity = {active.data(), images.data(), nan.data(), sum.data()};
  args.weight_type = test.weight_type;
  args.weight = weight.data();
  args.bias = test.bias ? bias.data() : nullptr;
  args.groups = g.groups;
  args.multiplication = test.multiplication;
  args.blocks = test.blocks;
  Buffer scratch(pixfuse::conv_bias_relu_cuda_scratch_bytes(args), 0, 0xff);
  args.scratch = scratch.data();
  ++calls;
  const int error = pixfuse::conv_bias_relu_cuda(args, nullptr);
  if (error != 0) return fail(test, "CUDA error " + std::to_string(error));

  // Both sides as they are multiplied, dense.
  std::vector<double> values, operands;
  for (int64_t n = 0; n < in[N]; ++n)
    for (int64_t c = 0; c < in[C]; ++c)
      for (int64_t y = 0; y < in[H]; ++y)
        for (int64_t x = 0; x < in[W]; ++x) {
          const double value = read_element(memory.input, test.input_type,
                                            offset_of(memory.input_strides, n, c, y, x));
          const bool bytes = test.input_type == ElementType::uint8;
          values.push_back(as_operand(
              bytes ? expected_float(static_cast<uint8_t>(value), c, test.rounding) : value,
              test.multiplication));
        }
  for (int64_t o = 0; o < g.outputs; ++o)
    for (int64_t c = 0; c < weights[C]; ++c)
      for (int64_t ky = 0; ky < g.kernel[0]; ++ky)
        for (int64_t kx = 0; kx < g.kernel[1]; ++kx) {
          const int64_t at = offset_of(weight_strides, o, c, ky, kx);
          operands.push_back(
              as_operand(read_element(weight.data(), test.weight_type, at), test.multiplication));
        }
  const Four dense_input = planar(in), dense_weight = planar(weights);
  const auto input_value = [&](int64_t n, int64_t c, int64_t y, int64_t x) {
    if (y < 0 || y >= in[H] || x < 0 || x >= in[W]) return 0.0;
    return values[static_cast<size_t>(offset_of(dense_input, n, c, y, x))];
  };
  int64_t wrong = 0;
  for (int64_t o = 0; o < g.outputs; ++o) {
    const int64_t group = o / (g.outputs / g.groups);
    int64_t counted_active = 0, counted_images = 0, counted_nan = 0;
    double counted_sum = 0.0;
    for (int64_t n = 0; n < g.images; ++n) {
      bool fired = false;
      for (int64_t y = 0; y < out[H]; ++y)
        for (int64_t x = 0; x < out[W]; ++x) {
          double exact = test.bias ? read_element(bias.data(), test.weight_type, o) : 0.0;
          double magnitude = std::fabs(exact), terms = 1;
          for (int64_t c = 0; c < weights[C]; ++c)
            for (int64_t ky = 0; ky < g.kernel[0]; ++ky)
              for (int64_t kx = 0; kx < g.kernel[1]; ++kx) {
                const double w =
                    operands[static_cast<size_t>(offset_of(dense_weight, o, c, ky, kx))];
                const double product =
                    w * input_value(n, group * weights[C] + c,
                                    y * g.stride[0] + ky * g.dilation[0] - g.padding[0],
                                    x * g.stride[1] + kx * g.dilation[1] - g.padding[2]);
                exact += product;
                magnitude += std::fabs(product);
                ++terms;
              }
          const double got = read_element(memory.output, test.output_type,
                                          offset_of(memory.output_strides, n, o, y, x));
          const double wanted = exact <= 0 ? 0 : exact;
          if (std::isfinite(exact)) {
            const double error = allowed_error(exact, magnitude, terms, test.output_type);
            wrong += !(std::fabs(got - wanted) <= error);
          } else {
            wrong += std::isnan(exact) ? !std::isnan(got) : got != wanted;
          }
          counted_active += got > 0;
          counted_nan += std::isnan(got);
          counted_sum += got;
          fired = fired || got > 0;
        }
      counted_images += fired;
    }
    const auto at = static_cast<size_t>(o);
    if (active[at] != counted_active || images[at] != counted_images || nan[at] != counted_nan) {
      fail(test, "counts of channel " + std::to_string(o) + ": " + std::to_string(active[at]) +
                     " active in " + std::to_string(images[at]) + " images, " +
                     std::to_string(nan[at]) + " NaN; wanted " + std::to_string(counted_active) +
                     " in " + std::to_string(counted_images) + ", " + std::to_string(counted_nan));
    }
    const bool same_sum = std::isnan(counted_sum) ? std::isnan(sum[at])
                          : std::isinf(counted_sum)
                              ? sum[at] == counted_sum
                              : std::fabs(sum[at] - counted_sum) <= 1e-6 * counted_sum;
    if (!same_sum) fail(test, "sum of channel " + std::to_string(o));
  }
  if (wrong != 0) fail(test, std::to_string(wrong) + " outputs are too far off");
}

void fill_input(const Case& test, uint8_t* input, const Four& strides) {
  const Four in = test.input_sizes();
  for (int64_t n = 0; n < in[N]; ++n)
    for (int64_t c = 0; c < in[C]; ++c)
      for (int64_t y = 0; y < in[H]; ++y)
        for (int64_t x = 0; x < in[W]; ++x) {
          double value = random_number() * 2;
          if (test.special_values > 0 && (n * 7 + c * 3 + y * 5 + x) % 61 == 0) {
            value = test.special_values == 1 ? NAN : c % 2 == 0 ? INFINITY : -INFINITY;
          }
          const uint32_t bits = test.input_type == ElementType::uint8
                                    ? static_cast<uint32_t>(128 + value * 63)
                                    : to_bits(value, test.input_type);
          write_element(input, test.input_type, offset_of(strides, n, c, y, x), bits);
        }
}

void check(const Case& test) {
  if (!is_in_share()) return;
  const Four in = test.input_sizes(), out = test.output_sizes();
  const Four input_strides = test.channels_last_input ? interleaved(in) : planar(in);
  const Four output_strides = test.channels_last_output ? interleaved(out) : planar(out);
  const int64_t in_bytes = pixfuse::element_bytes(test.input_type);
  const int64_t out_bytes = pixfuse::element_bytes(test.output_type);
  Buffer input(extent(in, input_strides) * in_bytes, test.offset * in_bytes, 0);
  Buffer output(extent(out, output_strides) * out_bytes, test.offset * out_bytes, 0xff);
  fill_input(test, input.data(), input_strides);
  check(test, {input.data(), output.data(), input_strides, output_strides});
}

// --- what is tried ---

constexpr Multiplication kMultiplications[] = {Multiplication::ieee, Multiplication::tf32,
                                               Multiplication::float16, Multiplication::bfloat16};

ElementType type_of(Multiplication multiplication) {
  return multiplication == Multiplication::float16    ? ElementType::float16
         : multiplication == Multiplication::bfloat16 ? ElementType::bfloat16
                                                      : ElementType::float32;
}

const std::vector<Geometry> kGeometries = {
    {3, 64, {7, 7}, {19, 21}, {2, 2}, {3, 3, 3, 3}},
    {3, 7, {3, 3}, {9, 17}, {1, 1}, {1, 1, 1, 1}, {1, 1}, 1, 3},
    {1, 5, {1, 1}, {1, 5}},
    {4, 70, {3, 2}, {13, 11}, {2, 1}, {1, 0, 2, 3}, {2, 1}},  // two blocks of channels
    {4, 16, {3, 3}, {6, 8}, {1, 1}, {1, 1, 1, 1}},
    {6, 10, {3, 3}, {8, 9}, {1, 1}, {1, 1, 1, 1}, {1, 1}, 2},
    {13, 33, {3, 3}, {6, 7}},
    {20, 16, {2, 2}, {5, 8}},  // channels in two slices
    {3, 8, {16, 16}, {32, 48}, {16, 16}},
    {2, 40, {5, 5}, {33, 35}, {1, 2}, {2, 0, 0, 1}, {7, 8}},
    {8, 12, {1, 1}, {10, 11}, {3, 3}},
    {3, 96, {4, 4}, {16, 20}, {4, 4}},
    {3, 6, {11, 11}, {23, 39}, {4, 4}, {2, 2, 2, 2}},
    {5, 5, {3, 3}, {6, 7}, {1, 1}, {1, 1, 1, 1}, {1, 1}, 5},
    {1, 3, {3, 3}, {30, 41}, {1, 1}, {1, 1, 1, 1}, {1, 1}, 1, 2},
    {2, 9, {3, 3}, {2, 2}, {1, 1}, {5, 5, 5, 5}},  // mostly padding
};

// Not every combination with every geometry, but each with many.
void test_shapes(const std::vector<Geometry>& geometries, bool both_inputs) {
  for (size_t i = 0; i < geometries.size(); ++i)
    for (size_t m = 0; m < std::size(kMultiplications); ++m)
      for (const bool bytes : {false, true}) {
        const size_t turn = i * std::size(kMultiplications) + m;
        if (!both_inputs && bytes != (turn % 3 == 0)) continue;
        const ElementType type = type_of(kMultiplications[m]);
        Case test{"shapes",
                  geometries[i],
                  bytes ? ElementType::uint8 : type,
                  type,
                  type,
                  kMultiplications[m],
                  (i + m) % 2 == 0,
                  (i / 2 + m) % 2 == 0};
        test.blocks = static_cast<int64_t>(turn % 3);  // usual, or one or two with several tiles
        test.bias = turn % 5 != 4;
        test.offset = turn % 7 == 6 ? 1 : 0;
        test.rounding = kRoundings[turn % 5];
        // Half of the times the instructions of compute capability 7.5.
        ::cuda_on_cpu::has_deep_multiplication =
            test.multiplication != Multiplication::float16 || i % 2 == 0;
        check(test);
        ::cuda_on_cpu::has_deep_multiplication = true;
      }
}

void test_values() {
  constexpr ElementType kTypes[] = {ElementType::float32, ElementType::float16,
                                    ElementType::bfloat16};
  const Geometry g = {3, 8, {3, 3}, {8, 9}, {1, 1}, {1, 1, 1, 1}, {1, 1}, 1, 2};
  for (const Multiplication multiplication : kMultiplications) {
    const ElementType type = type_of(multiplication);
    for (const Rounding rounding : kRoundings)
      for (const ElementType output : kTypes) {
        Case test{"values", g,       ElementType::uint8, type, output, multiplication, true,
                  false,    rounding};
        check(test);
      }
    for (const int special : {1, 2}) {
      Case test{"special values", g, type, type, type, multiplication, false, true};
      test.special_values = special;
      check(test);
    }
  }
  // 16-bit numbers without tensor cores for them.
  for (const ElementType type : {ElementType::float16, ElementType::bfloat16}) {
    check({"ieee", g, type, type, type, Multiplication::ieee, false, false});
    check({"ieee", g, type, type, type, Multiplication::ieee, true, true});
  }
  // Results that the output's type rounds to 0 do not fire.
  Case tiny{"tiny",
            g,
            ElementType::uint8,
            ElementType::float32,
            ElementType::float16,
            Multiplication::ieee,
            true,
            true};
  tiny.bias = false;
  tiny.weight_scale = 3e-8;
  check(tiny);
  check({"no image",
         {3, 8, {3, 3}, {8, 9}, {1, 1}, {1, 1, 1, 1}, {1, 1}, 1, 0},
         ElementType::uint8,
         ElementType::float32,
         ElementType::float32,
         Multiplication::ieee,
         true,
         false});
}

void test_far() {
  const int64_t far = (int64_t{1} << 32) + 48;
  for (size_t d = 0; d < 4; ++d)
    for (const bool far_output : {false, true}) {
      if (far_output && d != N) continue;
      Case test{"far",
                {3, 8, {2, 2}, {3, 5}, {1, 1}, {0, 0, 0, 0}, {1, 1}, 1, 2},
                ElementType::uint8,
                ElementType::float16,
                ElementType::float16,
                Multiplication::float16,
                false,
                false};
      const Four in = test.input_sizes(), out = test.output_sizes();
      Memory memory{nullptr, nullptr, planar(in), planar(out)};
      (far_output ? memory.output_strides : memory.input_strides)[d] = far;
      const int64_t in_bytes = extent(in, memory.input_strides);
      const int64_t out_bytes = extent(out, memory.output_strides) * 2;
      memory.input = reserve(in_bytes);
      memory.output = reserve(out_bytes);
      fill_input(test, memory.input, memory.input_strides);
      check(test, memory);
      munmap(memory.input, static_cast<size_t>(in_bytes));
      munmap(memory.output, static_cast<size_t>(out_bytes));
    }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view which = argc == 2 ? argv[1] : "";
  if (which == "shapes") {
    test_shapes(kGeometries, false);
  } else if (which == "values") {
    test_values();
  } else if (which == "far") {
    test_far();
  } else if (which == "few") {
    test_shapes({kGeometries[1], kGeometries[5]}, true);
  } else {
    std::fprintf(stderr, "usage: test_conv_bias_relu shapes|values|far|few\n");
    return 2;
  }
  std::printf("%lld calls, %lld wrong\n", static_cast<long long>(calls),
              static_cast<long long>(failures));
  return failures == 0 ? 0 : 1;
}
