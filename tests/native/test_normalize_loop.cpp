// The loops of `normalize`, and what `crop_mirror_normalize` makes of them, without torch and
// Python, on memory of exactly the size that they may touch, against the formulas written down once
// more, one pixel at a time.
//
// Beside what loop_program.h says, an argument:
//   crop                only the calls of crop_mirror_normalize
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/isa.h"
#include "crop_mirror_normalize/crop_mirror_normalize_args.h"
#include "guarded_memory.h"
#include "loop_program.h"
#include "normalize/normalize.h"
#include "normalize/normalize_constants.h"

using namespace pixfuse;

namespace {

bool only_crops = false;

// --- the formulas, once more ---

float expected_float32(Rounding rounding, uint8_t byte, double mean, double std) {
  const float x = byte, m = static_cast<float>(mean), s = static_cast<float>(std);
  switch (rounding) {
    case Rounding::torchvision:
      return (x * static_cast<float>(1.0 / 255.0) - m) / s;
    case Rounding::torchvision_v1:
      return (x / 255.0f - m) / s;
    case Rounding::timm:
      return (x - static_cast<float>(mean * 255)) / static_cast<float>(std * 255);
    case Rounding::transformers:
      return (x - m * 255.0f) / (s * 255.0f);
    case Rounding::nearest:
      break;
  }
  const long double value = (byte / 255.0L - static_cast<long double>(mean)) / std;
  return static_cast<float>(value);
}

// The nearest number with `digits` binary digits, none of them below 2^(min_exponent - digits + 1);
// half to even.
double rounded(double value, int digits, int min_exponent, double largest) {
  if (value == 0) return value;
  int exponent;
  std::frexp(value, &exponent);  // |value| is in [2^(exponent - 1), 2^exponent)
  const int last = std::max(exponent, min_exponent + 1) - digits;
  const double result = std::ldexp(std::nearbyint(std::ldexp(value, -last)), last);
  return std::fabs(result) > largest ? std::copysign(HUGE_VAL, value) : result;
}

double expected_value(ElementType dtype, float value) {
  switch (dtype) {
    case ElementType::float32:
    case ElementType::uint8:
      return value;
    case ElementType::float16:
      return rounded(value, 11, -14, 65504);
    case ElementType::bfloat16:
      return rounded(value, 8, -126, 0x1.fep127);
  }
  std::abort();
}

bool same(double a, double b) { return a == b && std::signbit(a) == std::signbit(b); }

// --- one call ---

// Ways to go backwards through any layout, or to stay where one is.
struct Turns {
  bool mirrored = false;     // columns from the right
  bool flipped = false;      // rows from below
  bool backward = false;     // channels from the last
  bool one_channel = false;  // repeated
};

struct Case {
  Isa isa;
  ElementType dtype;
  Rounding rounding;
  int64_t sizes[4];
  Layout images, output;
  bool at_end;
  bool all_bytes;  // every byte value in turn, instead of random ones
  Turns turns{};
};

void turn(int64_t (&strides)[4], const Turns& turns) {
  if (turns.one_channel) strides[1] = 0;
  if (turns.backward) strides[1] = -strides[1];
  if (turns.flipped) strides[2] = -strides[2];
  if (turns.mirrored) strides[3] = -strides[3];
}

// How many elements lie before the first one, and one past the last, counted from the first.
struct Reach {
  int64_t before = 0, end = 1;
};
Reach reach(const int64_t (&sizes)[4], const int64_t (&strides)[4]) {
  Reach reach;
  for (int d = 0; d < 4; ++d) {
    const int64_t way = (sizes[d] - 1) * strides[d];
    (way < 0 ? reach.before : reach.end) += way < 0 ? -way : way;
  }
  return reach;
}

// Every second time, none.
Turns next_turns(int64_t channels) {
  if (next_byte() % 2 == 0) return {};
  const uint8_t chosen = next_byte();
  return {(chosen & 1) != 0, (chosen & 2) != 0, (chosen & 4) != 0,
          channels > 1 && (chosen & 24) == 24};
}

bool run(const Case& test) {
  const int64_t channels = test.sizes[1];
  NormalizeArgs args{};
  std::memcpy(args.sizes, test.sizes, sizeof args.sizes);
  set_strides(args.image_strides, test.sizes, test.images);
  turn(args.image_strides, test.turns);
  set_strides(args.output_strides, test.sizes, test.output);
  args.dtype = test.dtype;
  args.past_caches = next_byte() % 2 == 0;
  std::vector<double> mean, std;
  for (int64_t c = 0; c < channels; ++c) {
    mean.push_back(0.485 - 0.07 * static_cast<double>(c));
    std.push_back(0.229 + 0.013 * static_cast<double>(c));
  }
  std::vector<ChannelConstants> constants(static_cast<size_t>(channels));
  set_rounding(args, constants.data(), mean.data(), std.data(), channels, test.rounding);

  const Reach images_reach = reach(args.sizes, args.image_strides);
  const int64_t image_bytes = images_reach.before + images_reach.end;
  const int64_t out_elements = reach(args.sizes, args.output_strides).end;
  const int64_t out_bytes = out_elements * element_bytes(test.dtype);
  const int64_t cut_images = planted == Planted::short_input ? 1 : 0;
  const int64_t cut_output = planted == Planted::short_output ? 1 : 0;
  const bool misaligned = planted == Planted::misaligned;
  const GuardedMemory images(image_bytes - cut_images, test.at_end);
  const GuardedMemory output(out_bytes - cut_output + (misaligned ? 1 : 0), test.at_end);
  for (int64_t i = 0; i < image_bytes - cut_images; ++i) {
    images.data()[i] = test.all_bytes ? static_cast<uint8_t>(i) : next_byte();
  }
  args.images = images.data() + images_reach.before - (planted == Planted::early_input ? 1 : 0);
  args.output = output.data() + (misaligned ? 1 : 0);

  const std::vector<uint8_t> before(images.data(), images.data() + image_bytes - cut_images);
  if (normalize_cpu(args, parallel_for) != 0) return false;
  if (!std::equal(before.begin(), before.end(), images.data())) {
    std::printf("the images were written to\n");
    return false;
  }

  for (int64_t n = 0; n < args.sizes[0]; ++n)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t h = 0; h < args.sizes[2]; ++h)
        for (int64_t w = 0; w < args.sizes[3]; ++w) {
          const int64_t at[4] = {n, c, h, w};
          int64_t in = 0, out = 0;
          for (int d = 0; d < 4; ++d) {
            in += at[d] * args.image_strides[d];
            out += at[d] * args.output_strides[d];
          }
          const auto k = static_cast<size_t>(c);
          float value = test.dtype == ElementType::uint8
                            ? args.images[in]
                            : expected_float32(test.rounding, args.images[in], mean[k], std[k]);
          if (planted == Planted::wrong_value && n + c + h + w == 0) {
            value = std::nextafter(value, 100.0f);
          }
          const double expected = expected_value(test.dtype, value);
          const double stored = stored_value(test.dtype, static_cast<const uint8_t*>(args.output) +
                                                             out * element_bytes(test.dtype));
          if (same(stored, expected)) continue;
          std::printf(
              "isa %d dtype %d rounding %d sizes %ld %ld %ld %ld images %d output %d at %ld %ld "
              "%ld "
              "%ld byte %d: %.9g, expected %.9g\n",
              static_cast<int>(test.isa), static_cast<int>(test.dtype),
              static_cast<int>(test.rounding), static_cast<long>(args.sizes[0]),
              static_cast<long>(channels), static_cast<long>(args.sizes[2]),
              static_cast<long>(args.sizes[3]), static_cast<int>(test.images),
              static_cast<int>(test.output), static_cast<long>(n), static_cast<long>(c),
              static_cast<long>(h), static_cast<long>(w), static_cast<int>(args.images[in]), stored,
              expected);
          return false;
        }
  return true;
}

// --- one call of crop_mirror_normalize: images of any sizes under windows at any place ---

struct Source {
  GuardedMemory memory;
  ImageSource image;
};

// Random bytes in memory of exactly their size.
Source next_source(int64_t channels, bool at_end) {
  const int64_t from = channels == 3 && next_byte() % 4 == 0   ? 4
                       : channels != 1 && next_byte() % 4 == 0 ? 1
                                                               : channels;
  const int64_t sizes[4] = {1, from, next_byte() % 40 + 1, next_byte() % 90 + 1};
  int64_t strides[4];
  set_strides(strides, sizes, static_cast<Layout>(next_byte() % static_cast<int>(Layout::count)));
  turn(strides, next_turns(1));
  const Reach bytes = reach(sizes, strides);
  const int64_t cut = planted == Planted::short_input ? 1 : 0;
  Source source{GuardedMemory(bytes.before + bytes.end - cut, at_end), {}};
  for (int64_t i = 0; i < bytes.before + bytes.end - cut; ++i)
    source.memory.data()[i] = next_byte();
  source.image = {source.memory.data() + bytes.before,
                  sizes[2],
                  sizes[3],
                  sizes[1],
                  strides[2],
                  strides[3],
                  strides[1]};
  return source;
}

bool run_crop(Isa isa, ElementType dtype, int64_t channels, Layout output) {
  const int64_t count = next_byte() % 5 + 1;
  const int64_t sizes[4] = {count, channels, next_byte() % 40 + 1, next_byte() % 90 + 1};
  const auto rounding = static_cast<Rounding>(next_byte() % 5);
  const bool at_end = next_byte() % 4 != 0;
  std::vector<double> mean, std, fill;
  for (int64_t c = 0; c < channels; ++c) {
    mean.push_back(0.485 - 0.07 * static_cast<double>(c));
    std.push_back(0.229 + 0.013 * static_cast<double>(c));
    fill.push_back(static_cast<double>(next_byte()));
  }
  std::vector<Source> held;
  std::vector<ImageSource> images;
  std::vector<Placement> placements;
  held.reserve(static_cast<size_t>(count));
  for (int64_t n = 0; n < count; ++n) {
    held.push_back(next_source(channels, at_end));
    images.push_back(held.back().image);
    // Windows inside, across each edge, and beyond.
    placements.push_back(
        {next_byte() % 80 - 40, next_byte() % 120 - 60, next_byte() % 2, next_byte() % 2});
  }
  CropMirrorNormalizeCall call(images, placements.data(), channels, sizes[2], sizes[3], mean, std,
                               static_cast<int64_t>(rounding), fill, false);
  call.set_dtype(dtype);
  int64_t strides[4];
  set_strides(strides, sizes, output);
  const int64_t pixels = count * sizes[2] * sizes[3];
  const int64_t cut = planted == Planted::short_output ? 1 : 0;
  const GuardedMemory out(pixels * channels * element_bytes(dtype) - cut, at_end);
  const GuardedMemory mask(pixels, at_end);
  call.set_output(out.data(), strides, mask.data());
  if (crop_mirror_normalize_cpu(call.args, parallel_for) != 0) return false;

  for (int64_t n = 0; n < count; ++n)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t h = 0; h < sizes[2]; ++h)
        for (int64_t w = 0; w < sizes[3]; ++w) {
          const auto i = static_cast<size_t>(n), k = static_cast<size_t>(c);
          const ImageSource& image = images[i];
          const Placement& placement = placements[i];
          const int64_t y = placement.top + (placement.flip != 0 ? sizes[2] - 1 - h : h);
          const int64_t x = placement.left + (placement.mirror != 0 ? sizes[3] - 1 - w : w);
          const bool inside = y >= 0 && y < image.height && x >= 0 && x < image.width;
          const int64_t from = image.channels == 1 ? 0 : c;
          const uint8_t byte = inside ? image.pixels[y * image.row_stride + x * image.pixel_stride +
                                                     from * image.channel_stride]
                                      : static_cast<uint8_t>(fill[k]);
          float value = dtype == ElementType::uint8
                            ? byte
                            : expected_float32(rounding, byte, mean[k], std[k]);
          if (planted == Planted::wrong_value && n + c + h + w == 0) {
            value = std::nextafter(value, 100.0f);
          }
          const int64_t at = n * strides[0] + c * strides[1] + h * strides[2] + w * strides[3];
          const double stored = stored_value(dtype, out.data() + at * element_bytes(dtype));
          const bool marked = mask.data()[(n * sizes[2] + h) * sizes[3] + w] != 0;
          if (same(stored, expected_value(dtype, value)) && marked == inside) continue;
          std::printf(
              "crop: isa %d dtype %d channels %ld output %d at %ld %ld %ld %ld: %.9g, expected "
              "%.9g, "
              "mask %d, expected %d\n",
              static_cast<int>(isa), static_cast<int>(dtype), static_cast<long>(channels),
              static_cast<int>(output), static_cast<long>(n), static_cast<long>(c),
              static_cast<long>(h), static_cast<long>(w), stored, expected_value(dtype, value),
              marked, inside);
          return false;
        }
  return true;
}

// --- all calls ---

constexpr ElementType kTypes[] = {ElementType::float32, ElementType::float16, ElementType::bfloat16,
                                  ElementType::uint8};
constexpr Rounding kRoundings[] = {Rounding::torchvision, Rounding::torchvision_v1, Rounding::timm,
                                   Rounding::transformers, Rounding::nearest};

bool run_loops_on(Isa isa, int64_t& cases) {
  constexpr int64_t kWidths[] = {1,  2,  3,  7,  8,  15, 16,  17,  31,  32,
                                 33, 48, 63, 64, 65, 96, 127, 129, 528, 1025};
  for (ElementType dtype : kTypes)
    for (int64_t channels : {1, 2, 3, 4, 5, 16, 17})
      for (int64_t width : kWidths) {
        if (channels > 5 && width > 65) continue;
        for (int images = 0; images < static_cast<int>(Layout::count); ++images)
          for (Layout output : {Layout::planar, Layout::pixels}) {
            // Chosen at random, the same in each run: not every combination, but many of each two.
            const int64_t height = next_byte() % 3 + 1, count = next_byte() % 2 + 1;
            const Case test{isa,
                            dtype,
                            kRoundings[next_byte() % 5],
                            {count, channels, height, width},
                            static_cast<Layout>(images),
                            output,
                            next_byte() % 4 != 0,
                            false,
                            next_turns(channels)};
            if (!run(test)) return false;
            ++cases;
          }
      }
  // Every byte value in every channel, a few pixels and many, in one part and several.
  for (ElementType dtype : kTypes)
    for (Rounding rounding : kRoundings)
      for (int64_t side : {16, 48, 160})
        for (Layout layout : {Layout::planar, Layout::pixels}) {
          const int64_t channels = layout == Layout::pixels ? 3 : 2;
          if (!run({isa, dtype, rounding, {1, channels, side, side}, layout, layout, true, true})) {
            return false;
          }
          ++cases;
        }
  return true;
}

bool run_crops_on(Isa isa, int64_t& cases) {
  for (int turn = 0; turn < 12; ++turn)
    for (ElementType dtype : kTypes)
      for (int64_t channels : {1, 2, 3, 4, 17})
        for (Layout output : {Layout::planar, Layout::pixels}) {
          if (!run_crop(isa, dtype, channels, output)) return false;
          ++cases;
        }
  return true;
}

bool run_all_on(Isa isa, int64_t& cases) {
  return (only_crops || run_loops_on(isa, cases)) && run_crops_on(isa, cases);
}

}  // namespace

int main(int argc, char** argv) {
  return run_program(argc, argv, run_all_on, {}, {{"crop", &only_crops}});
}
