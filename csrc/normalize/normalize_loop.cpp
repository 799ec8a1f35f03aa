// The loops over pixels. Compiled once per instruction set, with PIXFUSE_ISA naming its namespace
// and -ffp-contract=off, since each step of the arithmetic is rounded.
//
// A block goes through two plain loops, which the compiler vectorizes: bring its bytes into the
// order of the output, then convert them, straight into the output. The first is left out where the
// order is right already. What lies between the two stays in the first-level cache. Where pixels
// are read backwards (a mirrored image), they are brought into order forwards, from the lowest
// address on, and turned around in the cache.
#include "normalize/normalize_loop.h"

#include <stddef.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pixfuse::PIXFUSE_ISA {
namespace {

// The constants of neighbouring results of an interleaved output: those of the channels, over and
// over, for a whole number of pixels.
struct Cycle {
  static constexpr int64_t kCapacity = 1024;
  static constexpr int64_t kPixels = 64;  // so that the period is a multiple of every vector width
  static constexpr int64_t kMaxChannels = kCapacity / kPixels;

  int64_t period = 0;
  alignas(64) float mean[kCapacity];
  alignas(64) float std[kCapacity];
  alignas(64) float inverse[kCapacity];  // of std
  bool by_inverse = false;
  alignas(64) double center_high[kCapacity];
  alignas(64) double center_low[kCapacity];
  alignas(64) double inverse_width[kCapacity];
};

// --- convert ---

// A division takes longer than all else together, on some processors longer than memory. With the
// inverse of the divisor a product is near the quotient, and what it leaves of the dividend, which
// a fused multiply-add gives exactly, corrects it: to the very quotient, rounded once, with rare
// exceptions (Markstein, Computation of elementary functions on the IBM RISC System/6000, 1990).
// There are 256 dividends, so whether there is an exception is not believed but tried.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr bool kHasFusedMultiplyAdd = true;
#else
constexpr bool kHasFusedMultiplyAdd = false;
#endif

template <bool by_inverse>
inline float quotient(float dividend, float divisor, float inverse) {
  if constexpr (by_inverse && kHasFusedMultiplyAdd) {
    const float near = dividend * inverse;
    const float rest = __builtin_fmaf(-near, divisor, dividend);
    return __builtin_fmaf(rest, inverse, near);
  }
  return dividend / divisor;
}

template <Arithmetic arithmetic, bool by_inverse>
inline float normalize_value(int32_t x, float scale, float mean, float std, float inverse,
                             double center_high, double center_low, double inverse_width) {
  if constexpr (arithmetic == Arithmetic::multiply) {
    return quotient<by_inverse>((static_cast<float>(x) * scale) - mean, std, inverse);
  } else if constexpr (arithmetic == Arithmetic::divide) {
    const float unit = quotient<by_inverse>(static_cast<float>(x), 255.0f, 1.0f / 255.0f);
    return quotient<by_inverse>(unit - mean, std, inverse);
  } else {
    const double centered = (static_cast<double>(x) - center_high) - center_low;
    return static_cast<float>(centered * inverse_width);
  }
}

// What is known of one channel.
struct Channel : ChannelConstants {
  float inverse;  // of std
  bool by_inverse;

  Channel(const ChannelConstants& constants, bool by_inverse)
      : ChannelConstants(constants), inverse(1.0f / constants.std), by_inverse(by_inverse) {}
};

// `count` bytes of one channel.
template <Arithmetic arithmetic, bool by_inverse, class T>
void compute_values(const uint8_t* __restrict in, T* __restrict out, int64_t count, float scale,
                    const Channel& channel) {
  const Channel c = channel;  // a local: `out` cannot alias it
  for (int64_t i = 0; i < count; ++i) {
    out[i] = round_to<T>(normalize_value<arithmetic, by_inverse>(
        in[i], scale, c.mean, c.std, c.inverse, c.center_high, c.center_low, c.inverse_width));
  }
}

// `count` bytes of all channels in turn.
template <Arithmetic arithmetic, bool by_inverse, class T>
void compute_values(const uint8_t* __restrict in, T* __restrict out, int64_t count, float scale,
                    const Cycle& __restrict cycle) {
  for (int64_t begin = 0; begin < count; begin += cycle.period) {
    const int64_t left = count - begin;
    const int64_t length = left < cycle.period ? left : cycle.period;
    for (int64_t i = 0; i < length; ++i) {
      out[begin + i] = round_to<T>(normalize_value<arithmetic, by_inverse>(
          in[begin + i], scale, cycle.mean[i], cycle.std[i], cycle.inverse[i], cycle.center_high[i],
          cycle.center_low[i], cycle.inverse_width[i]));
    }
  }
}

// `Constants` are those of one Channel, or the Cycle of all.
template <bool by_inverse, class T, class Constants>
void compute(const NormalizeArgs& args, const uint8_t* in, T* out, int64_t count,
             const Constants& constants) {
  switch (args.arithmetic) {
    case Arithmetic::multiply:
      return compute_values<Arithmetic::multiply, by_inverse>(in, out, count, args.scale,
                                                              constants);
    case Arithmetic::divide:
      return compute_values<Arithmetic::divide, by_inverse>(in, out, count, args.scale, constants);
    case Arithmetic::nearest:
      return compute_values<Arithmetic::nearest, false>(in, out, count, args.scale, constants);
  }
}

template <class T, class Constants>
void compute(const NormalizeArgs& args, const uint8_t* in, T* out, int64_t count,
             const Constants& constants) {
  if (constants.by_inverse) return compute<true>(args, in, out, count, constants);
  compute<false>(args, in, out, count, constants);
}

// Whether the inverses give what the divisions give, for every value of every channel.
bool inverses_are_exact(const NormalizeArgs& args) {
  uint8_t bytes[256];
  for (int x = 0; x < 256; ++x) bytes[x] = static_cast<uint8_t>(x);
  for (int64_t c = 0; c < args.sizes[1]; ++c) {
    alignas(64) float divided[256], multiplied[256];
    compute(args, bytes, divided, 256, Channel(args.channels[c], false));
    compute(args, bytes, multiplied, 256, Channel(args.channels[c], true));
    uint32_t difference = 0;
    for (int x = 0; x < 256; ++x) difference |= bits_of(divided[x]) ^ bits_of(multiplied[x]);
    if (difference != 0) return false;
  }
  return true;
}

template <class T, class Constants>
void convert(const NormalizeArgs& args, const uint8_t* in, T* out, int64_t count,
             const Constants& constants) {
  compute(args, in, out, count, constants);
}

// Bytes unchanged; they may be where they belong already.
template <class Constants>
void convert(const NormalizeArgs&, const uint8_t* in, uint8_t* out, int64_t count,
             const Constants&) {
  if (in != out) __builtin_memcpy(out, in, static_cast<size_t>(count));
}

#if defined(__F16C__)
// gcc does not vectorize the rounding to float16 with the instruction that does it, which takes a
// fraction of the time of the integer steps of round_to.
void round_run(const float* in, Float16* out, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i rounded = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), rounded);
  }
  for (; i < count; ++i) out[i] = round_to<Float16>(in[i]);
}

inline int64_t whole_period(const Channel&) { return Cycle::kCapacity; }
inline int64_t whole_period(const Cycle& cycle) { return cycle.period; }

template <class Constants>
void convert(const NormalizeArgs& args, const uint8_t* in, Float16* out, int64_t count,
             const Constants& constants) {
  alignas(64) float values[Cycle::kCapacity];
  const int64_t step = whole_period(constants);
  for (int64_t begin = 0; begin < count; begin += step) {
    const int64_t left = count - begin, length = left < step ? left : step;
    compute(args, in + begin, values, length, constants);
    round_run(values, out + begin, length);
  }
}
#endif

#if defined(__AVX512BW__)
// A table of 16-bit results fits in eight registers of 32 entries; two-register permutes look up 64
// of them at a time, in less time than it takes to compute and round as many.
inline __m512i lookup_64(__m512i low, __m512i high, __m512i index) {
  return _mm512_permutex2var_epi16(low, index, high);  // uses the low 6 bits of each index
}

constexpr bool kHasLookup = true;

void lookup_run(const uint8_t* in, uint16_t* out, int64_t count, const uint16_t* table) {
  __m512i entries[8];
  for (int i = 0; i < 8; ++i) entries[i] = _mm512_loadu_si512(table + 32 * i);
  const __m512i bit6 = _mm512_set1_epi16(64), bit7 = _mm512_set1_epi16(128);
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i));
    const __m512i index = _mm512_cvtepu8_epi16(bytes);
    const __mmask32 in_odd_quarter = _mm512_test_epi16_mask(index, bit6);
    const __mmask32 in_upper_half = _mm512_test_epi16_mask(index, bit7);
    const __m512i lower =
        _mm512_mask_blend_epi16(in_odd_quarter, lookup_64(entries[0], entries[1], index),
                                lookup_64(entries[2], entries[3], index));
    const __m512i upper =
        _mm512_mask_blend_epi16(in_odd_quarter, lookup_64(entries[4], entries[5], index),
                                lookup_64(entries[6], entries[7], index));
    _mm512_storeu_si512(out + i, _mm512_mask_blend_epi16(in_upper_half, lower, upper));
  }
  for (; i < count; ++i) out[i] = table[in[i]];
}
#else
constexpr bool kHasLookup = false;

void lookup_run(const uint8_t*, uint16_t*, int64_t, const uint16_t*) {}
#endif

// A table costs 256 conversions, and so does trying the inverses; it pays when several times as
// many pixels use it.
constexpr int64_t kTablePixels = 1024;

// --- one channel of float32, and past the caches ---

// What the value of a pixel is read from: bytes that lie side by side, or pixels of 4 bytes, which
// are read as words (of the byte order that every machine with loops here has).
struct Bytes {
  const uint8_t* in;
  static constexpr bool ends = false;  // for what Words has it

  int32_t operator()(int64_t i) const { return in[i]; }
  int32_t last(int64_t i) const { return in[i]; }
};
struct Words {
  const uint8_t* in;
  int place;  // of the channel in the pixel
  bool ends;  // whether memory may end before the fourth byte of the last pixel

  int32_t operator()(int64_t i) const {
    uint32_t word;
    __builtin_memcpy(&word, in + 4 * i, sizeof word);
    return static_cast<int32_t>(word >> (8 * place) & 255u);
  }
  int32_t last(int64_t i) const { return in[4 * i + place]; }
};

// A line of the caches. Storing one past them saves reading it first; a line that is stored in part
// costs more than that, so such outputs lie on whole lines. Some lines are computed at a time.
constexpr int64_t kLineBytes = 64, kLineValues = kLineBytes / sizeof(float);
constexpr int64_t kSomeValues = 32;

#if defined(__AVX512F__)
constexpr bool kCanPassCaches = true;
inline void store_line(float* out, const float* line) {
  _mm512_stream_ps(out, _mm512_load_ps(line));
}
#elif defined(__AVX2__)
constexpr bool kCanPassCaches = true;
inline void store_line(float* out, const float* line) {
  for (int i = 0; i < kLineValues; i += 8) _mm256_stream_ps(out + i, _mm256_load_ps(line + i));
}
#else
constexpr bool kCanPassCaches = false;
inline void store_line(float*, const float*) {}
#endif

// Whoever is told that the work is done sees what was stored past the caches, too.
inline void finish_past_caches() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <Arithmetic arithmetic, bool by_inverse, bool past_caches, class Read>
void compute_channel(const Read read, float* __restrict out, int64_t count, float scale,
                     const Channel& channel) {
  const Channel c = channel;
  const auto value = [&](int32_t byte) {
    return normalize_value<arithmetic, by_inverse>(byte, scale, c.mean, c.std, c.inverse,
                                                   c.center_high, c.center_low, c.inverse_width);
  };
  const int64_t sure = count - (read.ends ? 1 : 0);
  int64_t i = 0;
  if constexpr (past_caches) {
    alignas(kLineBytes) float values[kSomeValues];
    for (; i + kSomeValues <= sure; i += kSomeValues) {
      for (int64_t j = 0; j < kSomeValues; ++j) values[j] = value(read(i + j));
      for (int64_t j = 0; j < kSomeValues; j += kLineValues) store_line(out + i + j, values + j);
    }
    // The last lines, too: each that is stored the usual way waits until it has been read.
    const int64_t rest = (count - i) / kLineValues * kLineValues;
    const int64_t sure_rest = rest < sure - i ? rest : sure - i;
    for (int64_t j = 0; j < sure_rest; ++j) values[j] = value(read(i + j));
    for (int64_t j = sure_rest; j < rest; ++j) values[j] = value(read.last(i + j));
    for (int64_t j = 0; j < rest; j += kLineValues) store_line(out + i + j, values + j);
    i += rest;
  }
  for (; i < sure; ++i) out[i] = value(read(i));
  for (; i < count; ++i) out[i] = value(read.last(i));
}

template <bool by_inverse, bool past_caches, class Read>
void convert_channel(const NormalizeArgs& args, const Read read, float* out, int64_t count,
                     const Channel& channel) {
  switch (args.arithmetic) {
    case Arithmetic::multiply:
      return compute_channel<Arithmetic::multiply, by_inverse, past_caches>(read, out, count,
                                                                            args.scale, channel);
    case Arithmetic::divide:
      return compute_channel<Arithmetic::divide, by_inverse, past_caches>(read, out, count,
                                                                          args.scale, channel);
    case Arithmetic::nearest:
      return compute_channel<Arithmetic::nearest, false, past_caches>(read, out, count, args.scale,
                                                                      channel);
  }
}

template <class Read>
void convert_channel(const NormalizeArgs& args, const Read read, float* out, int64_t count,
                     const Channel& channel, bool past_caches) {
  if (channel.by_inverse) {
    return past_caches ? convert_channel<true, kCanPassCaches>(args, read, out, count, channel)
                       : convert_channel<true, false>(args, read, out, count, channel);
  }
  return past_caches ? convert_channel<false, kCanPassCaches>(args, read, out, count, channel)
                     : convert_channel<false, false>(args, read, out, count, channel);
}

// Whether every row of every plane begins and ends where a line does.
inline bool on_lines(const NormalizeArgs& args) {
  uintptr_t offsets = reinterpret_cast<uintptr_t>(args.output);
  for (int d = 0; d < 4; ++d) {
    const int64_t elements = d < 3 ? args.output_strides[d] : args.sizes[3];
    if (args.sizes[d] > 1) offsets |= static_cast<uintptr_t>(elements) * sizeof(float);
  }
  return offsets % kLineBytes == 0;
}

// --- order: bytes into the order of the output ---

constexpr int kMaxGroup = 4;  // channels that are brought apart together

template <int channels, int step>
void deinterleave(const uint8_t* __restrict in, uint8_t* const (&runs)[kMaxGroup], int64_t count) {
  uint8_t* __restrict run0 = runs[0], * __restrict run1 = runs[1], * __restrict run2 = runs[2], * __restrict run3 = runs[3];
  for (int64_t i = 0; i < count; ++i) {
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

// --- one block ---

// Bytes of a channel can go to where they belong at once, if no arithmetic is between.
inline uint8_t* bytes_of(uint8_t* out) { return out; }
template <class T>
inline uint8_t* bytes_of(T*) {
  return nullptr;
}

inline float* float32_of(float* out) { return out; }
template <class T>
inline float* float32_of(T*) {
  return nullptr;
}

// Planes up to this size that are read where they lie are converted one after the other, whole: the
// batch is then read and written from end to end. Larger ones take turns, block by block: beyond
// the caches several streams through memory are faster than one.
constexpr int64_t kWholePlanePixels = 16384;

// The results of a channel lie side by side.
template <class T>
void normalize_planar(const NormalizeArgs& args, const uint8_t* in, T* out, int64_t count,
                      const uint16_t* table, bool by_inverse, bool past_caches, bool ends) {
  const int64_t channels = args.sizes[1];
  const int64_t in_channel = args.image_strides[1];
  const int group = channels == 3 || channels == 4 ? static_cast<int>(channels) : 1;
  const int distinct = in_channel == 0 ? 1 : group;  // one channel, repeated
  const Pixels pixels = pixels_of(args, in, count);
  const bool forward = in_channel == 1, backward = in_channel == -1;  // within the pixel
  float* const float32 = float32_of(out);
  if (float32 != nullptr && group == channels && group > 1 && (forward || backward) &&
      pixels.step == 4 && !pixels.mirrored) {
    for (int k = 0; k < group; ++k) {
      const Words words{pixels.lowest - (backward ? group - 1 : 0), backward ? group - 1 - k : k,
                        ends && group < 4};
      convert_channel(args, words, float32 + k * args.output_strides[1], count,
                      Channel(args.channels[k], by_inverse), past_caches);
    }
    return;
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
    const uint8_t* lowest = pixels.lowest - (backward ? group - 1 : 0);
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
      const Channel channel(args.channels[c], by_inverse);
      if (table != nullptr) {
        lookup_run(bytes, reinterpret_cast<uint16_t*>(target), count, table + 256 * c);
      } else if (float32 != nullptr) {
        convert_channel(args, Bytes{bytes}, float32_of(target), count, channel, past_caches);
      } else {
        convert(args, bytes, target, count, channel);
      }
    }
  }
}

// The results of a pixel lie side by side.
template <class T>
void normalize_interleaved(const NormalizeArgs& args, const uint8_t* in, T* out, int64_t count,
                           const Cycle& cycle) {
  const int64_t channels = args.sizes[1], in_channel = args.image_strides[1];
  const Pixels from = pixels_of(args, in, count);
  const bool backward = in_channel == -1;
  const bool together = in_channel == 1 || backward;  // the channels of a pixel
  const uint8_t* lowest = from.lowest - (backward ? channels - 1 : 0);
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
  convert(args, source, out, count * channels, cycle);
}

// Any strides, for channels beyond what a Cycle holds.
template <class T>
void normalize_strided(const NormalizeArgs& args, const uint8_t* in, T* out, int64_t count,
                       bool by_inverse) {
  alignas(64) uint8_t run[kMaxBlockPixels];
  alignas(64) T results[kMaxBlockPixels];
  for (int64_t c = 0; c < args.sizes[1]; ++c) {
    gather(in + c * args.image_strides[1], args.image_strides[3], run, 1, count);
    convert(args, run, results, count, Channel(args.channels[c], by_inverse));
    T* target = out + c * args.output_strides[1];
    for (int64_t i = 0; i < count; ++i) target[i * args.output_strides[3]] = results[i];
  }
}

void fill_cycle(const NormalizeArgs& args, bool by_inverse, Cycle& cycle) {
  const int64_t channels = args.sizes[1];
  cycle.period = channels * Cycle::kPixels;
  cycle.by_inverse = by_inverse;
  for (int64_t c = 0; c < channels; ++c) {
    const Channel channel(args.channels[c], by_inverse);
    for (int64_t i = c; i < cycle.period; i += channels) {
      cycle.mean[i] = channel.mean;
      cycle.std[i] = channel.std;
      cycle.inverse[i] = channel.inverse;
      cycle.center_high[i] = channel.center_high;
      cycle.center_low[i] = channel.center_low;
      cycle.inverse_width[i] = channel.inverse_width;
    }
  }
}

// What each of the 256 values becomes, per channel.
template <class T>
void fill_table(const NormalizeArgs& args, T* table) {
  uint8_t values[256];
  for (int x = 0; x < 256; ++x) values[x] = static_cast<uint8_t>(x);
  for (int64_t c = 0; c < args.sizes[1]; ++c) {
    convert(args, values, table + 256 * c, 256, Channel(args.channels[c], false));
  }
}

// What is made once for the channels, when first needed.
template <class T>
struct Prepared {
  bool has_cycle = false, has_table = false, has_inverses = false, by_inverse = false;
  Cycle cycle;
  alignas(64) T table[kMaxGroup * 256];
};

template <class T>
void normalize_blocks(const NormalizeArgs& args, int64_t first, int64_t last, bool table_pays,
                      Prepared<T>& prepared) {
  const int64_t channels = args.sizes[1], width = args.sizes[3];
  const bool planar = args.output_strides[3] == 1 || width == 1;
  const bool interleaved = !planar && channels <= Cycle::kMaxChannels &&
                           args.output_strides[1] == 1 && args.output_strides[3] == channels;
  const bool use_table =
      kHasLookup && sizeof(T) == 2 && planar && channels <= kMaxGroup && table_pays;
  if (sizeof(T) > 1 && table_pays && !use_table && !prepared.has_inverses) {
    prepared.by_inverse = kHasFusedMultiplyAdd && inverses_are_exact(args);
    prepared.has_inverses = true;
  }
  if (interleaved && sizeof(T) > 1 && !prepared.has_cycle) {
    fill_cycle(args, prepared.by_inverse, prepared.cycle);
    prepared.has_cycle = true;
  }
  if (use_table && !prepared.has_table) {
    fill_table(args, prepared.table);
    prepared.has_table = true;
  }

  const bool past_caches =
      kCanPassCaches && args.past_caches && planar && sizeof(T) == sizeof(float) && on_lines(args);
  const int64_t per_row = blocks_per_row(args), pixels = block_pixels(args);
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
      normalize_planar(args, in, out, count,
                       use_table ? reinterpret_cast<const uint16_t*>(prepared.table) : nullptr,
                       prepared.by_inverse, past_caches, ends);
    } else if (interleaved) {
      normalize_interleaved(args, in, out, count, prepared.cycle);
    } else {
      normalize_strided(args, in, out, count, prepared.by_inverse);
    }
  }
  if (past_caches) finish_past_caches();
}

template <class T>
void normalize_range(const NormalizeArgs& args, int64_t first, int64_t last) {
  Prepared<T> prepared;
  const int64_t most = block_pixels(args), pixels = args.sizes[3] < most ? args.sizes[3] : most;
  normalize_blocks(args, first, last, (last - first) * pixels >= kTablePixels, prepared);
}

template <class T>
void normalize_all(const NormalizeArgs* parts, int64_t count) {
  Prepared<T> prepared;
  int64_t pixels = 0;
  for (int64_t i = 0; i < count; ++i) {
    pixels += parts[i].sizes[0] * parts[i].sizes[2] * parts[i].sizes[3];
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t blocks = parts[i].sizes[0] * parts[i].sizes[2] * blocks_per_row(parts[i]);
    normalize_blocks(parts[i], 0, blocks, pixels >= kTablePixels, prepared);
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
