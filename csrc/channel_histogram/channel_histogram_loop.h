// The loops of one instruction set, as channel_histogram_cpu.cpp sees them.
// channel_histogram_loop.cpp is compiled once for each namespace below.
#pragma once
#include "channel_histogram/channel_histogram.h"

namespace pixfuse {

// Rows of pixels, all channels: sizes and strides of make_long_rows, of N, H and W together.
struct HistogramRows {
  const uint8_t* images;
  int64_t* counts;
  int64_t channels, channel_stride;
  int64_t sizes[3], strides[3];
};

// A block is up to this many neighbouring pixels of a row, all channels.
constexpr int64_t kHistogramBlockPixels = 8192;

static inline int64_t blocks_per_row(const HistogramRows& rows) {
  return (rows.sizes[2] + kHistogramBlockPixels - 1) / kHistogramBlockPixels;
}

// Counts the blocks [first, last), counted along rows; adds to the counts atomically.
namespace portable {
void channel_histogram_loop(const HistogramRows& rows, int64_t first, int64_t last);
}
namespace avx2 {
void channel_histogram_loop(const HistogramRows& rows, int64_t first, int64_t last);
}
namespace avx512 {
void channel_histogram_loop(const HistogramRows& rows, int64_t first, int64_t last);
}
namespace neon {
void channel_histogram_loop(const HistogramRows& rows, int64_t first, int64_t last);
}

}  // namespace pixfuse
