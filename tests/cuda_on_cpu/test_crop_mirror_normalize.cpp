// The CUDA kernel of `crop_mirror_normalize` against plain scalar arithmetic, over exactly sized
// buffers. What is expected follows from the images, the windows and the mirrors of a case; the
// addresses and strides that the kernel is given are made from the same, in another way.
//
//   test_crop_mirror_normalize values     every byte value, type, rounding and layout
//   test_crop_mirror_normalize shapes     windows, sizes, alignments, large batches
//   test_crop_mirror_normalize far        strides beyond 2^32, in memory that is mostly not there
//   test_crop_mirror_normalize few        a little of the first two, for the race checker
#include <array>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "crop_mirror_normalize/crop_mirror_normalize.h"
#include "normalize/normalize_constants.h"
#include "pixel_values.h"
#include "share.h"

namespace {

using pixfuse::CropMirrorNormalizeArgs;
using pixfuse::PlacedImage;

constexpr ElementType kTypes[] = {ElementType::float32, ElementType::float16, ElementType::bfloat16,
                                  ElementType::uint8};

// --- Images ---

// How an image lies in memory: bytes from one row, pixel and channel to the next.
struct Strides {
  int64_t row, pixel, channel;
};
struct Layout {
  const char* name;
  Strides (*strides)(int64_t channels, int64_t height, int64_t width);
};
constexpr Layout kLayouts[] = {
    {"planar", [](int64_t, int64_t h, int64_t w) { return Strides{w, 1, h * w}; }},
    {"interleaved", [](int64_t c, int64_t, int64_t w) { return Strides{w * c, c, 1}; }},
    {"one more byte per pixel",
     [](int64_t c, int64_t, int64_t w) { return Strides{w * (c + 1), c + 1, 1}; }},
    {"channels backwards", [](int64_t c, int64_t, int64_t w) { return Strides{w * c, c, -1}; }},
    {"one channel repeated", [](int64_t, int64_t, int64_t w) { return Strides{w, 1, 0}; }},
    {"one channel of many repeated",
     [](int64_t c, int64_t, int64_t w) { return Strides{w * (c + 1), c + 1, 0}; }},
    {"padded rows", [](int64_t, int64_t h, int64_t w) { return Strides{w + 5, 1, h * (w + 5)}; }},
    {"padded rows of pixels",
     [](int64_t c, int64_t, int64_t w) { return Strides{w * c + 7, c, 1}; }},
    {"planes backwards", [](int64_t, int64_t h, int64_t w) { return Strides{w, 1, -h * w}; }},
    {"upside down", [](int64_t c, int64_t, int64_t w) { return Strides{-w * c, c, 1}; }},
    {"right to left", [](int64_t c, int64_t, int64_t w) { return Strides{w * c, -c, 1}; }},
    {"transposed", [](int64_t c, int64_t h, int64_t) { return Strides{c, h * c, 1}; }},
    {"every second pixel",
     [](int64_t, int64_t h, int64_t w) { return Strides{4 * w, 2, 2 * h * 2 * w}; }},
    {"many more bytes per pixel",
     [](int64_t c, int64_t, int64_t w) { return Strides{w * (c + 9), c + 9, 1}; }},
    {"rows of planes", [](int64_t c, int64_t, int64_t w) { return Strides{w * c, 1, w}; }},
    {"same row", [](int64_t, int64_t, int64_t w) { return Strides{0, 1, w}; }},
};
constexpr int kLayoutCount = static_cast<int>(std::size(kLayouts));

struct Image {
  int layout = 0;
  int64_t height, width;
  int64_t top = 0, left = 0;  // of the window
  bool mirror = false, flip = false;
  int offset_bytes = 0;  // of its memory, from a 16-byte boundary
};

struct Case {
  std::string name;
  int64_t channels, height, width;  // of the output
  std::vector<Image> images;
  ElementType type = ElementType::float32;
  Rounding rounding = Rounding::torchvision;
  bool channels_last = false;
  bool mask = true;
  int output_offset_elements = 0;
  int mask_offset_bytes = 0;
};

// The memory of one image, and the address of its pixel 0, channel 0.
struct Pixels {
  std::unique_ptr<Buffer> buffer;
  uint8_t* origin = nullptr;
  Strides strides{};
  int64_t bytes = 0;

  uint8_t* at(int64_t c, int64_t h, int64_t w) const {
    return origin + h * strides.row + w * strides.pixel + c * strides.channel;
  }
};

Pixels make_pixels(const Case& test, const Image& image, int64_t number) {
  Pixels pixels;
  pixels.strides = kLayouts[image.layout].strides(test.channels, image.height, image.width);
  int64_t lowest = 0, highest = 0;
  for (const auto& [size, stride] :
       {std::pair{image.height, pixels.strides.row}, std::pair{image.width, pixels.strides.pixel},
        std::pair{test.channels, pixels.strides.channel}}) {
    (stride < 0 ? lowest : highest) += (size - 1) * stride;
  }
  pixels.bytes = highest - lowest + 1;
  pixels.buffer = std::make_unique<Buffer>(pixels.bytes, image.offset_bytes, 0xa5);
  pixels.origin = pixels.buffer->data() - lowest;
  for (int64_t c = 0; c < test.channels; ++c) {
    for (int64_t h = 0; h < image.height; ++h) {
      for (int64_t w = 0; w < image.width; ++w) {
        const int64_t pixel = h * image.width + w;
        *pixels.at(c, h, w) = static_cast<uint8_t>(pixel * 89 + c * 37 + number * 11);
      }
    }
  }
  return pixels;
}

// What the window shows of one axis of an image: the first of its `size` places that is inside, how
// many are, and the image's coordinate there. `backwards` when the window is mirrored.
struct Covered {
  int64_t first, count, from;
};
Covered cover(int64_t image_size, int64_t window, int64_t size, bool backwards) {
  const int64_t begin = std::max<int64_t>(window, 0);
  const int64_t end = std::min(window + size, image_size);
  if (begin >= end) return {0, 0, 0};
  if (backwards) return {window + size - end, end - begin, end - 1};
  return {begin - window, end - begin, begin};
}

PlacedImage place(const Case& test, const Image& image, const Pixels& pixels) {
  const Covered rows = cover(image.height, image.top, test.height, image.flip);
  const Covered columns = cover(image.width, image.left, test.width, image.mirror);
  if (rows.count == 0 || columns.count == 0) return {};
  const Strides& s = pixels.strides;
  return {pixels.at(0, rows.from, columns.from), image.flip ? -s.row : s.row,
          image.mirror ? -s.pixel : s.pixel,     s.channel,
          static_cast<int32_t>(rows.first),      static_cast<int32_t>(columns.first),
          static_cast<int32_t>(rows.count),      static_cast<int32_t>(columns.count)};
}

// --- One call ---

float fill_of(ElementType type, int64_t channel) {
  if (type == ElementType::uint8) return static_cast<float>((channel * 83 + 7) % 256);
  return 0.3f - 0.71f * static_cast<float>(channel);
}

std::array<int64_t, 4> strides_of(const Case& test) {
  const int64_t c = test.channels, h = test.height, w = test.width;
  if (test.channels_last) return {c * h * w, 1, w * c, c};
  return {c * h * w, h * w, w, 1};
}

int64_t calls = 0;
int64_t failures = 0;

void fail(const Case& test, const std::string& what) {
  constexpr int64_t kMostShown = 10;
  // Enough is known then, and the mistakes planted in kernels take less time.
  if (++failures > kMostShown) std::exit(1);
  const char* const types[] = {"float32", "float16", "bfloat16", "uint8"};
  std::fprintf(
      stderr,
      "wrong value: %s, rounding %d, %s%s, %zu images to %lld x %lld x %lld, offsets %d %d: "
      "%s\n",
      test.name.c_str(), static_cast<int>(test.rounding), types[static_cast<int>(test.type)],
      test.channels_last ? " channels-last" : "", test.images.size(),
      static_cast<long long>(test.channels), static_cast<long long>(test.height),
      static_cast<long long>(test.width), test.output_offset_elements, test.mask_offset_bytes,
      what.c_str());
}

int call(const Case& test, const std::vector<PlacedImage>& placed,
         const std::array<int64_t, 4>& strides, void* output, uint8_t* mask) {
  std::vector<double> mean, std;
  std::vector<float> fill;
  for (int64_t c = 0; c < test.channels; ++c) {
    mean.push_back(mean_of(c));
    std.push_back(std_of(c));
    fill.push_back(fill_of(test.type, c));
  }
  std::vector<pixfuse::ChannelConstants> channels(mean.size());
  pixfuse::NormalizeArgs constants{};
  pixfuse::set_rounding(constants, channels.data(), mean.data(), std.data(), test.channels,
                        test.rounding);
  CropMirrorNormalizeArgs args{};
  args.images = placed.data();
  const int64_t sizes[4] = {static_cast<int64_t>(placed.size()), test.channels, test.height,
                            test.width};
  std::copy_n(sizes, 4, args.sizes);
  std::copy_n(strides.begin(), 4, args.output_strides);
  args.output = output;
  args.mask = mask;
  args.dtype = test.type;
  args.arithmetic = constants.arithmetic;
  args.scale = constants.scale;
  args.channels = channels.data();
  args.fill = fill.data();
  ++calls;
  return pixfuse::crop_mirror_normalize_cuda(args, nullptr);
}

// Expected bits of every byte value in every channel.
const std::vector<uint32_t>& expected_table(const Case& test) {
  static std::map<std::pair<Rounding, ElementType>, std::vector<uint32_t>> tables;
  std::vector<uint32_t>& table = tables[{test.rounding, test.type}];
  for (auto c = static_cast<int64_t>(table.size() / 256); c < test.channels; ++c) {
    for (int byte = 0; byte < 256; ++byte) {
      table.push_back(expected_bits(static_cast<uint8_t>(byte), c, test.rounding, test.type));
    }
  }
  return table;
}

// Compares the whole output and the whole mask.
void compare(const Case& test, const std::vector<Pixels>& memory,
             const std::array<int64_t, 4>& strides, const uint8_t* output, const uint8_t* mask) {
  const auto& expected = expected_table(test);
  const int64_t element_bytes = pixfuse::element_bytes(test.type);
  std::vector<uint32_t> fill;
  for (int64_t c = 0; c < test.channels; ++c) {
    fill.push_back(bits_as(test.type, fill_of(test.type, c)));
  }
  int64_t wrong = 0, wrong_mask = 0;
  for (size_t n = 0; n < memory.size(); ++n) {
    const Image& image = test.images[n];
    for (int64_t y = 0; y < test.height; ++y) {
      for (int64_t x = 0; x < test.width; ++x) {
        const int64_t h = image.top + (image.flip ? test.height - 1 - y : y);
        const int64_t w = image.left + (image.mirror ? test.width - 1 - x : x);
        const bool inside = h >= 0 && h < image.height && w >= 0 && w < image.width;
        const int64_t pixel = (static_cast<int64_t>(n) * test.height + y) * test.width + x;
        if (mask != nullptr) wrong_mask += mask[pixel] != static_cast<uint8_t>(inside);
        for (int64_t c = 0; c < test.channels; ++c) {
          const int64_t element = static_cast<int64_t>(n) * strides[0] + c * strides[1] +
                                  y * strides[2] + x * strides[3];
          const auto channel = static_cast<size_t>(c);
          const uint32_t wanted =
              inside ? expected[channel * 256 + *memory[n].at(c, h, w)] : fill[channel];
          wrong += element_bits(output, element, element_bytes) != wanted;
        }
      }
    }
  }
  if (wrong != 0) fail(test, std::to_string(wrong) + " elements differ");
  if (wrong_mask != 0) fail(test, std::to_string(wrong_mask) + " elements of the mask differ");
}

void check(const Case& test) {
  if (!is_in_share()) return;
  constexpr uint8_t kUntouched = 0x6e;
#if defined(CUDA_ON_CPU_ADDRESS_SANITIZER)
  constexpr int64_t kGuardBytes = 0;  // the sanitizer guards the end
#else
  constexpr int64_t kGuardBytes = 64;
#endif
  const int64_t element_bytes = pixfuse::element_bytes(test.type);
  const int64_t pixels = static_cast<int64_t>(test.images.size()) * test.height * test.width;
  const int64_t output_bytes = pixels * test.channels * element_bytes;
  Buffer output(output_bytes + kGuardBytes, test.output_offset_elements * element_bytes,
                kUntouched);
  Buffer mask(pixels + kGuardBytes, test.mask_offset_bytes, kUntouched);
  std::vector<Pixels> memory;
  std::vector<PlacedImage> placed;
  for (const Image& image : test.images) {
    memory.push_back(make_pixels(test, image, static_cast<int64_t>(memory.size())));
    placed.push_back(place(test, image, memory.back()));
  }
  const auto strides = strides_of(test);
  const int error = call(test, placed, strides, output.data(), test.mask ? mask.data() : nullptr);
  if (error != 0) return fail(test, "CUDA error " + std::to_string(error));
  compare(test, memory, strides, output.data(), test.mask ? mask.data() : nullptr);
  const auto touched = [&](const uint8_t* begin, const uint8_t* end) {
    return std::any_of(begin, end, [](uint8_t byte) { return byte != kUntouched; });
  };
  const uint8_t* const past_output = output.data() + output_bytes;
  const uint8_t* const past_mask = mask.data() + (test.mask ? pixels : 0);
  if (touched(past_output, past_output + kGuardBytes)) fail(test, "the end was written over");
  if (touched(past_mask, mask.data() + pixels + kGuardBytes)) {
    fail(test, "the mask's end was written over");
  }
}

// --- Tests ---

void test_values(const std::vector<int64_t>& channel_counts, bool every_layout) {
  for (const int64_t channels : channel_counts) {
    for (int layout = 0; layout < (every_layout ? kLayoutCount : 4); ++layout) {
      for (const bool channels_last : {false, true}) {
        for (const ElementType type : kTypes) {
          for (const Rounding rounding : kRoundings) {
            Case test{kLayouts[layout].name, channels, 16, 16, {}, type, rounding, channels_last};
            test.images = {{layout, 16, 16}, {layout, 16, 16, 0, 0, true, true}};
            check(test);
            if (type == ElementType::uint8) break;  // no rounding there
          }
        }
      }
    }
  }
}

// Batches of images of all kinds together, made up.
class Chance {
 public:
  explicit Chance(unsigned seed) : random_(seed) {}
  int64_t from(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(random_() % static_cast<uint64_t>(high - low + 1));
  }
  bool coin() { return from(0, 1) == 1; }

 private:
  std::mt19937 random_;
};

Case made_up(Chance& chance, int64_t count, int64_t channels, int64_t height, int64_t width) {
  Case test{"made up", channels, height, width, {}};
  test.type = kTypes[chance.from(0, 3)];
  test.rounding = kRoundings[chance.from(0, 4)];
  test.channels_last = chance.coin();
  test.mask = chance.from(0, 3) != 0;
  test.output_offset_elements =
      static_cast<int>(chance.from(0, 16 / pixfuse::element_bytes(test.type) - 1));
  test.mask_offset_bytes = static_cast<int>(chance.from(0, 15));
  for (int64_t n = 0; n < count; ++n) {
    Image image{};
    image.layout = static_cast<int>(chance.from(0, kLayoutCount - 1));
    image.height = chance.from(1, height + 9);
    image.width = chance.from(1, width + 9);
    // Mostly a crop where the image is large enough, else wherever.
    const bool anywhere = chance.from(0, 3) == 0;
    const auto window = [&](int64_t image_size, int64_t size) {
      if (anywhere) return chance.from(-size - 1, image_size + 1);
      const int64_t slack = image_size - size;
      return slack >= 0 ? chance.from(0, slack) : chance.from(slack, 0);
    };
    image.top = window(image.height, height);
    image.left = window(image.width, width);
    image.mirror = chance.coin();
    image.flip = chance.coin();
    image.offset_bytes = static_cast<int>(chance.from(0, 15));
    test.images.push_back(image);
  }
  return test;
}

void test_made_up(int rounds) {
  Chance chance(1);
  for (int round = 0; round < rounds; ++round) {
    for (const int64_t width : {1, 2, 5, 8, 15, 16, 17, 31, 33, 64, 65, 130}) {
      for (const int64_t channels : {1, 2, 3, 4, 7}) {
        check(made_up(chance, chance.from(1, 4), channels, chance.from(1, 9), width));
      }
    }
  }
}

// Several blocks of threads to a row, and to an image.
void test_wide(const std::vector<int64_t>& widths, const std::vector<int64_t>& heights) {
  Chance chance(2);
  for (const int64_t width : widths) {
    for (const int64_t height : heights) {
      for (const int64_t channels : {1, 3, 4}) {
        check(made_up(chance, 3, channels, height, width));
      }
    }
  }
}

// More channels than one launch takes.
void test_many_channels() {
  Chance chance(3);
  for (const int64_t channels : {31, 32, 33, 65}) {
    for (const int64_t width : {3, 16, 150}) {
      check(made_up(chance, 2, channels, 5, width));
      check(made_up(chance, 2, channels, 5, width));
    }
  }
}

// Around what the parameters of one launch hold.
void test_many_images(const std::vector<int64_t>& counts) {
  Chance chance(4);
  for (const int64_t count : counts) {
    Case test = made_up(chance, count, chance.from(1, 3), chance.from(2, 4), chance.from(3, 20));
    test.mask = true;
    check(test);
  }
}

// Whole images without gaps are taken as one long row each: also where that makes chunks full.
void test_whole_images() {
  for (int layout = 0; layout < kLayoutCount; ++layout) {
    for (const bool channels_last : {false, true}) {
      for (const auto& [height, width] : {std::pair{7, 23}, {64, 31}, {1, 5}, {5, 1}, {0, 3}}) {
        Case test{kLayouts[layout].name, 3, height, width, {}};
        test.channels_last = channels_last;
        if (height > 0) test.images = {{layout, height, width}, {layout, height, width}};
        for (const bool change : {false, true}) {
          if (height > 0) test.images.back().flip = change;
          check(test);
        }
      }
    }
  }
}

// Every start of the image, the output and the mask within 16 bytes, read both ways.
void test_alignment() {
  for (int layout = 0; layout < 5; ++layout) {
    for (const ElementType type : kTypes) {
      for (int offset = 0; offset < 16; ++offset) {
        for (int output = 0; output < 16 / pixfuse::element_bytes(type); ++output) {
          if (type != ElementType::float32 && (offset + output) % 3 != 0) continue;
          Case test{kLayouts[layout].name, 3, 3, 53, {}, type};
          const bool mirror = (offset + output / 3) % 2 == 1;
          test.images = {{layout, 5, 60, 1, output % 7, mirror, false, offset}};
          test.channels_last = (offset / 2 + output) % 2 == 1;
          test.output_offset_elements = output;
          test.mask_offset_bytes = (offset * 7 + output) % 16;
          check(test);
        }
      }
    }
  }
}

// A window at every place around an image: it leaves it on each side, and altogether.
void test_windows() {
  for (const int layout : {0, 1, 2, 4, 13}) {
    for (int64_t top = -7; top <= 6; ++top) {
      for (const int64_t left : {-41, -40, -39, -33, -17, -16, -1, 0, 1, 5, 8, 20, 24, 25, 30}) {
        Case test{kLayouts[layout].name, 3, 6, 40, {}};
        test.images = {{layout, 5, 25, top, left, left % 2 != 0, top % 2 != 0}};
        test.type = kTypes[static_cast<size_t>(top + 7 + left + 41) % 4];
        test.channels_last = (top + left) % 2 == 0;
        check(test);
      }
    }
  }
}

// --- Far strides ---

// One stride at a time steps over more than 2^32 bytes of an image, or elements of the output.
void test_far() {
  const int64_t far = (int64_t{1} << 32) + 48;
  struct Far {
    const char* name;
    Strides image;
    std::array<int64_t, 4> output;
  };
  const Strides pixels{60, 3, 1};
  const std::array<int64_t, 4> dense{120, 40, 20, 1};
  const Far cases[] = {
      {"far rows", {far, 3, 1}, dense},
      {"far pixels", {60, far, 1}, dense},
      {"far channels", {20, 1, far}, dense},
      {"far rows backwards", {-far, 3, 1}, dense},
      {"far images of the output", pixels, {far, 40, 20, 1}},
      {"far channels of the output", pixels, {120, far, 20, 1}},
      {"far rows of the output", pixels, {120, 40, far, 1}},
  };
  for (const Far& layout : cases) {
    for (const ElementType type : kTypes) {
      Case test{layout.name, 3, 2, 20, {{0, 2, 20}, {0, 2, 20, 0, 0, true, true}}, type};
      const int64_t image_bytes = 24 * far, output_bytes = 4 * far * pixfuse::element_bytes(type);
      uint8_t* images = reserve(image_bytes);
      uint8_t* output = reserve(output_bytes);
      std::vector<Pixels> memory(2);
      std::vector<PlacedImage> placed;
      for (size_t n = 0; n < 2; ++n) {
        memory[n].origin =
            images + static_cast<int64_t>(n) * 1000 + (layout.image.row < 0 ? 2 * far : 0);
        memory[n].strides = layout.image;
        for (int64_t i = 0; i < 3 * 2 * 20; ++i) {
          *memory[n].at(i % 3, i / 60, i / 3 % 20) =
              static_cast<uint8_t>(i * 89 + static_cast<int64_t>(n) * 11);
        }
        placed.push_back(place(test, test.images[n], memory[n]));
      }
      const int error = call(test, placed, layout.output, output, nullptr);
      if (error != 0) fail(test, "CUDA error " + std::to_string(error));
      compare(test, memory, layout.output, output, nullptr);
      munmap(images, static_cast<size_t>(image_bytes));
      munmap(output, static_cast<size_t>(output_bytes));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view which = argc == 2 ? argv[1] : "";
  if (which == "values") {
    test_values({1, 3, 4}, true);
    test_values({2, 5, 8}, false);
  } else if (which == "shapes") {
    test_made_up(6);
    test_wide({1360, 1361, 2100, 5003}, {1, 3});
    test_wide({64, 224}, {64, 223});
    test_many_channels();
    test_many_images({0, 1, 255, 256, 257, 600});
    test_whole_images();
    test_alignment();
    test_windows();
  } else if (which == "far") {
    test_far();
  } else if (which == "few") {
    test_values({3}, false);
    test_made_up(1);
    test_wide({2100}, {2});
    test_many_images({257});
  } else {
    std::fprintf(stderr, "usage: test_crop_mirror_normalize values|shapes|far|few\n");
    return 2;
  }
  std::printf("%lld calls, %lld wrong\n", static_cast<long long>(calls),
              static_cast<long long>(failures));
  return failures == 0 ? 0 : 1;
}
