// Picks the instruction set, splits the work over threads.
#include <unistd.h>

#include "common/isa.h"
#include "normalize/normalize_loop.h"

namespace pixfuse {
namespace {

// Below this, starting threads costs more than they save.
constexpr int64_t kGrainElements = 32768;

using Loop = void (*)(const NormalizeArgs&, int64_t first, int64_t last);

Loop loop_for(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
      return avx2::normalize_loop;
    case Isa::avx512:
      return avx512::normalize_loop;
#elif defined(__aarch64__)
    case Isa::neon:
      return neon::normalize_loop;
#endif
    default:
      return portable::normalize_loop;
  }
}

// An output that the cache cannot hold is written past it: that saves reading every line before it
// is written, and leaves the cache to others. A smaller one stays there for whoever reads it next.
bool exceeds_cache(int64_t bytes) {
  static const int64_t cache_bytes = [] {
    const long reported = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return reported > 0 ? int64_t{reported} : int64_t{32} << 20;
  }();
  return bytes > cache_bytes / 4 * 3;
}

}  // namespace

int32_t normalize_cpu(const NormalizeArgs& original, ParallelFor parallel_for) {
  struct Job {
    NormalizeArgs args;
    Loop loop;
  } job{original, loop_for(active_isa())};
  for (int64_t size : job.args.sizes) {
    if (size == 0) return 0;
  }
  const auto& sizes = job.args.sizes;
  job.args.past_cache =
      original.past_cache ||
      exceeds_cache(sizes[0] * sizes[1] * sizes[2] * sizes[3] * element_bytes(job.args.dtype));
  merge_rows(job.args);

  const auto body = [](int64_t first, int64_t last, void* context) {
    const Job& job = *static_cast<const Job*>(context);
    job.loop(job.args, first, last);
  };
  const int64_t blocks = sizes[0] * sizes[2] * blocks_per_row(job.args);
  const int64_t row_pixels = sizes[3] < kBlockPixels ? sizes[3] : kBlockPixels;
  const int64_t grain = 1 + kGrainElements / (row_pixels * sizes[1]);
  if (blocks <= grain) {
    body(0, blocks, &job);
    return 0;
  }
  return parallel_for(0, blocks, grain, body, &job);
}

}  // namespace pixfuse
