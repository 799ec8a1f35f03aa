// Picks the instruction set, decides whether a table pays, splits the work over threads.
#include <cstddef>
#include <vector>

#include "common/isa.h"
#include "normalize/normalize_loop.h"

namespace pixfuse {
namespace {

// Below this, starting threads costs more than they save.
constexpr int64_t kGrainElements = 32768;
// A table costs 256 conversions a channel; it pays when several times as many pixels use it.
constexpr int64_t kTablePixels = 1024;

struct Loops {
  void (*fill_table)(const NormalizeArgs&, void*);
  void (*normalize_loop)(const NormalizeArgs&, const void*, int64_t, int64_t);
};

Loops loops_for(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
      return {avx2::fill_table, avx2::normalize_loop};
    case Isa::avx512:
      return {avx512::fill_table, avx512::normalize_loop};
#elif defined(__aarch64__)
    case Isa::neon:
      return {neon::fill_table, neon::normalize_loop};
#endif
    default:
      return {portable::fill_table, portable::normalize_loop};
  }
}

// Dividing in float32 keeps up with memory; float64 and the rounding to 16 bits do not.
bool table_pays(const NormalizeArgs& args) {
  const bool slow_arithmetic =
      args.arithmetic == Arithmetic::nearest || args.dtype != FloatType::float32;
  return slow_arithmetic && args.sizes[0] * args.sizes[2] * args.sizes[3] >= kTablePixels;
}

}  // namespace

int32_t normalize_cpu(const NormalizeArgs& original, ParallelFor parallel_for) {
  NormalizeArgs args = original;
  for (int64_t size : args.sizes) {
    if (size == 0) return 0;
  }
  merge_rows(args);
  const Loops loops = loops_for(active_isa());

  std::vector<unsigned char> table;
  if (table_pays(args)) {
    table.resize(static_cast<size_t>(args.sizes[1] * 256 * element_bytes(args.dtype)));
    loops.fill_table(args, table.data());
  }

  struct Job {
    const NormalizeArgs& args;
    const Loops& loops;
    const void* table;
  } job{args, loops, table.empty() ? nullptr : table.data()};
  const auto body = [](int64_t first, int64_t last, void* context) {
    const Job& job = *static_cast<const Job*>(context);
    job.loops.normalize_loop(job.args, job.table, first, last);
  };

  const int64_t blocks = args.sizes[0] * args.sizes[2] * blocks_per_row(args);
  const int64_t row_pixels = args.sizes[3] < kBlockPixels ? args.sizes[3] : kBlockPixels;
  const int64_t grain = 1 + kGrainElements / (row_pixels * args.sizes[1]);
  if (blocks <= grain) {
    body(0, blocks, &job);
    return 0;
  }
  return parallel_for(0, blocks, grain, body, &job);
}

}  // namespace pixfuse
