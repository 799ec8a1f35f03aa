// The loops of one instruction set, as image_moments_cpu.cpp sees them. image_moments_loop.cpp is
// compiled once for each namespace below.
#pragma once
#include "image_moments/image_moments.h"

namespace pixfuse {

// Up to this many neighbouring pixels of a row, all channels, are a block.
constexpr int64_t kMomentsBlockPixels = 4096;

// `args` has the rows of make_long_rows, of each image.
static inline int64_t blocks_per_row(const ImageMomentsArgs& args) {
  return (args.sizes[3] + kMomentsBlockPixels - 1) / kMomentsBlockPixels;
}

// Sums over the blocks [first, last), counted along rows, then rows, then images; adds to the sums
// atomically.
namespace portable {
void image_moments_loop(const ImageMomentsArgs& args, int64_t first, int64_t last);
}
namespace avx2 {
void image_moments_loop(const ImageMomentsArgs& args, int64_t first, int64_t last);
}
namespace avx512 {
void image_moments_loop(const ImageMomentsArgs& args, int64_t first, int64_t last);
}
namespace neon {
void image_moments_loop(const ImageMomentsArgs& args, int64_t first, int64_t last);
}

}  // namespace pixfuse
