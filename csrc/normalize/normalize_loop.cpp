// The loops over pixels. Compiled once per instruction set, with PIXFUSE_ISA naming its namespace
// and -ffp-contract=off, since each step of the arithmetic is rounded.
//
// A block goes through two plain loops, which the compiler vectorizes: bring its bytes into the
// order of the output, then convert them, straight into the output. What lies between the two stays
// in the first-level cache. The first is left out where the order is right already, or where the
// second picks the bytes of a channel out of whole pixels. Where pixels are read backwards (a
// mirrored image), they are brought into order forwards, from the lowest address on, and turned
// around in the cache.
#include "normalize/normalize_loop.h"

#include <stddef.h>

#include <type_traits>

#include "common/read_ahead.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pixfuse::PIXFUSE_ISA {
namespace {

// How a result is computed. That of every byte value is compared with what the steps of the
// arithmetic give before one of the shorter ways is taken: there are 256, so nothing is believed.
enum class Way { steps, inverses, fused };

// What is known of one channel.
struct Channel : ChannelConstants {
  float inverse;        // of std
  float slope, offset;  // of the whole normalization
};

// The constants of neighbouring results of an interleaved output: those of the channels, over and
// over, for a whole number of pixels.
struct Cycle {
  static constexpr int64_t kCapacity = 1024;
  static constexpr int64_t kPixels = 64;  // so that the period is a multiple of every vector width
  static constexpr int64_t kMaxChannels = kCapacity / kPixels;

  int64_t period = 0;
  alignas(64) float mean[kCapacity];
  alignas(64) float std[kCapacity];
  alignas(64) float inverse[kCapacity];
  alignas(64) float slope[kCapacity];
  alignas(64) float offset[kCapacity];
  alignas(64) double center_high[kCapacity];
  alignas(64) double center_low[kCapacity];
  alignas(64) double inverse_width[kCapacity];
};

// --- compute ---

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr bool kHasFusedMultiplyAdd = true;
#else
constexpr bool kHasFusedMultiplyAdd = false;
#endif

// A division takes longer than all else together, on some processors longer than memory. With the
// inverse of the divisor a product is near the quotient, and what it leaves of the dividend, which
// a fused multiply-add gives exactly, corrects it: to the very quotient, rounded once, with rare
// exceptions (Markstein, Computation of elementary functions on the IBM RISC System/6000, 1990).
template <Way way>
inline float quotient(float dividend, float divisor, float inverse) {
  if constexpr (way == Way::inverses) {
    const float near = dividend * inverse;
    const float rest = __builtin_fmaf(-near, divisor, dividend);
    return __builtin_fmaf(rest, inverse, near);
  }
  return dividend / divisor;
}

template <Arithmetic arithmetic, Way way>
inline float normalize_value(int32_t x, float scale, float mean, float std, float inverse,
                             float slope, float offset, double center_high, double center_low,
                             double inverse_width) {
  if constexpr (way == Way::fused) {
    return __builtin_fmaf(static_cast<float>(x), slope, offset);
  } else if constexpr (arithmetic == Arithmetic::multiply) {
    return quotient<way>((static_cast<float>(x) * scale) - mean, std, inverse);
  } else if constexpr (arithmetic == Arithmetic::divide) {
    const float unit = quotient<way>(static_cast<float>(x), 255.0f, 1.0f / 255.0f);
    return quotient<way>(unit - mean, std, inverse);
  } else {
    const double centered = (static_cast<double>(x) - center_high) - center_low;
    return static_cast<float>(centered * inverse_width);
  }
}

// Half to even; on the fused way half away from zero where that takes less, since a result half way
// between two others would be found out when the way is tried.
template <Way way, class T>
inline T rounded(float value) {
  if constexpr (way == Way::fused && std::is_same_v<T, BFloat16>) {
    return {static_cast<uint16_t>((bits_of(value) + 0x8000u) >> 16)};
  } else {
    return round_to<T>(value);
  }
}

template <Way way, class T>
inline void round_run(const float* __restrict in, T* __restrict out, int count) {
  for (int i = 0; i < count; ++i) out[i] = rounded<way, T>(in[i]);
}

#if defined(__F16C__)
// gcc does not vectorize the rounding to float16 with the instruction that does it, which takes a
// fraction of the time of the integer steps of round_to.
template <Way way>
inline void round_run(const float* __restrict in, Float16* __restrict out, int count) {
  constexpr int kHalfToEven = _MM_FROUND_TO_NEAREST_INT;
  int i = 0;
#if defined(__AVX512F__)
  // One store for a line, as it is read at once from where it is stored.
  for (; i + 32 <= count; i += 32) {
    const __m256i low = _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(in + i), kHalfToEven);
    const __m256i high = _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(in + i + 16), kHalfToEven);
    _mm512_storeu_si512(out + i, __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7));
  }
#endif
  for (; i + 8 <= count; i += 8) {
    const __m128i rounded = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), kHalfToEven);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), rounded);
  }
  for (; i < count; ++i) out[i] = round_to<Float16>(in[i]);
}
#endif

// Calls `run` with the arithmetic and the way as constants.
template <class Run>
void with_steps(Arithmetic arithmetic, Way way, const Run& run) {
  using Steps = std::integral_constant<Way, Way::steps>;
  using Multiply = std::integral_constant<Arithmetic, Arithmetic::multiply>;
  using Divide = std::integral_constant<Arithmetic, Arithmetic::divide>;
  using Nearest = std::integral_constant<Arithmetic, Arithmetic::nearest>;
  if constexpr (kHasFusedMultiplyAdd) {
    using Inverses = std::integral_constant<Way, Way::inverses>;
    if (way == Way::fused) {  // whatever the steps are
      return run(Multiply{}, std::integral_constant<Way, Way::fused>{});
    }
    if (way == Way::inverses && arithmetic == Arithmetic::multiply) {
      return run(Multiply{}, Inverses{});
    }
    if (way == Way::inverses && arithmetic == Arithmetic::divide) return run(Divide{}, Inverses{});
  }
  switch (arithmetic) {
    case Arithmetic::multiply:
      return run(Multiply{}, Steps{});
    case Arithmetic::divide:
      return run(Divide{}, Steps{});
    case Arithmetic::nearest:
      return run(Nearest{}, Steps{});  // has no division
  }
}

// What normalizes a value of one channel. It holds the constants one by one, which the output
// cannot alias: a copy of the whole Channel reads two members at once that have just been written
// apart, and then waits until all that was written before them, results too, has left the store
// buffer.
template <Arithmetic arithmetic, Way way>
inline auto normalizer(float scale, const Channel& channel) {
  return [scale, mean = channel.mean, std = channel.std, inverse = channel.inverse,
          slope = channel.slope, offset = channel.offset, center_high = channel.center_high,
          center_low = channel.center_low, inverse_width = channel.inverse_width](int32_t x) {
    return normalize_value<arithmetic, way>(x, scale, mean, std, inverse, slope, offset,
                                            center_high, center_low, inverse_width);
  };
}

// --- stores past the caches ---

// A line of the caches. Storing one past them saves reading it first; a line that is stored in part
// costs more than that, so such outputs lie on whole lines.
constexpr int kLineBytes = 64;

#if defined(__AVX512F__)
constexpr bool kCanPassCaches = true;
inline void store_line(void* out, const void* line) {
  _mm512_stream_si512(static_cast<__m512i*>(out), _mm512_load_si512(line));
}
#elif defined(__AVX2__)
constexpr bool kCanPassCaches = true;
inline void store_line(void* out, const void* line) {
  auto* const to = static_cast<__m256i*>(out);
  const auto* const from = static_cast<const __m256i*>(line);
  for (int i = 0; i < 2; ++i) _mm256_stream_si256(to + i, _mm256_load_si256(from + i));
}
#else
constexpr bool kCanPassCaches = false;
inline void store_line(void*, const void*) {}
#endif

// Whoever is told that the work is done sees what was stored past the caches, too.
inline void finish_past_caches() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// --- interleaved results: all channels in turn ---

// `count` bytes, at most Cycle::kCapacity, beginning with a first channel.
template <Arithmetic arithmetic, Way way>
inline void compute_cycle(const uint8_t* __restrict in, float* __restrict out, int64_t count,
                          float scale, const Cycle& __restrict cycle) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = normalize_value<arithmetic, way>(
        in[i], scale, cycle.mean[i], cycle.std[i], cycle.inverse[i], cycle.slope[i],
        cycle.offset[i], cycle.center_high[i], cycle.center_low[i], cycle.inverse_width[i]);
  }
}

// Past the caches whole lines of float32 alone: results of 16 bits take no less time so.
template <class T>
void convert_cycles(const NormalizeArgs& args, Way way, const uint8_t* in, T* out, int64_t count,
                    const Cycle& cycle, bool past_caches) {
  constexpr int64_t kLineValues = kLineBytes / sizeof(T);
  const bool on_lines =
      reinterpret_cast<uintptr_t>(out) % kLineBytes == 0 && count % kLineValues == 0;
  with_steps(args.arithmetic, way, [&](auto arithmetic, auto way) {
    for (int64_t begin = 0; begin < count; begin += cycle.period) {
      const int64_t left = count - begin, length = left < cycle.period ? left : cycle.period;
      const auto compute = [&](float* to) {
        compute_cycle<arithmetic.value, way.value>(in + begin, to, length, args.scale, cycle);
      };
      if constexpr (std::is_same_v<T, float>) {
        if (!past_caches || !on_lines) {
          compute(out + begin);
          continue;
        }
      }
      alignas(kLineBytes) float values[Cycle::kCapacity];
      compute(values);
      if constexpr (std::is_same_v<T, float>) {
        for (int64_t i = 0; i < length; i += kLineValues) store_line(out + begin + i, values + i);
      } else {
        round_run<way.value>(values, out + begin, static_cast<int>(length));
      }
    }
  });
}

// Bytes unchanged; they may be where they belong already.
void convert_cycles(const NormalizeArgs&, Way, const uint8_t* in, uint8_t* out, int64_t count,
                    const Cycle&, bool) {
  if (in != out) __builtin_memcpy(out, in, static_cast<size_t>(count));
}

// --- planar results: one channel ---

// So many values are read at once, as whole numbers of 32 bits.
constexpr int kAtOnce = 16;

// Where they are read from: bytes that lie side by side.
struct Bytes {
  const uint8_t* in;
  static constexpr bool ends = false;  // for what PixelBytes has it

  void read(int64_t i, int32_t* values) const {
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    _mm512_storeu_si512(values, _mm512_maskz_cvtepu8_epi32(0xffff, bytes));
#elif defined(__AVX2__)
    for (int j = 0; j < kAtOnce; j += 8) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in + i + j));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + j), _mm256_cvtepu8_epi32(bytes));
    }
#else
    for (int j = 0; j < kAtOnce; ++j) values[j] = in[i + j];
#endif
  }
  int32_t last(int64_t i) const { return in[i]; }
};

#if defined(__AVX512BW__)
// 16 pixels of `step` bytes, 3 or 4, four of them at the beginning of each lane. `whole`: all bytes
// of the last one are there.
template <int step, bool whole>
inline __m512i load_pixels(const uint8_t* in) {
  if constexpr (step == 3) {
    return _mm512_maskz_permutexvar_epi32(
        0xffff, _mm512_setr_epi32(0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12),
        _mm512_maskz_loadu_epi32(0x0fff, in));
  } else {
    return whole ? _mm512_loadu_si512(in) : _mm512_maskz_loadu_epi8(~uint64_t{0} >> 1, in);
  }
}
#endif

// Or one byte of each pixel of `step` bytes, 3 or 4.
template <int step>
struct PixelBytes {
  const uint8_t* in;
  int place;  // of the channel in the pixel
  bool ends;  // whether memory may end before the fourth byte of the last pixel

  void read(int64_t i, int32_t* values) const {
    const uint8_t* pixels = in + step * i;
#if defined(__AVX512BW__)
    const __m512i order = _mm512_maskz_broadcast_i32x4(0xffff, places(0));
    _mm512_storeu_si512(values, _mm512_shuffle_epi8(load_pixels<step, true>(pixels), order));
#elif defined(__AVX2__)
    // Of pixels of three bytes the upper four of eight end where the bytes end that are read.
    const __m256i order = _mm256_set_m128i(places(16 - 4 * step), places(0));
    for (int j = 0; j < kAtOnce; j += 8, pixels += 8 * step) {
      const auto* lower = reinterpret_cast<const __m128i*>(pixels);
      const auto* upper = reinterpret_cast<const __m128i*>(pixels + 8 * step - 16);
      const __m256i lanes = _mm256_loadu2_m128i(upper, lower);
      const __m256i spread = _mm256_shuffle_epi8(lanes, order);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + j), spread);
    }
#else
    // As words, of the byte order that every machine with loops here has.
    static_assert(step == 4);
    for (int j = 0; j < kAtOnce; ++j) {
      uint32_t word;
      __builtin_memcpy(&word, pixels + 4 * j, sizeof word);
      values[j] = static_cast<int32_t>(word >> (8 * place) & 255u);
    }
#endif
  }
  int32_t last(int64_t i) const { return in[step * i + place]; }

#if defined(__AVX2__)
 private:
  // Where the lowest bytes of four numbers are in a lane; the others, with the highest bit, are 0.
  __m128i places(int skipped) const {
    const int first = static_cast<int>(0x80808000) + skipped + place;
    return _mm_setr_epi32(first, first + step, first + 2 * step, first + 3 * step);
  }
#endif
};

// Whether pixels of 3 bytes can be read so; otherwise their channels are brought apart first.
#if defined(__AVX2__)
constexpr bool kReadsTriples = true;
#else
constexpr bool kReadsTriples = false;
#endif

// Rounds and stores `count` values, whole lines if past the caches.
template <Way way, bool past_caches, int count, class T>
inline void store_some(const float* values, T* out) {
  alignas(kLineBytes) T results[count];
  round_run<way>(values, results, count);
  // Line by line, which the compiler keeps in registers.
  constexpr int kLineValues = kLineBytes / sizeof(T),
                kStep = count < kLineValues ? count : kLineValues;
  static_assert(!past_caches || count % kLineValues == 0);
  for (int64_t i = 0; i < count; i += kStep) {
    if constexpr (past_caches) {
      store_line(out + i, results + i);
    } else {
      __builtin_memcpy(out + i, results + i, kStep * sizeof(T));
    }
  }
}

template <Arithmetic arithmetic, Way way, bool past_caches, class From, class T>
void compute_channel(const From from, T* __restrict out, int64_t count, float scale,
                     const Channel& channel) {
  constexpr int kLineValues = kLineBytes / sizeof(T), kSome = 32;
  const auto value = normalizer<arithmetic, way>(scale, channel);
  const auto compute_some = [&](int64_t first, auto some) {
    alignas(kLineBytes) float values[some.value];
    for (int64_t j = 0; j < some.value; j += kAtOnce) {
      int32_t bytes[kAtOnce];
      from.read(first + j, bytes);
      for (int k = 0; k < kAtOnce; ++k) values[j + k] = value(bytes[k]);
    }
    store_some<way, past_caches, some.value>(values, out + first);
  };
  const int64_t sure = count - (from.ends ? 1 : 0);
  int64_t i = 0;
  for (; i + kSome <= sure; i += kSome) compute_some(i, std::integral_constant<int, kSome>{});
  if constexpr (!past_caches || kAtOnce % kLineValues == 0) {
    for (; i + kAtOnce <= sure; i += kAtOnce) {
      compute_some(i, std::integral_constant<int, kAtOnce>{});
    }
  }
  if constexpr (past_caches) {
    // The last lines, too: each that is stored the usual way waits until it has been read.
    for (; i + kLineValues <= count; i += kLineValues) {
      alignas(kLineBytes) float values[kLineValues];
      for (int64_t j = 0; j < kLineValues; ++j) values[j] = value(from.last(i + j));
      store_some<way, past_caches, kLineValues>(values, out + i);
    }
  }
  for (; i < count; ++i) out[i] = rounded<way, T>(value(from.last(i)));
}

template <class From, class T>
void convert_channel(const NormalizeArgs& args, Way way, const From from, T* out, int64_t count,
                     const Channel& channel, bool past_caches) {
  with_steps(args.arithmetic, way, [&](auto arithmetic, auto way) {
    if (past_caches) {
      compute_channel<arithmetic.value, way.value, kCanPassCaches>(from, out, count, args.scale,
                                                                   channel);
    } else {
      compute_channel<arithmetic.value, way.value, false>(from, out, count, args.scale, channel);
    }
  });
}

// Bytes unchanged; they may be where they belong already.
void convert_channel(const NormalizeArgs&, Way, const Bytes from, uint8_t* out, int64_t count,
                     const Channel&, bool) {
  if (from.in != out) __builtin_memcpy(out, from.in, static_cast<size_t>(count));
}

// --- ways ---

inline float nudged(float value, int steps) {
  return float_of(bits_of(value) + static_cast<uint32_t>(steps));
}

// Whether a way gives what the steps give, for every value of a channel.
template <class T>
bool is_exact(const NormalizeArgs& args, Way way, const Channel& channel, const T (&exact)[256],
              const uint8_t (&bytes)[256]) {
  alignas(64) T results[256];
  convert_channel(args, way, Bytes{bytes}, results, 256, channel, false);
  return __builtin_memcmp(results, exact, sizeof exact) == 0;
}

// The shortest way that is exact for all channels. Types of 16 bits round the errors of the fused
// way off; where one value falls on the other side of a half, a slope or an offset next to the
// nearest ones may do.
template <class T>
Way try_ways(const NormalizeArgs& args, Channel* channels) {
  constexpr int kSlopeSteps[] = {0, 1, -1}, kOffsetSteps[] = {0, 1, -1, 2, -2, 3, -3, 4, -4};
  if (!kHasFusedMultiplyAdd) return Way::steps;
  uint8_t bytes[256];
  for (int x = 0; x < 256; ++x) bytes[x] = static_cast<uint8_t>(x);
  bool fused = true, inverses = true;
  for (int64_t c = 0; c < args.sizes[1] && (fused || inverses); ++c) {
    Channel& channel = channels[c];
    alignas(64) T exact[256];
    convert_channel(args, Way::steps, Bytes{bytes}, exact, 256, channel, false);
    inverses = inverses && is_exact(args, Way::inverses, channel, exact, bytes);
    if (!fused) continue;
    const float slope = channel.slope, offset = channel.offset;
    fused = is_exact(args, Way::fused, channel, exact, bytes);
    for (int k = 1; sizeof(T) == 2 && k < 27 && !fused; ++k) {
      channel.slope = nudged(slope, kSlopeSteps[k / 9]);
      channel.offset = nudged(offset, kOffsetSteps[k % 9]);
      fused = is_exact(args, Way::fused, channel, exact, bytes);
    }
  }
  return fused ? Way::fused : inverses ? Way::inverses : Way::steps;
}

// Whether the results of a channel lie side by side, or those of a pixel.
inline bool is_planar(const NormalizeArgs& args) {
  return args.output_strides[3] == 1 || args.sizes[3] == 1;
}
inline bool is_interleaved(const NormalizeArgs& args) {
  return !is_planar(args) && args.sizes[1] <= Cycle::kMaxChannels && args.output_strides[1] == 1 &&
         args.output_strides[3] == args.sizes[1];
}

// Whether every row of every plane begins and ends where a line does.
template <class T>
inline bool on_lines(const NormalizeArgs& args) {
  uintptr_t offsets = reinterpret_cast<uintptr_t>(args.output);
  for (int d = 0; d < 4; ++d) {
    const int64_t elements = d < 3 ? args.output_strides[d] : args.sizes[3];
    if (args.sizes[d] > 1) offsets |= static_cast<uintptr_t>(elements) * sizeof(T);
  }
  return offsets % kLineBytes == 0;
}

// --- order: bytes into the order of the output ---

constexpr int kMaxGroup = 4;  // channels that are brought apart together

template <int channels, int step>
void deinterleave(const uint8_t* __restrict in, uint8_t* const (&runs)[kMaxGroup], int64_t count) {
  uint8_t* __restrict run0 = runs[0], * __restrict run1 = runs[1], * __restrict run2 = runs[2], * __restrict run3 = runs[3];
  int64_t i = 0;
#if defined(__AVX512BW__)
  const __m512i by_channel = _mm512_maskz_broadcast_i32x4(
      0xffff, step == 3 ? _mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1)
                        : _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i across = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (; i + 16 <= count; i += 16) {
    const __m512i pixels = load_pixels<step, channels == step>(in + step * i);
    const __m512i apart =
        _mm512_maskz_permutexvar_epi32(0xffff, across, _mm512_shuffle_epi8(pixels, by_channel));
    const auto store = [&](uint8_t* to, __m128i bytes) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), bytes);
    };
    store(run0, _mm512_maskz_extracti32x4_epi32(0xf, apart, 0));
    store(run1, _mm512_maskz_extracti32x4_epi32(0xf, apart, 1));
    store(run2, _mm512_maskz_extracti32x4_epi32(0xf, apart, 2));
    if constexpr (channels == 4) store(run3, _mm512_maskz_extracti32x4_epi32(0xf, apart, 3));
  }
#endif
  for (; i < count; ++i) {
    run0[i] = in[step * i];
    run1[i] = in[step * i + 1];
    run2[i] = in[step * i + 2];
    if constexpr (channels == 4) run3[i] = in[step * i + 3];
  }
}

template <int channels>
void interleave(const uint8_t* __restrict in, int64_t channel_stride, uint8_t* __restrict pixels,
                int64_t count) {
  const uint8_t *plane1 = in + channel_stride, *plane2 = plane1 + channel_stride,
                *plane3 = plane2 + channel_stride;
  for (int64_t i = 0; i < count; ++i) {
    pixels[channels * i] = in[i];
    pixels[channels * i + 1] = plane1[i];
    pixels[channels * i + 2] = plane2[i];
    if constexpr (channels == 4) pixels[channels * i + 3] = plane3[i];
  }
}

// From pixels of `step` bytes to pixels of `channels` bytes, for the two ways to go through the
// pixels and through the channels of one. gcc does not vectorize what turns groups of three around,
// so the shuffle is spelled out: 16 bytes at a time, as many pixels as are whole in them. They are
// read forwards, as memory is prefetched, and written backwards if mirrored.
template <int channels, int step, bool mirrored, bool backward>
struct PixelOrder {
  using Bytes = uint8_t __attribute__((vector_size(16)));
  static constexpr int kPixels = 16 / step;

  // The place of channel c in a pixel that is read.
  static constexpr int place(int c) { return backward ? channels - 1 - c : c; }

  static void run(const uint8_t* __restrict in, uint8_t* __restrict out, int64_t count) {
    // Of the 16 bytes that are written, those that are not meant lie where the next ones go.
    constexpr int kUnused = 16 - channels * kPixels;
    Bytes order;
    for (int b = 0; b < 16; ++b) {
      const int used = mirrored ? b - kUnused : b;
      const int pixel = used / channels, c = used % channels;
      const bool meant = used >= 0 && pixel < kPixels;
      order[b] = static_cast<uint8_t>(
          meant ? step * (mirrored ? kPixels - 1 - pixel : pixel) + place(c) : 0);
    }
    int64_t i = 0;
    for (; (count - i) * channels >= 16 && (count - i) * step >= 16; i += kPixels) {
      Bytes bytes;
      __builtin_memcpy(&bytes, in + step * i, sizeof bytes);
      bytes = __builtin_shuffle(bytes, order);
      uint8_t* to = out + (mirrored ? channels * (count - i) - 16 : channels * i);
      __builtin_memcpy(to, &bytes, sizeof bytes);
    }
    for (; i < count; ++i) {
      uint8_t* to = out + channels * (mirrored ? count - 1 - i : i);
      for (int c = 0; c < channels; ++c) to[c] = in[step * i + place(c)];
    }
  }
};

template <int channels, int step>
void order_pixels(const uint8_t* in, uint8_t* out, int64_t count, bool mirrored, bool backward) {
  if (mirrored) {
    return backward ? PixelOrder<channels, step, true, true>::run(in, out, count)
                    : PixelOrder<channels, step, true, false>::run(in, out, count);
  }
  return backward ? PixelOrder<channels, step, false, true>::run(in, out, count)
                  : PixelOrder<channels, step, false, false>::run(in, out, count);
}

void gather(const uint8_t* __restrict in, int64_t in_step, uint8_t* __restrict out,
            int64_t out_step, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i * out_step] = in[i * in_step];
}

void reverse(const uint8_t* __restrict in, uint8_t* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = in[count - 1 - i];
}

// Where the `count` pixels of a block lie: from the lowest address on, and whether that is the last
// pixel of the output.
struct Pixels {
  const uint8_t* lowest;
  int64_t step;
  bool mirrored;
};

inline Pixels pixels_of(const NormalizeArgs& args, const uint8_t* in, int64_t count) {
  const int64_t step = args.image_strides[3];
  if (step >= 0) return {in, step, false};
  return {in + (count - 1) * step, -step, true};
}

// --- what is prepared once for the channels ---

constexpr int64_t kPreparedChannels = Cycle::kMaxChannels;

// Trying the ways costs several times 256 conversions; it pays when many more pixels use them.
constexpr int64_t kTriedPixels = 2048;

Channel channel_of(const NormalizeArgs& args, int64_t c) {
  Channel channel{args.channels[c], 0.0f, 0.0f, 0.0f};
  channel.inverse = 1.0f / channel.std;
  channel.slope = static_cast<float>(channel.inverse_width);
  const double center = channel.center_high + channel.center_low;
  channel.offset = static_cast<float>(-center * channel.inverse_width);
  return channel;
}

void fill_cycle(const Channel* channels, int64_t count, Cycle& cycle) {
  cycle.period = count * Cycle::kPixels;
  for (int64_t c = 0; c < count; ++c) {
    const Channel& channel = channels[c];
    for (int64_t i = c; i < cycle.period; i += count) {
      cycle.mean[i] = channel.mean;
      cycle.std[i] = channel.std;
      cycle.inverse[i] = channel.inverse;
      cycle.slope[i] = channel.slope;
      cycle.offset[i] = channel.offset;
      cycle.center_high[i] = channel.center_high;
      cycle.center_low[i] = channel.center_low;
      cycle.inverse_width[i] = channel.inverse_width;
    }
  }
}

template <class T>
struct Prepared {
  Way way = Way::steps;
  Channel channels[kPreparedChannels];  // where there are not more of them
  Cycle cycle;                          // where the results of a pixel lie side by side

  Prepared(const NormalizeArgs& args, int64_t pixels) {
    const int64_t count = args.sizes[1];
    if (sizeof(T) == 1 || count > kPreparedChannels) return;
    for (int64_t c = 0; c < count; ++c) channels[c] = channel_of(args, c);
    if constexpr (sizeof(T) > 1) {
      if (pixels >= kTriedPixels) way = try_ways<T>(args, channels);
    }
    if (args.output_strides[1] == 1) fill_cycle(channels, count, cycle);
  }
};

// --- one block ---

// Bytes of a channel can go to where they belong at once, if no arithmetic is between.
inline uint8_t* bytes_of(uint8_t* out) { return out; }
template <class T>
inline uint8_t* bytes_of(T*) {
  return nullptr;
}

// Planes up to this size that are read where they lie are converted one after the other, whole: the
// batch is then read and written from end to end. Larger ones take turns, block by block: beyond
// the caches several streams through memory are faster than one.
constexpr int64_t kWholePlanePixels = 16384;

// How far ahead of the pixels memory is asked for what is read next: a page, as processors look no
// further by themselves; where rows do not follow each other, the same columns of rows to come.
int64_t bytes_ahead(const NormalizeArgs& args) {
  constexpr int64_t kPageBytes = 4096;
  const int64_t row = args.image_strides[2], length = row < 0 ? -row : row;
  if (args.sizes[2] == 1 || row == 0) return kPageBytes;
  return (kPageBytes + length - 1) / length * row;
}

// The results of a channel lie side by side.
template <class T>
void normalize_planar(const NormalizeArgs& args, const uint8_t* in, T* out, int64_t count,
                      const Prepared<T>& prepared, bool past_caches, bool ends, int64_t ahead) {
  const int64_t channels = args.sizes[1];
  const int64_t in_channel = args.image_strides[1];
  const int group = channels == 3 || channels == 4 ? static_cast<int>(channels) : 1;
  const int distinct = in_channel == 0 ? 1 : group;  // one channel, repeated
  const Pixels pixels = pixels_of(args, in, count);
  const bool forward = in_channel == 1, backward = in_channel == -1;  // within the pixel
  const uint8_t* const lowest = pixels.lowest - (backward ? group - 1 : 0);
  const uintptr_t next = reinterpret_cast<uintptr_t>(lowest) + static_cast<uintptr_t>(ahead);
  const int64_t bytes_here = count * pixels.step;
  if constexpr (sizeof(T) > 1) {
    const bool triples = kReadsTriples && pixels.step == 3 && group == 3;
    if (group == channels && group > 1 && (forward || backward) && !pixels.mirrored &&
        (pixels.step == 4 || triples)) {
      for (int k = 0; k < group; ++k) {
        // The pixels are read once per channel, of which only the first waits for memory.
        const int64_t part = bytes_here * k / group, next_part = bytes_here * (k + 1) / group;
        read_ahead(next + static_cast<uintptr_t>(part), next_part - part);
        const int place = backward ? group - 1 - k : k;
        T* target = out + k * args.output_strides[1];
        const Channel& channel = prepared.channels[k];
        if (pixels.step == 4) {
          const PixelBytes<4> bytes{lowest, place, ends && group < 4};
          convert_channel(args, prepared.way, bytes, target, count, channel, past_caches);
        } else if constexpr (kReadsTriples) {
          const PixelBytes<3> bytes{lowest, place, false};
          convert_channel(args, prepared.way, bytes, target, count, channel, past_caches);
        }
      }
      return;
    }
  }

  alignas(64) uint8_t runs[kMaxGroup][kMaxBlockPixels];
  alignas(64) uint8_t turned[kMaxGroup][kMaxBlockPixels];

  for (int64_t first = 0; first < channels; first += group) {
    const uint8_t* source[kMaxGroup];
    uint8_t *staged[kMaxGroup], *ordered[kMaxGroup];
    for (int k = 0; k < kMaxGroup; ++k) {
      uint8_t* final = k < group ? bytes_of(out + (first + k) * args.output_strides[1]) : nullptr;
      ordered[k] = final != nullptr ? final : turned[k];
      staged[k] = final != nullptr && !pixels.mirrored ? final : runs[k];
      source[k] = staged[k];
    }
    // BGR is RGB with the runs named the other way round.
    uint8_t* apart[kMaxGroup] = {staged[0], staged[1], staged[2], staged[3]};
    for (int k = 0; k < group && backward; ++k) apart[k] = staged[group - 1 - k];
    if (pixels.step > 1 && first == 0) read_ahead(next, bytes_here);
    if (pixels.step == 1) {
      for (int k = 0; k < distinct; ++k) source[k] = pixels.lowest + (first + k) * in_channel;
    } else if (group == 3 && (forward || backward) && pixels.step == 3) {
      deinterleave<3, 3>(lowest, apart, count);
    } else if (group == 3 && (forward || backward) && pixels.step == 4) {
      deinterleave<3, 4>(lowest, apart, count);
    } else if (group == 4 && (forward || backward) && pixels.step == 4) {
      deinterleave<4, 4>(lowest, apart, count);
    } else {
      for (int k = 0; k < distinct; ++k) {
        gather(pixels.lowest + (first + k) * in_channel, pixels.step, staged[k], 1, count);
      }
    }
    for (int k = 0; k < distinct && pixels.mirrored; ++k) {
      reverse(source[k], ordered[k], count);
      source[k] = ordered[k];
    }
    for (int k = 0; k < group; ++k) {
      const int64_t c = first + k;
      const uint8_t* bytes = source[k < distinct ? k : 0];
      T* target = out + c * args.output_strides[1];
      convert_channel(args, prepared.way, Bytes{bytes}, target, count,
                      channels <= kPreparedChannels ? prepared.channels[c] : channel_of(args, c),
                      past_caches);
    }
  }
}

// The results of a pixel lie side by side.
template <class T>
void normalize_interleaved(const NormalizeArgs& args, const uint8_t* in, T* out, int64_t count,
                           const Prepared<T>& prepared, bool past_caches, int64_t ahead) {
  const int64_t channels = args.sizes[1], in_channel = args.image_strides[1];
  const Pixels from = pixels_of(args, in, count);
  const bool backward = in_channel == -1;
  const bool together = in_channel == 1 || backward;  // the channels of a pixel
  const uint8_t* lowest = from.lowest - (backward ? channels - 1 : 0);
  if (sizeof(T) == 1 && together) {  // else the results take longer than the bytes
    read_ahead(reinterpret_cast<uintptr_t>(lowest) + static_cast<uintptr_t>(ahead),
               count * from.step);
  }
  alignas(64) uint8_t staged[Cycle::kMaxChannels * kMaxBlockPixels];
  // What is written backwards goes to the cache first.
  uint8_t* const pixels = bytes_of(out) != nullptr && !from.mirrored ? bytes_of(out) : staged;

  const uint8_t* source = pixels;
  if (in_channel == 1 && from.step == channels && !from.mirrored) {
    source = in;
  } else if (channels == 3 && together && from.step == 3) {
    order_pixels<3, 3>(lowest, pixels, count, from.mirrored, backward);
  } else if (channels == 3 && together && from.step == 4) {
    order_pixels<3, 4>(lowest, pixels, count, from.mirrored, backward);
  } else if (channels == 4 && together && from.step == 4) {
    order_pixels<4, 4>(lowest, pixels, count, from.mirrored, backward);
  } else if ((channels == 3 || channels == 4) && from.step == 1) {
    alignas(64) uint8_t runs[kMaxGroup][kMaxBlockPixels];
    const uint8_t* planes = from.lowest;
    int64_t plane_stride = in_channel;
    if (from.mirrored) {
      const int64_t distinct = in_channel == 0 ? 1 : channels;
      for (int64_t c = 0; c < distinct; ++c) reverse(planes + c * in_channel, runs[c], count);
      planes = runs[0];
      plane_stride = in_channel == 0 ? 0 : kMaxBlockPixels;
    }
    if (channels == 3) {
      interleave<3>(planes, plane_stride, pixels, count);
    } else {
      interleave<4>(planes, plane_stride, pixels, count);
    }
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      gather(in + c * in_channel, args.image_strides[3], pixels + c, channels, count);
    }
  }
  convert_cycles(args, prepared.way, source, out, count * channels, prepared.cycle, past_caches);
}

// Any strides, for channels beyond what a Cycle holds.
template <class T>
void normalize_strided(const NormalizeArgs& args, const uint8_t* in, T* out, int64_t count) {
  alignas(64) uint8_t run[kMaxBlockPixels];
  alignas(64) T results[kMaxBlockPixels];
  for (int64_t c = 0; c < args.sizes[1]; ++c) {
    gather(in + c * args.image_strides[1], args.image_strides[3], run, 1, count);
    convert_channel(args, Way::steps, Bytes{run}, results, count, channel_of(args, c), false);
    T* target = out + c * args.output_strides[1];
    for (int64_t i = 0; i < count; ++i) target[i * args.output_strides[3]] = results[i];
  }
}

template <class T>
void normalize_blocks(const NormalizeArgs& args, int64_t first, int64_t last,
                      const Prepared<T>& prepared) {
  const int64_t width = args.sizes[3];
  const bool planar = is_planar(args), interleaved = is_interleaved(args);
  const bool past_caches =
      kCanPassCaches && args.past_caches && sizeof(T) > 1 && (!planar || on_lines<T>(args));
  const int64_t per_row = blocks_per_row(args), pixels = block_pixels(args);
  const int64_t ahead = bytes_ahead(args);
  const bool whole_planes = planar && args.image_strides[3] == 1 && width <= kWholePlanePixels;
  for (int64_t block = first, blocks; block < last; block += blocks) {
    const int64_t row = block / per_row;
    const int64_t left_in_row = per_row - block % per_row, left = last - block;
    blocks = !whole_planes ? 1 : left < left_in_row ? left : left_in_row;
    const int64_t n = row / args.sizes[2], h = row % args.sizes[2];
    const int64_t w = (block % per_row) * pixels;
    const int64_t count = width - w < blocks * pixels ? width - w : blocks * pixels;
    const uint8_t* in = args.images + n * args.image_strides[0] + h * args.image_strides[2] +
                        w * args.image_strides[3];
    T* out = static_cast<T*>(args.output) + n * args.output_strides[0] +
             h * args.output_strides[2] + w * args.output_strides[3];
    // Whether no pixel of the image lies behind the block.
    const bool ends = w + count == width && (h + 1 == args.sizes[2] || args.image_strides[2] <= 0);
    if (planar) {
      normalize_planar(args, in, out, count, prepared, past_caches, ends, ahead);
    } else if (interleaved) {
      normalize_interleaved(args, in, out, count, prepared, past_caches, ahead);
    } else {
      normalize_strided(args, in, out, count);
    }
  }
  if (past_caches) finish_past_caches();
}

template <class T>
void normalize_range(const NormalizeArgs& args, int64_t first, int64_t last) {
  const int64_t most = block_pixels(args), pixels = args.sizes[3] < most ? args.sizes[3] : most;
  normalize_blocks(args, first, last, Prepared<T>(args, (last - first) * pixels));
}

template <class T>
void normalize_all(const NormalizeArgs* parts, int64_t count) {
  int64_t pixels = 0;
  for (int64_t i = 0; i < count; ++i) {
    pixels += parts[i].sizes[0] * parts[i].sizes[2] * parts[i].sizes[3];
  }
  const Prepared<T> prepared(parts[0], pixels);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t blocks = parts[i].sizes[0] * parts[i].sizes[2] * blocks_per_row(parts[i]);
    normalize_blocks(parts[i], 0, blocks, prepared);
  }
}

}  // namespace

void normalize_loop(const NormalizeArgs& args, int64_t first, int64_t last) {
  switch (args.dtype) {
    case ElementType::float32:
      return normalize_range<float>(args, first, last);
    case ElementType::float16:
      return normalize_range<Float16>(args, first, last);
    case ElementType::bfloat16:
      return normalize_range<BFloat16>(args, first, last);
    case ElementType::uint8:
      return normalize_range<uint8_t>(args, first, last);
  }
}

void normalize_parts(const NormalizeArgs* parts, int64_t count) {
  if (count == 0) return;
  switch (parts[0].dtype) {
    case ElementType::float32:
      return normalize_all<float>(parts, count);
    case ElementType::float16:
      return normalize_all<Float16>(parts, count);
    case ElementType::bfloat16:
      return normalize_all<BFloat16>(parts, count);
    case ElementType::uint8:
      return normalize_all<uint8_t>(parts, count);
  }
}

}  // namespace pixfuse::PIXFUSE_ISA
