// The loops over pixels. Compiled once per instruction set, with PIXFUSE_ISA naming its namespace.
//
// Neighbouring pixels are often equal, and an increment that follows another of the same counter
// has to wait for it. So several tables take turns, and are added up at the end.
#include "channel_histogram/channel_histogram_loop.h"

namespace pixfuse::PIXFUSE_ISA {
namespace {

// `kCopies` tables for each of `kChannels` channels. 32 bits: half the cache of 64, and added to
// the counts long before they could overflow.
template <int kChannels, int kCopies>
struct Tables {
  static constexpr int64_t kMaxPixels = int64_t{1} << 31;

  alignas(64) uint32_t counts[kCopies][kChannels][kByteValues];
  int64_t pixels;

  void clear() {
    __builtin_memset(counts, 0, sizeof counts);
    pixels = 0;
  }

  // Threads may add to the same counts at the same time; whole numbers, so in any order.
  void add_to(int64_t* total) const {
    for (int c = 0; c < kChannels; ++c) {
      for (int x = 0; x < kByteValues; ++x) {
        int64_t sum = 0;
        for (int k = 0; k < kCopies; ++k) sum += counts[k][c][x];
        if (sum != 0) __atomic_fetch_add(total + c * kByteValues + x, sum, __ATOMIC_RELAXED);
      }
    }
  }
};

// `kStep` bytes from one pixel to the next, 0 for any other number.
template <int kChannels, int kCopies, int kStep>
void count_run(const uint8_t* in, int64_t pixel_step, int64_t count,
               Tables<kChannels, kCopies>& tables) {
  const int64_t step = kStep == 0 ? pixel_step : kStep;
  int64_t i = 0;
  if constexpr (kChannels == 1 && kStep == 1) {
    // One load for eight pixels: the loads of the counters are enough for the load units.
    static_assert(kCopies == 8);
    for (; i + 8 <= count; i += 8) {
      uint64_t bytes;
      __builtin_memcpy(&bytes, in + i, sizeof bytes);
      for (int k = 0; k < 8; ++k) ++tables.counts[k][0][(bytes >> (8 * k)) & 0xff];
    }
  }
  for (; i + kCopies <= count; i += kCopies) {
    const uint8_t* pixel = in + i * step;
    for (int k = 0; k < kCopies; ++k) {
      for (int c = 0; c < kChannels; ++c) ++tables.counts[k][c][pixel[k * step + c]];
    }
  }
  for (; i < count; ++i) {
    for (int c = 0; c < kChannels; ++c) ++tables.counts[0][c][in[i * step + c]];
  }
}

template <int kChannels, int kCopies, int kStep>
void count_blocks(const HistogramRows& rows, int64_t first_channel, int64_t first, int64_t last) {
  Tables<kChannels, kCopies> tables;
  tables.clear();
  int64_t* total = rows.counts + first_channel * kByteValues;
  const uint8_t* images = rows.images + first_channel * rows.channel_stride;
  const int64_t per_row = blocks_per_row(rows), width = rows.sizes[2];
  for (int64_t block = first; block < last; ++block) {
    const int64_t row = block / per_row, w = (block % per_row) * kHistogramBlockPixels;
    const int64_t count = width - w < kHistogramBlockPixels ? width - w : kHistogramBlockPixels;
    const uint8_t* in = images + row / rows.sizes[1] * rows.strides[0] +
                        row % rows.sizes[1] * rows.strides[1] + w * rows.strides[2];
    if (tables.pixels + count > tables.kMaxPixels) {
      tables.add_to(total);
      tables.clear();
    }
    tables.pixels += count;
    count_run<kChannels, kCopies, kStep>(in, rows.strides[2], count, tables);
  }
  tables.add_to(total);
}

}  // namespace

void channel_histogram_loop(const HistogramRows& rows, int64_t first, int64_t last) {
  const int64_t step = rows.strides[2];
  const bool side_by_side = rows.channel_stride == 1;
  if (side_by_side && rows.channels == 3) {
    if (step == 3) return count_blocks<3, 4, 3>(rows, 0, first, last);
    return count_blocks<3, 4, 0>(rows, 0, first, last);
  }
  if (side_by_side && rows.channels == 4) {
    if (step == 4) return count_blocks<4, 4, 4>(rows, 0, first, last);
    return count_blocks<4, 4, 0>(rows, 0, first, last);
  }
  for (int64_t c = 0; c < rows.channels; ++c) {
    if (step == 1) {
      count_blocks<1, 8, 1>(rows, c, first, last);
    } else {
      count_blocks<1, 8, 0>(rows, c, first, last);
    }
  }
}

}  // namespace pixfuse::PIXFUSE_ISA
