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
  bool alone;  // no other thread adds to the counts
};

// A block is up to this many neighbouring pixels of a row, all channels.
constexpr int64_t kHistogramBlockPixels = 8192;

static inline int64_t blocks_per_row(const HistogramRows& rows) {
  return (rows.sizes[2] + kHistogramBlockPixels - 1) / kHistogramBlockPixels;
}

// How often two bytes were found beside each other; the index is the first byte and 256 times the
// second. All zero before and after a loop.
struct PairTables {
  static constexpr int kTables = 3;
  alignas(64) uint16_t counts[kTables][kByteValues * kByteValues];
};

// From this many pixels on, a loop with tables of pairs takes less time than one without: they have
// to be looked through at its end.
constexpr int64_t kPairedPixels = 32768;

// Counts the blocks [first, last), counted along rows; adds to the counts atomically. `pairs` may
// be null, and is used where pixels lie as it needs.
namespace portable {
void channel_histogram_loop(const HistogramRows& rows, int64_t first, int64_t last,
                            PairTables* pairs);
}
namespace avx2 {
void channel_histogram_loop(const HistogramRows& rows, int64_t first, int64_t last,
                            PairTables* pairs);
}
namespace avx512 {
void channel_histogram_loop(const HistogramRows& rows, int64_t first, int64_t last,
                            PairTables* pairs);
}
namespace neon {
void channel_histogram_loop(const HistogramRows& rows, int64_t first, int64_t last,
                            PairTables* pairs);
}

}  // namespace pixfuse
