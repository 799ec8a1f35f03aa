// The loops of `channel_histogram` and `image_moments` without torch and Python, on memory of
// exactly the size that they may read, against counting one pixel at a time.
#include <cstdio>
#include <cstring>
#include <vector>

#include "channel_histogram/channel_histogram.h"
#include "common/isa.h"
#include "guarded_memory.h"
#include "image_moments/image_moments.h"
#include "loop_program.h"

using namespace pixfuse;

namespace {

int64_t unguarded = 0;  // what `race` writes to without care
// Called, not compiled in line: this file has no sanitizer, but the thread sanitizer sees this
// call.
void* (*volatile write_bytes)(void*, int, size_t) = std::memset;

// A race is not the same work twice: that would be counted.
struct Work {
  void (*body)(int64_t, int64_t, void*);
  void* context;
};
int32_t parallel_for_counts(int64_t begin, int64_t end, int64_t,
                            void (*body)(int64_t, int64_t, void*), void* context) {
  Work work{body, context};
  const auto run = [](int64_t first, int64_t last, void* context) {
    const Work& work = *static_cast<Work*>(context);
    if (planted == Planted::race) write_bytes(&unguarded, 1, sizeof unguarded);
    work.body(first, last, work.context);
  };
  return run_parts(begin, end, 1, run, &work);
}

bool equal(const char* what, const int64_t* found, const std::vector<int64_t>& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    if (found[i] == expected[i]) continue;
    std::printf("%s[%zu]: %ld, expected %ld\n", what, i, static_cast<long>(found[i]),
                static_cast<long>(expected[i]));
    return false;
  }
  return true;
}

bool run(Isa isa, const int64_t (&sizes)[4], Layout layout, bool at_end, bool one_row = false) {
  ChannelHistogramArgs histogram{};
  ImageMomentsArgs moments{};
  set_strides(histogram.strides, sizes, layout);
  if (one_row) histogram.strides[2] = 0;  // as torch's expand() repeats it
  std::memcpy(histogram.sizes, sizes, sizeof sizes);
  std::memcpy(moments.sizes, sizes, sizeof sizes);
  std::memcpy(moments.strides, histogram.strides, sizeof moments.strides);
  int64_t bytes = 1;
  for (int d = 0; d < 4; ++d) bytes += (sizes[d] - 1) * histogram.strides[d];
  const int64_t cut = planted == Planted::short_input ? 1 : 0;
  const GuardedMemory images(bytes - cut, at_end);
  for (int64_t i = 0; i < bytes - cut; ++i) images.data()[i] = next_byte();
  histogram.images = moments.images = images.data() - (planted == Planted::early_input ? 1 : 0);

  const auto channels = static_cast<size_t>(sizes[1]);
  const size_t results = static_cast<size_t>(sizes[0]) * channels;
  const int64_t cut_output = planted == Planted::short_output ? 8 : 0;
  const GuardedMemory counts(static_cast<int64_t>(channels) * 256 * 8 - cut_output, true);
  const GuardedMemory sums(static_cast<int64_t>(results) * 8, true);
  const GuardedMemory squares(static_cast<int64_t>(results) * 8, true);
  std::memset(counts.data(), 0, channels * 256 * 8 - static_cast<size_t>(cut_output));
  std::memset(sums.data(), 0, results * 8);
  std::memset(squares.data(), 0, results * 8);
  histogram.counts = reinterpret_cast<int64_t*>(counts.data());
  moments.sums = reinterpret_cast<int64_t*>(sums.data());
  moments.squares = reinterpret_cast<int64_t*>(squares.data());

  if (channel_histogram_cpu(histogram, parallel_for_counts) != 0) return false;
  if (image_moments_cpu(moments, parallel_for_counts) != 0) return false;

  std::vector<int64_t> expected_counts(channels * 256), expected_sums(results);
  std::vector<int64_t> expected_squares(results);
  for (int64_t n = 0; n < sizes[0]; ++n)
    for (int64_t c = 0; c < sizes[1]; ++c)
      for (int64_t h = 0; h < sizes[2]; ++h)
        for (int64_t w = 0; w < sizes[3]; ++w) {
          const int64_t* s = histogram.strides;
          const int64_t x = histogram.images[n * s[0] + c * s[1] + h * s[2] + w * s[3]];
          ++expected_counts[static_cast<size_t>(c * 256 + x)];
          expected_sums[static_cast<size_t>(n * sizes[1] + c)] += x;
          expected_squares[static_cast<size_t>(n * sizes[1] + c)] += x * x;
        }
  if (planted == Planted::wrong_value) ++expected_squares[0];
  const bool good = equal("counts", histogram.counts, expected_counts) &&
                    equal("sums", moments.sums, expected_sums) &&
                    equal("squares", moments.squares, expected_squares);
  if (!good) {
    std::printf("isa %d sizes %ld %ld %ld %ld layout %d\n", static_cast<int>(isa),
                static_cast<long>(sizes[0]), static_cast<long>(sizes[1]),
                static_cast<long>(sizes[2]), static_cast<long>(sizes[3]), static_cast<int>(layout));
  }
  return good;
}

// Images, height, width.
constexpr int64_t kInPieces[][3] = {{1, 48, 64}, {1, 49, 65}, {2, 15, 127}, {1, 3, 1100},
                                    {3, 33, 33}, {2, 70, 31}, {1, 200, 16}};

bool run_all_on(Isa isa, int64_t& cases) {
  // Enough to be cut into pieces: these fit, or are at an edge, or are cut from one long row.
  // First, so that planted faults are met here.
  for (const int64_t channels : {1, 3, 4, 5})
    for (const auto& [images, height, width] : kInPieces)
      for (int layout = 0; layout < static_cast<int>(Layout::count); ++layout) {
        const int64_t sizes[4] = {images, channels, height, width};
        if (!run(isa, sizes, static_cast<Layout>(layout), next_byte() % 4 != 0)) return false;
        ++cases;
      }
  for (const int64_t channels : {1, 2, 3, 4, 5, 6, 16, 17})
    for (const int64_t width :
         {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 129, 1023, 1025, 8193})
      for (int layout = 0; layout < static_cast<int>(Layout::count); ++layout) {
        if (channels > 5 && width > 200) continue;
        const int64_t sizes[4] = {next_byte() % 3 + 1, channels, next_byte() % 3 + 1, width};
        if (!run(isa, sizes, static_cast<Layout>(layout), next_byte() % 4 != 0)) return false;
        ++cases;
      }
  for (const int64_t channels : {1, 3, 4})
    for (const int64_t width : {1, 33, 64, 200})
      for (int layout = 0; layout < static_cast<int>(Layout::count); ++layout) {
        const int64_t sizes[4] = {1, channels, 4000, width};
        if (!run(isa, sizes, static_cast<Layout>(layout), true, true)) return false;
        ++cases;
      }
  // Enough for several parts, and for the narrow sums to be emptied.
  for (const int64_t channels : {1, 3, 4})
    for (const Layout layout :
         {Layout::planar, Layout::pixels, Layout::pixels_and_one, Layout::spread}) {
      const int64_t sizes[4] = {3, channels, 201, 301};
      if (!run(isa, sizes, layout, true)) return false;
      if (!run(isa, sizes, layout, false)) return false;
      cases += 2;
    }
  return true;
}

}  // namespace

int main(int argc, char** argv) { return run_program(argc, argv, run_all_on, {Isa::gfni}); }
