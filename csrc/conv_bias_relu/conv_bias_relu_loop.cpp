// The direct convolution. Compiled once per instruction set, with PIXFUSE_ISA naming its namespace.
//
// Tiles of a few pixels times a few vectors of output channels are summed up in registers: each
// value of a line is broadcast, and multiplied with the weights of its tap. A tile of floats is
// finished there too, ReLU and counts included. What becomes planes, or fills no vector, goes over
// the stage; what is rounded to 16 bits is finished there.
#include "common/read_ahead.h"
#include "conv_bias_relu/lines.h"
#include "conv_bias_relu/rows.h"
#include "conv_bias_relu/stage.h"

namespace pixfuse::PIXFUSE_ISA {
namespace {

// --- tiles ---

// As many pixels as there are registers for, or one more: rows of 56, 28 and 14 pixels, which
// images of 224 leave, are whole tiles then, and that is worth a sum in memory.
#if defined(__AVX512F__)
constexpr int kTilePixels[kMaxVectors] = {14, 14, 8, 7};
#elif defined(__ARM_NEON)
constexpr int kTilePixels[kMaxVectors] = {12, 12, 8, 6};
#else
constexpr int kTilePixels[kMaxVectors] = {10, 6};
#endif

// Pixels that are computed in one go where they need no stage: whole tiles of the most vectors, and
// so few that a sum of theirs in float32 is right to 1e-5.
constexpr int64_t kRowPixels = 8 * kTilePixels[kMaxVectors - 1];

// How far ahead weights are asked for: those of many channels come from the second-level cache.
constexpr int64_t kTapsAhead = 16;

// A tile's place: the lines its kernel reads, at the tile's first pixel.
struct Tile {
  const float* const* lines;  // [kernel rows]
  int64_t line_start;         // floats; padding that is left out is before the line
  int64_t kernel_rows;
  // Of the kernel that are summed up apart from the others; 0: all together. And those of the first
  // such group, if the rows before are padding that is left out.
  int64_t rows_apart, rows_left;
  TapRuns runs;
  int64_t pixel_step;  // floats from one output pixel's taps to the next one's
  // Taps of a kernel row that are padding, and left out: the tile's first pixel begins with so many
  // of them, its last one ends with so many.
  int64_t first_padding, last_padding;
  const float* weight;
  const float* bias;
  bool past_caches;  // where the place is pixels
  Ahead* input;      // what lines are filled with next, or read next
  Ahead* output;     // where the place is the stage of planes
  // What counts, of each vector.
  Integers* active;
  Vector* sum;
};

// What happens to a tile's sums: they are stored on the stage, to be finished from there; or they
// are finished, and stored in an output where the channels of a pixel are side by side, or on the
// stage, for planes. For the last, runs of taps can be summed up apart: torch's convolution of
// planes of many channels adds up no more at a time.
enum class Place { stage, pixels, planes, planes_of_runs };

// What the compiler must not keep in registers, which others need more.
inline float* in_memory(float* memory) {
  asm volatile("" : "+r"(memory) : : "memory");
  return memory;
}

// `out` has a distance of `step` floats between pixels.
template <Place place, int vectors, int pixels>
void run_tile(const Tile& tile, float* out, int64_t step) {
  // The stores come after so much arithmetic that their lines can be in the cache by then.
  if constexpr (place == Place::pixels) {
    if (!tile.past_caches)
      unrolled<pixels>([&](auto q) __attribute__((always_inline)) {
        constexpr int kLineFloats = 16, lines = (vectors * kLanes + kLineFloats - 1) / kLineFloats;
        unrolled<lines>([&](auto line) __attribute__((always_inline)) {
          __builtin_prefetch(out + q.value * step + line.value * kLineFloats, 1);
        });
      });
  }
  Vector sums[vectors * pixels];
  constexpr bool runs_apart = place == Place::planes_of_runs;
  unrolled<vectors * pixels>([&](auto i)
                                 __attribute__((always_inline)) { sums[i.value] = Vector{}; });
  constexpr int64_t kTapFloats = vectors * kLanes;
  const float* weight = tile.weight;
  const int64_t pixel_step = tile.pixel_step;
  const TapRuns runs = tile.runs;
  // Terms that are added up one after the other lose the more bits the more there are.
  float apart[runs_apart ? 1 : vectors * pixels * kLanes];
  float* const before = runs_apart ? out : in_memory(apart);
  bool is_first = true;
  const auto add_up = [&]() __attribute__((always_inline)) {
    unrolled<vectors * pixels>([&](auto i) __attribute__((always_inline)) {
      Vector& sum = sums[i.value];
      if (!is_first) sum += load(before + i.value * kLanes);
      store(before + i.value * kLanes, sum);
      sum = Vector{};
    });
    is_first = false;
  };
  int64_t rows_left = tile.rows_left;
  for (int64_t row = 0; row < tile.kernel_rows; ++row) {
    tile.input->ask<0>();
    if constexpr (runs_apart) tile.output->ask<1>();
    const float* run = tile.lines[row] + tile.line_start;
    for (int64_t r = 0; r < runs.count; ++r, run += runs.step) {
      const float* first[pixels];
      unrolled<pixels>([&](auto q) __attribute__((always_inline)) {
        first[q.value] = run + q.value * pixel_step;
      });
      int64_t offset = 0;
      const auto sum_up = [&](auto begin, auto end, int64_t taps) __attribute__((always_inline)) {
        for (; taps > 0; --taps, offset += runs.tap_step) {
          Vector w[vectors];
          unrolled<vectors>([&](auto v) __attribute__((always_inline)) {
            w[v.value] = load(weight + v.value * kLanes);
          });
          unrolled<vectors>([&](auto v) __attribute__((always_inline)) {
            __builtin_prefetch(weight + kTapsAhead * kTapFloats + v.value * kLanes);
          });
          weight += kTapFloats;
          unrolled<pixels>([&](auto q) __attribute__((always_inline)) {
            if constexpr (q.value >= begin.value && q.value < end.value) {
              const Vector value = broadcast(first[q.value][offset]);
              unrolled<vectors>([&](auto v) __attribute__((always_inline)) {
                Vector& sum = sums[q.value * vectors + v.value];
                sum = multiply_add(value, w[v.value], sum);
              });
            }
          });
        }
      };
      constexpr Constant<0> all_from;
      constexpr Constant<pixels> all_to;
      const int64_t first_padding = r == 0 ? tile.first_padding : 0;
      const int64_t last_padding = r + 1 == runs.count ? tile.last_padding : 0;
      sum_up(Constant<1>{}, all_to, first_padding);
      sum_up(all_from, all_to, runs.taps - first_padding - last_padding);
      sum_up(all_from, Constant<pixels - 1>{}, last_padding);
      if constexpr (runs_apart) {
        if (row + 1 < tile.kernel_rows || r + 1 < runs.count) add_up();
      }
    }
    if constexpr (!runs_apart) {
      if (--rows_left == 0 && row + 1 < tile.kernel_rows) {
        add_up();
        rows_left = tile.rows_apart;
      }
    }
  }
  // The bias last: all terms that came after it would be rounded to its last bit.
  unrolled<vectors * pixels>([&](auto i) __attribute__((always_inline)) {
    Vector& sum = sums[i.value];
    if (!is_first) sum += load(before + i.value * kLanes);
    sum += load(tile.bias + i.value % vectors * kLanes);
  });
  if constexpr (place == Place::stage) {
    unrolled<vectors * pixels>([&](auto i) __attribute__((always_inline)) {
      store(out + i.value * kLanes, sums[i.value]);
    });
    return;
  }
  unrolled<vectors>([&](auto v) __attribute__((always_inline)) {
    Integers active = tile.active[v.value];
    Vector total = tile.sum[v.value];
    unrolled<pixels>([&](auto q) __attribute__((always_inline)) {
      const Vector y = relu(sums[q.value * vectors + v.value]);
      active = count_positive(active, y);
      total += y;
      float* const to = out + q.value * step + v.value * kLanes;
      (place == Place::pixels) && tile.past_caches ? store_past_caches(to, y) : store(to, y);
    });
    tile.active[v.value] = active;
    tile.sum[v.value] = total;
  });
}

using RunTile = void (*)(const Tile&, float*, int64_t);
struct TileTable {
  RunTile of[kMaxVectors][kTilePixels[0]];
};

// How many of `left` pixels the next tile takes: few different numbers, as each is a function.
constexpr int64_t tile_pixels(int64_t vectors, int64_t left) {
  const int64_t most = kTilePixels[vectors - 1];
  return left >= most ? most : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// How many tiles a row of so many pixels has, about.
inline int64_t tiles_of(int64_t vectors, int64_t pixels) {
  const int64_t most = kTilePixels[vectors - 1];
  return (pixels + most - 1) / most;
}

template <Place place, int vectors = kMaxVectors, int pixels = kTilePixels[0]>
constexpr void fill_tiles(TileTable& table) {
  if constexpr (tile_pixels(vectors, pixels) == pixels) {
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
  fill_tiles<place>(table);
  return table;
}
template <Place place>
constexpr TileTable kTiles = all_tiles<place>();

// --- rows ---

// Some neighbouring pixels of a block of channels, tile by tile, into `out`.
template <Place place, int vectors>
void run_tiles(const Tile& tiles, int64_t pixels, float* out, int64_t step) {
  Tile tile = tiles;
  for (int64_t left = pixels; left > 0;) {
    const int64_t width = tile_pixels(vectors, left);
    tile.first_padding = left == pixels ? tiles.first_padding : 0;
    tile.last_padding = left == width ? tiles.last_padding : 0;
    if constexpr (place == Place::planes) tile.output->ask<1>();
    kTiles<place>.of[vectors - 1][width - 1](tile, out, step);
    tile.line_start += width * tile.pixel_step;
    out += width * step;
    left -= width;
  }
}

// One block of channels of one output row. Of planes `staged` pixels are on the stage already, of
// the rows before; they are turned when it is full, and with the `last` row.
template <class T, int vectors>
void run_row(const ConvBiasReluJob& job, const Tile& row_tile, int64_t channels,
             const Totals& totals, T* out, float* stage, int64_t& staged, bool last) {
  const ConvBiasReluArgs& args = job.args;
  const int64_t width = args.output_sizes[3], pixel_step = args.output_strides[3];
  const int64_t channel_step = args.output_strides[1];
  const bool whole = channels >= vectors * kLanes;
  Tile tile = row_tile;
  const bool pixels_are_stored = __is_same(T, float) && whole && channel_step == 1;
  constexpr int64_t step = vectors * kLanes;
  const int64_t most = kRowPixels;
  for (int64_t begin = 0; begin < width; begin += most) {
    const int64_t pixels = width - begin < most ? width - begin : most;
    Counts<vectors> counts;
    tile.active = counts.active;
    tile.sum = counts.sum;
    tile.line_start = row_tile.line_start + begin * tile.pixel_step;
    tile.first_padding = begin == 0 ? row_tile.first_padding : 0;
    tile.last_padding = begin + pixels == width ? row_tile.last_padding : 0;
    T* const to = out + begin * pixel_step;
    if constexpr (__is_same(T, float)) {
      if (job.planes) {
        float* const at = stage + staged * step;
        job.runs_apart ? run_tiles<Place::planes_of_runs, vectors>(tile, pixels, at, step)
                       : run_tiles<Place::planes, vectors>(tile, pixels, at, step);
        add_counts<vectors>(counts, totals, at, pixels, channels, step, 1);
        staged += pixels;
        const int64_t left = width - begin - pixels;
        const int64_t next = left > 0 ? left : width;
        if (staged + (next < most ? next : most) > kStagePixels || (last && left == 0)) {
          store_planes<T, vectors>(stage, staged, channels, to + pixels - staged, channel_step,
                                   job.past_caches);
          staged = 0;
        }
        continue;
      }
      if (pixels_are_stored) run_tiles<Place::pixels, vectors>(tile, pixels, to, pixel_step);
    }
    if (!pixels_are_stored) {
      run_tiles<Place::stage, vectors>(tile, pixels, stage, step);
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
             const Totals& totals, T* out, float* stage, int64_t& staged, bool last) {
  if constexpr (vectors > 1) {
    if (wanted_vectors < vectors) {
      return run_row<T, vectors - 1>(wanted_vectors, job, tile, channels, totals, out, stage,
                                     staged, last);
    }
  }
  run_row<T, vectors>(job, tile, channels, totals, out, stage, staged, last);
}

template <class T>
void run_items(const ConvBiasReluJob& job, int64_t first, int64_t last, const Scratch& scratch) {
  const ConvBiasReluArgs& args = job.args;
  const int64_t kernel_rows = args.kernel[0];
  const int64_t taps = kernel_rows * args.kernel[1] * args.input_sizes[1];
  const int64_t pixel_step = args.stride[1] * (job.interleaved_lines ? args.input_sizes[1] : 1);
  const auto fill = [&](int64_t n, int64_t row, float* line) { fill_line(job, n, row, line); };
  // While a row of outputs is computed, those rows of input are asked for that come next: past the
  // end of an image, rows of the next one. Of planes, so are those of the output: they are stored
  // after all others, so each would wait for memory.
  const int64_t next_row = (job.rows_at_once - 1) * args.stride[0] - args.padding[0] +
                           (kernel_rows - 1) * args.dilation[0] + 1;
  const int64_t *const in = args.input_strides, bytes = element_bytes(args.input_type);
  const auto next_input = [&](const RowBlock& row) {
    const int64_t start = row.image * in[0] + (row.first_row * args.stride[0] + next_row) * in[2];
    Ahead ahead{reinterpret_cast<uintptr_t>(args.input) + static_cast<uintptr_t>(bytes * start)};
    if (!job.interleaved_lines || row.channel > 0) return ahead;
    const int64_t row_bytes = row.rows * args.stride[0] * bytes * in[2];
    if (in[1] == 1) {
      ahead.runs = row_bytes / kCacheLineBytes;
      ahead.step = ahead.bytes = kCacheLineBytes;
    } else {
      ahead.runs = args.input_sizes[1];
      ahead.step = bytes * in[1];
      ahead.bytes = row_bytes;
    }
    return ahead;
  };
  const auto next_output = [&](const RowBlock& row, const T* out) {
    const int64_t left = args.output_sizes[1] - row.channel, most = row.vectors * kLanes;
    Ahead ahead{reinterpret_cast<uintptr_t>(out)};
    if (!job.planes || job.past_caches) return ahead;
    ahead.runs = left < most ? left : most;
    ahead.step = args.output_strides[1] * static_cast<int64_t>(sizeof(T));
    ahead.bytes = row.rows * args.output_strides[2] * static_cast<int64_t>(sizeof(T));
    return ahead;
  };
  const auto run_block = [&](const RowBlock& row) {
    T* const out = static_cast<T*>(args.output) + row.output_offset;
    Ahead input = next_input(row), output = next_output(row, out);
    const int64_t times = row.rows * kernel_rows * tiles_of(row.vectors, args.output_sizes[3]);
    input.share_out(times);
    output.share_out(job.runs_apart ? times : times / kernel_rows);
    int64_t staged = 0;
    for (int64_t y = 0; y < row.rows; ++y) {
      const float* const* const lines = row.lines + y * kernel_rows;
      int64_t first_row = 0, end_row = kernel_rows;  // of the kernel, without padding left out
      while (lines[first_row] == nullptr) ++first_row;
      while (lines[end_row - 1] == nullptr) --end_row;
      const int64_t row_weights = taps / kernel_rows * row.vectors * kLanes;
      const Tile tile{lines + first_row,
                      -job.first_padding,
                      end_row - first_row,
                      job.rows_apart,
                      job.rows_apart > 0 ? job.rows_apart - first_row % job.rows_apart : 0,
                      job.tap_runs,
                      pixel_step,
                      job.first_padding,
                      job.last_padding,
                      job.weight + row.channel * taps + first_row * row_weights,
                      job.bias + row.channel,
                      job.past_caches,
                      &input,
                      &output,
                      nullptr,
                      nullptr};
      run_row<T>(row.vectors, job, tile, args.output_sizes[1] - row.channel, row.totals,
                 out + y * args.output_strides[2], row.stage, staged, y + 1 == row.rows);
    }
  };
  run_rows(job, first, last, scratch, fill, run_block, job.rows_staged);
  if (job.past_caches) finish_past_caches();
}

}  // namespace

int64_t vector_lanes() { return kLanes; }
int64_t max_vectors() { return kMaxVectors; }

void conv_bias_relu_loop(const ConvBiasReluJob& job, int64_t first, int64_t last,
                         const Scratch& scratch) {
  with_output_type(job,
                   [&](auto of_type) { run_items<decltype(of_type)>(job, first, last, scratch); });
}

}  // namespace pixfuse::PIXFUSE_ISA
