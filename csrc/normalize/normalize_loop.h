// The loops of one instruction set, as normalize_cpu.cpp sees them. normalize_loop.cpp is compiled
// once for each namespace below.
#pragma once
#include "normalize/normalize.h"

namespace pixfuse {

// A block is up to this many neighbouring pixels of a row, all channels: small enough that what is
// staged for it stays in the first-level cache. Results of four bytes come in shorter blocks:
// batches beyond the caches take less time the sooner the planes of the output take turns.
constexpr int64_t kMaxBlockPixels = 1024;

static inline int64_t block_pixels(const NormalizeArgs& args) {
  return args.dtype == ElementType::float32 ? kMaxBlockPixels / 2 : kMaxBlockPixels;
}

static inline int64_t blocks_per_row(const NormalizeArgs& args) {
  return (args.sizes[3] + block_pixels(args) - 1) / block_pixels(args);
}

// normalize_loop converts the blocks [first, last), counted along rows, then rows, then images.
// normalize_parts converts all of each part. The parts differ in addresses, strides, heights and
// widths alone: what is prepared for the channels serves all of them.
namespace portable {
void normalize_loop(const NormalizeArgs& args, int64_t first, int64_t last);
void normalize_parts(const NormalizeArgs* parts, int64_t count);
}  // namespace portable
namespace avx2 {
void normalize_loop(const NormalizeArgs& args, int64_t first, int64_t last);
void normalize_parts(const NormalizeArgs* parts, int64_t count);
}  // namespace avx2
namespace avx512 {
void normalize_loop(const NormalizeArgs& args, int64_t first, int64_t last);
void normalize_parts(const NormalizeArgs* parts, int64_t count);
}  // namespace avx512
namespace neon {
void normalize_loop(const NormalizeArgs& args, int64_t first, int64_t last);
void normalize_parts(const NormalizeArgs* parts, int64_t count);
}  // namespace neon

}  // namespace pixfuse
