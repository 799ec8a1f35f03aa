// The convolution by digits.h. Compiled for processors with tiles, with PIXFUSE_ISA naming its
// namespace.
//
// A row of input is brought into quads of bytes when it comes, and held as that. Then, for up to 32
// pixels of an output row, the bytes that each of them sees are rows of left operands; where a row
// of the kernel fills a tile, they are taken from the lines, else several rows of the kernel are
// brought side by side first. The sums of all three digits stay in tiles until the kernel is
// through.
#include "common/matrix_tiles.h"
#include "conv_bias_relu/rows.h"
#include "conv_bias_relu/stage.h"

namespace pixfuse::PIXFUSE_ISA {
namespace {

static_assert(kLanes == kTileRows && kTileBytes == kTileQuads * kLanes * kQuadBytes);

// --- input ---

// A line has a quad where those of other ways have a float.
typedef uint32_t Quad __attribute__((may_alias));

// The byte of each channel less 128, in two's complement, and kInside.
template <int channels, bool is_signed>
inline Quad quad_of(const uint8_t* pixel, int64_t channel_step) {
  constexpr uint32_t kSigns = is_signed ? 0x808080u >> (8 * (3 - channels)) : 0;
  uint32_t quad = static_cast<uint32_t>(kInside) << 24;
  for (int c = 0; c < channels; ++c) {
    quad |= static_cast<uint32_t>(pixel[c * channel_step]) << (8 * c);
  }
  return quad ^ kSigns;
}

template <int channels, bool is_signed>
void fill_quads(const uint8_t* __restrict in, int64_t channel_step, int64_t pixel_step,
                int64_t count, Quad* __restrict out) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  // gcc collects the bytes of such pixels one by one.
  if (channels == 3 && channel_step == 1 && (pixel_step == 3 || pixel_step == 4)) {
    const __m512i fours = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i threes = _mm512_set_epi32(0, 11, 10, 9, 0, 8, 7, 6, 0, 5, 4, 3, 0, 2, 1, 0);
    const __m512i order = pixel_step == 3 ? threes : fours;
    const __m512i bytes = _mm512_broadcast_i32x4(
        pixel_step == 3 ? _mm_set_epi8(-1, 11, 10, 9, -1, 8, 7, 6, -1, 5, 4, 3, -1, 2, 1, 0)
                        : _mm_set_epi8(-1, 14, 13, 12, -1, 10, 9, 8, -1, 6, 5, 4, -1, 2, 1, 0));
    const __m512i rest =
        _mm512_set1_epi32((static_cast<int32_t>(kInside) << 24) | (is_signed ? 0x808080 : 0));
    for (; i < count; i += 16) {
      const int64_t left = count - i < 16 ? count - i : 16;
      // Not even the fourth byte of the last pixel is ours.
      const auto mine = ~uint64_t{0} >> (64 - ((left - 1) * pixel_step + 3));
      const __m512i loaded = _mm512_maskz_loadu_epi8(mine, in + i * pixel_step);
      const __m512i spread = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(order, loaded), bytes);
      _mm512_mask_storeu_epi32(out + i, static_cast<__mmask16>((1u << left) - 1),
                               _mm512_xor_si512(spread, rest));
    }
    return;
  }
#endif
  if (pixel_step == 1) {
    for (; i < count; ++i) out[i] = quad_of<channels, is_signed>(in + i, channel_step);
    return;
  }
  for (; i < count; ++i) out[i] = quad_of<channels, is_signed>(in + i * pixel_step, channel_step);
}

template <bool is_signed>
void fill_quads(const ConvBiasReluJob& job, int64_t n, int64_t row, float* line) {
  const ConvBiasReluArgs& args = job.args;
  const int64_t width = args.input_sizes[3], left = args.padding[1];
  const int64_t reached = job.line_pixels - left;
  const int64_t count = reached < width ? reached : width;
  if (count <= 0) return;
  const uint8_t* in = static_cast<const uint8_t*>(args.input) + n * args.input_strides[0] +
                      row * args.input_strides[2];
  Quad* const out = reinterpret_cast<Quad*>(line) + left;
  const int64_t channel_step = args.input_strides[1], pixel_step = args.input_strides[3];
  switch (args.input_sizes[1]) {
    case 1:
      return fill_quads<1, is_signed>(in, channel_step, pixel_step, count, out);
    case 2:
      return fill_quads<2, is_signed>(in, channel_step, pixel_step, count, out);
    default:
      return fill_quads<3, is_signed>(in, channel_step, pixel_step, count, out);
  }
}

// --- sums ---

// Brings together what each step takes of the lines, for each of some output pixels.
template <int quads>
void gather_rows(const ConvBiasReluJob& job, const float* const* lines, int64_t first,
                 int64_t pixels, float* gathered) {
  constexpr int64_t kRows = kTileQuads / quads;
  const int64_t stride = job.args.stride[1], kernel_rows = job.args.kernel[0];
  for (int64_t step = 0; step < job.digits->steps; ++step) {
    const float* from[kRows];
    for (int64_t i = 0; i < kRows; ++i) {
      // Beyond the kernel the weights are zero; any row will do.
      const int64_t ky = step * kRows + i;
      from[i] = lines[ky < kernel_rows ? ky : kernel_rows - 1] + first * stride;
    }
    float* to = gathered + step * kDigitsPixels * kTileQuads;
    for (int64_t p = 0; p < pixels; ++p) {
      for (int64_t i = 0; i < kRows; ++i) {
        __builtin_memcpy(to + i * quads, from[i] + p * stride, quads * kQuadBytes);
      }
      to += kTileQuads;
    }
  }
}

void gather_rows(const ConvBiasReluJob& job, const float* const* lines, int64_t first,
                 int64_t pixels, float* gathered) {
  switch (job.digits->segment) {
    case 1:
      return gather_rows<1>(job, lines, first, pixels, gathered);
    case 2:
      return gather_rows<2>(job, lines, first, pixels, gathered);
    case 4:
      return gather_rows<4>(job, lines, first, pixels, gathered);
    default:
      return gather_rows<8>(job, lines, first, pixels, gathered);
  }
}

// Up to two times 16 output pixels of a row, or up to 16 of each of two rows: where the bytes that
// they see at each step are.
struct Pixels {
  const ConvBiasReluJob& job;
  const RowBlock& row;
  int64_t first;
  const float* gathered;

  bool are_gathered() const { return job.digits->segment < kTileQuads; }
  int64_t quads() const { return are_gathered() ? kTileQuads : job.args.stride[1]; }

  const float* left_operand(int64_t step, int64_t tile) const {
    if (are_gathered()) return gathered + (step * kDigitsPixels + tile * kTileRows) * kTileQuads;
    const int64_t pieces = job.digits->pieces_per_row, ky = step / pieces;
    const int64_t kernel_row = row.rows > 1 ? tile * job.args.kernel[0] + ky : ky;
    const int64_t pixel = row.rows > 1 ? 0 : first + tile * kTileRows;
    return row.lines[kernel_row] + pixel * job.args.stride[1] + step % pieces * kTileQuads;
  }
};

// Their sums with a vector of channels: [tile][digit][pixel]. A left operand is loaded for each
// digit, since no tile is left to keep two of them, and it is near; the weights, which may come
// from the second-level cache, once.
template <bool is_signed, int tiles>
void sum_up(const Pixels& pixels, const int8_t* weight, int32_t* sums) {
  constexpr int kLeft = tiles * kDigits, kRight = kLeft + 1;
  const int64_t row_bytes = pixels.quads() * kQuadBytes, steps = pixels.job.digits->steps;
  unrolled<tiles * kDigits>([&](auto sum) { clear_tile<sum.value>(); });
  for (int64_t step = 0; step < steps; ++step) {
    const float* left[tiles];
    for (int tile = 0; tile < tiles; ++tile) left[tile] = pixels.left_operand(step, tile);
    if constexpr (tiles == 1) load_tile<kLeft>(left[0], row_bytes);
    unrolled<kDigits>([&](auto digit) __attribute__((always_inline)) {
      load_tile<kRight>(weight, kTileRowBytes);
      unrolled<tiles>([&](auto tile) __attribute__((always_inline)) {
        if constexpr (tiles > 1) load_tile<kLeft>(left[tile.value], row_bytes);
        add_products<is_signed, tile.value * kDigits + digit.value, kLeft, kRight>();
      });
      weight += kTileBytes;
    });
  }
  unrolled<tiles * kDigits>(
      [&](auto sum) { store_tile<sum.value>(sums + sum.value * kTileRows * kLanes); });
}

// --- outputs ---

constexpr int64_t kDigitSums = kTileRows * kLanes;

inline Vector sum_at(const int32_t* sums) {
  Integers whole;
  __builtin_memcpy(&whole, sums, sizeof whole);
  return __builtin_convertvector(whole, Vector);
}

// From the sums of up to 16 pixels and a vector of channels to the output and its counts.
template <class T>
void put_out(const ConvBiasReluJob& job, const RowBlock& row, int64_t vector, const int32_t* sums,
             int64_t pixels, T* out) {
  const ConvBiasReluArgs& args = job.args;
  const int64_t pixel_step = args.output_strides[3], channel_step = args.output_strides[1];
  const int64_t channel = row.channel + vector * kLanes;
  const int64_t channels = args.output_sizes[1] - channel;
  const bool straight = channel_step == 1 && channels >= kLanes;
  const Vector step = load(job.digits->step + channel), bias = load(job.bias + channel);
  const Vector middle = step * 256.0f, high = step * 65536.0f;
  Counts counts;
  for (int64_t p = 0; p < pixels; ++p) {
    Vector y = multiply_add(sum_at(sums), step, bias);
    y = multiply_add(sum_at(sums + kDigitSums), middle, y);
    y = multiply_add(sum_at(sums + 2 * kDigitSums), high, y);
    y = round_as<T>(relu(y));
    counts.active[0] = count_positive(counts.active[0], y);
    counts.sum[0] += y;
    if (!straight) {
      store(row.stage + p * kLanes, y);
    } else if (__is_same(T, float) && job.past_caches) {
      store_past_caches(reinterpret_cast<float*>(out + p * pixel_step), y);
    } else {
      store_exact(out + p * pixel_step, y);
    }
    sums += kLanes;
  }
  if (!straight && channel_step == 1) {
    store_pixels<T, 1>(row.stage, pixels, channels, out, pixel_step);
  } else if (!straight) {
    store_planes<T, 1>(row.stage, pixels, channels, out, channel_step, job.past_caches);
  }
  const Totals totals{row.totals.active + vector * kLanes, row.totals.nan + vector * kLanes,
                      row.totals.sum + vector * kLanes};
  add_counts<1>(counts, totals, out, pixels, channels, pixel_step, channel_step);
}

// One block of channels of one output row, or of two that one tile each is enough for.
template <class T, bool is_signed>
void run_block(const ConvBiasReluJob& job, const RowBlock& row, float* scratch) {
  const ConvBiasReluArgs& args = job.args;
  const DigitsPlan& plan = *job.digits;
  int32_t* const sums = reinterpret_cast<int32_t*>(scratch);
  float* const gathered = scratch + kDigitsSumFloats;
  const int64_t width = args.output_sizes[3];
  const int64_t vector_bytes = plan.steps * kDigits * kTileBytes;
  const auto* const weight =
      reinterpret_cast<const int8_t*>(job.weight) + row.channel / kLanes * vector_bytes;
  T* const out = static_cast<T*>(args.output) + row.output_offset;
  // From one tile to the next: pixels of a row, or rows.
  const int64_t tile_step =
      row.rows > 1 ? args.output_strides[2] : kTileRows * args.output_strides[3];
  for (int64_t begin = 0; begin < width; begin += kDigitsPixels) {
    const int64_t here = width - begin < kDigitsPixels ? width - begin : kDigitsPixels;
    const Pixels pixels{job, row, begin, gathered};
    if (pixels.are_gathered()) {
      for (int64_t i = 0; i < row.rows; ++i) {
        gather_rows(job, row.lines + i * args.kernel[0], begin, here,
                    gathered + i * kTileRows * kTileQuads);
      }
    }
    for (int64_t v = 0; v < row.vectors; ++v) {
      const bool one = row.rows == 1 && here <= kTileRows;
      const int8_t* const factors = weight + v * vector_bytes;
      one ? sum_up<is_signed, 1>(pixels, factors, sums)
          : sum_up<is_signed, 2>(pixels, factors, sums);
      T* const to = out + begin * args.output_strides[3] + v * kLanes * args.output_strides[1];
      for (int64_t tile = 0; tile < (one ? 1 : 2); ++tile) {
        const int64_t left = row.rows > 1 ? here : here - tile * kTileRows;
        put_out<T>(job, row, v, sums + tile * kDigits * kTileRows * kLanes,
                   left < kTileRows ? left : kTileRows, to + tile * tile_step);
      }
    }
  }
}

template <class T, bool is_signed>
void run_items(const ConvBiasReluJob& job, int64_t first, int64_t last, const Scratch& scratch) {
  float* const own = scratch.floats + scratch_floats(job) - job.digits->scratch_floats;
  const auto fill = [&](int64_t n, int64_t row, float* line) {
    fill_quads<is_signed>(job, n, row, line);
  };
  const auto run = [&](const RowBlock& row) { run_block<T, is_signed>(job, row, own); };
  begin_tiles();
  run_rows(job, first, last, scratch, fill, run, job.args.output_sizes[3] <= kTileRows ? 2 : 1);
  end_tiles();
  if (job.past_caches) finish_past_caches();
}

template <class T>
void run_items(const ConvBiasReluJob& job, int64_t first, int64_t last, const Scratch& scratch) {
  if (job.digits->is_signed) return run_items<T, true>(job, first, last, scratch);
  run_items<T, false>(job, first, last, scratch);
}

}  // namespace

void digits_loop(const ConvBiasReluJob& job, int64_t first, int64_t last, const Scratch& scratch) {
  with_output_type(job,
                   [&](auto of_type) { run_items<decltype(of_type)>(job, first, last, scratch); });
}

}  // namespace pixfuse::PIXFUSE_ISA
