// The convolution by digits.h. Compiled for processors with tiles, and for those whose vectors
// multiply bytes (VNNI), with PIXFUSE_ISA naming its namespace.
//
// A row of input becomes bytes in the order of a patch when it comes, and is held as that. Then the
// patches of some output pixels are brought together, if they fit once for all output channels.
// Sums stay in tiles, or in registers, until the kernel is through, or in pairs a part of it.
#include "common/matrix_tiles.h"
#include "common/read_ahead.h"
#if defined(__AVX512VNNI__)
#include "conv_bias_relu/digits_in_vectors.h"
#else
#include "conv_bias_relu/digits_in_tiles.h"
#endif

namespace pixfuse::PIXFUSE_ISA {
namespace {

// Whether what multiplies is vectors, not tiles. They take unsigned bytes and signed ones: so
// patches are x, also where z is 128, and the sums begin with what that is too much.
#if defined(__AVX512VNNI__)
constexpr bool kInVectors = true;
#else
constexpr bool kInVectors = false;
#endif

// --- input ---

// 16 pixels of three channels, each in the low bytes of 32 bits. Of fewer, nothing behind the last
// one is read: not even the fourth byte of that.
struct Interleaved {
  __m512i order, bytes;
  int64_t pixel_step;  // 3 or 4

  explicit Interleaved(int64_t pixel_step) : pixel_step(pixel_step) {
    const __m512i fours = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i threes = _mm512_set_epi32(0, 11, 10, 9, 0, 8, 7, 6, 0, 5, 4, 3, 0, 2, 1, 0);
    order = pixel_step == 3 ? threes : fours;
    bytes = _mm512_broadcast_i32x4(
        pixel_step == 3 ? _mm_set_epi8(-1, 11, 10, 9, -1, 8, 7, 6, -1, 5, 4, 3, -1, 2, 1, 0)
                        : _mm_set_epi8(-1, 14, 13, 12, -1, 10, 9, 8, -1, 6, 5, 4, -1, 2, 1, 0));
  }
  __m512i load(const uint8_t* pixel, int64_t count) const {
    const auto mine = ~uint64_t{0} >> (64 - ((count - 1) * pixel_step + 3));
    const __m512i loaded = _mm512_maskz_loadu_epi8(mine, pixel);
    return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(order, loaded), bytes);
  }
};

struct Planes {
  int64_t channel_step;
  static constexpr int64_t pixel_step = 1;

  __m512i load(const uint8_t* pixel, int64_t count) const {
    const auto mine = static_cast<__mmask16>((1u << count) - 1);
    const auto channel = [&](int64_t c) {
      return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mine, pixel + c * channel_step));
    };
    const __m512i two = _mm512_or_si512(channel(0), _mm512_slli_epi32(channel(1), 8));
    return _mm512_or_si512(two, _mm512_slli_epi32(channel(2), 16));
  }
};

template <class Pixels>
void fill_threes(const Pixels& pixels, const uint8_t* in, int64_t count, uint8_t sign,
                 uint8_t* out) {
  const __m512i signs = _mm512_set1_epi32(sign * 0x010101);
  const __m512i threes =
      _mm512_broadcast_i32x4(_mm_set_epi8(-1, -1, -1, -1, 14, 13, 12, 10, 9, 8, 6, 5, 4, 2, 1, 0));
  const __m512i order = _mm512_set_epi32(0, 0, 0, 0, 14, 13, 12, 10, 9, 8, 6, 5, 4, 2, 1, 0);
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t here = count - i < 16 ? count - i : 16;
    const __m512i four = _mm512_xor_si512(pixels.load(in + i * pixels.pixel_step, here), signs);
    const auto mine = ~uint64_t{0} >> (64 - here * 3);
    _mm512_mask_storeu_epi8(out + i * 3, mine,
                            _mm512_permutexvar_epi32(order, _mm512_shuffle_epi8(four, threes)));
  }
}

// The byte of each channel, less 128 in two's complement if `sign` is 0x80.
template <int channels>
void fill_bytes(const uint8_t* in, int64_t channel_step, int64_t pixel_step, int64_t count,
                uint8_t sign, uint8_t* out) {
  if (channels == 3 && pixel_step == 1) {
    return fill_threes(Planes{channel_step}, in, count, sign, out);
  }
  if (channels == 3 && channel_step == 1 && (pixel_step == 3 || pixel_step == 4)) {
    return fill_threes(Interleaved(pixel_step), in, count, sign, out);
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int c = 0; c < channels; ++c) {
      out[i * channels + c] = in[i * pixel_step + c * channel_step] ^ sign;
    }
  }
}

template <int channels>
void fill_bytes(const ConvBiasReluJob& job, const uint8_t* in, int64_t count, uint8_t* out) {
  const int64_t* const strides = job.args.input_strides;
  const uint8_t sign = job.digits->is_signed ? 0x80 : 0;
  fill_bytes<channels>(in, strides[1], strides[3], count, sign, out);
}

// Rows of the input that are asked for before they are needed.
constexpr int64_t kRowsAhead = 8;

void fill_line(const ConvBiasReluJob& job, int64_t n, int64_t row, float* line) {
  const ConvBiasReluArgs& args = job.args;
  const int64_t width = args.input_sizes[3], left = args.padding[1];
  const int64_t reached = job.line_pixels - left;
  const int64_t count = reached < width ? reached : width;
  if (count <= 0) return;
  const uint8_t* const in = static_cast<const uint8_t*>(args.input) + n * args.input_strides[0] +
                            row * args.input_strides[2];
  const int64_t planes = args.input_strides[3] == 1 ? args.input_sizes[1] : 1;
  for (int64_t c = 0; c < planes; ++c) {
    const int64_t ahead = c * args.input_strides[1] + kRowsAhead * args.input_strides[2];
    read_ahead(reinterpret_cast<uintptr_t>(in) + static_cast<uintptr_t>(ahead),
               count * args.input_strides[3]);
  }
  uint8_t* const out = reinterpret_cast<uint8_t*>(line) + left * args.input_sizes[1];
  switch (args.input_sizes[1]) {
    case 1:
      return fill_bytes<1>(job, in, count, out);
    case 2:
      return fill_bytes<2>(job, in, count, out);
    default:
      return fill_bytes<3>(job, in, count, out);
  }
}

// --- weights ---

// 16 weights of one output channel that lie side by side in a patch, in whole steps.
__m512i steps_of(const DigitsWeights& from, int64_t output, int64_t byte) {
  const float* const weights = from.weights + output * from.output_step;
  const WeightRuns& runs = from.runs[byte / kLanes];
  __m512 loaded;
  if (runs.are_all) {
    const auto run = [&](int i) {
      return _mm256_maskz_loadu_ps(runs.used[i], weights + runs.starts[i]);
    };
    const __m512 two = _mm512_insertf32x8(_mm512_castps256_ps512(run(0)), run(1), 1);
    loaded =
        _mm512_permutex2var_ps(two, _mm512_loadu_si512(runs.order), _mm512_castps256_ps512(run(2)));
  } else {
    loaded = _mm512_i32gather_ps(_mm512_loadu_si512(from.offsets + byte), weights, sizeof(float));
  }
  const __m512d per_step = _mm512_set1_pd(from.per_step[output]);
  const auto rounded = [&](__m256 some, const double* scales) {
    const __m512d scaled = _mm512_mul_pd(_mm512_cvtps_pd(some), _mm512_loadu_pd(scales));
    // Leaves no bits below 1, and a whole number in the low ones.
    const __m512d steps = _mm512_add_pd(_mm512_mul_pd(scaled, per_step), _mm512_set1_pd(0x1.8p52));
    return _mm512_cvtepi64_epi32(_mm512_castpd_si512(steps));
  };
  const __m256i low = rounded(_mm512_castps512_ps256(loaded), from.scales + byte);
  const __m256i high = rounded(_mm512_extractf32x8_ps(loaded, 1), from.scales + byte + 8);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// What each four of them are multiplied in, four bytes of each: the lowest digits, the middle ones
// and the highest ones; in pairs, the lowest digits, the words of the first and the third, and
// those of the others.
template <bool in_pairs>
__m512i digits_of(__m512i steps) {
  // With 128 added to each digit none is negative, and the bytes of the number are the digits; less
  // 128, they have another sign. The rest of the number without the lowest digit is the word.
  const __m512i offset = _mm512_set1_epi32(in_pairs ? 0x80 : 0x808080);
  const __m512i digits = _mm512_xor_si512(_mm512_add_epi32(steps, offset), offset);
  const __m128i order = in_pairs
                            ? _mm_set_epi8(15, 11, 7, 3, 14, 13, 6, 5, 10, 9, 2, 1, 12, 8, 4, 0)
                            : _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  return _mm512_shuffle_epi8(digits, _mm512_broadcast_i32x4(order));
}

#if defined(__AVX512VNNI__)

// What the sums of 16 output channels begin with, modulo 2^32.
template <bool in_pairs>
struct Starts {
  __m512i sums[kDigits] = {}, products = {};

  void add(const Vector (&digits)[kDigits]) {
    const auto digit = [&](int i) { return (__m512i)digits[i]; };
    for (int i = 0; i < kDigits; ++i) {
      sums[i] = in_pairs && i > 0 ? _mm512_dpwssd_epi32(sums[i], digit(i), _mm512_set1_epi16(1))
                                  : _mm512_dpbusd_epi32(sums[i], _mm512_set1_epi8(1), digit(i));
    }
    if (in_pairs) products = _mm512_dpwssd_epi32(products, digit(1), digit(2));
  }
  void store(int32_t zero, int32_t* to) {
    if (in_pairs) sums[1] = _mm512_add_epi32(sums[1], sums[2]);
    for (int i = 0; i < kDigits; ++i) {
      const __m512i start = _mm512_mullo_epi32(sums[i], _mm512_set1_epi32(-zero));
      _mm512_storeu_si512(to + i * kLanes, i == 1 ? _mm512_sub_epi32(start, products) : start);
    }
  }
};

#endif

template <bool in_pairs>
void pack(const DigitsPlan& plan, const DigitsWeights& from, int8_t* packed, int32_t* starts) {
  constexpr int kQuads = 4;  // at a time
  const int64_t digit_bytes = kInVectors ? kStepBytes : plan.patch_bytes() * kLanes;
  const int64_t quad_bytes = kInVectors ? from.quad_bytes : kStepBytes;
#if defined(__AVX512VNNI__)
  Starts<in_pairs> start;
#endif
  for (int64_t byte = 0; byte < plan.patch_bytes(); byte += kQuads * kQuadBytes) {
    Vector rows[kLanes];
    for (int64_t o = 0; o < kLanes; ++o) {
      rows[o] = o < from.outputs ? (Vector)digits_of<in_pairs>(steps_of(from, o, byte)) : Vector{};
    }
    transpose<kLanes / 2>(rows);
    for (int64_t quad = 0; quad < kQuads; ++quad, packed += quad_bytes) {
      Vector digits[kDigits];
      for (int64_t digit = 0; digit < kDigits; ++digit) {
        digits[digit] = rows[quad * kQuadBytes + digit];
        __builtin_memcpy(packed + digit * digit_bytes, &digits[digit], sizeof(Vector));
      }
#if defined(__AVX512VNNI__)
      start.add(digits);
#endif
    }
  }
#if defined(__AVX512VNNI__)
  start.store(plan.is_signed ? 128 : 0, starts);
#endif
}

// --- patches ---

// Copies `count` rows of a kernel, each from `from_step` and to `to_step` bytes after the one
// before; `flip` is what their bytes are to differ by.
void copy_rows(const uint8_t* from, int64_t from_step, int64_t count, int64_t bytes, uint8_t flip,
               uint8_t* to, int64_t to_step) {
  const auto bits = [](int64_t number) { return ~uint64_t{0} >> (64 - number); };
  const __m512i flips = _mm512_set1_epi8(static_cast<char>(flip));
  if (bytes <= 32) {
    const auto mask = static_cast<__mmask32>(bits(bytes));
    for (int64_t i = 0; i < count; ++i) {
      const __m256i loaded = _mm256_maskz_loadu_epi8(mask, from);
      _mm256_mask_storeu_epi8(to, mask, _mm256_xor_si256(loaded, _mm512_castsi512_si256(flips)));
      from += from_step;
      to += to_step;
    }
    return;
  }
  for (; bytes > 0; bytes -= 64, from += 64, to += 64) {
    const __mmask64 mask = bits(bytes < 64 ? bytes : 64);
    for (int64_t i = 0; i < count; ++i) {
      const __m512i loaded = _mm512_maskz_loadu_epi8(mask, from + i * from_step);
      _mm512_mask_storeu_epi8(to + i * to_step, mask, _mm512_xor_si512(loaded, flips));
    }
  }
}

// The patches of the pixels [begin, end), counted along some rows.
void gather(const ConvBiasReluJob& job, const RowBlock& row, int64_t begin, int64_t end,
            uint8_t* patches) {
  const ConvBiasReluArgs& args = job.args;
  const DigitsPlan& plan = *job.digits;
  const int64_t width = args.output_sizes[3], patch_bytes = plan.patch_bytes();
  // A row of a kernel with gaps comes pixel by pixel.
  const int64_t pieces = args.dilation[1] > 1 ? args.kernel[1] : 1;
  const int64_t bytes = args.kernel[1] / pieces * args.input_sizes[1];
  const uint8_t flip = kInVectors && plan.is_signed ? 0x80 : 0;
  for (int64_t pixel = begin; pixel < end;) {
    const int64_t y = pixel / width, x = pixel % width;
    const int64_t count = end - pixel < width - x ? end - pixel : width - x;
    for (int64_t ky = 0; ky < args.kernel[0]; ++ky) {
      const auto* const line = reinterpret_cast<const uint8_t*>(row.lines[y * args.kernel[0] + ky]);
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t from = x * args.stride[1] + piece * args.dilation[1];
        copy_rows(line + from * args.input_sizes[1], args.stride[1] * args.input_sizes[1], count,
                  bytes, flip, patches + ky * plan.row_step + piece * bytes, patch_bytes);
      }
    }
    patches += count * patch_bytes;
    pixel += count;
  }
}

// --- rows ---

// One block of channels of some output rows, a group of pixels at a time.
template <class T, bool is_signed>
void run_block(const ConvBiasReluJob& job, const RowBlock& row, float* scratch) {
  const DigitsPlan& plan = *job.digits;
  int32_t* const sums = reinterpret_cast<int32_t*>(scratch);
  uint8_t* const bytes =
      reinterpret_cast<uint8_t*>(scratch + (plan.in_pairs ? kPairsSums : kTilesSums));
  uint8_t* const words = bytes + plan.held_pixels * plan.patch_bytes();
  const Patches held{bytes, words,
                     reinterpret_cast<int32_t*>(words + 2 * plan.held_pixels * plan.patch_bytes())};
  const auto hold = [&](int64_t begin, int64_t end) {
    gather(job, row, begin, end, bytes);
#if defined(__AVX512VNNI__)
    if (plan.in_pairs) widen(plan, end - begin, held);
#endif
  };
  T* const out = static_cast<T*>(job.args.output) + row.output_offset;
  // The output is dense: its rows are one run of pixels.
  const int64_t width = job.args.output_sizes[3], pixels = row.rows * width;
  if (plan.is_gathered_once && row.channel == 0) hold(0, pixels);
  int64_t biases[kPairsPixels], y = row.first_row, x = 0;
  for (int64_t begin = 0; begin < pixels; begin += plan.group_pixels) {
    const int64_t end = pixels - begin < plan.group_pixels ? pixels : begin + plan.group_pixels;
    if (!plan.is_gathered_once) hold(begin, end);
    for (int64_t p = 0; p < end - begin; ++p) {
      biases[p] = plan.row_bias[y] + plan.column_bias[x];
      if (++x == width) {
        x = 0;
        ++y;
      }
    }
    run_group<T, is_signed>(job, row, held.from(plan, plan.is_gathered_once ? begin : 0), biases,
                            end - begin, sums, out + begin * job.args.output_strides[3]);
  }
}

template <class T, bool is_signed>
void run_items(const ConvBiasReluJob& job, int64_t first, int64_t last, const Scratch& scratch) {
  float* const own = scratch.floats + scratch_floats(job) - job.digits->scratch_floats;
  const auto fill = [&](int64_t n, int64_t row, float* line) { fill_line(job, n, row, line); };
  const auto run = [&](const RowBlock& row) { run_block<T, is_signed>(job, row, own); };
  if (!kInVectors) begin_tiles();
  run_rows(job, first, last, scratch, fill, run, job.rows_at_once);
  if (!kInVectors) end_tiles();
  if (job.past_caches) finish_past_caches();
}

template <class T>
void run_items(const ConvBiasReluJob& job, int64_t first, int64_t last, const Scratch& scratch) {
  if constexpr (!kInVectors) {
    if (job.digits->is_signed) return run_items<T, true>(job, first, last, scratch);
  }
  run_items<T, false>(job, first, last, scratch);
}

}  // namespace

void pack_digits(const DigitsPlan& plan, const DigitsWeights& from, int8_t* packed,
                 int32_t* starts) {
  plan.in_pairs ? pack<true>(plan, from, packed, starts) : pack<false>(plan, from, packed, starts);
}

void digits_loop(const ConvBiasReluJob& job, int64_t first, int64_t last, const Scratch& scratch) {
  with_output_type(job,
                   [&](auto of_type) { run_items<decltype(of_type)>(job, first, last, scratch); });
}

}  // namespace pixfuse::PIXFUSE_ISA
