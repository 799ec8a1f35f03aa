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

static inline int64_t block_pixels(const HistogramRows& rows) {
  return rows.sizes[2] < kHistogramBlockPixels ? rows.sizes[2] : kHistogramBlockPixels;
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

// Adds what was found of some channels. Other threads may add to the same counts at the same time;
// whole numbers, so in any order.
static inline void add_to_counts(const HistogramRows& rows, int64_t first_channel,
                                 const int64_t* sums, int64_t channels) {
  int64_t* counts = rows.counts + first_channel * kByteValues;
  for (int64_t i = 0; i < channels * kByteValues; ++i) {
    if (rows.alone) {
      counts[i] += sums[i];
    } else if (sums[i] != 0) {
      __atomic_fetch_add(counts + i, sums[i], __ATOMIC_RELAXED);
    }
  }
}

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

// Rows as they lie beside each other, not made long: pieces of images are counted, and the less
// there is to see in a piece, the sooner.
struct HistogramGrid {
  HistogramRows rows;
  int64_t last_row;  // pixels of the last row of each image, which may be shorter
};

constexpr int64_t kPieceRows = 16, kPieceColumns = 32;

// A strip is up to kPieceRows rows of an image.
static inline int64_t strips_per_image(const HistogramGrid& grid) {
  return (grid.rows.sizes[1] + kPieceRows - 1) / kPieceRows;
}

// Counts the strips [first, last) of all images; adds to the counts atomically. Pixels have 3
// channels and are 3 or 4 bytes apart, or 4 and 4; or each channel is a plane of bytes.
namespace gfni {
void bit_planes_loop(const HistogramGrid& grid, int64_t first, int64_t last);
}

}  // namespace pixfuse
