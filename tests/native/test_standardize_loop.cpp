// `standardize_per_image` without torch and Python, on memory of exactly the size that it may
// touch, against the definition in more digits, one value at a time.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "common/isa.h"
#include "guarded_memory.h"
#include "loop_program.h"
#include "standardize_per_image/standardize_per_image.h"

using namespace pixfuse;

namespace {

void set_strides(int64_t (&strides)[4], const int64_t (&sizes)[4], bool pixels, int64_t row_gap) {
  const int64_t c = sizes[1], h = sizes[2], w = sizes[3];
  const int64_t row = (pixels ? c * w : w) + row_gap;
  const int64_t planar[4] = {c * h * row, h * row, row, 1}, interleaved[4] = {h * row, 1, row, c};
  std::memcpy(strides, pixels ? interleaved : planar, sizeof strides);
}

int64_t reach(const int64_t (&sizes)[4], const int64_t (&strides)[4]) {
  int64_t last = 0;
  for (int d = 0; d < 4; ++d) last += (sizes[d] - 1) * strides[d];
  return last + 1;
}

struct Case {
  Isa isa;
  int64_t sizes[4];
  bool pixels_in, pixels_out, per_channel, at_end;
  int64_t row_gap;
  double floor;
};

// What the bytes of an image become, in more digits than the loops have. Each is computed once, if
// it is there: the emulator takes long for a `long double`.
class ByteValues {
 public:
  ByteValues() = default;
  ByteValues(const int64_t (&counts)[256], double least_width) {
    long double count = 0, sum = 0, spread = 0;
    for (int byte = 0; byte < 256; ++byte) {
      if (counts[byte] == 0) continue;
      count += counts[byte];
      sum += counts[byte] * static_cast<long double>(byte);
    }
    mean_ = sum / count;
    for (int byte = 0; byte < 256; ++byte) {
      if (counts[byte] == 0) continue;
      spread += counts[byte] * (byte - mean_) * (byte - mean_);
    }
    const long double floor =
        least_width > 0 ? static_cast<long double>(least_width) : 1 / sqrtl(count);
    width_ = std::max(sqrtl(spread / count), floor);
  }

  float operator[](uint8_t byte) {
    if (!known_[byte]) values_[byte] = static_cast<float>((byte - mean_) / width_);
    known_[byte] = true;
    return values_[byte];
  }

 private:
  long double mean_ = 0, width_ = 1;
  float values_[256] = {};
  bool known_[256] = {};
};

bool run(const Case& test) {
  const auto& sizes = test.sizes;
  StandardizeArgs args{};
  std::memcpy(args.sizes, sizes, sizeof args.sizes);
  set_strides(args.image_strides, sizes, test.pixels_in, test.row_gap);
  set_strides(args.output_strides, sizes, test.pixels_out, 0);
  args.dtype = ElementType::float32;
  args.per_channel = test.per_channel;
  args.floor = test.floor;
  const int64_t image_bytes = reach(sizes, args.image_strides);
  const int64_t output_bytes = reach(sizes, args.output_strides) * 4;
  const int64_t cut_input = planted == Planted::short_input ? 1 : 0;
  const int64_t cut_output = planted == Planted::short_output ? 1 : 0;
  const GuardedMemory images(image_bytes - cut_input, test.at_end);
  const GuardedMemory output(output_bytes - cut_output, test.at_end);
  const int step = next_byte() % 4 == 0 ? 1 : 255;  // some images are flat
  for (int64_t i = 0; i < image_bytes - cut_input; ++i) {
    images.data()[i] = static_cast<uint8_t>(step == 1 ? 90 + next_byte() / 250 : next_byte());
  }
  args.images = images.data() - (planted == Planted::early_input ? 1 : 0);
  args.output = output.data();
  const int64_t results = sizes[0] * sizes[1];
  const GuardedMemory sums(results * 8, true), squares(results * 8, true);
  const GuardedMemory constants(results * static_cast<int64_t>(sizeof(ChannelConstants)), true);
  std::memset(sums.data(), 0, static_cast<size_t>(results) * 8);
  std::memset(squares.data(), 0, static_cast<size_t>(results) * 8);
  args.sums = reinterpret_cast<int64_t*>(sums.data());
  args.squares = reinterpret_cast<int64_t*>(squares.data());
  args.constants = reinterpret_cast<ChannelConstants*>(constants.data());

  if (standardize_per_image_cpu(args, parallel_for) != 0) return false;
  const int64_t* in = args.image_strides;
  const int64_t* out = args.output_strides;
  ByteValues values;
  for (int64_t n = 0; n < sizes[0]; ++n)
    for (int64_t c = 0; c < sizes[1]; ++c) {
      if (test.per_channel || c == 0) {
        int64_t counts[256] = {};
        const int64_t last = test.per_channel ? c + 1 : sizes[1];
        for (int64_t k = c; k < last; ++k)
          for (int64_t h = 0; h < sizes[2]; ++h)
            for (int64_t w = 0; w < sizes[3]; ++w) {
              ++counts[args.images[n * in[0] + k * in[1] + h * in[2] + w * in[3]]];
            }
        values = ByteValues(counts, test.floor);
      }
      for (int64_t h = 0; h < sizes[2]; ++h)
        for (int64_t w = 0; w < sizes[3]; ++w) {
          float expected = values[args.images[n * in[0] + c * in[1] + h * in[2] + w * in[3]]];
          if (planted == Planted::wrong_value && n + c + h + w == 0) {
            expected = std::nextafter(expected, 100.0f);
          }
          float stored;
          const int64_t at = n * out[0] + c * out[1] + h * out[2] + w * out[3];
          std::memcpy(&stored, static_cast<uint8_t*>(args.output) + 4 * at, sizeof stored);
          if (stored == expected) continue;
          std::printf("isa %d sizes %ld %ld %ld %ld: %.9g, expected %.9g\n",
                      static_cast<int>(test.isa), static_cast<long>(sizes[0]),
                      static_cast<long>(sizes[1]), static_cast<long>(sizes[2]),
                      static_cast<long>(sizes[3]), static_cast<double>(stored),
                      static_cast<double>(expected));
          return false;
        }
    }
  return true;
}

bool run_all_on(Isa isa, int64_t& cases) {
  for (const int64_t count : {1, 2, 9})
    for (const int64_t channels : {1, 3, 4, 5, 17})
      for (const int64_t width : {1, 2, 7, 16, 33, 65, 1025})
        for (int layout = 0; layout < 8; ++layout) {
          if (channels * width * count > 20000) continue;
          const Case test{isa,
                          {count, channels, next_byte() % 3 + 1, width},
                          (layout & 1) != 0,
                          (layout & 2) != 0,
                          (layout & 4) != 0,
                          next_byte() % 4 != 0,
                          next_byte() % 3,
                          next_byte() % 2 == 0 ? 0.0 : 0.75};
          if (!run(test)) return false;
          ++cases;
        }
  // Several parts of one image, and several images of several parts.
  for (const int64_t count : {1, 9}) {
    if (!run({isa, {count, 3, 61, 203}, true, false, false, true, 2, 0.0})) return false;
    ++cases;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) { return run_program(argc, argv, run_all_on); }
