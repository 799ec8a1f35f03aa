// The loops over pixels. Compiled once per instruction set, with PIXFUSE_ISA naming its namespace
// and -ffp-contract=off, since each step of the arithmetic is rounded.
//
// A block goes through two plain loops, which the compiler vectorizes: convert its values to bytes,
// then bring the bytes into the order of the output: they are a quarter of the values. The second
// is left out where the order is right already.
#include "denormalize/denormalize_loop.h"

#include "common/read_ahead.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace pixfuse::PIXFUSE_ISA {
namespace {

constexpr int64_t kBlock = kDenormalizeBlockPixels;
constexpr int64_t kPiece = 512;  // values that are converted at a time
constexpr int kMaxGroup = 4;     // channels whose bytes are brought together

// The constants of neighbouring values of interleaved channels, over and over, for a whole number
// of pixels.
struct Cycle {
  static constexpr int64_t kCapacity = 1024;
  static constexpr int64_t kPixels = 64;  // so that the period is a multiple of every vector width
  static constexpr int64_t kMaxChannels = kCapacity / kPixels;

  int64_t period = 0;
  alignas(64) float scale[kCapacity];
  alignas(64) float offset[kCapacity];
};

struct Tallies {
  int64_t clamped = 0, nonfinite = 0;
};

// --- convert ---

inline float widen(float value) { return value; }
inline float widen(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
// Without branches and subnormal operands, which some threads treat as zero.
inline float widen(Float16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  const uint32_t wide = magnitude << 13;
  const uint32_t normal = wide + (112u << 23);
  const uint32_t infinite = wide + (224u << 23);  // and NaN
  const uint32_t subnormal = bits_of(float_of(wide + (113u << 23)) - float_of(113u << 23));
  const uint32_t finite = magnitude < 0x400u ? subnormal : normal;
  return float_of(sign | (magnitude >= 0x7c00u ? infinite : finite));
}

// Adding this to a value rounds it half to even, as 1 is the last bit of the sum. And the bits of
// floats, as whole numbers with a sign, are in the order of the floats where these are positive,
// with infinity at the end, and below 0 where they are negative. So what is clamped are whole
// numbers, whose last byte is the result: the compiler has instructions for that, where it turns
// clamped floats into comparisons and blends.
constexpr float kRoundToByte = 12582912.0f;   // 1.5 * 2**23, as a sum may be less
constexpr int32_t kRoundedZero = 0x4b400000;  // its bits

struct Constants {
  const float *scale, *offset;
};

// `kCycle`: constants for each value; else the first ones for all. `kCount`: with tallies.
template <bool kCycle, bool kCount, class T>
void convert_values(const T* __restrict in, uint8_t* __restrict out, int64_t count,
                    Constants constants, Tallies& tallies) {
  const float* __restrict scales = constants.scale, * __restrict offsets = constants.offset;
  const float scale = scales[0], offset = offsets[0];
  uint32_t infinite = 0, nonfinite = 0, below = 0, beyond = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float x = widen(in[i]);
    const float y = x * (kCycle ? scales[i] : scale) + (kCycle ? offsets[i] : offset);
    const int32_t rounded = static_cast<int32_t>(bits_of(y + kRoundToByte));
    const int32_t above = rounded > kRoundedZero ? rounded : kRoundedZero;
    const int32_t inside = above < kRoundedZero + 255 ? above : kRoundedZero + 255;
    out[i] = static_cast<uint8_t>(y == y ? inside : 0);  // NaN: 0
    if constexpr (kCount) {
      const uint32_t magnitude = bits_of(x) & 0x7fffffffu;
      infinite += magnitude == 0x7f800000u ? 1u : 0u;
      nonfinite += magnitude >= 0x7f800000u ? 1u : 0u;
      // What rounds to a whole number outside of 0..255. Infinities do; NaN is on no side.
      below += y < -0.5f ? 1u : 0u;
      beyond += y >= 255.5f ? 1u : 0u;
    }
  }
  tallies.clamped += int64_t{below} + beyond - infinite;
  tallies.nonfinite += nonfinite;
}

template <bool kCycle, class T>
void convert_piece(const T* in, uint8_t* out, int64_t count, Constants constants,
                   Tallies* tallies) {
  Tallies ignored;
  if (tallies != nullptr) {
    convert_values<kCycle, true>(in, out, count, constants, *tallies);
  } else {
    convert_values<kCycle, false>(in, out, count, constants, ignored);
  }
}

#if defined(__F16C__)
// gcc does not vectorize the widening with the instruction that does it.
template <bool kCycle>
void convert_piece(const Float16* in, uint8_t* out, int64_t count, Constants constants,
                   Tallies* tallies) {
  alignas(64) float values[kPiece];
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    _mm256_store_ps(values + i, _mm256_cvtph_ps(halves));
  }
  for (; i < count; ++i) values[i] = widen(in[i]);
  convert_piece<kCycle>(values, out, count, constants, tallies);
}
#endif

// What is read is up to four times what is written.
constexpr uintptr_t kAheadBytes = 4096;

template <bool kCycle, class T>
void convert(const T* in, uint8_t* out, int64_t count, Constants constants, Tallies* tallies) {
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    const int64_t left = count - begin, length = left < kPiece ? left : kPiece;
    read_ahead(reinterpret_cast<uintptr_t>(in + begin) + kAheadBytes,
               length * static_cast<int64_t>(sizeof(T)));
    const Constants here =
        kCycle ? Constants{constants.scale + begin, constants.offset + begin} : constants;
    convert_piece<kCycle>(in + begin, out + begin, length, here, tallies);
  }
}

// --- order: bytes into the order of the output ---

template <int kChannels>
void interleave(const uint8_t (&runs)[kMaxGroup][kBlock], uint8_t* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    for (int c = 0; c < kChannels; ++c) out[kChannels * i + c] = runs[c][i];
  }
}

template <int kChannels>
void deinterleave(const uint8_t* __restrict in, uint8_t* out, int64_t channel_stride,
                  int64_t count) {
  uint8_t* __restrict run0 = out, * __restrict run1 = run0 + channel_stride;
  uint8_t* __restrict run2 = run1 + channel_stride;
  uint8_t* __restrict run3 = kChannels == 4 ? run2 + channel_stride : nullptr;
  for (int64_t i = 0; i < count; ++i) {
    run0[i] = in[kChannels * i];
    run1[i] = in[kChannels * i + 1];
    run2[i] = in[kChannels * i + 2];
    if constexpr (kChannels == 4) run3[i] = in[kChannels * i + 3];
  }
}

void scatter(const uint8_t* __restrict in, int64_t in_step, uint8_t* __restrict out,
             int64_t out_step, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i * out_step] = in[i * in_step];
}

// --- one block ---

// Channel after channel: the values of a channel lie side by side, or are brought together.
template <class T>
void convert_channels(const DenormalizeArgs& args, const T* in, uint8_t* out, int64_t count,
                      Tallies* tallies) {
  const int64_t channels = args.sizes[1], step = args.value_strides[3];
  const int64_t out_channel = args.output_strides[1], out_pixel = args.output_strides[3];
  const bool planar = out_pixel == 1;
  const bool together = !planar && (channels == 3 || channels == 4);
  alignas(64) T gathered[kBlock];
  alignas(64) uint8_t runs[kMaxGroup][kBlock];
  for (int64_t c = 0; c < channels; ++c) {
    const T* source = in + c * args.value_strides[1];
    if (step != 1) {
      for (int64_t i = 0; i < count; ++i) gathered[i] = source[i * step];
      source = gathered;
    }
    uint8_t* run = planar ? out + c * out_channel : runs[together ? c : 0];
    const ChannelScale& channel = args.channels[c];
    convert<false>(source, run, count, {&channel.scale, &channel.offset}, tallies);
    if (!planar && !together) scatter(run, 1, out + c * out_channel, out_pixel, count);
  }
  if (together && channels == 3) interleave<3>(runs, out, count);
  if (together && channels == 4) interleave<4>(runs, out, count);
}

// All channels in turn: the values of a pixel lie side by side.
template <class T>
void convert_pixels(const DenormalizeArgs& args, const T* in, uint8_t* out, int64_t count,
                    const Cycle& cycle, Tallies* tallies) {
  const int64_t channels = args.sizes[1], total = count * channels;
  const int64_t out_channel = args.output_strides[1], out_pixel = args.output_strides[3];
  const bool planar = out_pixel == 1;
  alignas(64) uint8_t staged[Cycle::kMaxChannels * kBlock];
  uint8_t* bytes = planar ? staged : out;
  for (int64_t begin = 0; begin < total; begin += cycle.period) {
    const int64_t left = total - begin, length = left < cycle.period ? left : cycle.period;
    convert<true>(in + begin, bytes + begin, length, {cycle.scale, cycle.offset}, tallies);
  }
  if (!planar) return;
  if (channels == 3) return deinterleave<3>(staged, out, out_channel, count);
  if (channels == 4) return deinterleave<4>(staged, out, out_channel, count);
  for (int64_t c = 0; c < channels; ++c) {
    scatter(staged + c, channels, out + c * out_channel, 1, count);
  }
}

template <class T>
void denormalize_blocks(const DenormalizeArgs& args, int64_t first, int64_t last) {
  const int64_t channels = args.sizes[1], width = args.sizes[3];
  const bool pixels = channels > 1 && channels <= Cycle::kMaxChannels &&
                      args.value_strides[1] == 1 && args.value_strides[3] == channels;
  Cycle cycle;
  if (pixels) {
    cycle.period = channels * Cycle::kPixels;
    for (int64_t i = 0; i < cycle.period; ++i) {
      cycle.scale[i] = args.channels[i % channels].scale;
      cycle.offset[i] = args.channels[i % channels].offset;
    }
  }
  Tallies found;
  Tallies* tallies = args.tallies != nullptr ? &found : nullptr;

  const int64_t per_row = blocks_per_row(args);
  for (int64_t block = first; block < last; ++block) {
    const int64_t row = block / per_row, w = (block % per_row) * kBlock;
    const int64_t n = row / args.sizes[2], h = row % args.sizes[2];
    const int64_t count = width - w < kBlock ? width - w : kBlock;
    const T* in = static_cast<const T*>(args.values) + n * args.value_strides[0] +
                  h * args.value_strides[2] + w * args.value_strides[3];
    uint8_t* out = args.output + n * args.output_strides[0] + h * args.output_strides[2] +
                   w * args.output_strides[3];
    if (pixels) {
      convert_pixels(args, in, out, count, cycle, tallies);
    } else {
      convert_channels(args, in, out, count, tallies);
    }
  }
  if (tallies == nullptr) return;
  const auto add = [&](Tally which, int64_t count) {
    __atomic_fetch_add(args.tallies + static_cast<int>(which), count, __ATOMIC_RELAXED);
  };
  add(Tally::clamped, found.clamped);
  add(Tally::nonfinite, found.nonfinite);
}

}  // namespace

void denormalize_loop(const DenormalizeArgs& args, int64_t first, int64_t last) {
  switch (args.dtype) {
    case ElementType::float32:
      return denormalize_blocks<float>(args, first, last);
    case ElementType::float16:
      return denormalize_blocks<Float16>(args, first, last);
    case ElementType::bfloat16:
      return denormalize_blocks<BFloat16>(args, first, last);
    case ElementType::uint8:
      return;  // not asked for: the operator refuses it
  }
}

}  // namespace pixfuse::PIXFUSE_ISA
