// The CUDA kernel of `channel_histogram` and `image_moments` against plain scalar arithmetic, over
// exactly sized buffers.
//
//   test_channel_histogram shapes   sizes, strides, alignments, channel counts
//   test_channel_histogram far      offsets beyond 2^32, in memory that is mostly not there
//   test_channel_histogram few      a little of the first, for the race checker
#include <sys/mman.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "channel_histogram/channel_histogram.h"
#include "image_moments/image_moments.h"
#include "share.h"

namespace {

constexpr int N = 0, C = 1, H = 2, W = 3;
using Four = std::array<int64_t, 4>;

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

// `pixel_gap` more bytes per pixel than there are channels, as in RGBX.
Four interleaved(const Four& s, int64_t row_gap = 0, int64_t pixel_gap = 0) {
  const int64_t pixel = s[C] + pixel_gap, row = s[W] * pixel + row_gap;
  return {s[H] * row, 1, row, pixel};
}

void expect(const char* what, const std::string& name, const Four& sizes,
            const std::vector<int64_t>& found, const std::vector<int64_t>& expected) {
  ++calls;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (found[i] == expected[i]) continue;
    // Enough is known then, and the mistakes planted in kernels take less time.
    if (++failures > 10) std::exit(1);
    std::fprintf(
        stderr,
        "wrong value: %s of %s, sizes %lld %lld %lld %lld, entry %zu: %lld, expected %lld\n", what,
        name.c_str(), static_cast<long long>(sizes[N]), static_cast<long long>(sizes[C]),
        static_cast<long long>(sizes[H]), static_cast<long long>(sizes[W]), i,
        static_cast<long long>(found[i]), static_cast<long long>(expected[i]));
    return;
  }
}

// Both operators on bytes that are there already.
void check(const std::string& name, const uint8_t* images, const Four& sizes, const Four& strides) {
  const auto channels = static_cast<size_t>(sizes[C]);
  const size_t count = static_cast<size_t>(sizes[N]) * channels;
  // What is there is added to, so results start at something.
  constexpr int64_t kBefore = 1000;
  std::vector<int64_t> counts(channels * 256, kBefore), expected_counts = counts;
  std::vector<int64_t> sums(count, kBefore), squares = sums;
  std::vector<int64_t> expected_sums = sums, expected_squares = sums;
  for_each_element(sizes, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    const int64_t byte = images[offset_of(strides, n, c, h, w)];
    ++expected_counts[static_cast<size_t>(c * 256 + byte)];
    expected_sums[static_cast<size_t>(n * sizes[C] + c)] += byte;
    expected_squares[static_cast<size_t>(n * sizes[C] + c)] += byte * byte;
  });

  pixfuse::ChannelHistogramArgs histogram{};
  pixfuse::ImageMomentsArgs moments{};
  histogram.images = moments.images = images;
  for (size_t d = 0; d < 4; ++d) {
    histogram.sizes[d] = moments.sizes[d] = sizes[d];
    histogram.strides[d] = moments.strides[d] = strides[d];
  }
  histogram.counts = counts.data();
  moments.sums = sums.data();
  moments.squares = squares.data();
  const int errors[] = {pixfuse::channel_histogram_cuda(histogram, nullptr),
                        pixfuse::image_moments_cuda(moments, nullptr)};
  for (const int error : errors) {
    if (error == 0) continue;
    ++failures;
    std::fprintf(stderr, "CUDA error %d: %s\n", error, name.c_str());
  }
  expect("counts", name, sizes, counts, expected_counts);
  expect("sums", name, sizes, sums, expected_sums);
  expect("squares", name, sizes, squares, expected_squares);
}

// In memory of exactly the bytes that are reached, from `offset` bytes past a boundary.
void check(const std::string& name, const Four& sizes, const Four& strides, int64_t offset = 0) {
  if (!is_in_share()) return;
  const int64_t bytes = extent(sizes, strides);
  auto* memory = static_cast<uint8_t*>(std::malloc(static_cast<size_t>(offset + bytes)));
  static uint32_t state = 1;
  for (int64_t i = 0; i < offset + bytes; ++i) {
    state = state * 1664525u + 1013904223u;
    memory[i] = static_cast<uint8_t>(state >> 24);
  }
  check(name, memory + offset, sizes, strides);
  std::free(memory);
}

void test_sizes(const std::vector<int64_t>& widths, const std::vector<int64_t>& channel_counts,
                const std::vector<int64_t>& batches) {
  for (const int64_t w : widths)
    for (const int64_t c : channel_counts)
      for (const int64_t n : batches)
        for (const int64_t h : {1, 3}) {
          const Four s = {n, c, h, w};
          const int64_t offset = (w + c + h) % 16;
          check("planar", s, planar(s), offset);
          check("pixels", s, interleaved(s), offset);
          check("padded rows", s, planar(s, 5), offset);
          check("padded rows of pixels", s, interleaved(s, 7), offset);
          check("one more byte per pixel", s, interleaved(s, 0, 1), offset);
          check("batch last", s, {1, n * h * w, n * w, n}, offset);
          check("rows of planes", s, {c * h * w, w, c * w, 1}, offset);
          check("same image", s, {0, h * w, w, 1}, offset);
          check("same row", s, {c * w, w, 0, 1}, offset);
        }
}

void test_alignment() {
  for (int64_t offset = 0; offset < 16; ++offset)
    for (const int64_t c : {1, 3, 4, 5})
      for (const int64_t w : {15, 16, 17, 47}) {
        const Four s = {2, c, 2, w};
        check("planar", s, planar(s, 3), offset);
        check("pixels", s, interleaved(s, 3), offset);
      }
}

void test_far() {
  const int64_t far = (int64_t{1} << 32) + 48;
  const Four sizes = {2, 2, 2, 20};
  for (size_t d = 0; d < 4; ++d) {
    Four strides = planar(sizes);
    strides[d] = far;
    const auto bytes = static_cast<size_t>(extent(sizes, strides));
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::exit(2);
    auto* images = static_cast<uint8_t*>(memory);
    for_each_element(sizes, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
      images[offset_of(strides, n, c, h, w)] = static_cast<uint8_t>(n * 80 + c * 40 + h * 20 + w);
    });
    check("far", images, sizes, strides);
    munmap(memory, bytes);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view which = argc == 2 ? argv[1] : "";
  if (which == "shapes") {
    test_sizes({0, 1, 2, 7, 15, 16, 17, 33, 257}, {1, 2, 3, 4, 5, 9}, {0, 1, 3});
    test_sizes({40000}, {1, 3, 4}, {1, 2});  // several blocks of threads
    test_alignment();
  } else if (which == "far") {
    test_far();
  } else if (which == "few") {
    test_sizes({1, 17, 40}, {1, 3, 5}, {2});
    test_sizes({40000}, {3}, {1});
  } else {
    std::fprintf(stderr, "usage: test_channel_histogram shapes|far|few\n");
    return 2;
  }
  std::printf("%lld checks, %lld wrong\n", static_cast<long long>(calls),
              static_cast<long long>(failures));
  return failures == 0 ? 0 : 1;
}
