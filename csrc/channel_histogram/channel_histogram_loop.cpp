// The loops over pixels. Compiled once per instruction set, with PIXFUSE_ISA naming its namespace.
//
// Neighbouring pixels are often equal, and an increment that follows another of the same counter
// has to wait for it. So several tables take turns, and are added up at the end.
//
// And a processor stores about one counter per cycle, whatever else it could do. So where there is
// much to count, two bytes at a time are counted as a pair, and the pairs added up by either byte
// at the end. The bytes of a pair need not be of one channel: they lie side by side in memory.
#include "channel_histogram/channel_histogram_loop.h"

namespace pixfuse::PIXFUSE_ISA {
namespace {

// Other threads may add to the same counts at the same time; whole numbers, so in any order.
void add_to_counts(const HistogramRows& rows, int64_t first_channel, const int64_t* sums,
                   int64_t channels) {
  int64_t* counts = rows.counts + first_channel * kByteValues;
  for (int64_t i = 0; i < channels * kByteValues; ++i) {
    if (rows.alone) {
      counts[i] += sums[i];
    } else if (sums[i] != 0) {
      __atomic_fetch_add(counts + i, sums[i], __ATOMIC_RELAXED);
    }
  }
}

// `kCopies` tables for each of `kChannels` channels. 32 bits: half the cache of 64, and added to
// the counts long before they could overflow.
template <int kChannels, int kCopies>
struct Tables {
  static constexpr int64_t kMaxPixels = int64_t{1} << 31;

  alignas(64) uint32_t counts[kCopies][kChannels * kByteValues];
  int64_t pixels;

  void clear() {
    __builtin_memset(counts, 0, sizeof counts);
    pixels = 0;
  }

  void add_to(const HistogramRows& rows, int64_t first_channel) const {
    int64_t sums[kChannels * kByteValues];
    for (int x = 0; x < kChannels * kByteValues; ++x) {
      int64_t sum = 0;
      for (int k = 0; k < kCopies; ++k) sum += counts[k][x];
      sums[x] = sum;
    }
    add_to_counts(rows, first_channel, sums, kChannels);
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
      for (int k = 0; k < 8; ++k) ++tables.counts[k][(bytes >> (8 * k)) & 0xff];
    }
  }
  for (; i + kCopies <= count; i += kCopies) {
    const uint8_t* pixel = in + i * step;
    for (int k = 0; k < kCopies; ++k) {
      for (int c = 0; c < kChannels; ++c) ++tables.counts[k][c * kByteValues + pixel[k * step + c]];
    }
  }
  for (; i < count; ++i) {
    for (int c = 0; c < kChannels; ++c) ++tables.counts[0][c * kByteValues + in[i * step + c]];
  }
}

// The blocks [first, last) as runs of pixels side by side.
template <class Run>
void for_each_run(const HistogramRows& rows, const uint8_t* images, int64_t first, int64_t last,
                  const Run& run) {
  const int64_t per_row = blocks_per_row(rows), width = rows.sizes[2];
  for (int64_t block = first; block < last; ++block) {
    const int64_t row = block / per_row, w = (block % per_row) * kHistogramBlockPixels;
    const int64_t count = width - w < kHistogramBlockPixels ? width - w : kHistogramBlockPixels;
    run(images + row / rows.sizes[1] * rows.strides[0] + row % rows.sizes[1] * rows.strides[1] +
            w * rows.strides[2],
        count);
  }
}

template <int kChannels, int kCopies, int kStep>
void count_blocks(const HistogramRows& rows, int64_t first_channel, int64_t first, int64_t last) {
  Tables<kChannels, kCopies> tables;
  tables.clear();
  const uint8_t* images = rows.images + first_channel * rows.channel_stride;
  for_each_run(rows, images, first, last, [&](const uint8_t* in, int64_t count) {
    if (tables.pixels + count > tables.kMaxPixels) {
      tables.add_to(rows, first_channel);
      tables.clear();
    }
    tables.pixels += count;
    count_run<kChannels, kCopies, kStep>(in, rows.strides[2], count, tables);
  });
  tables.add_to(rows, first_channel);
}

// --- pairs ---

using PairTable = uint16_t[kByteValues * kByteValues];

// Adds to the sums of the channels that the first and the second bytes are of, and clears the
// table. 16 bits hold every sum, since they hold the sum of the whole table.
void unpair(PairTable& table, int64_t* first_sums, int64_t* second_sums) {
  alignas(64) uint16_t by_first[kByteValues] = {};
  for (int second = 0; second < kByteValues; ++second) {
    uint16_t* row = table + second * kByteValues;
    uint16_t any = 0;
    for (int first = 0; first < kByteValues; ++first) any = static_cast<uint16_t>(any | row[first]);
    if (any == 0) continue;
    uint16_t sum = 0;
    for (int first = 0; first < kByteValues; ++first) {
      by_first[first] = static_cast<uint16_t>(by_first[first] + row[first]);
      sum = static_cast<uint16_t>(sum + row[first]);
      row[first] = 0;
    }
    second_sums[second] += sum;
  }
  for (int x = 0; x < kByteValues; ++x) first_sums[x] += by_first[x];
}

inline unsigned pair_at(const uint8_t* first, int second = 1) {
  return first[0] | static_cast<unsigned>(first[second]) << 8;
}

// How `kChannels` channels, side by side, are paired where pixels are `kStep` bytes apart.
template <int kChannels, int kStep>
struct Pairing;

template <>
struct Pairing<1, 1> {
  static constexpr int kPixels = 2;  // of a unit
  static constexpr int kMost = 1;    // pairs of a unit in one table
  static constexpr int kTables = 1;
  static constexpr int kChannelsOf[][2] = {{0, 0}};
  static void count(const uint8_t* in, PairTable* tables) { ++tables[0][pair_at(in)]; }
};
template <>
struct Pairing<3, 3> {
  static constexpr int kPixels = 2, kMost = 1, kTables = 3;
  static constexpr int kChannelsOf[][2] = {{0, 1}, {2, 0}, {1, 2}};
  static void count(const uint8_t* in, PairTable* tables) {
    for (int k = 0; k < 3; ++k) ++tables[k][pair_at(in + 2 * k)];
  }
};
template <>
struct Pairing<4, 4> {
  static constexpr int kPixels = 1, kMost = 1, kTables = 2;
  static constexpr int kChannelsOf[][2] = {{0, 1}, {2, 3}};
  static void count(const uint8_t* in, PairTable* tables) {
    for (int k = 0; k < 2; ++k) ++tables[k][pair_at(in + 2 * k)];
  }
};
template <>
struct Pairing<3, 4> {
  static constexpr int kPixels = 2, kMost = 2, kTables = 2;
  static constexpr int kChannelsOf[][2] = {{0, 1}, {2, 2}};
  static void count(const uint8_t* in, PairTable* tables) {
    ++tables[0][pair_at(in)];
    ++tables[0][pair_at(in + 4)];
    ++tables[1][pair_at(in + 2, 4)];
  }
};

template <int kChannels, int kStep>
void count_paired_blocks(const HistogramRows& rows, int64_t first_channel, int64_t first,
                         int64_t last, PairTables& pairs) {
  using Pair = Pairing<kChannels, kStep>;
  static_assert(Pair::kTables <= PairTables::kTables);
  constexpr int64_t kMaxUnits = 65535 / Pair::kMost;
  static_assert(kHistogramBlockPixels / Pair::kPixels <= kMaxUnits);
  int64_t sums[kChannels][kByteValues] = {};
  const auto add_up = [&] {
    for (int k = 0; k < Pair::kTables; ++k) {
      unpair(pairs.counts[k], sums[Pair::kChannelsOf[k][0]], sums[Pair::kChannelsOf[k][1]]);
    }
  };
  int64_t units = 0;
  const uint8_t* images = rows.images + first_channel * rows.channel_stride;
  for_each_run(rows, images, first, last, [&](const uint8_t* in, int64_t count) {
    // Two places take turns, so that an increment seldom has to wait for the one before.
    int64_t half = count / (2 * Pair::kPixels);
    const int64_t bytes = Pair::kPixels * kStep, room = (kMaxUnits - units) / 2;
    if (half > room) {
      // The tables are not added up for the sake of a few units (an image of 256 x 256 pixels has
      // one too many): they are counted one by one.
      if (half - room <= half / 32) {
        half = room;
      } else {
        add_up();
        units = 0;
      }
    }
    units += 2 * half;
    const uint8_t* second = in + half * bytes;
    for (int64_t i = 0; i < half; ++i) {
      Pair::count(in + i * bytes, pairs.counts);
      Pair::count(second + i * bytes, pairs.counts);
    }
    for (int64_t i = 2 * half * Pair::kPixels; i < count; ++i) {
      for (int c = 0; c < kChannels; ++c) ++sums[c][in[i * kStep + c]];
    }
  });
  add_up();
  add_to_counts(rows, first_channel, sums[0], kChannels);
}

}  // namespace

void channel_histogram_loop(const HistogramRows& rows, int64_t first, int64_t last,
                            PairTables* pairs) {
  constexpr int64_t kShortRow = 64;  // in which the pixels that are left over would count
  const int64_t step = rows.strides[2];
  const bool side_by_side = rows.channel_stride == 1;
  if (rows.sizes[2] < kShortRow) pairs = nullptr;
  if (side_by_side && rows.channels == 3) {
    if (pairs != nullptr && step == 3)
      return count_paired_blocks<3, 3>(rows, 0, first, last, *pairs);
    if (pairs != nullptr && step == 4)
      return count_paired_blocks<3, 4>(rows, 0, first, last, *pairs);
    if (step == 3) return count_blocks<3, 4, 3>(rows, 0, first, last);
    return count_blocks<3, 4, 0>(rows, 0, first, last);
  }
  if (side_by_side && rows.channels == 4) {
    if (pairs != nullptr && step == 4)
      return count_paired_blocks<4, 4>(rows, 0, first, last, *pairs);
    if (step == 4) return count_blocks<4, 4, 4>(rows, 0, first, last);
    return count_blocks<4, 4, 0>(rows, 0, first, last);
  }
  for (int64_t c = 0; c < rows.channels; ++c) {
    if (pairs != nullptr && step == 1) {
      count_paired_blocks<1, 1>(rows, c, first, last, *pairs);
    } else if (step == 1) {
      count_blocks<1, 8, 1>(rows, c, first, last);
    } else {
      count_blocks<1, 8, 0>(rows, c, first, last);
    }
  }
}

}  // namespace pixfuse::PIXFUSE_ISA
