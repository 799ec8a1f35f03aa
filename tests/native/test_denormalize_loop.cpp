// The loops of `denormalize` without torch and Python, on memory of exactly the size that they may
// touch, against the formula written down once more, one value at a time.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "common/isa.h"
#include "denormalize/denormalize.h"
#include "guarded_memory.h"
#include "loop_program.h"

using namespace pixfuse;

namespace {

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
          const auto x = static_cast<float>(
              stored_value(dtype, static_cast<const uint8_t*>(args.values) + in * bytes));
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

int main(int argc, char** argv) { return run_program(argc, argv, run_all_on); }
