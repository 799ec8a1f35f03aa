// The loops over pixels. Compiled once per instruction set, with PIXFUSE_ISA naming its namespace
// and -ffp-contract=off, since each step of the arithmetic is rounded.
//
// A block goes through three plain loops: bring the bytes of each channel together, convert them,
// put the results where the output wants them. Steps that would change nothing are left out, and
// what lies between two steps stays in the first-level cache.
#include "normalize/normalize_loop.h"

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace pixfuse::PIXFUSE_ISA {
namespace {

constexpr int kMaxGroup = 4;  // channels that are staged together

// --- convert: contiguous bytes of one channel to contiguous results ---

template <Arithmetic arithmetic>
inline float normalize_value(uint8_t x, const ChannelConstants& channel, float scale) {
  if constexpr (arithmetic == Arithmetic::multiply) {
    return ((static_cast<float>(x) * scale) - channel.mean) / channel.std;
  } else if constexpr (arithmetic == Arithmetic::divide) {
    return ((static_cast<float>(x) / 255.0f) - channel.mean) / channel.std;
  } else {
    return static_cast<float>(
        ((static_cast<double>(x) - channel.center_high) - channel.center_low) / channel.width);
  }
}

template <Arithmetic arithmetic, class T>
void compute_run_of(const uint8_t* __restrict in, T* __restrict out, int64_t count,
                    const ChannelConstants& channel, float scale) {
  const ChannelConstants constants = channel;  // `out` cannot alias a local
  for (int64_t i = 0; i < count; ++i) {
    out[i] = round_to<T>(normalize_value<arithmetic>(in[i], constants, scale));
  }
}

template <class T>
void compute_run(const NormalizeArgs& args, const uint8_t* in, T* out, int64_t count, int64_t c) {
  switch (args.arithmetic) {
    case Arithmetic::multiply:
      return compute_run_of<Arithmetic::multiply>(in, out, count, args.channels[c], args.scale);
    case Arithmetic::divide:
      return compute_run_of<Arithmetic::divide>(in, out, count, args.channels[c], args.scale);
    case Arithmetic::nearest:
      return compute_run_of<Arithmetic::nearest>(in, out, count, args.channels[c], args.scale);
  }
}

#if defined(__AVX512BW__)
// A table of 16-bit results fits in eight registers of 32 entries; two-register permutes look up 64
// of them at a time. Without intrinsics gcc looks up one element after another.
inline __m512i lookup_64(__m512i low, __m512i high, __m512i index) {
  return _mm512_permutex2var_epi16(low, index, high);  // uses the low 6 bits of each index
}

int64_t lookup_vectors(const uint8_t* in, uint16_t* out, int64_t count, const uint16_t* table) {
  __m512i entries[8];
  for (int i = 0; i < 8; ++i) entries[i] = _mm512_loadu_si512(table + 32 * i);
  const __m512i bit6 = _mm512_set1_epi16(64), bit7 = _mm512_set1_epi16(128);
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i));
    const __m512i index = _mm512_cvtepu8_epi16(bytes);
    const __mmask32 in_odd_quarter = _mm512_test_epi16_mask(index, bit6);
    const __mmask32 in_upper_half = _mm512_test_epi16_mask(index, bit7);
    const __m512i lower = _mm512_mask_blend_epi16(in_odd_quarter,
                                                  lookup_64(entries[0], entries[1], index),
                                                  lookup_64(entries[2], entries[3], index));
    const __m512i upper = _mm512_mask_blend_epi16(in_odd_quarter,
                                                  lookup_64(entries[4], entries[5], index),
                                                  lookup_64(entries[6], entries[7], index));
    _mm512_storeu_si512(out + i, _mm512_mask_blend_epi16(in_upper_half, lower, upper));
  }
  return i;
}
#endif

template <class T>
void lookup_run(const uint8_t* __restrict in, T* __restrict out, int64_t count,
                const T* __restrict table) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  if constexpr (sizeof(T) == 2) {
    i = lookup_vectors(in, reinterpret_cast<uint16_t*>(out), count,
                       reinterpret_cast<const uint16_t*>(table));
  }
#endif
  for (; i < count; ++i) out[i] = table[in[i]];
}

// --- bring together: pixels of `step` bytes to one run per channel ---

template <int channels, int step>
void deinterleave(const uint8_t* __restrict in, uint8_t (&runs)[kMaxGroup][kBlockPixels],
                  int64_t count) {
  uint8_t *__restrict run0 = runs[0], *__restrict run1 = runs[1], *__restrict run2 = runs[2],
          *__restrict run3 = runs[3];
  for (int64_t i = 0; i < count; ++i) {
    run0[i] = in[step * i];
    run1[i] = in[step * i + 1];
    run2[i] = in[step * i + 2];
    if constexpr (channels == 4) run3[i] = in[step * i + 3];
  }
}

// --- put away: one run per channel to pixels of `channels` results ---

template <int channels, class T>
void interleave(const T (&runs)[kMaxGroup][kBlockPixels], T* __restrict out, int64_t count) {
  const T *__restrict run0 = runs[0], *__restrict run1 = runs[1], *__restrict run2 = runs[2],
          *__restrict run3 = runs[3];
  for (int64_t i = 0; i < count; ++i) {
    out[channels * i] = run0[i];
    out[channels * i + 1] = run1[i];
    out[channels * i + 2] = run2[i];
    if constexpr (channels == 4) out[channels * i + 3] = run3[i];
  }
}

template <class T>
void normalize_block(const NormalizeArgs& args, const T* table, const uint8_t* in, T* out,
                     int64_t count) {
  const int64_t channels = args.sizes[1];
  const int64_t in_channel = args.image_strides[1], in_pixel = args.image_strides[3];
  const int64_t out_channel = args.output_strides[1], out_pixel = args.output_strides[3];
  const int group = channels == 3 || channels == 4 ? static_cast<int>(channels) : 1;

  alignas(64) uint8_t in_runs[kMaxGroup][kBlockPixels];
  alignas(64) T out_runs[kMaxGroup][kBlockPixels];

  for (int64_t first = 0; first < channels; first += group) {
    const uint8_t* source[kMaxGroup];
    for (int k = 0; k < group; ++k) {
      source[k] = in_pixel == 1 ? in + (first + k) * in_channel : in_runs[k];
    }
    if (in_pixel == 1) {
      // already together
    } else if (group == 3 && in_channel == 1 && in_pixel == 3) {
      deinterleave<3, 3>(in, in_runs, count);
    } else if (group == 3 && in_channel == 1 && in_pixel == 4) {
      deinterleave<3, 4>(in, in_runs, count);
    } else if (group == 4 && in_channel == 1 && in_pixel == 4) {
      deinterleave<4, 4>(in, in_runs, count);
    } else {
      for (int k = 0; k < group; ++k) {
        const uint8_t* pixels = in + (first + k) * in_channel;
        for (int64_t i = 0; i < count; ++i) in_runs[k][i] = pixels[i * in_pixel];
      }
    }

    for (int k = 0; k < group; ++k) {
      const int64_t c = first + k;
      T* target = out_pixel == 1 ? out + c * out_channel : out_runs[k];
      if (table != nullptr) {
        lookup_run(source[k], target, count, table + 256 * c);
      } else {
        compute_run(args, source[k], target, count, c);
      }
    }

    if (out_pixel == 1) {
      // already in place
    } else if (group == 3 && out_channel == 1 && out_pixel == 3) {
      interleave<3>(out_runs, out, count);
    } else if (group == 4 && out_channel == 1 && out_pixel == 4) {
      interleave<4>(out_runs, out, count);
    } else {
      for (int k = 0; k < group; ++k) {
        T* pixels = out + (first + k) * out_channel;
        for (int64_t i = 0; i < count; ++i) pixels[i * out_pixel] = out_runs[k][i];
      }
    }
  }
}

template <class T>
void normalize_blocks(const NormalizeArgs& args, const T* table, int64_t first, int64_t last) {
  const int64_t per_row = blocks_per_row(args);
  for (int64_t block = first; block < last; ++block) {
    const int64_t row = block / per_row;
    const int64_t n = row / args.sizes[2], h = row % args.sizes[2];
    const int64_t w = (block % per_row) * kBlockPixels;
    const int64_t left = args.sizes[3] - w;
    const uint8_t* in = args.images + n * args.image_strides[0] + h * args.image_strides[2] +
                        w * args.image_strides[3];
    T* out = static_cast<T*>(args.output) + n * args.output_strides[0] +
             h * args.output_strides[2] + w * args.output_strides[3];
    normalize_block(args, table, in, out, left < kBlockPixels ? left : kBlockPixels);
  }
}

template <class T>
void fill_table_of(const NormalizeArgs& args, T* table) {
  uint8_t values[256];
  for (int x = 0; x < 256; ++x) values[x] = static_cast<uint8_t>(x);
  for (int64_t c = 0; c < args.sizes[1]; ++c) compute_run(args, values, table + 256 * c, 256, c);
}

}  // namespace

void fill_table(const NormalizeArgs& args, void* table) {
  switch (args.dtype) {
    case FloatType::float32:
      return fill_table_of(args, static_cast<float*>(table));
    case FloatType::float16:
      return fill_table_of(args, static_cast<Float16*>(table));
    case FloatType::bfloat16:
      return fill_table_of(args, static_cast<BFloat16*>(table));
  }
}

void normalize_loop(const NormalizeArgs& args, const void* table, int64_t first, int64_t last) {
  switch (args.dtype) {
    case FloatType::float32:
      return normalize_blocks(args, static_cast<const float*>(table), first, last);
    case FloatType::float16:
      return normalize_blocks(args, static_cast<const Float16*>(table), first, last);
    case FloatType::bfloat16:
      return normalize_blocks(args, static_cast<const BFloat16*>(table), first, last);
  }
}

}  // namespace pixfuse::PIXFUSE_ISA
