// The direct convolution. Compiled once per instruction set, with PIXFUSE_ISA naming its namespace.
//
// The lines of input that some output rows reach are brought into a buffer that stays in the cache,
// as floats, with true zeros where the padding is. Then tiles of a few pixels times a few vectors
// of output channels are summed up in registers: each value of a line is broadcast, and multiplied
// with the weights of its tap. A tile of floats is finished there too, ReLU, counts and order
// included; what is rounded to 16 bits, or fills no vector, is staged for that.
#include "conv_bias_relu/conv_bias_relu_loop.h"
#include "conv_bias_relu/vectors.h"

namespace pixfuse::PIXFUSE_ISA {
namespace {

// --- tiles ---

// Accumulators, weights and a broadcast value fill the vector registers: 32, or 16 of x86 without
// AVX-512.
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int kMaxVectors = 4;
constexpr int kTilePixels[kMaxVectors] = {12, 12, 8, 6};
#else
constexpr int kMaxVectors = 2;
constexpr int kTilePixels[kMaxVectors] = {10, 6};
#endif

// Where there are registers for a square of sums, it is transposed in them: for outputs whose
// pixels of a channel lie side by side.
#if defined(__AVX512F__)
constexpr bool kSquareTiles = true;
#else
constexpr bool kSquareTiles = false;
#endif
constexpr int kMostTilePixels = kLanes > 12 ? kLanes : 12;

// Counts and sums of one channel block over a few pixels, so few that a sum in float32 is right to
// 1e-5.
struct Counts {
  Integers active[kMaxVectors] = {};
  Vector sum[kMaxVectors] = {};
};

// A tile's place: the lines its kernel reads, at the tile's first pixel.
struct Tile {
  const float* const* lines;  // [kernel rows]
  int64_t line_start;         // floats
  int64_t kernel_rows;
  int64_t taps;
  const int64_t* tap_offsets;
  int64_t pixel_step;  // floats from one output pixel's taps to the next one's
  const float* weight;
  const float* bias;
  Counts* counts;
};

// What happens to a tile's sums: they are stored, to be finished from there; or they are finished
// and stored in an output where the channels of a pixel, or the pixels of a channel, are side by
// side.
enum class Place { stage, pixels, planes };

// Calls body(0) to body(count - 1), with numbers that are constants: only then does gcc keep an
// array of accumulators in registers from one kernel row to the next.
template <int i>
struct Constant {
  static constexpr int value = i;
};
template <int count, class Body>
[[gnu::always_inline]] inline void unrolled(const Body& body) {
  if constexpr (count > 1) unrolled<count - 1>(body);
  body(Constant<count - 1>{});
}

// `out` has a distance of `step` floats between pixels, or between planes; on the stage, none.
template <Place place, int vectors, int pixels>
void run_tile(const Tile& tile, float* out, int64_t step) {
  // The stores come after so much arithmetic that their lines can be in the cache by then.
  if constexpr (place == Place::pixels) {
    unrolled<pixels>([&](auto q) __attribute__((always_inline)) {
      constexpr int kLineFloats = 16, lines = (vectors * kLanes + kLineFloats - 1) / kLineFloats;
      unrolled<lines>([&](auto line) __attribute__((always_inline)) {
        __builtin_prefetch(out + q.value * step + line.value * kLineFloats, 1);
      });
    });
  } else if constexpr (place == Place::planes) {
    unrolled<kLanes>([&](auto c) __attribute__((always_inline)) {
      __builtin_prefetch(out + c.value * step, 1);
    });
  }
  Vector sums[vectors * pixels];
  unrolled<vectors>([&](auto v) __attribute__((always_inline)) {
    const Vector bias = load(tile.bias + v.value * kLanes);
    unrolled<pixels>(
        [&](auto q) __attribute__((always_inline)) { sums[q.value * vectors + v.value] = bias; });
  });
  const float* weight = tile.weight;
  const int64_t taps = tile.taps, pixel_step = tile.pixel_step;
  const int64_t* const offsets = tile.tap_offsets;
  for (int64_t row = 0; row < tile.kernel_rows; ++row) {
    const float* const line = tile.lines[row] + tile.line_start;
    for (int64_t t = 0; t < taps; ++t) {
      Vector w[vectors];
      unrolled<vectors>([&](auto v) __attribute__((always_inline)) {
        w[v.value] = load(weight + v.value * kLanes);
      });
      weight += vectors * kLanes;
      const float* const at = line + offsets[t];
      unrolled<pixels>([&](auto q) __attribute__((always_inline)) {
        const Vector value = broadcast(at[q.value * pixel_step]);
        unrolled<vectors>([&](auto v) __attribute__((always_inline)) {
          Vector& sum = sums[q.value * vectors + v.value];
          sum = multiply_add(value, w[v.value], sum);
        });
      });
    }
  }
  if constexpr (place == Place::stage) {
    unrolled<vectors * pixels>([&](auto i) __attribute__((always_inline)) {
      store(out + i.value * kLanes, sums[i.value]);
    });
    return;
  }
  unrolled<vectors>([&](auto v) __attribute__((always_inline)) {
    Integers active = tile.counts->active[v.value];
    Vector total = tile.counts->sum[v.value];
    unrolled<pixels>([&](auto q) __attribute__((always_inline)) {
      Vector& y = sums[q.value * vectors + v.value];
      y = relu(y);
      active = count_positive(active, y);
      total += y;
      if constexpr (place == Place::pixels) store(out + q.value * step + v.value * kLanes, y);
    });
    tile.counts->active[v.value] = active;
    tile.counts->sum[v.value] = total;
  });
  if constexpr (place == Place::planes) {
    Vector square[kLanes];
    unrolled<kLanes>([&](auto q) __attribute__((always_inline)) {
      square[q.value] = q.value < pixels ? sums[q.value < pixels ? q.value : 0] : Vector{};
    });
    transpose<kLanes / 2>(square);
    unrolled<kLanes>([&](auto c) __attribute__((always_inline)) {
      if constexpr (pixels == kLanes) {
        store(out + c.value * step, square[c.value]);
      } else {
        store_exact(out + c.value * step, square[c.value], pixels);
      }
    });
  }
}

using RunTile = void (*)(const Tile&, float*, int64_t);
struct TileTable {
  RunTile of[kMaxVectors][kMostTilePixels];
};

// How many of `left` pixels the next tile takes: few different numbers, as each is a function.
template <Place place>
constexpr int64_t tile_pixels(int64_t vectors, int64_t left) {
  if (place == Place::planes) return left >= kLanes ? kLanes : left > 8 ? (left + 1) / 2 : left;
  const int64_t most = kTilePixels[vectors - 1];
  return left >= most ? most : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

template <Place place, int vectors, int pixels = kMostTilePixels>
constexpr void fill_tiles(TileTable& table) {
  if constexpr (tile_pixels<place>(vectors, pixels) == pixels) {
    table.of[vectors - 1][pixels - 1] = run_tile<place, vectors, pixels>;
  }
  if constexpr (pixels > 1) {
    fill_tiles<place, vectors, pixels - 1>(table);
  } else if constexpr (vectors > 1) {
    fill_tiles<place, vectors - 1>(table);
  }
}

template <Place place>
constexpr TileTable all_tiles() {
  TileTable table{};
  constexpr int vectors = place == Place::planes ? 1 : kMaxVectors;
  if constexpr (place != Place::planes || kSquareTiles) {
    fill_tiles<place, vectors>(table);
  }
  return table;
}
template <Place place>
constexpr TileTable kTiles = all_tiles<place>();

// --- lines ---

template <Arithmetic arithmetic>
inline float normalized(uint8_t x, float scale, float mean, float std, double center_high,
                        double center_low, double inverse_width) {
  if constexpr (arithmetic == Arithmetic::multiply) {
    return ((static_cast<float>(x) * scale) - mean) / std;
  } else if constexpr (arithmetic == Arithmetic::divide) {
    return ((static_cast<float>(x) / 255.0f) - mean) / std;
  } else {
    const double centered = (static_cast<double>(x) - center_high) - center_low;
    return static_cast<float>(centered * inverse_width);
  }
}

// `count` bytes; the constants repeat after `period` of them, and begin at `first`.
template <Arithmetic arithmetic, int period>
void normalize_run(const ConvBiasReluJob& job, const uint8_t* __restrict in, float* __restrict out,
                   int64_t count, int64_t first) {
  const float scale = job.args.scale;
  const float *mean = job.mean + first, *std = job.std + first;
  const double *high = job.center_high + first, *low = job.center_low + first,
               *inverse_width = job.inverse_width + first;
  int64_t begin = 0;
  for (; begin + period <= count; begin += period) {
    for (int i = 0; i < period; ++i) {
      out[begin + i] = normalized<arithmetic>(in[begin + i], scale, mean[i], std[i], high[i],
                                              low[i], inverse_width[i]);
    }
  }
  for (int64_t i = 0; begin + i < count; ++i) {
    out[begin + i] = normalized<arithmetic>(in[begin + i], scale, mean[i], std[i], high[i], low[i],
                                            inverse_width[i]);
  }
}

template <Arithmetic arithmetic>
void normalize_run(const ConvBiasReluJob& job, const uint8_t* in, float* out, int64_t count,
                   int64_t first, int64_t period) {
  switch (period / kCyclePixels) {
    case 1:
      return normalize_run<arithmetic, kCyclePixels>(job, in, out, count, first);
    case 2:
      return normalize_run<arithmetic, 2 * kCyclePixels>(job, in, out, count, first);
    case 3:
      return normalize_run<arithmetic, 3 * kCyclePixels>(job, in, out, count, first);
    default:
      return normalize_run<arithmetic, 4 * kCyclePixels>(job, in, out, count, first);
  }
}

void convert_run(const ConvBiasReluJob& job, const uint8_t* in, float* out, int64_t count,
                 int64_t first, int64_t period) {
  switch (job.args.arithmetic) {
    case Arithmetic::multiply:
      return normalize_run<Arithmetic::multiply>(job, in, out, count, first, period);
    case Arithmetic::divide:
      return normalize_run<Arithmetic::divide>(job, in, out, count, first, period);
    case Arithmetic::nearest:
      return normalize_run<Arithmetic::nearest>(job, in, out, count, first, period);
  }
}

template <class T>
void convert_run(const ConvBiasReluJob&, const T* __restrict in, float* __restrict out,
                 int64_t count, int64_t, int64_t) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(in[i]);
}

// One row of the input, as far as the kernel reaches it; the padding stays as it is.
template <class T>
void fill_line(const ConvBiasReluJob& job, int64_t n, int64_t row, float* line) {
  const ConvBiasReluArgs& args = job.args;
  const int64_t channels = args.input_sizes[1], width = args.input_sizes[3];
  const int64_t channel_step = args.input_strides[1], pixel_step = args.input_strides[3];
  const int64_t left = args.padding[1];
  const int64_t reached = job.line_pixels - left;
  const int64_t count = reached < width ? reached : width;
  if (count <= 0) return;
  const T* in =
      static_cast<const T*>(args.input) + n * args.input_strides[0] + row * args.input_strides[2];
  const int64_t period = kCyclePixels * channels;
  if (job.interleaved_lines) {
    return convert_run(job, in, line + left * channels, count * channels, 0, period);
  }
  constexpr int64_t kGathered = 256;
  T run[kGathered];
  for (int64_t c = 0; c < channels; ++c) {
    const T* source = in + c * channel_step;
    float* target = line + c * job.line_pixels + left;
    const int64_t first = c * kCyclePixels;  // a channel's constants stand together
    if (pixel_step == 1) {
      convert_run(job, source, target, count, first, kCyclePixels);
      continue;
    }
    for (int64_t begin = 0; begin < count; begin += kGathered) {
      const int64_t length = count - begin < kGathered ? count - begin : kGathered;
      for (int64_t i = 0; i < length; ++i) run[i] = source[(begin + i) * pixel_step];
      convert_run(job, run, target + begin, length, first, kCyclePixels);
    }
  }
}

void fill_line(const ConvBiasReluJob& job, int64_t n, int64_t row, float* line) {
  switch (job.args.input_type) {
    case ElementType::float32:
      return fill_line<float>(job, n, row, line);
    case ElementType::float16:
      return fill_line<Float16>(job, n, row, line);
    case ElementType::bfloat16:
      return fill_line<BFloat16>(job, n, row, line);
    case ElementType::uint8:
      return fill_line<uint8_t>(job, n, row, line);
  }
}

// --- what tiles left ---

// Sums and counts of one item, at the first channel of a block.
struct Totals {
  int64_t* active;
  int64_t* nan;
  double* sum;
};

// ReLU, rounding and activity of `pixels` times `vectors` on the stage, where the results stay.
template <class T, int vectors>
Counts finish(float* stage, int64_t pixels) {
  Counts counts;
  for (int64_t p = 0; p < pixels; ++p) {
    for (int v = 0; v < vectors; ++v) {
      float* at = stage + (p * vectors + v) * kLanes;
      const Vector y = round_as<T>(relu(load(at)));
      counts.active[v] = count_positive(counts.active[v], y);
      counts.sum[v] += y;
      store(at, y);
    }
  }
  return counts;
}

// Adds the counts of some pixels. The NaNs are counted in what became of the pixels: value (p, c)
// is at p * pixel_step + c * channel_step.
template <int vectors, class T>
void add_counts(const Counts& counts, const Totals& totals, const T* values, int64_t pixels,
                int64_t channels, int64_t pixel_step, int64_t channel_step) {
  int32_t active[vectors * kLanes];
  float sums[vectors * kLanes];
  __builtin_memcpy(active, counts.active, sizeof active);
  __builtin_memcpy(sums, counts.sum, sizeof sums);
  for (int i = 0; i < vectors * kLanes; ++i) {
    totals.active[i] += active[i];
    totals.sum[i] += static_cast<double>(sums[i]);
  }
  // No output is below 0, so a sum is NaN only when one of the outputs is.
  Integers any_nan = counts.sum[0] != counts.sum[0];
  for (int v = 1; v < vectors; ++v) any_nan |= counts.sum[v] != counts.sum[v];
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= any_nan[i];
  if (found == 0) return;
  for (int64_t c = 0; c < vectors * kLanes && c < channels; ++c) {
    for (int64_t p = 0; p < pixels; ++p) {
      const float value = to_float(values[p * pixel_step + c * channel_step]);
      totals.nan[c] += value != value ? 1 : 0;
    }
  }
}

// From the stage to an output whose channels of a pixel lie side by side.
template <class T, int vectors>
void store_pixels(const float* stage, int64_t pixels, int64_t channels, T* out, int64_t step) {
  for (int64_t p = 0; p < pixels; ++p) {
    for (int v = 0; v < vectors; ++v) {
      const int64_t left = channels - v * kLanes;
      if (left <= 0) break;
      const Vector y = load(stage + (p * vectors + v) * kLanes);
      T* to = out + p * step + v * kLanes;
      if (left >= kLanes) {
        store_exact(to, y);
      } else {
        store_exact(to, y, left);
      }
    }
  }
}

// From the stage to an output whose pixels of a channel lie side by side.
template <class T, int vectors>
void store_planes(const float* stage, int64_t pixels, int64_t channels, T* out, int64_t plane) {
  for (int v = 0; v < vectors; ++v) {
    const int64_t left = channels - v * kLanes;
    if (left <= 0) break;
    const int64_t wanted = left < kLanes ? left : kLanes;
    for (int64_t p = 0; p < pixels; p += kLanes) {
      const int64_t count = pixels - p < kLanes ? pixels - p : kLanes;
      Vector square[kLanes] = {};
      for (int64_t i = 0; i < count; ++i) {
        square[i] = load(stage + ((p + i) * vectors + v) * kLanes);
      }
      transpose<kLanes / 2>(square);
      T* to = out + v * kLanes * plane + p;
      if (wanted == kLanes && count == kLanes) {
        for (int c = 0; c < kLanes; ++c) store_exact(to + c * plane, square[c]);
      } else {
        for (int64_t c = 0; c < wanted; ++c) store_exact(to + c * plane, square[c], count);
      }
    }
  }
}

// --- one item ---

// Up to kStagePixels neighbouring pixels of a block of channels, tile by tile, into `out`.
template <Place place, int vectors>
void run_tiles(Tile tile, int64_t pixels, float* out, int64_t step) {
  for (int64_t left = pixels; left > 0;) {
    const int64_t width = tile_pixels<place>(vectors, left);
    kTiles<place>.of[vectors - 1][width - 1](tile, out, step);
    tile.line_start += width * tile.pixel_step;
    out += width * (place == Place::planes ? 1 : step);
    left -= width;
  }
}

// One block of channels of one output row.
template <class T, int vectors>
void run_row(const ConvBiasReluJob& job, const Tile& row_tile, int64_t channels,
             const Totals& totals, T* out, float* stage) {
  const ConvBiasReluArgs& args = job.args;
  const int64_t width = args.output_sizes[3], pixel_step = args.output_strides[3];
  const int64_t channel_step = args.output_strides[1];
  const bool whole = channels >= vectors * kLanes;
  Tile tile = row_tile;
  for (int64_t begin = 0; begin < width; begin += kStagePixels) {
    const int64_t pixels = width - begin < kStagePixels ? width - begin : kStagePixels;
    Counts counts;
    tile.counts = &counts;
    tile.line_start = begin * tile.pixel_step;
    T* const to = out + begin * pixel_step;
    bool done = false;
    if constexpr (__is_same(T, float)) {
      if (whole && channel_step == 1) {
        run_tiles<Place::pixels, vectors>(tile, pixels, to, pixel_step);
        done = true;
      } else if constexpr (kSquareTiles && vectors == 1) {
        if (whole) {
          run_tiles<Place::planes, 1>(tile, pixels, to, channel_step);
          done = true;
        }
      }
    }
    if (!done) {
      run_tiles<Place::stage, vectors>(tile, pixels, stage, vectors * kLanes);
      counts = finish<T, vectors>(stage, pixels);
      if (channel_step == 1) {
        store_pixels<T, vectors>(stage, pixels, channels, to, pixel_step);
      } else {
        store_planes<T, vectors>(stage, pixels, channels, to, channel_step);
      }
    }
    add_counts<vectors>(counts, totals, to, pixels, channels, pixel_step, channel_step);
  }
}

template <class T, int vectors = kMaxVectors>
void run_row(int64_t wanted_vectors, const ConvBiasReluJob& job, const Tile& tile, int64_t channels,
             const Totals& totals, T* out, float* stage) {
  if constexpr (vectors > 1) {
    if (wanted_vectors < vectors) {
      return run_row<T, vectors - 1>(wanted_vectors, job, tile, channels, totals, out, stage);
    }
  }
  run_row<T, vectors>(job, tile, channels, totals, out, stage);
}

template <class T>
void run_items(const ConvBiasReluJob& job, int64_t first_item, int64_t last_item,
               const Scratch& scratch) {
  const ConvBiasReluArgs& args = job.args;
  float* const lines = scratch.floats;
  int64_t* const held_rows = scratch.held_rows;
  float* const zeros = lines + job.lines * job.line_floats;
  float* const stage = zeros + job.line_floats;
  for (int64_t i = 0; i < (job.lines + 1) * job.line_floats; ++i) lines[i] = 0.0f;
  const int64_t channels = args.output_sizes[1], height = args.output_sizes[2];
  const int64_t kernel_rows = args.kernel[0];
  const int64_t padded = job.blocks.vectors * kLanes;
  const int64_t taps = kernel_rows * job.taps_per_row;
  int64_t held_image = -1;

  for (int64_t item = first_item; item < last_item; ++item) {
    const int64_t n = item / job.items_per_image;
    const int64_t item_row = item % job.items_per_image * kItemRows;
    const int64_t item_end = item_row + kItemRows < height ? item_row + kItemRows : height;
    if (n != held_image) {
      for (int64_t i = 0; i < job.lines; ++i) held_rows[i] = -1;
      held_image = n;
    }
    const Totals item_totals{job.item_active + item * padded, job.item_nan + item * padded,
                             job.item_sum + item * padded};
    for (int64_t c = 0; c < padded; ++c) {
      item_totals.active[c] = 0;
      item_totals.nan[c] = 0;
      item_totals.sum[c] = 0.0;
    }
    for (int64_t row = item_row; row < item_end; row += job.rows_at_once) {
      const int64_t row_end = row + job.rows_at_once < item_end ? row + job.rows_at_once : item_end;
      for (int64_t y = row; y < row_end; ++y) {
        for (int64_t k = 0; k < kernel_rows; ++k) {
          const int64_t source = y * args.stride[0] - args.padding[0] + k * args.dilation[0];
          const float** line = scratch.wanted + (y - row) * kernel_rows + k;
          if (source < 0 || source >= args.input_sizes[2]) {
            *line = zeros;
            continue;
          }
          const int64_t slot = source % job.lines;
          float* held = lines + slot * job.line_floats;
          if (held_rows[slot] != source) {
            fill_line(job, n, source, held);
            held_rows[slot] = source;
          }
          *line = held;
        }
      }
      for (int64_t block = 0; block < job.blocks.count; ++block) {
        const int64_t vector = job.blocks.first_vector(block);
        const int64_t vectors = job.blocks.first_vector(block + 1) - vector;
        const int64_t channel = vector * kLanes;
        const Totals totals{item_totals.active + channel, item_totals.nan + channel,
                            item_totals.sum + channel};
        const int64_t pixel_step =
            args.stride[1] * (job.interleaved_lines ? args.input_sizes[1] : 1);
        for (int64_t y = row; y < row_end; ++y) {
          const Tile tile{scratch.wanted + (y - row) * kernel_rows,
                          0,
                          kernel_rows,
                          job.taps_per_row,
                          job.tap_offsets,
                          pixel_step,
                          job.weight + channel * taps,
                          job.bias + channel,
                          nullptr};
          T* out = static_cast<T*>(args.output) + n * args.output_strides[0] +
                   channel * args.output_strides[1] + y * args.output_strides[2];
          run_row<T>(vectors, job, tile, channels - channel, totals, out, stage);
        }
      }
    }
  }
}

}  // namespace

int64_t vector_lanes() { return kLanes; }
int64_t max_vectors(bool planes_of_floats) {
  return kSquareTiles && planes_of_floats ? 1 : kMaxVectors;
}

void conv_bias_relu_loop(const ConvBiasReluJob& job, int64_t first, int64_t last,
                         const Scratch& scratch) {
  switch (job.args.output_type) {
    case ElementType::float32:
      return run_items<float>(job, first, last, scratch);
    case ElementType::float16:
      return run_items<Float16>(job, first, last, scratch);
    case ElementType::bfloat16:
      return run_items<BFloat16>(job, first, last, scratch);
    case ElementType::uint8:
      return;  // no such output
  }
}

}  // namespace pixfuse::PIXFUSE_ISA
