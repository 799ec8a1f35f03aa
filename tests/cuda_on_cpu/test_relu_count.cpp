// The CUDA kernel of the last pass of `conv_bias_relu` against plain scalar arithmetic.
//
//   test_relu_count shapes   sizes, layouts, types, in place and not, NaN among the values
//   test_relu_count few      a little of the same, for the race checker
#include <string>
#include <string_view>
#include <vector>

#include "conv_bias_relu/conv_bias_relu.h"
#include "pixel_values.h"
#include "share.h"

namespace {

int64_t calls = 0, failures = 0;

uint32_t random_state = 1;
double random_number() {  // from -1 to 1
  random_state = random_state * 1664525u + 1013904223u;
  return static_cast<double>(random_state >> 8) / (1 << 23) - 1.0;
}

struct Case {
  int64_t images, channels, pixels;
  bool channels_last, is_float64;
  ElementType input_type, output_type;
  bool in_place, bias;
  int64_t input_offset, output_offset;  // elements before them
};

void fail(const Case& test, const std::string& what) {
  if (++failures > 3) std::exit(1);
  std::fprintf(stderr,
               "wrong value: %lld images of %lld channels of %lld pixels, channels last %d, "
               "float64 %d, types %d %d: %s\n",
               static_cast<long long>(test.images), static_cast<long long>(test.channels),
               static_cast<long long>(test.pixels), test.channels_last ? 1 : 0,
               test.is_float64 ? 1 : 0, static_cast<int>(test.input_type),
               static_cast<int>(test.output_type), what.c_str());
}

// A number in a type whose bits are those of a float cut off: exact, so that rounding is seen only
// where something is rounded.
double read(const uint8_t* data, const Case& test, ElementType type, int64_t i) {
  if (test.is_float64) {
    double value;
    std::memcpy(&value, data + i * 8, 8);
    return value;
  }
  const uint32_t bits = element_bits(data, i, pixfuse::element_bytes(type));
  if (type == ElementType::float32) return ::pixfuse::float_of(bits);
  if (type == ElementType::bfloat16) return ::pixfuse::float_of(bits << 16);
  const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return fraction != 0 ? NAN : INFINITY;
  const double magnitude = exponent == 0
                               ? std::ldexp(fraction, -24)
                               : std::ldexp(1024 + fraction, static_cast<int>(exponent) - 25);
  return bits >> 15 != 0 ? -magnitude : magnitude;
}

void write(uint8_t* data, const Case& test, ElementType type, int64_t i, double value) {
  if (test.is_float64) {
    std::memcpy(data + i * 8, &value, 8);
    return;
  }
  const uint32_t nan = type == ElementType::float16 ? 0x7e00u : 0x7fc0u;
  const uint32_t bits = std::isnan(value) && type != ElementType::float32
                            ? nan
                            : bits_as(type, static_cast<float>(value));
  const int64_t bytes = pixfuse::element_bytes(type);
  std::memcpy(data + i * bytes, &bits, static_cast<size_t>(bytes));
}

void check(const Case& test) {
  if (!is_in_share()) return;
  const int64_t count = test.images * test.channels * test.pixels;
  const int64_t in_bytes = test.is_float64 ? 8 : pixfuse::element_bytes(test.input_type);
  const int64_t out_bytes = test.is_float64 ? 8 : pixfuse::element_bytes(test.output_type);
  Buffer input(count * in_bytes, test.input_offset * in_bytes, 0);
  Buffer output(count * out_bytes, test.output_offset * out_bytes, 0xff);
  Buffer bias(test.channels * in_bytes, 0, 0);
  std::vector<double> before(static_cast<size_t>(count));
  for (int64_t c = 0; c < test.channels; ++c) {
    write(bias.data(), test, test.input_type, c, random_number());
  }
  for (int64_t i = 0; i < count; ++i) {
    write(input.data(), test, test.input_type, i, i % 97 == 13 ? NAN : random_number());
    before[static_cast<size_t>(i)] = read(input.data(), test, test.input_type, i);
  }
  const auto channels = static_cast<size_t>(test.channels);
  std::vector<int64_t> active(channels, -1), images(channels, -1), nan(channels, -1);
  std::vector<double> sum(channels, -1.0);
  pixfuse::ReluCountCudaArgs args{};
  args.call.input = input.data();
  args.call.output = test.in_place ? input.data() : output.data();
  args.call.is_float64 = test.is_float64;
  args.call.input_type = test.input_type;
  args.call.output_type = test.output_type;
  args.call.images = test.images;
  args.call.channels = test.channels;
  args.call.pixels = test.pixels;
  args.call.channels_last = test.channels_last;
  args.call.activity = {active.data(), images.data(), nan.data(), sum.data()};
  args.bias = test.bias ? bias.data() : nullptr;
  args.bias_type = test.input_type;
  Buffer scratch(pixfuse::relu_count_cuda_scratch_bytes(args.call), 0, 0xff);
  args.scratch = scratch.data();
  ++calls;
  const int error = pixfuse::relu_count_cuda(args, nullptr);
  if (error != 0) return fail(test, "CUDA error " + std::to_string(error));
  const auto* result = static_cast<const uint8_t*>(args.call.output);
  int64_t wrong = 0;
  for (int64_t c = 0; c < test.channels; ++c) {
    const double b = test.bias ? read(bias.data(), test, test.input_type, c) : 0.0;
    int64_t counted_active = 0, counted_images = 0, counted_nan = 0;
    double counted_sum = 0.0;
    for (int64_t n = 0; n < test.images; ++n) {
      bool fired = false;
      for (int64_t p = 0; p < test.pixels; ++p) {
        const int64_t i = test.channels_last ? (n * test.pixels + p) * test.channels + c
                                             : (n * test.channels + c) * test.pixels + p;
        const double x = before[static_cast<size_t>(i)];
        const double exact =
            test.is_float64 ? x + b
                            : static_cast<double>(static_cast<float>(x) + static_cast<float>(b));
        const double y = read(result, test, test.output_type, i);
        if (std::isnan(exact)) {
          wrong += !std::isnan(y);
        } else {
          Buffer wanted(8, 0, 0);
          write(wanted.data(), test, test.output_type, 0, exact <= 0 ? 0.0 : exact);
          wrong += y != read(wanted.data(), test, test.output_type, 0);
        }
        counted_active += y > 0;
        counted_nan += std::isnan(y);
        counted_sum += y;
        fired = fired || y > 0;
      }
      counted_images += fired;
    }
    const auto at = static_cast<size_t>(c);
    if (active[at] != counted_active || images[at] != counted_images || nan[at] != counted_nan) {
      fail(test, "counts of channel " + std::to_string(c));
    }
    const bool same_sum = std::isnan(counted_sum)
                              ? std::isnan(sum[at])
                              : std::fabs(sum[at] - counted_sum) <= 1e-5 * counted_sum;
    if (!same_sum) fail(test, "sum of channel " + std::to_string(c));
  }
  if (wrong != 0) fail(test, std::to_string(wrong) + " outputs differ");
}

void test_shapes(const std::vector<int64_t>& images, const std::vector<int64_t>& channel_counts,
                 const std::vector<int64_t>& pixel_counts) {
  struct Types {
    bool is_float64;
    ElementType input, output;
  };
  constexpr Types kTypes[] = {
      {false, ElementType::float32, ElementType::float32},
      {false, ElementType::float32, ElementType::float16},
      {false, ElementType::float32, ElementType::bfloat16},
      {false, ElementType::float16, ElementType::float16},
      {false, ElementType::bfloat16, ElementType::bfloat16},
      {true, ElementType::float32, ElementType::float32},
  };
  int64_t turn = 0;
  for (const int64_t n : images)
    for (const int64_t c : channel_counts)
      for (const int64_t p : pixel_counts)
        for (const bool channels_last : {false, true})
          for (const Types& types : kTypes) {
            if (c > 8 && !channels_last) continue;  // many blocks, and nothing new
            const bool same = types.is_float64 || types.input == types.output;
            check({n, c, p, channels_last, types.is_float64, types.input, types.output,
                   same && turn % 3 == 0, turn % 4 != 0, turn % 5 == 4 ? 1 : 0,
                   turn % 7 == 6 ? 1 : 0});
            ++turn;
          }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view which = argc == 2 ? argv[1] : "";
  if (which == "shapes") {
    test_shapes({0, 2}, {5, 72}, {1, 20, 24});
    test_shapes({1}, {1}, {9000});  // several runs to an image
    test_shapes({40}, {1}, {7});    // many images to a warp of the second kernel
  } else if (which == "few") {
    test_shapes({2}, {3}, {16, 49});
  } else {
    std::fprintf(stderr, "usage: test_relu_count shapes|few\n");
    return 2;
  }
  std::printf("%lld calls, %lld wrong\n", static_cast<long long>(calls),
              static_cast<long long>(failures));
  return failures == 0 ? 0 : 1;
}
