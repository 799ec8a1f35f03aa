// The CUDA kernels of `normalize` against plain scalar arithmetic, over exactly sized buffers.
//
//   test_normalize values   every byte value, channel count, rounding, float type and layout
//   test_normalize shapes   sizes, strides and alignments
//   test_normalize far      offsets beyond 2^32 elements, in memory that is mostly not there
//   test_normalize large    more than 2^31 elements, dense
//   test_normalize few      a little of the first two, for the race checker
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "normalize/normalize_constants.h"
#include "pixel_values.h"
#include "share.h"

namespace {

using pixfuse::NormalizeArgs;

constexpr int N = 0, C = 1, H = 2, W = 3;
using Four = std::array<int64_t, 4>;  // sizes or strides

// --- One call ---

struct Case {
  std::string name;
  Four sizes;
  Four image_strides;
  Four output_strides;
  ElementType type = ElementType::float32;
  Rounding rounding = Rounding::torchvision;
  int image_offset_bytes = 0;      // from a 16-byte boundary
  int output_offset_elements = 0;  // from a 16-byte boundary
};

int64_t extent(const Four& sizes, const Four& strides) {
  int64_t last = 0;
  for (int d = 0; d < 4; ++d) {
    if (sizes[d] == 0) return 0;
    if (sizes[d] > 1) last += (sizes[d] - 1) * strides[d];
  }
  return last + 1;
}

template <class Body>
void for_each_element(const Four& sizes, Body body) {
  for (int64_t n = 0; n < sizes[N]; ++n) {
    for (int64_t c = 0; c < sizes[C]; ++c) {
      for (int64_t h = 0; h < sizes[H]; ++h) {
        for (int64_t w = 0; w < sizes[W]; ++w) body(n, c, h, w);
      }
    }
  }
}

int64_t offset_of(const Four& strides, int64_t n, int64_t c, int64_t h, int64_t w) {
  return n * strides[N] + c * strides[C] + h * strides[H] + w * strides[W];
}

// Rows of `row_gap` more elements than the pixels need.
Four planar(const Four& sizes, int64_t row_gap = 0) {
  const int64_t row = sizes[W] + row_gap;
  return {sizes[C] * sizes[H] * row, sizes[H] * row, row, 1};
}

int64_t calls = 0;
int64_t failures = 0;

void fail(const Case& test, const std::string& what) {
  constexpr int64_t kMostShown = 10;
  // Enough is known then, and the mistakes planted in kernels take less time.
  if (++failures > kMostShown) std::exit(1);
  const char* const types[] = {"float32", "float16", "bfloat16"};
  std::fprintf(stderr, "wrong value: %s, rounding %d, %s, sizes", test.name.c_str(),
               static_cast<int>(test.rounding), types[static_cast<int>(test.type)]);
  for (int64_t size : test.sizes) std::fprintf(stderr, " %lld", static_cast<long long>(size));
  std::fprintf(stderr, ", image offset %d, output offset %d: %s\n", test.image_offset_bytes,
               test.output_offset_elements, what.c_str());
}

// Expected bits of every byte value in every channel.
const std::vector<uint32_t>& expected_table(const Case& test) {
  static std::map<std::pair<Rounding, ElementType>, std::vector<uint32_t>> tables;
  std::vector<uint32_t>& table = tables[{test.rounding, test.type}];
  for (auto c = static_cast<int64_t>(table.size() / 256); c < test.sizes[C]; ++c) {
    for (int byte = 0; byte < 256; ++byte) {
      table.push_back(expected_bits(static_cast<uint8_t>(byte), c, test.rounding, test.type));
    }
  }
  return table;
}

int call_normalize(const Case& test, const uint8_t* images, void* output) {
  NormalizeArgs args{};
  args.images = images;
  args.output = output;
  std::copy(test.sizes.begin(), test.sizes.end(), args.sizes);
  std::copy(test.image_strides.begin(), test.image_strides.end(), args.image_strides);
  std::copy(test.output_strides.begin(), test.output_strides.end(), args.output_strides);
  args.dtype = test.type;
  std::vector<double> mean, std;
  for (int64_t c = 0; c < test.sizes[C]; ++c) {
    mean.push_back(mean_of(c));
    std.push_back(std_of(c));
  }
  std::vector<pixfuse::ChannelConstants> channels(mean.size());
  pixfuse::set_rounding(args, channels.data(), mean.data(), std.data(), test.sizes[C],
                        test.rounding);
  ++calls;
  return pixfuse::normalize_cuda(args, nullptr);
}

// Over 256 neighbours every byte value appears, in each channel in an order of its own.
void fill_images(const Case& test, uint8_t* images) {
  const Four pixels = planar({test.sizes[N], 1, test.sizes[H], test.sizes[W]});
  for_each_element(test.sizes, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    const int64_t pixel = offset_of(pixels, n, 0, h, w);
    images[offset_of(test.image_strides, n, c, h, w)] = static_cast<uint8_t>(pixel * 89 + c * 37);
  });
}

void check(const Case& test) {
  if (!is_in_share()) return;
  // A pattern that no test expects where nothing must be written; as a float it is a large number.
  constexpr uint8_t kUntouched = 0x6e;
  const int64_t element_bytes = pixfuse::element_bytes(test.type);
  const int64_t image_bytes = extent(test.sizes, test.image_strides);
  const int64_t output_elements = extent(test.sizes, test.output_strides);
#if defined(CUDA_ON_CPU_ADDRESS_SANITIZER)
  constexpr int64_t kGuardElements = 0;  // the sanitizer guards the end
#else
  constexpr int64_t kGuardElements = 64;
#endif
  Buffer images(image_bytes, test.image_offset_bytes, 0xa5);
  Buffer output((output_elements + kGuardElements) * element_bytes,
                test.output_offset_elements * element_bytes, kUntouched);
  fill_images(test, images.data());

  const int error = call_normalize(test, images.data(), output.data());
  if (error != 0) return fail(test, "CUDA error " + std::to_string(error));

  const auto& expected = expected_table(test);
  std::vector<bool> written(static_cast<size_t>(output_elements + kGuardElements));
  int64_t wrong = 0;
  for_each_element(test.sizes, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    const int64_t offset = offset_of(test.output_strides, n, c, h, w);
    const uint8_t byte = images.data()[offset_of(test.image_strides, n, c, h, w)];
    written[static_cast<size_t>(offset)] = true;
    wrong += element_bits(output.data(), offset, element_bytes) !=
             expected[static_cast<size_t>(c * 256 + byte)];
  });
  if (wrong != 0) return fail(test, std::to_string(wrong) + " elements differ");

  uint32_t untouched = 0;
  std::memset(&untouched, kUntouched, static_cast<size_t>(element_bytes));
  for (size_t i = 0; i < written.size(); ++i) {
    if (written[i]) continue;
    if (element_bits(output.data(), static_cast<int64_t>(i), element_bytes) == untouched) continue;
    return fail(test, "element " + std::to_string(i) + ", which lies between, was written");
  }
}

// --- Layouts ---

// `pixel_gap` more elements per pixel than there are channels, as in RGBX.
Four interleaved(const Four& sizes, int64_t row_gap = 0, int64_t pixel_gap = 0) {
  const int64_t pixel = sizes[C] + pixel_gap;
  const int64_t row = sizes[W] * pixel + row_gap;
  return {sizes[H] * row, 1, row, pixel};
}

// As a slice that takes every `step`-th row and pixel.
Four stepped(Four strides, int64_t step) {
  strides[H] *= step;
  strides[W] *= step;
  return strides;
}

Four with_stride(Four strides, int dimension, int64_t stride) {
  strides[static_cast<size_t>(dimension)] = stride;
  return strides;
}

struct LayoutPair {
  const char* name;
  Four (*image)(const Four& sizes);
  Four (*output)(const Four& sizes);
};
constexpr auto kPlanar = [](const Four& sizes) { return planar(sizes); };
constexpr auto kInterleaved = [](const Four& sizes) { return interleaved(sizes); };
constexpr LayoutPair kLayouts[] = {
    {"planar to planar", kPlanar, kPlanar},
    {"planar to interleaved", kPlanar, kInterleaved},
    {"interleaved to planar", kInterleaved, kPlanar},
    {"interleaved to interleaved", kInterleaved, kInterleaved},
};
constexpr ElementType kTypes[] = {ElementType::float32, ElementType::float16,
                                  ElementType::bfloat16};

Case make_case(const LayoutPair& layout, const Four& sizes) {
  return {layout.name, sizes, layout.image(sizes), layout.output(sizes)};
}

// `body` changes a case and checks it, for each type and rounding.
template <class Body>
void for_each_type_and_rounding(Case test, Body body) {
  for (const ElementType type : kTypes) {
    for (const Rounding rounding : kRoundings) {
      test.type = type;
      test.rounding = rounding;
      body(test);
    }
  }
}

// --- Tests ---

void test_values(const std::vector<int64_t>& channel_counts) {
  for (const int64_t channels : channel_counts) {
    for (const LayoutPair& layout : kLayouts) {
      for_each_type_and_rounding(make_case(layout, {1, channels, 16, 16}), check);
    }
  }
}

void test_sizes(const std::vector<int64_t>& widths, const std::vector<int64_t>& heights,
                const std::vector<int64_t>& batches, const std::vector<int64_t>& channel_counts) {
  size_t turn = 0;  // types and roundings by turns: the sizes matter here
  for (const int64_t w : widths) {
    for (const int64_t h : heights) {
      for (const int64_t n : batches) {
        for (const int64_t c : channel_counts) {
          for (const LayoutPair& layout : kLayouts) {
            Case test = make_case(layout, {n, c, h, w});
            test.type = kTypes[turn % 3];
            test.rounding = kRoundings[turn / 3 % 5];
            ++turn;
            check(test);
          }
        }
      }
    }
  }
}

// Many channels are launched in parts, and their constants and tables fill shared memory.
void test_many_channels() {
  size_t turn = 0;
  for (const int64_t channels : {20, 28, 31, 32, 33, 63, 64, 65, 130}) {
    for (const LayoutPair& layout : kLayouts) {
      Case test = make_case(layout, {1, channels, 3, 401});
      for (const Rounding rounding : kRoundings) {
        test.rounding = rounding;
        test.type = kTypes[turn++ % 3];
        check(test);
      }
    }
  }
}

// Every start of the input within 16 bytes and of the output within 16 bytes, also of every row.
void test_alignment(const Four& sizes) {
  for (const LayoutPair& layout : kLayouts) {
    for (const ElementType type : kTypes) {
      const int elements = static_cast<int>(16 / pixfuse::element_bytes(type));
      const bool halves = elements == 8;  // the two types of 16 bits take turns
      for (int image_offset = 0; image_offset < 16; ++image_offset) {
        for (int output_offset = 0; output_offset < elements; ++output_offset) {
          if (halves && (image_offset + output_offset + static_cast<int>(type)) % 2) continue;
          Case test = make_case(layout, sizes);
          test.type = type;
          test.image_offset_bytes = image_offset;
          test.output_offset_elements = output_offset;
          check(test);
        }
      }
    }
  }
}

// Inputs of every kind; the output is always dense.
std::vector<Case> strided_cases(const Four& sizes) {
  const Four twice = {sizes[N], sizes[C], 2 * sizes[H], 2 * sizes[W]};
  const Four turned = {sizes[N], sizes[C], sizes[W], sizes[H]};
  const auto transposed = [](Four strides) {
    std::swap(strides[H], strides[W]);
    return strides;
  };
  const Four dense = planar(sizes), pixels = interleaved(sizes);
  const std::pair<const char*, Four> images[] = {
      {"padded rows", planar(sizes, 5)},
      {"padded rows of pixels", interleaved(sizes, 7)},
      {"rows padded to 16 bytes", planar(sizes, 16 - sizes[W] % 16)},
      {"one more byte per pixel", interleaved(sizes, 0, 1)},
      {"one more byte per pixel, padded rows", interleaved(sizes, 3, 1)},
      {"many more bytes per pixel", interleaved(sizes, 0, 9)},
      {"every second pixel", stepped(planar(twice), 2)},
      {"every second interleaved pixel", stepped(interleaved(twice), 2)},
      {"transposed", transposed(planar(turned))},
      {"transposed pixels", transposed(interleaved(turned))},
      {"batch last", {1, sizes[N] * sizes[H] * sizes[W], sizes[N] * sizes[W], sizes[N]}},
      {"rows of planes", {dense[N], sizes[W], sizes[C] * sizes[W], 1}},
      {"same image", with_stride(dense, N, 0)},
      {"same interleaved image", with_stride(pixels, N, 0)},
      {"same channel", with_stride(dense, C, 0)},
      {"same row", with_stride(dense, H, 0)},
      {"same pixel", with_stride(with_stride(dense, H, 0), W, 0)},
      {"sliding windows", with_stride(dense, N, 1)},
  };
  std::vector<Case> cases;
  for (const auto& [name, strides] : images) {
    cases.push_back({std::string(name) + " to planar", sizes, strides, dense});
    cases.push_back({std::string(name) + " to interleaved", sizes, strides, pixels});
  }
  // The stride of a dimension of size 1 means nothing and can be anything.
  for (const int dimension : {N, C, H, W}) {
    Four one = sizes;
    one[static_cast<size_t>(dimension)] = 1;
    for (const LayoutPair& layout : kLayouts) {
      Case test = make_case(layout, one);
      test.image_strides = with_stride(test.image_strides, dimension, int64_t{1} << 40);
      cases.push_back(test);
    }
  }
  return cases;
}

void test_strides(const Four& sizes) {
  size_t turn = 0;
  for (Case test : strided_cases(sizes)) {
    for (const ElementType type : kTypes) {
      test.type = type;
      test.rounding = kRoundings[turn++ % 5];
      check(test);
    }
  }
}

// --- Far offsets and large sizes ---

void check_far(Case test) {
  if (!is_in_share()) return;
  const int64_t element_bytes = pixfuse::element_bytes(test.type);
  const int64_t image_bytes = extent(test.sizes, test.image_strides);
  const int64_t output_bytes = extent(test.sizes, test.output_strides) * element_bytes;
  uint8_t* images = reserve(image_bytes);
  uint8_t* output = reserve(output_bytes);
  fill_images(test, images);
  const int error = call_normalize(test, images, output);
  const auto& expected = expected_table(test);
  int64_t wrong = 0;
  for_each_element(test.sizes, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    const uint8_t byte = images[offset_of(test.image_strides, n, c, h, w)];
    wrong += element_bits(output, offset_of(test.output_strides, n, c, h, w), element_bytes) !=
             expected[static_cast<size_t>(c * 256 + byte)];
  });
  if (error != 0) fail(test, "CUDA error " + std::to_string(error));
  if (wrong != 0) fail(test, std::to_string(wrong) + " elements differ");
  munmap(images, static_cast<size_t>(image_bytes));
  munmap(output, static_cast<size_t>(output_bytes));
}

// One dimension at a time steps over more than 2^32 elements. A dense output could not do so in
// memory that is not there: here its images, channels or rows lie far apart instead.
void test_far() {
  const int64_t far = (int64_t{1} << 32) + 48;
  const Four sizes = {2, 2, 2, 20};
  const Four pixels = interleaved(sizes), dense = planar(sizes);
  for (const ElementType type : kTypes) {
    for (const int dimension : {N, C, H, W}) {
      check_far({"far input", sizes, with_stride(dense, dimension, far), pixels, type});
    }
    for (const int dimension : {N, C, H}) {
      check_far({"far output", sizes, pixels, with_stride(dense, dimension, far), type});
    }
  }
}

// The same pages over and over: as much address space as a large tensor, as little memory as fits
// its period.
uint8_t* reserve_repeated(int64_t bytes, int64_t period) {
  uint8_t* memory = reserve(bytes);
  const int file = memfd_create("period", 0);
  bool mapped = file >= 0 && ftruncate(file, period) == 0;
  for (int64_t start = 0; mapped && start < bytes; start += period) {
    const auto length = static_cast<size_t>(std::min(period, bytes - start));
    mapped = mmap(memory + start, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file,
                  0) != MAP_FAILED;
  }
  if (!mapped) {
    std::perror("test_normalize: cannot map memory repeatedly");
    std::exit(2);
  }
  close(file);
  return memory;
}

// More than 2^31 elements, dense. Input and output repeat, so each result is written many times,
// and one period shows whether every one was right that came last.
void test_large() {
  constexpr int64_t kPeriod = int64_t{1} << 24;  // in elements, a multiple of all 256 values
  const int64_t width = (int64_t{1} << 31) + 4099;
  Case test = make_case(kLayouts[0], {1, 1, 1, width});
  test.type = ElementType::bfloat16;
  const uint8_t* images = reserve_repeated(width, kPeriod);
  uint8_t* output = reserve_repeated(width * 2, kPeriod * 2);
  for (int64_t i = 0; i < kPeriod; ++i)
    const_cast<uint8_t*>(images)[i] = static_cast<uint8_t>(i * 89);
  if (call_normalize(test, images, output) != 0) return fail(test, "CUDA error");
  const auto& expected = expected_table(test);
  int64_t wrong = 0;
  for (int64_t i = 0; i < kPeriod; ++i) {
    wrong += element_bits(output, i, 2) != expected[images[i]];
  }
  if (wrong != 0) fail(test, std::to_string(wrong) + " elements differ");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view which = argc == 2 ? argv[1] : "";
  if (which == "values") {
    test_values({1, 2, 3, 4, 5, 6, 7, 8, 13});
  } else if (which == "shapes") {
    for (const int64_t channels : {1, 3, 4, 5}) test_alignment({2, channels, 2, 21});
    test_alignment({1, 3, 1, 150});
    test_sizes({0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 65, 127, 255, 257, 1025, 5003},
               {0, 1, 2, 3, 7}, {0, 1, 3}, {1, 2, 3, 4, 13});
    test_many_channels();
    test_sizes({64, 224}, {64, 223}, {2}, {3, 4});
    for (const int64_t width : {1, 5, 16, 33}) {
      for (const int64_t channels : {1, 3, 4, 6}) test_strides({3, channels, 5, width});
    }
  } else if (which == "far") {
    test_far();
  } else if (which == "large") {
    test_large();
  } else if (which == "few") {
    test_values({1, 3, 4, 5});
    test_sizes({1, 17, 33}, {1, 3}, {2}, {1, 3, 4});
    test_sizes({2100, 5003}, {1}, {1}, {1, 3, 4});  // several blocks of threads to a row
    test_strides({2, 3, 3, 17});
  } else {
    std::fprintf(stderr, "usage: test_normalize values|shapes|far|large|few\n");
    return 2;
  }
  std::printf("%lld calls, %lld wrong\n", static_cast<long long>(calls),
              static_cast<long long>(failures));
  return failures == 0 ? 0 : 1;
}
