// The convolution by winograd.h. Compiled once per instruction set, with PIXFUSE_ISA naming its
// namespace.
//
// A row of input is brought to the points of the width when it comes, and held as that. For two
// output rows, the lines that they see are brought to the points of the height. Then, for a few
// tiles of the two rows at a time and point by point, tiles times vectors of output channels are
// summed up in registers, over pieces and input channels, as in the direct convolution: each value
// is broadcast, and multiplied with the weights of its point. The sums of the points of the height
// are added to those of the two rows, which stay in the caches until the outputs are taken from
// them.
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
constexpr int64_t kRowFloats = kSlotFloats / kWinogradRows;

// Outputs are turned on the stage, and stored past the caches in whole vectors.
static_assert(kWinogradTiles * kWinogradOutputs <= kStagePixels &&
              kWinogradTiles * kWinogradOutputs % kLanes == 0);

// Of the height: a single row needs no more than come before infinity.
int row_slots(const RowBlock& row) {
  return row.rows == kWinogradRows ? kWinogradRowSlots : kWinogradRowInfinity;
}

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

// The sum over every other one of x, the last one at `last`.
template <int last, int count>
[[gnu::always_inline]] inline Vector sum_of_every_other(const float* factors,
                                                        const Vector (&x)[count]) {
  Vector sum{};
  unrolled<last / 2 + 1>([&](auto i) __attribute__((always_inline)) {
    constexpr int at = last % 2 + 2 * i.value;
    sum = multiply_add(broadcast(factors[at]), x[at], sum);
  });
  return sum;
}

// All points of one piece. B has zeros in every other column for 0 and infinity; and for a point
// and its negative the same numbers there, and each other's negatives in the other columns.
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
  constexpr int last = points - 1, pairs = last / 2;
  for (int64_t at = 0; at < plan.tiles * channels; at += kLanes) {
    Vector x[points];
    unrolled<points>([&](auto i)
                         __attribute__((always_inline)) { x[i.value] = load(in[i.value] + at); });
    float* to = out + at;
    for (int pair = 0; pair < pairs; ++pair) {
      const float* const factors = piece.input[2 * pair];
      const Vector same = sum_of_every_other<last - 1>(factors, x);
      const Vector opposite = sum_of_every_other<last - 2>(factors, x);
      store(to, same + opposite);
      store(to + plan.point_floats, same - opposite);
      to += 2 * plan.point_floats;
    }
    if constexpr (last % 2 != 0) {
      store(to, sum_of_every_other<last - 1>(piece.input[last - 1], x));
      to += plan.point_floats;
    }
    store(to, sum_of_every_other<last>(piece.input[last], x));
  }
}

// The lines that two rows of outputs see, or the first one alone.
void transform_lines(const WinogradPlan& plan, const RowBlock& row, float* out) {
  const int64_t count = plan.first_line[row_slots(row)], floats = plan.point_floats;
  const int64_t all = plan.first_line[kWinogradRowSlots];
  for (int64_t p = 0; p < plan.points; ++p) {
    for (int64_t i = 0; i < count; ++i) {
      const WinogradLine& line = plan.lines[i];
      const float* const from = row.lines[line.line] + p * floats;
      const float* const other = row.lines[line.other] + p * floats;
      float* const to = out + (p * all + i) * floats;
      const Vector factor = broadcast(line.factor);
      for (int64_t at = 0; at < floats; at += kLanes) {
        store(to + at, multiply_add(factor, load(other + at), load(from + at)));
      }
    }
  }
}

// --- sums ---

// The sums of one slot for `tiles` times `vectors`, of both rows, or of the first one alone: with
// `runs`, where those of each slot of the height begin.
template <int vectors, int tiles>
void sum_tiles(const WinogradPlan& plan, const int64_t* runs, int row_slots, const float* lines,
               int64_t channels, const float* weight, float* first_row) {
  constexpr int count = vectors * tiles;
  float* const second_row = first_row + kRowFloats;
  Vector sums[count] = {};
  for (int slot = 0; slot < row_slots; ++slot) {
    for (const WinogradRun* run = plan.runs + runs[slot]; run != plan.runs + runs[slot + 1];
         ++run) {
      Vector parts[count] = {};
      const float* at = lines + run->offset;
      for (int64_t line = 0; line < run->lines; ++line, at += plan.point_floats) {
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
      unrolled<count>([&](auto i)
                          __attribute__((always_inline)) { sums[i.value] += parts[i.value]; });
    }
    // A of winograd.h: the rows are the sum and the difference of the first two slots, and one slot
    // more each.
    unrolled<count>([&](auto i) __attribute__((always_inline)) {
      float *const first = first_row + i.value * kLanes, *const second =
                                                             second_row + i.value * kLanes;
      Vector& sum = sums[i.value];
      if (slot == 0) {
        store(first, sum);
        sum = Vector{};
      } else if (slot == 1) {
        const Vector above = load(first);
        store(second, above - sum);
        sum += above;
      } else if (slot == 2) {
        store(first, sum);
        sum = load(second);
      } else {
        store(second, sum);
      }
    });
  }
}

using SumTiles = void (*)(const WinogradPlan&, const int64_t*, int, const float*, int64_t,
                          const float*, float*);
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
  y[0] = load(sums + kWinogradZero * slot);
  y[1] = y[2] = Vector{};
  y[3] = load(sums + kWinogradInfinity * slot);
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
  // It may be larger than all: so it is rounded with once.
  for (Vector& output : y) output += bias;
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

// The sums of some tiles at all points.
template <class T, int vectors>
void sum_points(const ConvBiasReluJob& job, const RowBlock& row, int64_t first, int64_t tiles,
                const float* lines, const T* out, int64_t pixels, float* sums) {
  const ConvBiasReluArgs& args = job.args;
  const int64_t channels = args.output_sizes[1] - row.channel;
  const int64_t wanted = channels < vectors * kLanes ? channels : vectors * kLanes;
  const WinogradPlan& plan = *job.winograd;
  const int64_t inputs = args.input_sizes[1];
  const float* weight = job.weight + row.channel * plan.weights_per_output;
  for (int slot = 0; slot < kWinogradSlots; ++slot) {
    const int64_t* const runs = plan.first_run + slot * kWinogradRowSlots;
    const WinogradRun* const run = plan.runs + runs[0];
    const WinogradRun* const last = plan.runs + runs[kWinogradRowSlots];
    if (run == last) continue;
    // The stores come after so much arithmetic that their lines can be in the cache by then.
    for (int64_t r = 0; r < row.rows; ++r) {
      const T* const to = out + r * args.output_strides[2];
      if (job.past_caches) {
        // then there is nothing to be read
      } else if (args.output_strides[1] == 1) {
        prefetch_rows(to, pixels, args.output_strides[3], wanted, slot);
      } else {
        prefetch_rows(to, wanted, args.output_strides[1], pixels, slot);
      }
    }
    for (int64_t t = 0; t < tiles;) {
      const int64_t count = sum_tile_count(tiles - t);
      kSums.of[vectors - 1][count - 1](plan, runs, row_slots(row), lines + (first + t) * inputs,
                                       inputs, weight,
                                       sums + slot * kSlotFloats + t * vectors * kLanes);
      t += count;
    }
    for (const WinogradRun* r = run; r != last; ++r) weight += r->lines * inputs * vectors * kLanes;
  }
}

template <class T, int vectors>
void run_row(const ConvBiasReluJob& job, const RowBlock& row, float* sums, float* lines) {
  const ConvBiasReluArgs& args = job.args;
  const WinogradPlan& plan = *job.winograd;
  const int64_t width = args.output_sizes[3], pixel_step = args.output_strides[3];
  const int64_t channel_step = args.output_strides[1];
  const int64_t channels = args.output_sizes[1] - row.channel;
  const float* const bias = job.bias + row.channel;
  // Of the rows that are held at once, each block of channels sees the same lines.
  lines += row.first_row % job.rows_at_once / kWinogradRows * plan.group_floats();
  if (row.channel == 0) transform_lines(plan, row, lines);
  for (int64_t first = 0; first < plan.tiles; first += kWinogradTiles) {
    const int64_t left = plan.tiles - first, tiles = left < kWinogradTiles ? left : kWinogradTiles;
    const int64_t begin = first * kWinogradOutputs, end = begin + tiles * kWinogradOutputs;
    const int64_t pixels = (end < width ? end : width) - begin;
    T* const out = static_cast<T*>(args.output) + row.output_offset + begin * pixel_step;
    sum_points<T, vectors>(job, row, first, tiles, lines, out, pixels, sums);
    for (int64_t r = 0; r < row.rows; ++r) {
      T* const to = out + r * args.output_strides[2];
      const float* const of_row = sums + r * kRowFloats;
      constexpr bool is_float = __is_same(T, float);
      Counts<vectors> counts;
      if (is_float && channels >= vectors * kLanes && channel_step == 1) {
        take_outputs<vectors, true>(of_row, bias, pixels, reinterpret_cast<float*>(to), pixel_step,
                                    job.past_caches, counts);
      } else {
        take_outputs<vectors, is_float>(of_row, bias, pixels, row.stage, vectors * kLanes, false,
                                        counts);
        if constexpr (!is_float) counts = finish<T, vectors>(row.stage, pixels);
        if (channel_step == 1) {
          store_pixels<T, vectors>(row.stage, pixels, channels, to, pixel_step);
        } else {
          store_planes<T, vectors>(row.stage, pixels, channels, to, channel_step, job.past_caches);
        }
      }
      add_counts<vectors>(counts, row.totals, to, pixels, channels, pixel_step, channel_step);
    }
  }
}

template <class T, int vectors = kMaxVectors>
void run_vectors(const ConvBiasReluJob& job, const RowBlock& row, float* sums, float* lines) {
  if constexpr (vectors > 1) {
    if (row.vectors < vectors) return run_vectors<T, vectors - 1>(job, row, sums, lines);
  }
  run_row<T, vectors>(job, row, sums, lines);
}

template <class T>
void run_items(const ConvBiasReluJob& job, int64_t first, int64_t last, const Scratch& scratch) {
  const WinogradPlan& plan = *job.winograd;
  float* const sums = scratch.floats + scratch_floats(job) - plan.scratch_floats;
  float* const lines = sums + kWinogradSumFloats;
  float* const line = lines + plan.groups * plan.group_floats();
  float* const spread = line + plan.input_floats;
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
  const auto run_block = [&](const RowBlock& row) { run_vectors<T>(job, row, sums, lines); };
  run_rows(job, first, last, scratch, fill, run_block, kWinogradRows);
  if (job.past_caches) finish_past_caches();
}

}  // namespace

void winograd_loop(const ConvBiasReluJob& job, int64_t first, int64_t last,
                   const Scratch& scratch) {
  with_output_type(job,
                   [&](auto of_type) { run_items<decltype(of_type)>(job, first, last, scratch); });
}

}  // namespace pixfuse::PIXFUSE_ISA
