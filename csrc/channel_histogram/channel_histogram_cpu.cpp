// Picks the instruction set, splits the work over threads.
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
    case Isa::vnni:
    case Isa::amx:
      return avx512::channel_histogram_loop;
#elif defined(__aarch64__)
    case Isa::neon:
      return neon::channel_histogram_loop;
#endif
    default:
      return portable::channel_histogram_loop;
  }
}

}  // namespace

int32_t channel_histogram_cpu(const ChannelHistogramArgs& args, ParallelFor parallel_for) {
  constexpr int N = 0, C = 1, H = 2, W = 3;
  for (int64_t size : args.sizes) {
    if (size == 0) return 0;
  }
  struct Job {
    HistogramRows rows;
    Loop loop;
    int64_t blocks;
  } job{{args.images,
         args.counts,
         args.sizes[C],
         args.strides[C],
         {args.sizes[N], args.sizes[H], args.sizes[W]},
         {args.strides[N], args.strides[H], args.strides[W]},
         false},
        loop_for(active_isa()),
        0};
  make_long_rows(job.rows.sizes, job.rows.strides, 3);

  const auto body = [](int64_t first, int64_t last, void* context) {
    const Job& job = *static_cast<const Job*>(context);
    HistogramRows rows = job.rows;
    rows.alone = last - first == job.blocks;
    const int64_t width = rows.sizes[2];
    const int64_t pixels = width < kHistogramBlockPixels ? width : kHistogramBlockPixels;
    PairTables* pairs = (last - first) * pixels >= kPairedPixels ? take_tables() : nullptr;
    job.loop(rows, first, last, pairs);
    if (pairs != nullptr) give_tables_back(pairs);
  };
  const auto& sizes = job.rows.sizes;
  const int64_t blocks = job.blocks = sizes[0] * sizes[1] * blocks_per_row(job.rows);
  const int64_t row_pixels = sizes[2] < kHistogramBlockPixels ? sizes[2] : kHistogramBlockPixels;
  const int64_t grain = 1 + kGrainElements / (row_pixels * args.sizes[C]);
  if (blocks <= grain) {
    body(0, blocks, &job);
    return 0;
  }
  return parallel_for(0, blocks, grain, body, &job);
}

}  // namespace pixfuse
