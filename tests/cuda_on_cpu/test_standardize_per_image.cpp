// The CUDA kernels of `standardize_per_image` against plain scalar arithmetic in more digits, over
// exactly sized buffers: each call goes both ways, unless it does not fit shared memory. The sums
// that the way of two kernels starts from are computed here.
//
//   test_standardize_per_image shapes   sizes, strides, channel counts, types, floors
//   test_standardize_per_image far      offsets beyond 2^32, in memory that is mostly not there
//   test_standardize_per_image large    millions of values, all but one equal
//   test_standardize_per_image limits   what just fits shared memory and what just does not; the
//   rule test_standardize_per_image few      a little of the first, for the race checker
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "common/cuda_launch.h"
#include "image_moments/image_moments.h"
#include "share.h"
#include "standardize_per_image/standardize_per_image.h"

// In the place of the product's kernel, which has its own test.
int pixfuse::image_moments_cuda(const ImageMomentsArgs& args, void*) {
  for (int64_t n = 0; n < args.sizes[0]; ++n)
    for (int64_t c = 0; c < args.sizes[1]; ++c)
      for (int64_t h = 0; h < args.sizes[2]; ++h)
        for (int64_t w = 0; w < args.sizes[3]; ++w) {
          const int64_t x = args.images[n * args.strides[0] + c * args.strides[1] +
                                        h * args.strides[2] + w * args.strides[3]];
          args.sums[n * args.sizes[1] + c] += x;
          args.squares[n * args.sizes[1] + c] += x * x;
        }
  return 0;
}

namespace {

using pixfuse::ElementType;
using pixfuse::StandardizeArgs;
using pixfuse::StandardizeWay;
constexpr int N = 0, C = 1, H = 2, W = 3;
using Four = std::array<int64_t, 4>;
constexpr ElementType kTypes[] = {ElementType::float32, ElementType::float16,
                                  ElementType::bfloat16};

int64_t calls = 0, in_one_pass = 0, failures = 0;

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

Four planar(const Four& s, int64_t row_gap = 0) {
  const int64_t row = s[W] + row_gap;
  return {s[C] * s[H] * row, s[H] * row, row, 1};
}

Four interleaved(const Four& s, int64_t row_gap = 0) {
  const int64_t row = s[W] * s[C] + row_gap;
  return {s[H] * row, 1, row, s[C]};
}

// The bits of the 16-bit float nearest to `value` (half to even), from the definition of the
// format. No value here overflows.
uint32_t round_to_16_bits(float value, int significand_bits, int exponent_bits) {
  const uint32_t sign = std::signbit(value) ? 0x8000u : 0u;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int lowest = value == 0 ? 1 - bias : std::max(std::ilogb(value), 1 - bias);
  const double last_bit = std::ldexp(1.0, lowest - (significand_bits - 1));
  const auto units = static_cast<uint32_t>(std::nearbyint(std::fabs(value) / last_bit));
  const auto field = static_cast<uint32_t>(lowest + bias - 1);
  return sign | ((field << (significand_bits - 1)) + units);
}

uint32_t bits_of(float value, ElementType type) {
  if (type == ElementType::float16) return round_to_16_bits(value, 11, 5);
  if (type == ElementType::bfloat16) return round_to_16_bits(value, 8, 8);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct Case {
  std::string name;
  Four sizes, image_strides, output_strides;
  ElementType type;
  bool per_channel;
  double floor;
};

void fail(const Case& test, const std::string& what) {
  // Enough is known then, and the mistakes planted in kernels take less time.
  if (++failures > 10) std::exit(1);
  std::fprintf(stderr, "wrong value: %s, type %d, per channel %d, sizes %lld %lld %lld %lld: %s\n",
               test.name.c_str(), static_cast<int>(test.type), test.per_channel ? 1 : 0,
               static_cast<long long>(test.sizes[N]), static_cast<long long>(test.sizes[C]),
               static_cast<long long>(test.sizes[H]), static_cast<long long>(test.sizes[W]),
               what.c_str());
}

// The mean, and what is divided by, of some channels of an image.
struct Moments {
  long double mean, width;
};
Moments moments_of(const Case& test, const uint8_t* image, int64_t first, int64_t last) {
  const Four& s = test.image_strides;
  long double sum = 0, squares = 0;
  const auto n = static_cast<long double>((last - first) * test.sizes[H] * test.sizes[W]);
  const auto visit = [&](auto body) {
    for (int64_t c = first; c < last; ++c)
      for (int64_t h = 0; h < test.sizes[H]; ++h)
        for (int64_t w = 0; w < test.sizes[W]; ++w) {
          body(static_cast<long double>(image[c * s[C] + h * s[H] + w * s[W]]));
        }
  };
  visit([&](long double x) { sum += x; });
  const long double mean = sum / n;
  visit([&](long double x) { squares += (x - mean) * (x - mean); });
  const long double floor = test.floor > 0 ? static_cast<long double>(test.floor) : 1 / sqrtl(n);
  return {mean, std::max(sqrtl(squares / n), floor)};
}

StandardizeArgs args_of(const Case& test, const uint8_t* images, uint8_t* output) {
  StandardizeArgs args{};
  args.images = images;
  args.output = output;
  std::copy(test.sizes.begin(), test.sizes.end(), args.sizes);
  std::copy(test.image_strides.begin(), test.image_strides.end(), args.image_strides);
  std::copy(test.output_strides.begin(), test.output_strides.end(), args.output_strides);
  args.dtype = test.type;
  args.per_channel = test.per_channel;
  args.floor = test.floor;
  return args;
}

// Whether the emulated device can take it in one pass.
bool fits(const StandardizeArgs& args) {
  auto way = StandardizeWay::one_pass;
  return pixfuse::choose_standardize_way(args, way) == cudaSuccess;
}

void check_one_way(const Case& test, StandardizeArgs args) {
  const uint8_t* images = args.images;
  auto* output = static_cast<uint8_t*>(args.output);
  ++calls;
  in_one_pass += args.sums == nullptr;
  const int error = pixfuse::standardize_per_image_cuda(args, nullptr);
  if (error != 0) return fail(test, "CUDA error " + std::to_string(error));
  const int64_t bytes = pixfuse::element_bytes(test.type);
  int64_t wrong = 0;
  for (int64_t n = 0; n < test.sizes[N]; ++n) {
    const uint8_t* image = images + n * test.image_strides[N];
    Moments m{};
    for (int64_t c = 0; c < test.sizes[C]; ++c) {
      if (test.per_channel || c == 0) {
        m = moments_of(test, image, c, test.per_channel ? c + 1 : test.sizes[C]);
      }
      for (int64_t h = 0; h < test.sizes[H]; ++h)
        for (int64_t w = 0; w < test.sizes[W]; ++w) {
          const long double x = image[offset_of(test.image_strides, 0, c, h, w)];
          const auto value = static_cast<float>((x - m.mean) / m.width);
          uint32_t stored = 0;
          std::memcpy(&stored, output + offset_of(test.output_strides, n, c, h, w) * bytes,
                      static_cast<size_t>(bytes));
          wrong += stored != bits_of(value, test.type);
        }
    }
  }
  if (wrong != 0) {
    fail(test, std::to_string(wrong) + " elements differ" + (args.sums ? "" : ", in one pass"));
  }
}

void check(const Case& test, const uint8_t* images, uint8_t* output) {
  StandardizeArgs args = args_of(test, images, output);
  if (fits(args)) check_one_way(test, args);
  const auto bytes =
      static_cast<size_t>(extent(test.sizes, test.output_strides)) * element_bytes(test.type);
  if (bytes < 1 << 20) std::memset(output, 0xff, bytes);  // nothing of the first way is left
  std::vector<int64_t> sums(static_cast<size_t>(test.sizes[N] * test.sizes[C])), squares = sums;
  args.sums = sums.data();
  args.squares = squares.data();
  check_one_way(test, args);
}

void check(const Case& test) {
  if (!is_in_share()) return;
  const auto in = static_cast<size_t>(extent(test.sizes, test.image_strides));
  const auto out = static_cast<size_t>(extent(test.sizes, test.output_strides) *
                                       pixfuse::element_bytes(test.type));
  auto* images = static_cast<uint8_t*>(std::malloc(in));
  auto* output = static_cast<uint8_t*>(std::malloc(out));
  static uint32_t state = 1;
  const bool flat = calls % 5 == 0;  // where the floor decides
  for (size_t i = 0; i < in; ++i) {
    state = state * 1664525u + 1013904223u;
    images[i] = static_cast<uint8_t>(flat ? 200 : state >> 24);
  }
  if (flat && in > 3) images[3] = 201;
  check(test, images, output);
  std::free(images);
  std::free(output);
}

void test_sizes(const std::vector<int64_t>& widths, const std::vector<int64_t>& channel_counts) {
  size_t turn = 0;
  for (const int64_t w : widths)
    for (const int64_t c : channel_counts)
      for (const int64_t n : {0, 1, 3})
        for (const bool per_channel : {false, true}) {
          const Four s = {n, c, 3, w};
          const Four inputs[] = {
              planar(s),
              interleaved(s),
              planar(s, 5),
              {0, 3 * w, w, 1},                              // one image, repeated
              {1, n * 3 * w, n * w, n},                      // images by turns
              {3 * w * (c + 1) + 7, 1, w * (c + 1), c + 1},  // some of the channels
              {3 * w, 0, w, 1},                              // one channel, repeated
          };
          for (const Four& input : inputs)
            for (const Four& output : {planar(s), interleaved(s)}) {
              constexpr double kFloors[] = {0.0, 0.25, 90.0};
              check({"sizes", s, input, output, kTypes[turn % 3], per_channel,
                     kFloors[turn / 3 % 3]});
              ++turn;
            }
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
      Case test{
          "far", s,  planar(s), far_output ? planar(s) : interleaved(s), ElementType::bfloat16,
          true,  0.0};
      (far_output ? test.output_strides : test.image_strides)[d] = far;
      const int64_t in = extent(s, test.image_strides), out = extent(s, test.output_strides) * 2;
      uint8_t *images = reserve(in), *output = reserve(out);
      for (int64_t i = 0; i < 160; ++i) {
        images[offset_of(test.image_strides, i / 80, i / 40 % 2, i / 20 % 2, i % 20)] =
            static_cast<uint8_t>(i * i);
      }
      check(test, images, output);
      munmap(images, static_cast<size_t>(in));
      munmap(output, static_cast<size_t>(out));
    }
}

// One value off the mean of millions: what a double drops of the mean then shows in the result.
void test_large() {
  for (const int64_t width : {6000011, 8000009}) {
    const Four s = {1, 1, 1, width};
    const Case test{"large", s, planar(s), planar(s), ElementType::float32, false, 0.0};
    std::vector<uint8_t> images(static_cast<size_t>(width), 201);
    std::vector<uint8_t> output(images.size() * 4);
    images[5] = 202;
    check(test, images.data(), output.data());
  }
}

// What a block of the kernel declares: its sums of 32 warps and its constants of 32 channels.
constexpr int64_t kDeclaredBytes = 32 * 2 * 8 + 32 * 3 * 8;

void expect(bool right, const Case& test, const char* what) {
  ++calls;
  if (!right) fail(test, what);
}

// Of the layouts that have one run, with the shared memory that their bytes need: 30 more, rounded
// down to 16, as a run may start anywhere between two boundaries.
void test_limits() {
  constexpr int64_t kDevices[] = {64 << 10, 99 << 10, 163 << 10, 227 << 10};
  for (const int64_t shared_bytes : kDevices) {
    cuda_on_cpu::device = {shared_bytes, 8};
    constexpr int64_t kTableBytes = 256 * 2;
    const int64_t most = (shared_bytes - kDeclaredBytes - kTableBytes) / 16 * 16 - 16 + 1;
    for (const int64_t values : {most, most + 1}) {
      const Four s = {1, 1, 1, values};
      const Case test{"limit", s, planar(s), planar(s), ElementType::bfloat16, true, 0.0};
      expect(fits(args_of(test, nullptr, nullptr)) == (values == most), test, "what fits");
      check(test);
    }
    // Three planes, of which each fits and all together do not.
    const Four s = {2, 3, 1, most / 2};
    for (const bool per_channel : {false, true})
      for (const bool interleaved_output : {false, true}) {
        const Case test{"planes",
                        s,
                        planar(s),
                        interleaved_output ? interleaved(s) : planar(s),
                        ElementType::float16,
                        per_channel,
                        0.0};
        expect(fits(args_of(test, nullptr, nullptr)) == (per_channel && !interleaved_output), test,
               "which planes fit");
        check(test);
      }
  }
  // As many channels as a block has constants for, and one more, unless each is a plane.
  cuda_on_cpu::device = {227 << 10, 8};
  for (const int64_t channels : {32, 33}) {
    for (const bool per_channel : {false, true}) {
      const Four s = {1, channels, 3, 5};
      const Case test{"channels", s, planar(s), planar(s), ElementType::float32, per_channel, 0.0};
      expect(fits(args_of(test, nullptr, nullptr)) == (channels == 32 || per_channel), test,
             "how many channels fit");
      check(test);
    }
  }
  // The rule: a large image for every fourth multiprocessor; small ones in any number.
  for (const int64_t multiprocessors : {1, 8, 9, 132})
    for (const int64_t images : {1, 2, 3, 33})
      for (const int64_t values : {31 * 1024 - 15, 31 * 1024, 300'000}) {
        cuda_on_cpu::device = {227 << 10, multiprocessors};
        const Four s = {images, 1, 1, values};
        const Case test{"rule", s, planar(s), planar(s), ElementType::float32, false, 0.0};
        auto way = StandardizeWay::by_rule;
        const StandardizeArgs args = args_of(test, nullptr, nullptr);
        expect(pixfuse::choose_standardize_way(args, way) == cudaSuccess, test, "the rule fails");
        const bool fits_memory = values < 227 << 10, is_small = values < 31 * 1024;
        const bool wanted = fits_memory && (is_small || 4 * images >= multiprocessors);
        expect((way == StandardizeWay::one_pass) == wanted, test, "what the rule says");
        way = StandardizeWay::two_kernels;
        expect(pixfuse::choose_standardize_way(args, way) == cudaSuccess &&
                   way == StandardizeWay::two_kernels,
               test, "two kernels are always possible");
      }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view which = argc == 2 ? argv[1] : "";
  cuda_on_cpu::device = {227 << 10, 132};
  if (which == "shapes") {
    test_sizes({0, 1, 2, 7, 16, 17, 85, 257}, {1, 2, 3, 4, 33});
    test_sizes({1500}, {1, 3});  // several blocks of threads to an image, or many
    test_sizes({5000}, {3});     // a block with as many threads as there can be
  } else if (which == "far") {
    test_far();
  } else if (which == "large") {
    test_large();
  } else if (which == "limits") {
    test_limits();
  } else if (which == "few") {
    test_sizes({1, 17}, {1, 3, 33});
    test_sizes({1500}, {3});
  } else {
    std::fprintf(stderr, "usage: test_standardize_per_image shapes|far|large|limits|few\n");
    return 2;
  }
  std::printf("%lld calls, %lld in one pass, %lld wrong\n", static_cast<long long>(calls),
              static_cast<long long>(in_one_pass), static_cast<long long>(failures));
  return failures == 0 ? 0 : 1;
}
