// The loops of one instruction set, as denormalize_cpu.cpp sees them. denormalize_loop.cpp is
// compiled once for each namespace below.
#pragma once
#include "denormalize/denormalize.h"

namespace pixfuse {

// A block is up to this many neighbouring pixels of a row, all channels: small enough that what is
// staged for it stays in the first-level cache.
constexpr int64_t kDenormalizeBlockPixels = 1024;

static inline int64_t blocks_per_row(const DenormalizeArgs& args) {
  return (args.sizes[3] + kDenormalizeBlockPixels - 1) / kDenormalizeBlockPixels;
}

// Converts the blocks [first, last), counted along rows, then rows, then images.
namespace portable {
void denormalize_loop(const DenormalizeArgs& args, int64_t first, int64_t last);
}
namespace avx2 {
void denormalize_loop(const DenormalizeArgs& args, int64_t first, int64_t last);
}
namespace avx512 {
void denormalize_loop(const DenormalizeArgs& args, int64_t first, int64_t last);
}
namespace neon {
void denormalize_loop(const DenormalizeArgs& args, int64_t first, int64_t last);
}

}  // namespace pixfuse
