// The loops of one instruction set, as normalize_cpu.cpp sees them. normalize_loop.cpp is compiled
// once for each namespace below.
#pragma once
#include "normalize/normalize.h"

namespace pixfuse {

// A block is up to this many neighbouring pixels of a row, all channels: small enough that what is
// staged for it stays in the first-level cache.
constexpr int64_t kBlockPixels = 1024;

static inline int64_t blocks_per_row(const NormalizeArgs& args) {
  return (args.sizes[3] + kBlockPixels - 1) / kBlockPixels;
}

// Converts the blocks [first, last), counted along rows, then rows, then images.
namespace portable {
void normalize_loop(const NormalizeArgs& args, int64_t first, int64_t last);
}
namespace avx2 {
void normalize_loop(const NormalizeArgs& args, int64_t first, int64_t last);
}
namespace avx512 {
void normalize_loop(const NormalizeArgs& args, int64_t first, int64_t last);
}
namespace neon {
void normalize_loop(const NormalizeArgs& args, int64_t first, int64_t last);
}

}  // namespace pixfuse
