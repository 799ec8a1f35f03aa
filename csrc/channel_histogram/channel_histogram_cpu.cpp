// Picks the instruction set, splits the work over threads.
#include "channel_histogram/channel_histogram_loop.h"
#include "common/isa.h"

namespace pixfuse {
namespace {

// A thread clears and adds up tables of its own, which costs about as much as counting this many.
constexpr int64_t kGrainElements = 131072;

using Loop = void (*)(const HistogramRows&, int64_t first, int64_t last);

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

}  // namespace

int32_t channel_histogram_cpu(const ChannelHistogramArgs& args, ParallelFor parallel_for) {
  constexpr int N = 0, C = 1, H = 2, W = 3;
  for (int64_t size : args.sizes) {
    if (size == 0) return 0;
  }
  struct Job {
    HistogramRows rows;
    Loop loop;
  } job{{args.images,
         args.counts,
         args.sizes[C],
         args.strides[C],
         {args.sizes[N], args.sizes[H], args.sizes[W]},
         {args.strides[N], args.strides[H], args.strides[W]}},
        loop_for(active_isa())};
  make_long_rows(job.rows.sizes, job.rows.strides, 3);

  const auto body = [](int64_t first, int64_t last, void* context) {
    const Job& job = *static_cast<const Job*>(context);
    job.loop(job.rows, first, last);
  };
  const auto& sizes = job.rows.sizes;
  const int64_t blocks = sizes[0] * sizes[1] * blocks_per_row(job.rows);
  const int64_t row_pixels = sizes[2] < kHistogramBlockPixels ? sizes[2] : kHistogramBlockPixels;
  const int64_t grain = 1 + kGrainElements / (row_pixels * args.sizes[C]);
  if (blocks <= grain) {
    body(0, blocks, &job);
    return 0;
  }
  return parallel_for(0, blocks, grain, body, &job);
}

}  // namespace pixfuse
