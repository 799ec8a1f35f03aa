// The convolution by digits.h. Compiled for processors with tiles, and for those whose vectors
// multiply bytes (VNNI), with PIXFUSE_ISA naming its namespace.
//
// A row of input becomes bytes in the order of a patch when it comes, and is held as that. Then the
// patches of some output pixels are brought together, if they fit once for all output channels.
// Sums stay in tiles, or in registers, until the kernel is through.
#include "common/matrix_tiles.h"
#include "conv_bias_relu/rows.h"
#include "conv_bias_relu/stage.h"

namespace pixfuse::PIXFUSE_ISA {
namespace {

static_assert(kLanes == kTileRows && kStepBytes == kTileRowBytes);

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

void fill_line(const ConvBiasReluJob& job, int64_t n, int64_t row, float* line) {
  const ConvBiasReluArgs& args = job.args;
  const int64_t width = args.input_sizes[3], left = args.padding[1];
  const int64_t reached = job.line_pixels - left;
  const int64_t count = reached < width ? reached : width;
  if (count <= 0) return;
  const uint8_t* const in = static_cast<const uint8_t*>(args.input) + n * args.input_strides[0] +
                            row * args.input_strides[2];
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

// The digits of 16 weights of one output channel that lie side by side in a patch: of each four,
// the lowest digits, the middle ones and the highest ones, four bytes each.
__m512i digits_of(const DigitsWeights& from, int64_t output, int64_t byte) {
  const __m512i offsets = _mm512_loadu_si512(from.offsets + byte);
  const float* const weights = from.weights + output * from.output_step;
  const __m512 loaded = _mm512_i32gather_ps(offsets, weights, sizeof(float));
  const __m512d per_step = _mm512_set1_pd(from.per_step[output]);
  const auto rounded = [&](__m256 some, const double* scales) {
    const __m512d scaled = _mm512_mul_pd(_mm512_cvtps_pd(some), _mm512_loadu_pd(scales));
    // Leaves no bits below 1, and a whole number in the low ones.
    const __m512d steps = _mm512_add_pd(_mm512_mul_pd(scaled, per_step), _mm512_set1_pd(0x1.8p52));
    return _mm512_cvtepi64_epi32(_mm512_castpd_si512(steps));
  };
  const __m256i low = rounded(_mm512_castps512_ps256(loaded), from.scales + byte);
  const __m256i high = rounded(_mm512_extractf32x8_ps(loaded, 1), from.scales + byte + 8);
  const __m512i steps = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  // With 128 added to each digit none is negative, and the bytes of the number are the digits; less
  // 128, they have another sign.
  const __m512i offset = _mm512_set1_epi32(0x808080);
  const __m512i digits = _mm512_xor_si512(_mm512_add_epi32(steps, offset), offset);
  return _mm512_shuffle_epi8(digits, _mm512_broadcast_i32x4(_mm_set_epi8(
                                         15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0)));
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

// --- outputs ---

inline Integers load_integers(const void* from) {
  Integers v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

// What the sums of the digits are multiplied with.
struct Steps {
  Vector low, middle, high;

  explicit Steps(const float* step) : low(load(step)), middle(low * 256.0f), high(low * 65536.0f) {}
  Vector output(Integers lows, Integers middles, Integers highs, Vector bias) const {
    Vector y = __builtin_convertvector(lows, Vector) * low;
    y = multiply_add(__builtin_convertvector(middles, Vector), middle, y);
    y = multiply_add(__builtin_convertvector(highs, Vector), high, y);
    return y + bias;  // the last, as it may be larger than all: so it is rounded with once
  }
};

// Where a vector of output channels goes, of some pixels: with ReLU, and counted.
template <class T>
class Outputs {
 public:
  Outputs(const ConvBiasReluJob& job, const RowBlock& row, int64_t vector, T* out)
      : channels(job.args.output_sizes[1] - row.channel - vector * kLanes),
        channel_step(job.args.output_strides[1]),
        pixel_step(job.args.output_strides[3]),
        is_straight(channel_step == 1 && channels >= kLanes),
        past_caches(job.past_caches),
        stage(row.stage),
        out(out + vector * kLanes * channel_step),
        totals{row.totals.active + vector * kLanes, row.totals.nan + vector * kLanes,
               row.totals.sum + vector * kLanes} {}

  // Asks for the lines of the caches that planes are going to be stored to: up to 16 channels of a
  // few pixels each, more than a processor foresees.
  void prefetch_planes(int64_t pixels) const {
    if (channel_step == 1 || past_caches) return;
    for (int64_t c = 0; c < channels && c < kLanes; ++c) {
      const auto* const first = reinterpret_cast<const char*>(out + c * channel_step);
      const auto* const last = reinterpret_cast<const char*>(out + c * channel_step + pixels) - 1;
      for (const char* at = first; at < last; at += 64) __builtin_prefetch(at, 1);
      __builtin_prefetch(last, 1);
    }
  }

  // The same of pixels.
  template <int pixels>
  void prefetch_pixels(int64_t first) const {
    if (!is_straight || past_caches) return;
    unrolled<pixels>([&](auto p) __attribute__((always_inline)) {
      __builtin_prefetch(out + (first + p.value) * pixel_step, 1);
    });
  }

  [[gnu::always_inline]] void put(int64_t pixel, Vector sum, Counts<1>& counts) const {
    const Vector y = round_as<T>(relu(sum));
    counts.active[0] = count_positive(counts.active[0], y);
    counts.sum[0] += y;
    if (!is_straight) {
      store(stage + pixel * kLanes, y);
    } else if (__is_same(T, float) && past_caches) {
      store_past_caches(reinterpret_cast<float*>(out + pixel * pixel_step), y);
    } else {
      store_exact(out + pixel * pixel_step, y);
    }
  }

  // All of the pixels have been put.
  void finish(int64_t pixels, const Counts<1>& counts) const {
    if (!is_straight && channel_step == 1) {
      store_pixels<T, 1>(stage, pixels, channels, out, pixel_step);
    } else if (!is_straight) {
      store_planes<T, 1>(stage, pixels, channels, out, channel_step, past_caches);
    }
    add_counts<1>(counts, totals, out, pixels, channels, pixel_step, channel_step);
  }

 private:
  int64_t channels, channel_step, pixel_step;
  bool is_straight, past_caches;
  float* stage;
  T* out;
  Totals totals;
};

// --- sums ---

#if defined(__AVX512VNNI__)

// Pixels whose sums of all digits are in registers at a time, with the weights.
constexpr int kDotPixels = 8;
constexpr int64_t kGroupPixels = kDigitsPixels;

// Four bytes of each patch are multiplied with a vector's weights at a time.
template <class T, int pixels>
void sum_up(const DigitsPlan& plan, const uint8_t* patches, const int8_t* weight,
            const int32_t* start, const Steps& steps, const float* bias, const int64_t* biases,
            const Outputs<T>& outputs, int64_t first, Counts<1>& counts) {
  const int64_t patch_bytes = plan.patch_bytes(), digit_bytes = patch_bytes * kLanes;
  outputs.template prefetch_pixels<pixels>(first);
  Integers sums[kDigits * pixels];
  unrolled<kDigits>([&](auto digit) __attribute__((always_inline)) {
    const Integers before = load_integers(start + digit.value * kLanes);
    unrolled<pixels>([&](auto p) __attribute__((always_inline)) {
      sums[p.value * kDigits + digit.value] = before;
    });
  });
  for (int64_t quad = 0; quad < plan.quads; ++quad) {
    Integers w[kDigits];
    unrolled<kDigits>([&](auto digit) __attribute__((always_inline)) {
      w[digit.value] = load_integers(weight + digit.value * digit_bytes);
    });
    unrolled<pixels>([&](auto p) __attribute__((always_inline)) {
      int32_t four;
      __builtin_memcpy(&four, patches + p.value * patch_bytes, sizeof four);
      const __m512i bytes = _mm512_set1_epi32(four);
      unrolled<kDigits>([&](auto digit) __attribute__((always_inline)) {
        Integers& sum = sums[p.value * kDigits + digit.value];
        sum = (Integers)_mm512_dpbusd_epi32((__m512i)sum, bytes, (__m512i)w[digit.value]);
      });
    });
    patches += kQuadBytes;
    weight += kStepBytes;
  }
  Counts<1> all = counts;
  unrolled<pixels>([&](auto p) __attribute__((always_inline)) {
    const Integers* const of = sums + p.value * kDigits;
    outputs.put(first + p.value, steps.output(of[0], of[1], of[2], load(bias + biases[p.value])),
                all);
  });
  counts = all;
}

template <class T, bool is_signed>
void run_group(const ConvBiasReluJob& job, const RowBlock& row, const uint8_t* patches,
               const int64_t* biases, int64_t pixels, int32_t*, T* out) {
  const DigitsPlan& plan = *job.digits;
  for (int64_t v = 0; v < row.vectors; ++v) {
    const int64_t channel = row.channel + v * kLanes;
    const Outputs<T> outputs(job, row, v, out);
    outputs.prefetch_planes(pixels);
    const auto* const weight =
        reinterpret_cast<const int8_t*>(job.weight) + channel * plan.weight_bytes_per_output();
    const int32_t* const start = plan.starts + channel * kDigits;
    const Steps steps(plan.step + channel);
    Counts<1> counts;
    for (int64_t p = 0; p < pixels;) {
      const auto sum = [&](auto count) {
        sum_up<T, count.value>(plan, patches + p * plan.patch_bytes(), weight, start, steps,
                               job.bias + channel, biases + p, outputs, p, counts);
        p += count.value;
      };
      if (pixels - p >= kDotPixels) {
        sum(Constant<kDotPixels>{});
      } else if (pixels - p >= 4) {
        sum(Constant<4>{});
      } else if (pixels - p >= 2) {
        sum(Constant<2>{});
      } else {
        sum(Constant<1>{});
      }
    }
    outputs.finish(pixels, counts);
  }
}

#else

constexpr int64_t kGroupPixels = kTilesPixels;
constexpr int kGroupTiles = kTilesPixels / kTileRows;
constexpr int kTileSums = kTileRows * kLanes;
constexpr int kColumnSums = kGroupTiles * kTileSums;
static_assert(kGroupTiles == 2 && kDigitsSumFloats == kDigitsColumns * kColumnSums);

// Of up to 32 pixels with a few columns: a column has the weights of one digit of a vector of
// output channels, and the sums [pixel][output channel]. Two tiles of pixels and two columns need
// the fewest loads that eight tiles allow: each is for two multiplications. With another thread on
// its core a processor renames no tiles, and waits for each load as for each multiplication.
template <bool is_signed, int tiles, int columns>
void sum_up(const DigitsPlan& plan, const uint8_t* patches, const int8_t* weight, int32_t* sums) {
  constexpr int kLeft = tiles * columns, kRight = kLeft + tiles;
  static_assert(kRight + columns <= 8);
  const int64_t patch_bytes = plan.patch_bytes(), column_bytes = plan.steps * kTileBytes;
  unrolled<kLeft>([&](auto sum) { clear_tile<sum.value>(); });
  for (int64_t step = 0; step < plan.steps; ++step) {
    unrolled<tiles>([&](auto tile) __attribute__((always_inline)) {
      load_tile<kLeft + tile.value>(patches + tile.value * kTileRows * patch_bytes, patch_bytes);
      unrolled<columns>([&](auto column) __attribute__((always_inline)) {
        if constexpr (tile.value == 0) {
          load_tile<kRight + column.value>(weight + column.value * column_bytes, kTileRowBytes);
        }
        add_products<is_signed, tile.value * columns + column.value, kLeft + tile.value,
                     kRight + column.value>();
      });
    });
    patches += kStepBytes;
    weight += kTileBytes;
  }
  unrolled<tiles>([&](auto tile) __attribute__((always_inline)) {
    unrolled<columns>([&](auto column) __attribute__((always_inline)) {
      store_tile<tile.value * columns + column.value>(sums + column.value * kColumnSums +
                                                      tile.value * kTileSums);
    });
  });
}

template <bool is_signed, int columns>
void sum_up(const DigitsPlan& plan, const uint8_t* patches, int64_t tiles, const int8_t* weight,
            int32_t* sums) {
  tiles == 1 ? sum_up<is_signed, 1, columns>(plan, patches, weight, sums)
             : sum_up<is_signed, 2, columns>(plan, patches, weight, sums);
}

template <class T, bool is_signed>
void run_group(const ConvBiasReluJob& job, const RowBlock& row, const uint8_t* patches,
               const int64_t* biases, int64_t pixels, int32_t* sums, T* out) {
  const DigitsPlan& plan = *job.digits;
  const auto* const weight =
      reinterpret_cast<const int8_t*>(job.weight) + row.channel * plan.weight_bytes_per_output();
  const int64_t tiles = pixels > kTileRows ? 2 : 1, columns = row.vectors * kDigits;
  for (int64_t column = 0; column < columns; column += 2) {
    const int64_t vector = column / kDigits, channel = row.channel + vector * kLanes;
    const bool is_last = (column + 2) / kDigits > vector;  // of the vector's columns
    const Outputs<T> outputs(job, row, vector, out);
    if (is_last) outputs.prefetch_planes(pixels);
    const int8_t* const factors = weight + column * plan.steps * kTileBytes;
    int32_t* const to = sums + column % kDigitsColumns * kColumnSums;
    column + 1 < columns ? sum_up<is_signed, 2>(plan, patches, tiles, factors, to)
                         : sum_up<is_signed, 1>(plan, patches, tiles, factors, to);
    if (!is_last) continue;
    const Steps steps(plan.step + channel);
    const int32_t* at = sums + vector * kDigits % kDigitsColumns * kColumnSums;
    Counts<1> counts;
    for (int64_t p = 0; p < pixels; ++p, at += kLanes) {
      const Integers low = load_integers(at), middle = load_integers(at + kColumnSums);
      const Integers high = load_integers(at + 2 * kColumnSums);
      outputs.put(p, steps.output(low, middle, high, load(job.bias + channel + biases[p])), counts);
    }
    outputs.finish(pixels, counts);
  }
}

#endif

// --- rows ---

// One block of channels of some output rows, a group of pixels at a time.
template <class T, bool is_signed>
void run_block(const ConvBiasReluJob& job, const RowBlock& row, float* scratch) {
  int32_t* const sums = reinterpret_cast<int32_t*>(scratch);
  uint8_t* const patches = reinterpret_cast<uint8_t*>(scratch + kDigitsSumFloats);
  T* const out = static_cast<T*>(job.args.output) + row.output_offset;
  const DigitsPlan& plan = *job.digits;
  // The output is dense: its rows are one run of pixels.
  const int64_t width = job.args.output_sizes[3], pixels = row.rows * width;
  if (plan.is_gathered_once && row.channel == 0) gather(job, row, 0, pixels, patches);
  int64_t biases[kGroupPixels], y = row.first_row, x = 0;
  for (int64_t begin = 0; begin < pixels; begin += kGroupPixels) {
    const int64_t end = pixels - begin < kGroupPixels ? pixels : begin + kGroupPixels;
    if (!plan.is_gathered_once) gather(job, row, begin, end, patches);
    for (int64_t p = 0; p < end - begin; ++p) {
      biases[p] = plan.row_bias[y] + plan.column_bias[x];
      if (++x == width) {
        x = 0;
        ++y;
      }
    }
    run_group<T, is_signed>(job, row,
                            patches + (plan.is_gathered_once ? begin * plan.patch_bytes() : 0),
                            biases, end - begin, sums, out + begin * job.args.output_strides[3]);
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
  constexpr int kQuads = 4;  // at a time
  const int64_t digit_bytes = plan.patch_bytes() * kLanes;
  Integers sums[kDigits] = {};
  for (int64_t byte = 0; byte < plan.patch_bytes(); byte += kQuads * kQuadBytes) {
    Vector rows[kLanes];
    for (int64_t o = 0; o < kLanes; ++o) {
      rows[o] = o < from.outputs ? (Vector)digits_of(from, o, byte) : Vector{};
    }
    transpose<kLanes / 2>(rows);
    for (int64_t quad = 0; quad < kQuads; ++quad, packed += kStepBytes) {
      for (int64_t digit = 0; digit < kDigits; ++digit) {
        const Vector row = rows[quad * kQuadBytes + digit];
        __builtin_memcpy(packed + digit * digit_bytes, &row, sizeof row);
#if defined(__AVX512VNNI__)
        sums[digit] =
            (Integers)_mm512_dpbusd_epi32((__m512i)sums[digit], _mm512_set1_epi8(1), (__m512i)row);
#endif
      }
    }
  }
  if (!kInVectors || !plan.is_signed) return;
  for (int64_t digit = 0; digit < kDigits; ++digit) {
    const Integers start = sums[digit] * -128;
    __builtin_memcpy(starts + digit * kLanes, &start, sizeof start);
  }
}

void digits_loop(const ConvBiasReluJob& job, int64_t first, int64_t last, const Scratch& scratch) {
  with_output_type(job,
                   [&](auto of_type) { run_items<decltype(of_type)>(job, first, last, scratch); });
}

}  // namespace pixfuse::PIXFUSE_ISA
