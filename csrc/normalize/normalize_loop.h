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

// `fill_table` writes what each of the 256 values becomes, [C][256] elements of the output's type.
// `normalize_loop` converts the blocks [first, last), counted along rows, then rows, then images;
// `table` may be null: then each pixel is computed. The bits are the same, as the table is filled
// by the same arithmetic.
namespace portable {
void fill_table(const NormalizeArgs& args, void* table);
void normalize_loop(const NormalizeArgs& args, const void* table, int64_t first, int64_t last);
}  // namespace portable
namespace avx2 {
void fill_table(const NormalizeArgs& args, void* table);
void normalize_loop(const NormalizeArgs& args, const void* table, int64_t first, int64_t last);
}  // namespace avx2
namespace avx512 {
void fill_table(const NormalizeArgs& args, void* table);
void normalize_loop(const NormalizeArgs& args, const void* table, int64_t first, int64_t last);
}  // namespace avx512
namespace neon {
void fill_table(const NormalizeArgs& args, void* table);
void normalize_loop(const NormalizeArgs& args, const void* table, int64_t first, int64_t last);
}  // namespace neon

}  // namespace pixfuse
