// Picks the instruction set, splits the work over threads.
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

}  // namespace

int32_t normalize_cpu(const NormalizeArgs& original, ParallelFor parallel_for) {
  struct Job {
    NormalizeArgs args;
    Loop loop;
  } job{original, loop_for(common_isa())};
  for (int64_t size : job.args.sizes) {
    if (size == 0) return 0;
  }
  merge_rows(job.args.sizes, job.args.image_strides, job.args.output_strides);

  const auto body = [](int64_t first, int64_t last, void* context) {
    const Job& job = *static_cast<const Job*>(context);
    job.loop(job.args, first, last);
  };
  const auto& sizes = job.args.sizes;
  const int64_t blocks = sizes[0] * sizes[2] * blocks_per_row(job.args);
  const int64_t most_pixels = block_pixels(job.args);
  const int64_t pixels = sizes[3] < most_pixels ? sizes[3] : most_pixels;
  const int64_t grain = 1 + kGrainElements / (pixels * sizes[1]);
  if (blocks <= grain) {
    body(0, blocks, &job);
    return 0;
  }
  return parallel_for(0, blocks, grain, body, &job);
}

}  // namespace pixfuse
