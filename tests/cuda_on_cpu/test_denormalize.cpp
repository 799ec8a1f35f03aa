// The CUDA kernel of `denormalize` against plain scalar arithmetic, over exactly sized buffers.
//
//   test_denormalize values   every 16-bit value, and float32 around every step
//   test_denormalize shapes   sizes, strides, alignments, channel counts
//   test_denormalize far      offsets beyond 2^32, in memory that is mostly not there
//   test_denormalize few      a little of the first two, for the race checker
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "denormalize/denormalize.h"
#include "share.h"

namespace {

using pixfuse::ElementType;
constexpr int N = 0, C = 1, H = 2, W = 3;
using Four = std::array<int64_t, 4>;
constexpr ElementType kTypes[] = {ElementType::float32, ElementType::float16,
                                  ElementType::bfloat16};

int64_t calls = 0, failures = 0;

int64_t extent(const Four& sizes, const Four& strides) {
  int64_t last = 0;
  for (size_t d = 0; d < 4; ++d) {
    if (sizes[d] == 0) return 0;
    last += (sizes[d] - 1) * strides[d];
  }
  return last + 1;
}

int64_t offset_of(const Four& strides, int64_t n, int64_t c, int64_t h, int64_t w) {
  return n * strides[N] + c * strides[C] + h * strides[H] + w * strides[W];
}

template <class Body>
void for_each_element(const Four& sizes, Body body) {
  for (int64_t n = 0; n < sizes[N]; ++n)
    for (int64_t c = 0; c < sizes[C]; ++c)
      for (int64_t h = 0; h < sizes[H]; ++h)
        for (int64_t w = 0; w < sizes[W]; ++w) body(n, c, h, w);
}

Four planar(const Four& s, int64_t row_gap = 0) {
  const int64_t row = s[W] + row_gap;
  return {s[C] * s[H] * row, s[H] * row, row, 1};
}

Four interleaved(const Four& s, int64_t row_gap = 0, int64_t pixel_gap = 0) {
  const int64_t pixel = s[C] + pixel_gap, row = s[W] * pixel + row_gap;
  return {s[H] * row, 1, row, pixel};
}

// The value of 16 bits, from the definition of the format.
float value_of(uint16_t bits, int exponent_bits) {
  const int fraction_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1);
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const float sign = (bits & 0x8000) != 0 ? -1.0f : 1.0f;
  if (exponent == (1 << exponent_bits) - 1) {
    return fraction == 0 ? sign * std::numeric_limits<float>::infinity() : std::nanf("");
  }
  if (exponent == 0) {
    return sign * std::ldexp(static_cast<float>(fraction), 1 - bias - fraction_bits);
  }
  return sign * std::ldexp(static_cast<float>((1 << fraction_bits) + fraction),
                           exponent - bias - fraction_bits);
}

float load(ElementType dtype, const uint8_t* element) {
  if (dtype == ElementType::float32) {
    float value;
    std::memcpy(&value, element, sizeof value);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, element, sizeof bits);
  return value_of(bits, dtype == ElementType::float16 ? 5 : 8);
}

float scale_of(int64_t c) { return 64.0f + 0.37f * static_cast<float>(c); }
float offset_value(int64_t c) { return 120.0f - 0.3f * static_cast<float>(c); }

// `random` bits: as 16-bit floats any, as float32 mostly values around the range.
void store_random(ElementType dtype, uint8_t* element) {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  uint32_t bits = state ^ state >> 16;
  if (dtype == ElementType::float32 && state >> 29 != 0) {
    const float value = static_cast<float>(static_cast<int32_t>(state)) * 0x1p-29f;
    std::memcpy(&bits, &value, sizeof bits);
  }
  std::memcpy(element, &bits, static_cast<size_t>(pixfuse::element_bytes(dtype)));
}

struct Case {
  std::string name;
  Four sizes, value_strides, output_strides;
  ElementType dtype;
};

void fail(const Case& test, const std::string& what) {
  // Enough is known then, and the mistakes planted in kernels take less time.
  if (++failures > 10) std::exit(1);
  std::fprintf(stderr, "wrong value: %s, dtype %d, sizes %lld %lld %lld %lld: %s\n",
               test.name.c_str(), static_cast<int>(test.dtype),
               static_cast<long long>(test.sizes[N]), static_cast<long long>(test.sizes[C]),
               static_cast<long long>(test.sizes[H]), static_cast<long long>(test.sizes[W]),
               what.c_str());
}

// On values that are there already; `written` marks what the output may have changed.
void check(const Case& test, const uint8_t* values, uint8_t* output, std::vector<bool>* written) {
  pixfuse::DenormalizeArgs args{};
  args.values = values;
  args.output = output;
  std::copy(test.sizes.begin(), test.sizes.end(), args.sizes);
  std::copy(test.value_strides.begin(), test.value_strides.end(), args.value_strides);
  std::copy(test.output_strides.begin(), test.output_strides.end(), args.output_strides);
  args.dtype = test.dtype;
  std::vector<pixfuse::ChannelScale> channels;
  for (int64_t c = 0; c < test.sizes[C]; ++c) channels.push_back({scale_of(c), offset_value(c)});
  args.channels = channels.data();
  constexpr int64_t kBefore = 1000;  // what is there is added to
  int64_t tallies[2] = {kBefore, kBefore}, expected[2] = {kBefore, kBefore};
  const bool count = calls++ % 3 != 0;
  args.tallies = count ? tallies : nullptr;
  const int error = pixfuse::denormalize_cuda(args, nullptr);
  if (error != 0) return fail(test, "CUDA error " + std::to_string(error));

  const int64_t bytes = pixfuse::element_bytes(test.dtype);
  int64_t wrong = 0;
  for_each_element(test.sizes, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    const float x = load(test.dtype, values + offset_of(test.value_strides, n, c, h, w) * bytes);
    const float product = x * scale_of(c);
    const float y = product + offset_value(c);
    const float nearest = std::nearbyintf(y);  // half to even
    const int byte = std::isnan(y) ? 0 : static_cast<int>(std::clamp(nearest, 0.0f, 255.0f));
    expected[0] += std::isfinite(x) && (nearest < 0 || nearest > 255);
    expected[1] += !std::isfinite(x);
    const int64_t out = offset_of(test.output_strides, n, c, h, w);
    wrong += output[out] != byte;
    if (written != nullptr) (*written)[static_cast<size_t>(out)] = true;
  });
  if (wrong != 0) return fail(test, std::to_string(wrong) + " bytes differ");
  if (count && !std::equal(tallies, tallies + 2, expected)) fail(test, "the tallies differ");
}

// In memory of exactly the size, from some bytes past a boundary.
void check(const Case& test, int64_t output_offset = 0,
           const std::vector<uint8_t>* content = nullptr) {
  if (!is_in_share()) return;
  const int64_t bytes = pixfuse::element_bytes(test.dtype);
  const auto in = static_cast<size_t>(extent(test.sizes, test.value_strides) * bytes);
  const auto out = static_cast<size_t>(extent(test.sizes, test.output_strides));
  const auto skipped = static_cast<size_t>(output_offset);
  auto* values = static_cast<uint8_t*>(std::malloc(in));
  auto* output = static_cast<uint8_t*>(std::malloc(skipped + out));
  std::memset(output, 0x6e, skipped + out);
  if (content != nullptr) {
    std::memcpy(values, content->data(), in);
  } else {
    for (size_t i = 0; i < in; i += static_cast<size_t>(bytes))
      store_random(test.dtype, values + i);
  }
  std::vector<bool> written(out);
  check(test, values, output + skipped, &written);
  for (size_t i = 0; i < skipped; ++i) {
    if (output[i] != 0x6e) fail(test, "a byte before the output was written");
  }
  for (size_t i = 0; i < out; ++i) {
    if (!written[i] && output[skipped + i] != 0x6e) fail(test, "a byte between was written");
  }
  std::free(values);
  std::free(output);
}

void test_values() {
  for (const ElementType dtype : {ElementType::float16, ElementType::bfloat16}) {
    std::vector<uint8_t> content(2 * 65536);
    for (uint32_t i = 0; i < 65536; ++i) std::memcpy(&content[2 * i], &i, 2);
    const Four s = {1, 1, 256, 256};
    check({"every value", s, planar(s), planar(s), dtype}, 0, &content);
  }
  // Channel 0 has exact products, so exact halves; in channel 1 products are rounded.
  std::vector<float> near;
  const float infinity = std::numeric_limits<float>::infinity();
  for (const int64_t c : {0, 1}) {
    for (int step = -2; step < 260; ++step) {
      float middle = (static_cast<float>(step) + 0.5f - offset_value(c)) / scale_of(c);
      for (int i = 0; i < 5; ++i) middle = std::nextafter(middle, -1e9f);
      for (int i = 0; i < 10; ++i) near.push_back(middle = std::nextafter(middle, 1e9f));
    }
    for (const float value : {infinity, -infinity, std::nanf(""), 3e38f, -3e38f, 1e-40f, -0.0f}) {
      near.push_back(value);
    }
  }
  std::vector<uint8_t> content(4 * near.size());
  std::memcpy(content.data(), near.data(), content.size());
  const Four s = {1, 2, 1, static_cast<int64_t>(near.size() / 2)};
  check({"around every step", s, planar(s), planar(s), ElementType::float32}, 0, &content);
}

void test_sizes(const std::vector<int64_t>& widths, const std::vector<int64_t>& channel_counts) {
  size_t turn = 0;
  for (const int64_t w : widths)
    for (const int64_t c : channel_counts)
      for (const int64_t n : {0, 1, 2})
        for (const int64_t h : {1, 3}) {
          const Four s = {n, c, h, w};
          const Four inputs[] = {planar(s),
                                 interleaved(s),
                                 planar(s, 5),
                                 interleaved(s, 7),
                                 interleaved(s, 0, 1),
                                 {0, h * w, w, 1},
                                 {1, n * h * w, n * w, n}};
          for (const Four& input : inputs)
            for (const Four& output : {planar(s), interleaved(s)}) {
              check({"sizes", s, input, output, kTypes[turn % 3]}, static_cast<int64_t>(turn % 17));
              ++turn;
            }
        }
}

void test_alignment() {
  for (int64_t offset = 0; offset < 16; ++offset)
    for (const int64_t c : {1, 3, 4})
      for (const int64_t w : {15, 16, 17, 47})
        for (const bool pixels : {false, true}) {
          const Four s = {2, c, 2, w};
          check({"alignment", s, planar(s), pixels ? interleaved(s, 3) : planar(s, 3),
                 ElementType::float32},
                offset);
        }
}

uint8_t* reserve(int64_t bytes) {
  void* memory = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::exit(2);
  return static_cast<uint8_t*>(memory);
}

void test_far() {
  const int64_t far = (int64_t{1} << 32) + 48;
  const Four s = {2, 2, 2, 20};
  for (size_t d = 0; d < 4; ++d)
    for (const bool far_output : {false, true}) {
      if (far_output && d == W) continue;
      Case test{"far", s, planar(s), interleaved(s), ElementType::bfloat16};
      if (far_output) test.output_strides = planar(s);
      (far_output ? test.output_strides : test.value_strides)[d] = far;
      const int64_t in = extent(s, test.value_strides) * 2, out = extent(s, test.output_strides);
      uint8_t *values = reserve(in), *output = reserve(out);
      for_each_element(s, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
        store_random(test.dtype, values + 2 * offset_of(test.value_strides, n, c, h, w));
      });
      check(test, values, output, nullptr);
      munmap(values, static_cast<size_t>(in));
      munmap(output, static_cast<size_t>(out));
    }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view which = argc == 2 ? argv[1] : "";
  if (which == "values") {
    test_values();
  } else if (which == "shapes") {
    test_sizes({0, 1, 2, 15, 16, 17, 33, 257}, {1, 2, 3, 4, 5, 33});
    test_sizes({5003}, {1, 3, 4});
    test_alignment();
  } else if (which == "far") {
    test_far();
  } else if (which == "few") {
    test_sizes({1, 17, 40}, {1, 3, 33});
    test_sizes({5003}, {3});
  } else {
    std::fprintf(stderr, "usage: test_denormalize values|shapes|far|few\n");
    return 2;
  }
  std::printf("%lld calls, %lld wrong\n", static_cast<long long>(calls),
              static_cast<long long>(failures));
  return failures == 0 ? 0 : 1;
}
