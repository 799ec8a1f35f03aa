// The loops of `denormalize` without torch and Python, on memory of exactly the size that they may
// touch, against the formula written down once more, one value at a time.
//
//   threads             the parts of each call run at the same time
//   planted=NAME        a fault that must be noticed: see `Planted`
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "common/isa.h"
#include "denormalize/denormalize.h"
#include "guarded_memory.h"
#include "wanted_isas.h"

using namespace pixfuse;

namespace {

enum class Planted {
  none,
  short_input,   // the values end one byte early
  early_input,   // the values begin one element late
  short_output,  // the output ends one byte early
  wrong_value,   // one expected byte is another
  race,          // two threads do the same work
};
constexpr const char* kPlantedNames[] = {"none",         "short_input", "early_input",
                                         "short_output", "wrong_value", "race"};
Planted planted = Planted::none;
bool use_threads = false;

int32_t parallel_for(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*),
                     void* context) {
  // Parts of different lengths, the last one first.
  std::vector<std::thread> threads;
  const int64_t part = (end - begin) / 3 + 1;
  for (int64_t last = end; last > begin; last -= part) {
    const int64_t first = std::max(begin, last - part);
    for (int copies = planted == Planted::race ? 2 : 1; copies > 0; --copies) {
      if (use_threads) {
        threads.emplace_back(body, first, last, context);
      } else {
        body(first, last, context);
      }
    }
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}

uint8_t next_byte() {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return static_cast<uint8_t>(state >> 24);
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
  if (exponent == 0)
    return sign * std::ldexp(static_cast<float>(fraction), 1 - bias - fraction_bits);
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

// Any bits as 16-bit floats; as float32 mostly values around the range, some of any bits.
void fill(ElementType dtype, uint8_t* element) {
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) bits = bits << 8 | next_byte();
  if (dtype == ElementType::float32 && next_byte() % 8 != 0) {
    const float value = static_cast<float>(static_cast<int32_t>(bits)) * 0x1p-29f;
    std::memcpy(&bits, &value, sizeof bits);
  }
  std::memcpy(element, &bits, static_cast<size_t>(element_bytes(dtype)));
}

enum class Layout { planar, pixels, pixels_and_one, padded_rows, spread, same_image, count };

void set_strides(int64_t (&strides)[4], const int64_t (&sizes)[4], Layout layout) {
  const int64_t c = sizes[1], h = sizes[2], w = sizes[3];
  const auto set = [&](int64_t sn, int64_t sc, int64_t sh, int64_t sw) {
    const int64_t values[4] = {sn, sc, sh, sw};
    std::memcpy(strides, values, sizeof values);
  };
  switch (layout) {
    case Layout::planar:
    case Layout::count:
      return set(c * h * w, h * w, w, 1);
    case Layout::pixels:
      return set(c * h * w, 1, c * w, c);
    case Layout::pixels_and_one:
      return set((c + 1) * h * w, 1, (c + 1) * w, c + 1);
    case Layout::padded_rows:
      return set(c * h * (w + 3), h * (w + 3), w + 3, 1);
    case Layout::spread:
      return set(2 * c * h * w, 2 * h * w, 2 * w, 2);
    case Layout::same_image:
      return set(0, h * w, w, 1);
  }
}

bool run(Isa isa, ElementType dtype, const int64_t (&sizes)[4], Layout layout, bool nhwc,
         bool at_end) {
  DenormalizeArgs args{};
  std::memcpy(args.sizes, sizes, sizeof sizes);
  set_strides(args.value_strides, sizes, layout);
  set_strides(args.output_strides, sizes, nhwc ? Layout::pixels : Layout::planar);
  args.dtype = dtype;
  std::vector<ChannelScale> channels;
  for (int64_t c = 0; c < sizes[1]; ++c) {
    channels.push_back({60.0f + static_cast<float>(c), 120.0f - 0.3f * static_cast<float>(c)});
  }
  args.channels = channels.data();
  const int64_t bytes = element_bytes(dtype);
  int64_t elements = 1;
  for (int d = 0; d < 4; ++d) elements += (sizes[d] - 1) * args.value_strides[d];
  const int64_t written = sizes[0] * sizes[1] * sizes[2] * sizes[3];
  const int64_t cut_input = planted == Planted::short_input ? 1 : 0;
  const int64_t cut_output = planted == Planted::short_output ? 1 : 0;
  const GuardedMemory values(elements * bytes - cut_input, at_end);
  const GuardedMemory output(written - cut_output, at_end);
  for (int64_t i = 0; i < elements - cut_input; ++i) fill(dtype, values.data() + i * bytes);
  args.values = values.data() - (planted == Planted::early_input ? bytes : 0);
  args.output = output.data();
  int64_t tallies[2] = {0, 0}, expected_tallies[2] = {0, 0};
  const bool count = next_byte() % 2 != 0;
  args.tallies = count ? tallies : nullptr;

  set_active_isa(isa);
  if (denormalize_cpu(args, parallel_for) != 0) return false;
  for (int64_t n = 0; n < sizes[0]; ++n)
    for (int64_t c = 0; c < sizes[1]; ++c)
      for (int64_t h = 0; h < sizes[2]; ++h)
        for (int64_t w = 0; w < sizes[3]; ++w) {
          const int64_t at[4] = {n, c, h, w};
          int64_t in = 0, out = 0;
          for (int d = 0; d < 4; ++d) {
            in += at[d] * args.value_strides[d];
            out += at[d] * args.output_strides[d];
          }
          const float x = load(dtype, static_cast<const uint8_t*>(args.values) + in * bytes);
          const float product = x * channels[static_cast<size_t>(c)].scale;
          const float y = product + channels[static_cast<size_t>(c)].offset;
          const float nearest = std::nearbyintf(y);  // half to even
          int expected = std::isnan(y) ? 0 : static_cast<int>(std::clamp(nearest, 0.0f, 255.0f));
          if (planted == Planted::wrong_value && n + c + h + w == 0) expected ^= 1;
          expected_tallies[0] += std::isfinite(x) && (nearest < 0 || nearest > 255);
          expected_tallies[1] += !std::isfinite(x);
          if (args.output[out] == expected) continue;
          std::printf(
              "isa %d dtype %d sizes %ld %ld %ld %ld layout %d nhwc %d: %.9g became %d, "
              "expected %d\n",
              static_cast<int>(isa), static_cast<int>(dtype), static_cast<long>(sizes[0]),
              static_cast<long>(sizes[1]), static_cast<long>(sizes[2]), static_cast<long>(sizes[3]),
              static_cast<int>(layout), nhwc ? 1 : 0, static_cast<double>(x), args.output[out],
              expected);
          return false;
        }
  if (!count || std::equal(tallies, tallies + 2, expected_tallies)) return true;
  std::printf("clamped %ld, not finite %ld, expected %ld and %ld\n", static_cast<long>(tallies[0]),
              static_cast<long>(tallies[1]), static_cast<long>(expected_tallies[0]),
              static_cast<long>(expected_tallies[1]));
  return false;
}

bool run_all_on(Isa isa, int64_t& cases) {
  for (const ElementType dtype :
       {ElementType::float32, ElementType::float16, ElementType::bfloat16})
    for (const int64_t channels : {1, 2, 3, 4, 5, 16, 17})
      for (const int64_t width : {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 129, 1025})
        for (int layout = 0; layout < static_cast<int>(Layout::count); ++layout)
          for (const bool nhwc : {false, true}) {
            if (channels > 5 && width > 65) continue;
            const int64_t sizes[4] = {next_byte() % 2 + 1, channels, next_byte() % 3 + 1, width};
            if (!run(isa, dtype, sizes, static_cast<Layout>(layout), nhwc, next_byte() % 4 != 0)) {
              return false;
            }
            ++cases;
          }
  for (const bool nhwc : {false, true}) {  // several parts
    if (!run(isa, ElementType::float32, {3, 3, 101, 203}, Layout::padded_rows, nhwc, true))
      return false;
    ++cases;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    bool known = argument == "threads";
    use_threads = use_threads || known;
    for (size_t k = 0; k < std::size(kPlantedNames); ++k) {
      if (argument != std::string("planted=") + kPlantedNames[k]) continue;
      planted = static_cast<Planted>(k);
      known = true;
    }
    if (!known) {
      std::printf("unknown argument %s\n", argv[i]);
      return 2;
    }
  }
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::neon}) {
    if (!is_wanted(isa)) continue;
    int64_t cases = 0;
    if (!run_all_on(isa, cases)) return 1;
    std::printf("isa %d: %ld cases\n", static_cast<int>(isa), static_cast<long>(cases));
    std::fflush(stdout);
  }
  return 0;
}
