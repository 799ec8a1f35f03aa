// Picks the instruction set and the loop, splits the work over threads.
#include <atomic>
#include <new>

#include "channel_histogram/channel_histogram_loop.h"
#include "common/isa.h"

namespace pixfuse {
namespace {

// A thread clears and adds up tables of its own, which costs about as much as counting this many.
constexpr int64_t kGrainElements = 131072;

using Loop = void (*)(const HistogramRows&, int64_t first, int64_t last, PairTables* pairs);

// Tables that wait for the next call: to allocate and to clear them takes as long as to count a
// small image. Without a lock, so that a process may fork at any time.
std::atomic<PairTables*> idle_tables[8];

PairTables* take_tables() {
  for (std::atomic<PairTables*>& idle : idle_tables) {
    if (PairTables* tables = idle.exchange(nullptr, std::memory_order_acquire)) return tables;
  }
  return new (std::nothrow) PairTables();  // or null: then the loop does without
}

void give_tables_back(PairTables* tables) {
  for (std::atomic<PairTables*>& idle : idle_tables) {
    PairTables* none = nullptr;
    if (idle.compare_exchange_strong(none, tables, std::memory_order_release)) return;
  }
  delete tables;
}

Loop loop_for(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
      return avx2::channel_histogram_loop;
    case Isa::avx512:
      return avx512::channel_histogram_loop;
#elif defined(__aarch64__)
    case Isa::neon:
      return neon::channel_histogram_loop;
#endif
    default:
      return portable::channel_histogram_loop;
  }
}

// Splits `parts` of so many pixels each over the threads.
int32_t split(int64_t parts, int64_t pixels, const HistogramRows& rows, ParallelFor parallel_for,
              void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t grain = 1 + kGrainElements / (pixels * rows.channels);
  if (parts > grain) return parallel_for(0, parts, grain, body, context);
  body(0, parts, context);
  return 0;
}

int32_t count_blocks(HistogramRows rows, ParallelFor parallel_for) {
  make_long_rows(rows.sizes, rows.strides, 3);
  struct Job {
    HistogramRows rows;
    Loop loop;
    int64_t blocks;
  } job{rows, loop_for(common_isa()), rows.sizes[0] * rows.sizes[1] * blocks_per_row(rows)};
  const auto body = [](int64_t first, int64_t last, void* context) {
    const Job& job = *static_cast<const Job*>(context);
    HistogramRows rows = job.rows;
    rows.alone = last - first == job.blocks;
    PairTables* pairs =
        (last - first) * block_pixels(rows) >= kPairedPixels ? take_tables() : nullptr;
    job.loop(rows, first, last, pairs);
    if (pairs != nullptr) give_tables_back(pairs);
  };
  return split(job.blocks, block_pixels(rows), rows, parallel_for, body, &job);
}

// --- pieces ---

#if defined(__x86_64__)
bool has_bit_planes() {
  const Isa isa = active_isa();
  return (isa == Isa::gfni || isa == Isa::amx) && isa_available(Isa::gfni);
}

// From this many pixels on it takes less time than a loop with tables.
constexpr int64_t kFewestPixels = 3072;

bool is_counted_in_pieces(const HistogramRows& rows) {
  const int64_t step = rows.strides[2];
  if (rows.sizes[2] == 1) return false;  // one pixel, however often: its stride means nothing
  if (rows.sizes[0] * rows.sizes[1] * rows.sizes[2] < kFewestPixels) return false;
  if (rows.channels == 1 || rows.channel_stride != 1) return step == 1;
  return (rows.channels == 3 && (step == 3 || step == 4)) || (rows.channels == 4 && step == 4);
}

// How bit_planes_loop is to go over these rows; false where another loop takes less time.
bool make_grid(const HistogramRows& rows, HistogramGrid& grid) {
  grid.rows = rows;
  auto &sizes = grid.rows.sizes, &strides = grid.rows.strides;
  sort_by_stride(sizes, strides, 3);
  if (!is_counted_in_pieces(grid.rows)) return false;
  grid.last_row = sizes[2];
  const auto round_up = [](int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; };
  const int64_t pixels = sizes[1] * sizes[2];
  const int64_t padded = round_up(sizes[1], kPieceRows) * round_up(sizes[2], kPieceColumns);
  if (3 * padded <= 4 * pixels) return true;
  // Images that pieces do not fit: if all pixels lie side by side, as rows of the pieces' width.
  HistogramRows long_rows = grid.rows;
  make_long_rows(long_rows.sizes, long_rows.strides, 3);
  const int64_t length = long_rows.sizes[2];
  if (long_rows.sizes[1] != 1 || length < kPieceRows * kPieceColumns) return padded <= 2 * pixels;
  const int64_t height = (length + kPieceColumns - 1) / kPieceColumns;
  sizes[0] = long_rows.sizes[0];
  sizes[1] = height;
  sizes[2] = kPieceColumns;
  strides[0] = long_rows.strides[0];
  strides[1] = kPieceColumns * strides[2];
  grid.last_row = length - (height - 1) * kPieceColumns;
  return true;
}

int32_t count_pieces(const HistogramGrid& grid, ParallelFor parallel_for) {
  struct Job {
    HistogramGrid grid;
    int64_t strips;
  } job{grid, grid.rows.sizes[0] * strips_per_image(grid)};
  const auto body = [](int64_t first, int64_t last, void* context) {
    const Job& job = *static_cast<const Job*>(context);
    HistogramGrid grid = job.grid;
    grid.rows.alone = last - first == job.strips;
    gfni::bit_planes_loop(grid, first, last);
  };
  const int64_t pixels = kPieceRows * grid.rows.sizes[2];
  return split(job.strips, pixels, grid.rows, parallel_for, body, &job);
}
#endif

}  // namespace

int32_t channel_histogram_cpu(const ChannelHistogramArgs& args, ParallelFor parallel_for) {
  constexpr int N = 0, C = 1, H = 2, W = 3;
  for (int64_t size : args.sizes) {
    if (size == 0) return 0;
  }
  const HistogramRows rows{args.images,
                           args.counts,
                           args.sizes[C],
                           args.strides[C],
                           {args.sizes[N], args.sizes[H], args.sizes[W]},
                           {args.strides[N], args.strides[H], args.strides[W]},
                           false};
#if defined(__x86_64__)
  HistogramGrid grid;
  if (has_bit_planes() && make_grid(rows, grid)) return count_pieces(grid, parallel_for);
#endif
  return count_blocks(rows, parallel_for);
}

}  // namespace pixfuse
