// The convolution by winograd.h. Compiled once per instruction set, with PIXFUSE_ISA naming its
// namespace.
//
// A row of input is brought to the points of all pieces when it comes, and held as that. Then, for
// a few tiles of an output row at a time and point by point, tiles times vectors of output channels
// are summed up in registers, over kernel rows and input channels, as in the direct convolution:
// each value is broadcast, and multiplied with the weights of its point. These sums stay in the
// first-level cache until the outputs are taken from them.
#include "conv_bias_relu/lines.h"
#include "conv_bias_relu/rows.h"
#include "conv_bias_relu/stage.h"

namespace pixfuse::PIXFUSE_ISA {
namespace {

// In registers: their sums, those of a run, and the weights.
constexpr int kSumTiles = 3;

// From a slot's sums to those of the next one: however many vectors there are, so that a slot that
// no piece uses stays zero.
constexpr int64_t kSlotFloats = kWinogradSumFloats / kWinogradSlots;

// Outputs are turned on the stage, and stored past the caches in whole vectors.
static_assert(kWinogradTiles * kWinogradOutputs <= kStagePixels &&
              kWinogradTiles * kWinogradOutputs % kLanes == 0);

// --- input ---

// The pixels of a line, `residues` apart, come together: one of each tile.
void spread_line(const ConvBiasReluJob& job, const float* line, float* spread) {
  const WinogradPlan& plan = *job.winograd;
  const int64_t channels = job.args.input_sizes[1], residues = plan.residues;
  const int64_t tiles = job.line_pixels / residues;
  // Always as many values as there can be channels: the next tile comes over what is too much.
  if (job.interleaved_lines) {
    for (int64_t i = 0; i < residues; ++i) {
      const float* from = line + i * channels;
      float* to = spread + i * plan.residue_floats;
      for (int64_t t = 0; t < tiles; ++t) {
        __builtin_memcpy(to, from, sizeof(float) * kMaxDirectChannels);
        from += residues * channels;
        to += channels;
      }
    }
    return;
  }
  typedef float Four __attribute__((vector_size(16)));
  static_assert(kMaxDirectChannels == 4 && kWinogradOutputs % 4 == 0);
  const float* from[4];
  for (int64_t c = 0; c < 4; ++c) from[c] = line + (c < channels ? c : 0) * job.line_pixels;
  for (int64_t t = 0; t < tiles; ++t) {
    for (int64_t i = 0; i < residues; i += 4) {
      Four planes[4];
      unrolled<4>([&](auto c) __attribute__((always_inline)) {
        __builtin_memcpy(&planes[c.value], from[c.value] + t * residues + i, sizeof(Four));
      });
      const Four low02 = __builtin_shufflevector(planes[0], planes[2], 0, 4, 1, 5);
      const Four low13 = __builtin_shufflevector(planes[1], planes[3], 0, 4, 1, 5);
      const Four high02 = __builtin_shufflevector(planes[0], planes[2], 2, 6, 3, 7);
      const Four high13 = __builtin_shufflevector(planes[1], planes[3], 2, 6, 3, 7);
      const Four pixels[4] = {__builtin_shufflevector(low02, low13, 0, 4, 1, 5),
                              __builtin_shufflevector(low02, low13, 2, 6, 3, 7),
                              __builtin_shufflevector(high02, high13, 0, 4, 1, 5),
                              __builtin_shufflevector(high02, high13, 2, 6, 3, 7)};
      float* to = spread + i * plan.residue_floats + t * channels;
      for (const Four& one : pixels) {
        __builtin_memcpy(to, &one, sizeof one);
        to += plan.residue_floats;
      }
    }
  }
}

// All points of one piece.
template <int points>
void transform_piece(const ConvBiasReluJob& job, const WinogradPiece& piece, const float* spread,
                     float* out) {
  const WinogradPlan& plan = *job.winograd;
  const int64_t channels = job.args.input_sizes[1];
  const float* in[points];
  for (int i = 0; i < points; ++i) {
    const int64_t pixel = piece.first + i * job.args.stride[1];
    in[i] = spread + pixel % plan.residues * plan.residue_floats + pixel / plan.residues * channels;
  }
  for (int64_t at = 0; at < plan.tiles * channels; at += kLanes) {
    Vector x[points];
    unrolled<points>([&](auto i)
                         __attribute__((always_inline)) { x[i.value] = load(in[i.value] + at); });
    for (int p = 0; p < points; ++p) {
      Vector y{};
      unrolled<points>([&](auto i) __attribute__((always_inline)) {
        y = multiply_add(broadcast(piece.input[p][i.value]), x[i.value], y);
      });
      store(out + p * plan.point_floats + at, y);
    }
  }
}

// --- sums ---

// The sums of one slot for `tiles` times `vectors`.
template <int vectors, int tiles>
void sum_tiles(const WinogradRun* run, const WinogradRun* last, const float* const* lines,
               int64_t line_start, int64_t channels, const float* weight, float* out) {
  Vector sums[vectors * tiles] = {};
  for (; run != last; ++run) {
    Vector parts[vectors * tiles] = {};
    for (int64_t row = run->first_row; row < run->first_row + run->rows; ++row) {
      const float* at = lines[row] + run->line_offset + line_start;
      for (int64_t c = 0; c < channels; ++c) {
        Vector w[vectors];
        unrolled<vectors>([&](auto v) __attribute__((always_inline)) {
          w[v.value] = load(weight + v.value * kLanes);
        });
        weight += vectors * kLanes;
        unrolled<tiles>([&](auto t) __attribute__((always_inline)) {
          const Vector value = broadcast(at[c + t.value * channels]);
          unrolled<vectors>([&](auto v) __attribute__((always_inline)) {
            Vector& part = parts[t.value * vectors + v.value];
            part = multiply_add(value, w[v.value], part);
          });
        });
      }
    }
    unrolled<vectors * tiles>(
        [&](auto i) __attribute__((always_inline)) { sums[i.value] += parts[i.value]; });
  }
  unrolled<vectors * tiles>(
      [&](auto i) __attribute__((always_inline)) { store(out + i.value * kLanes, sums[i.value]); });
}

using SumTiles = void (*)(const WinogradRun*, const WinogradRun*, const float* const*, int64_t,
                          int64_t, const float*, float*);
struct SumTable {
  SumTiles of[kMaxVectors][kSumTiles];
};

template <int vectors = kMaxVectors, int tiles = kSumTiles>
constexpr void fill_sums(SumTable& table) {
  table.of[vectors - 1][tiles - 1] = sum_tiles<vectors, tiles>;
  if constexpr (tiles > 1) {
    fill_sums<vectors, tiles - 1>(table);
  } else if constexpr (vectors > 1) {
    fill_sums<vectors - 1>(table);
  }
}
constexpr SumTable all_sums() {
  SumTable table{};
  fill_sums(table);
  return table;
}
constexpr SumTable kSums = all_sums();

// How many of `left` tiles come next: 4 as twice 2.
constexpr int64_t sum_tile_count(int64_t left) {
  return left == kSumTiles + 1 ? kSumTiles - 1 : left < kSumTiles ? left : kSumTiles;
}

// --- outputs ---

// The outputs of a tile: A of winograd.h.
template <int vectors>
[[gnu::always_inline]] inline void outputs_of(const float* sums, Vector bias,
                                              Vector (&y)[kWinogradOutputs]) {
  constexpr int64_t slot = kSlotFloats;
  const Vector zero = load(sums + kWinogradZero * slot);
  y[0] = bias + zero;
  y[1] = bias;
  y[2] = bias;
  y[3] = bias + load(sums + kWinogradInfinity * slot);
  unrolled<kWinogradPairs>([&](auto i) __attribute__((always_inline)) {
    constexpr double a = kWinogradPairPoints[i.value];
    const Vector above = load(sums + 2 * i.value * slot);
    const Vector below = load(sums + (2 * i.value + 1) * slot);
    const Vector even = above + below, odd = above - below;
    y[0] += even;
    y[1] = multiply_add(broadcast(static_cast<float>(a)), odd, y[1]);
    y[2] = multiply_add(broadcast(static_cast<float>(a * a)), even, y[2]);
    y[3] = multiply_add(broadcast(static_cast<float>(a * a * a)), odd, y[3]);
  });
}

// ReLU and counts too, where an output has its channels side by side.
template <int vectors, bool is_finished>
void take_outputs(const float* sums, const float* bias, int64_t pixels, float* out, int64_t step,
                  bool past_caches, Counts<vectors>& counts) {
  Counts<vectors> all = counts;
  for (int64_t p = 0; p < pixels; p += kWinogradOutputs) {
    unrolled<vectors>([&](auto v) __attribute__((always_inline)) {
      Vector y[kWinogradOutputs];
      outputs_of<vectors>(sums + (p / kWinogradOutputs * vectors + v.value) * kLanes,
                          load(bias + v.value * kLanes), y);
      unrolled<kWinogradOutputs>([&](auto q) __attribute__((always_inline)) {
        if (p + q.value >= pixels) return;
        if constexpr (is_finished) {
          y[q.value] = relu(y[q.value]);
          all.active[v.value] = count_positive(all.active[v.value], y[q.value]);
          all.sum[v.value] += y[q.value];
        }
        float* const to = out + (p + q.value) * step + v.value * kLanes;
        past_caches ? store_past_caches(to, y[q.value]) : store(to, y[q.value]);
      });
    });
  }
  counts = all;
}

// Part `part` of the memory that outputs will be stored in: `count` rows of `length` elements.
template <class T>
void prefetch_rows(const T* out, int64_t count, int64_t step, int64_t length, int part) {
  constexpr int64_t kLineElements = 64 / sizeof(T);
  const int64_t end = count * (part + 1) / kWinogradSlots;
  for (int64_t i = count * part / kWinogradSlots; i < end; ++i) {
    for (int64_t at = 0; at < length; at += kLineElements) {
      __builtin_prefetch(out + i * step + at, 1);
    }
  }
}

// --- rows ---

template <class T, int vectors>
void run_row(const ConvBiasReluJob& job, const RowBlock& row, float* sums) {
  const ConvBiasReluArgs& args = job.args;
  const WinogradPlan& plan = *job.winograd;
  const int64_t width = args.output_sizes[3], pixel_step = args.output_strides[3];
  const int64_t channel_step = args.output_strides[1], inputs = args.input_sizes[1];
  const int64_t channels = args.output_sizes[1] - row.channel;
  const int64_t wanted = channels < vectors * kLanes ? channels : vectors * kLanes;
  const float* const bias = job.bias + row.channel;
  T* const out = static_cast<T*>(args.output) + row.output_offset;
  for (int64_t first = 0; first < plan.tiles; first += kWinogradTiles) {
    const int64_t left = plan.tiles - first, tiles = left < kWinogradTiles ? left : kWinogradTiles;
    const int64_t begin = first * kWinogradOutputs, end = begin + tiles * kWinogradOutputs;
    const int64_t pixels = (end < width ? end : width) - begin;
    T* const to = out + begin * pixel_step;
    const float* weight = job.weight + row.channel * plan.weights_per_output;
    for (int slot = 0; slot < kWinogradSlots; ++slot) {
      const WinogradRun* const run = plan.runs + plan.first_run[slot];
      const WinogradRun* const last = plan.runs + plan.first_run[slot + 1];
      if (run == last) continue;
      // The stores come after so much arithmetic that their lines can be in the cache by then.
      if (job.past_caches) {
        // then there is nothing to be read
      } else if (channel_step == 1) {
        prefetch_rows(to, pixels, pixel_step, wanted, slot);
      } else {
        prefetch_rows(to, wanted, channel_step, pixels, slot);
      }
      float* at = sums + slot * kSlotFloats;
      for (int64_t t = 0; t < tiles;) {
        const int64_t count = sum_tile_count(tiles - t);
        kSums.of[vectors - 1][count - 1](run, last, row.lines, (first + t) * inputs, inputs, weight,
                                         at + t * vectors * kLanes);
        t += count;
      }
      for (const WinogradRun* r = run; r != last; ++r)
        weight += r->rows * inputs * vectors * kLanes;
    }
    Counts<vectors> counts;
    bool done = false;
    if constexpr (__is_same(T, float)) {
      if (channels >= vectors * kLanes && channel_step == 1) {
        take_outputs<vectors, true>(sums, bias, pixels, to, pixel_step, job.past_caches, counts);
        done = true;
      }
    }
    if (!done) {
      take_outputs<vectors, false>(sums, bias, pixels, row.stage, vectors * kLanes, false, counts);
      counts = finish<T, vectors>(row.stage, pixels);
      if (channel_step == 1) {
        store_pixels<T, vectors>(row.stage, pixels, channels, to, pixel_step);
      } else {
        store_planes<T, vectors>(row.stage, pixels, channels, to, channel_step, job.past_caches);
      }
    }
    add_counts<vectors>(counts, row.totals, to, pixels, channels, pixel_step, channel_step);
  }
}

template <class T, int vectors = kMaxVectors>
void run_vectors(const ConvBiasReluJob& job, const RowBlock& row, float* sums) {
  if constexpr (vectors > 1) {
    if (row.vectors < vectors) return run_vectors<T, vectors - 1>(job, row, sums);
  }
  run_row<T, vectors>(job, row, sums);
}

template <class T>
void run_items(const ConvBiasReluJob& job, int64_t first, int64_t last, const Scratch& scratch) {
  const WinogradPlan& plan = *job.winograd;
  float* const sums = scratch.floats + scratch_floats(job) - plan.scratch_floats;
  float* const line = sums + kWinogradSumFloats;
  float* const spread = line + plan.line_floats;
  for (int64_t i = 0; i < plan.scratch_floats; ++i) sums[i] = 0.0f;
  const auto fill = [&](int64_t n, int64_t row, float* out) {
    fill_line(job, n, row, line);
    spread_line(job, line, spread);
    for (int64_t i = 0; i < plan.pieces; ++i) {
      const WinogradPiece& piece = plan.piece[i];
      if (piece.points == 5) transform_piece<5>(job, piece, spread, out);
      if (piece.points == 6) transform_piece<6>(job, piece, spread, out);
      if (piece.points == 7) transform_piece<7>(job, piece, spread, out);
      out += piece.points * plan.point_floats;
    }
  };
  const auto run_block = [&](const RowBlock& row) { run_vectors<T>(job, row, sums); };
  run_rows(job, first, last, scratch, fill, run_block);
  if (job.past_caches) finish_past_caches();
}

}  // namespace

void winograd_loop(const ConvBiasReluJob& job, int64_t first, int64_t last,
                   const Scratch& scratch) {
  with_output_type(job,
                   [&](auto of_type) { run_items<decltype(of_type)>(job, first, last, scratch); });
}

}  // namespace pixfuse::PIXFUSE_ISA
