// Picks the instruction set, splits the work over threads.
#include "common/isa.h"
#include "image_moments/image_moments_loop.h"

namespace pixfuse {
namespace {

// Below this, starting threads costs more than they save.
constexpr int64_t kGrainElements = 131072;

using Loop = void (*)(const ImageMomentsArgs&, int64_t first, int64_t last);

Loop loop_for(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
      return avx2::image_moments_loop;
    case Isa::avx512:
      return avx512::image_moments_loop;
#elif defined(__aarch64__)
    case Isa::neon:
      return neon::image_moments_loop;
#endif
    default:
      return portable::image_moments_loop;
  }
}

}  // namespace

int32_t image_moments_cpu(const ImageMomentsArgs& original, ParallelFor parallel_for) {
  struct Job {
    ImageMomentsArgs args;
    Loop loop;
  } job{original, loop_for(common_isa())};
  for (int64_t size : job.args.sizes) {
    if (size == 0) return 0;
  }
  make_long_rows(job.args.sizes + 2, job.args.strides + 2, 2);

  const auto body = [](int64_t first, int64_t last, void* context) {
    const Job& job = *static_cast<const Job*>(context);
    job.loop(job.args, first, last);
  };
  const auto& sizes = job.args.sizes;
  const int64_t blocks = sizes[0] * sizes[2] * blocks_per_row(job.args);
  const int64_t row_pixels = sizes[3] < kMomentsBlockPixels ? sizes[3] : kMomentsBlockPixels;
  const int64_t grain = 1 + kGrainElements / (row_pixels * sizes[1]);
  if (blocks <= grain) {
    body(0, blocks, &job);
    return 0;
  }
  return parallel_for(0, blocks, grain, body, &job);
}

}  // namespace pixfuse
