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

// Increments of one counter wait for each other, several cycles each: where a piece of an image has
// one color, a unit of it is counted as often as it is there.
constexpr int64_t kPieceUnits = 128;

// Of the last unit only `kUsed` bytes may be there.
template <int kUnitBytes, int kUsed>
inline bool all_same(const uint8_t* in, int64_t units) {
  const int64_t rest = (units - 1) * kUnitBytes;
  if (__builtin_memcmp(in, in + rest, kUsed) != 0) return false;  // nearly always
  uint8_t differing = 0;
  for (int64_t i = 0; i < rest - kUnitBytes + kUsed; ++i) {
    differing = static_cast<uint8_t>(differing | (in[i] ^ in[i + kUnitBytes]));
  }
  return differing == 0;
}

inline unsigned pair_at(const uint8_t* first, int second = 1) {
  return first[0] | static_cast<unsigned>(first[second]) << 8;
}

inline void add(PairTable& table, unsigned pair, uint16_t times) {
  table[pair] = static_cast<uint16_t>(table[pair] + times);
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
  static void count(const uint8_t* in, PairTable* tables, uint16_t times) {
    add(tables[0], pair_at(in), times);
  }
};
template <>
struct Pairing<3, 3> {
  static constexpr int kPixels = 2, kMost = 1, kTables = 3;
  static constexpr int kChannelsOf[][2] = {{0, 1}, {2, 0}, {1, 2}};
  static void count(const uint8_t* in, PairTable* tables, uint16_t times) {
    for (int k = 0; k < 3; ++k) add(tables[k], pair_at(in + 2 * k), times);
  }
};
template <>
struct Pairing<4, 4> {
  static constexpr int kPixels = 1, kMost = 1, kTables = 2;
  static constexpr int kChannelsOf[][2] = {{0, 1}, {2, 3}};
  static void count(const uint8_t* in, PairTable* tables, uint16_t times) {
    for (int k = 0; k < 2; ++k) add(tables[k], pair_at(in + 2 * k), times);
  }
};
template <>
struct Pairing<3, 4> {
  static constexpr int kPixels = 2, kMost = 2, kTables = 2;
  static constexpr int kChannelsOf[][2] = {{0, 1}, {2, 2}};
  static void count(const uint8_t* in, PairTable* tables, uint16_t times) {
    add(tables[0], pair_at(in), times);
    add(tables[0], pair_at(in + 4), times);
    add(tables[1], pair_at(in + 2, 4), times);
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
    const int64_t room = (kMaxUnits - units) / 2;
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
    constexpr int kBytes = Pair::kPixels * kStep, kUsed = kBytes - kStep + kChannels;
    for (int64_t begin = 0; begin < half; begin += kPieceUnits) {
      const int64_t length = half - begin < kPieceUnits ? half - begin : kPieceUnits;
      const uint8_t* places[2] = {in + begin * kBytes, in + (half + begin) * kBytes};
      const bool same[2] = {all_same<kBytes, kUsed>(places[0], length),
                            all_same<kBytes, kUsed>(places[1], length)};
      if (!same[0] && !same[1]) {
        for (int64_t i = 0; i < length; ++i) {
          for (const uint8_t* place : places) Pair::count(place + i * kBytes, pairs.counts, 1);
        }
        continue;
      }
      for (int k = 0; k < 2; ++k) {
        const uint16_t times = static_cast<uint16_t>(same[k] ? length : 1);
        for (int64_t i = 0; i < length; i += times) {
          Pair::count(places[k] + i * kBytes, pairs.counts, times);
        }
      }
    }
    for (int64_t i = 2 * half * Pair::kPixels; i < count; ++i) {
      for (int c = 0; c < kChannels; ++c) ++sums[c][in[i * kStep + c]];
    }
  });
  add_up();
  add_to_counts(rows, first_channel, sums[0], kChannels);
}

// As many channels as there are tables, each in a plane of its own: the planes take turns.
void count_paired_planes(const HistogramRows& rows, int64_t first_channel, int64_t first,
                         int64_t last, PairTables& pairs) {
  constexpr int kPlanes = PairTables::kTables;
  constexpr int64_t kMaxUnits = 65535;
  static_assert(kHistogramBlockPixels / 2 <= kMaxUnits);
  int64_t sums[kPlanes][kByteValues] = {};
  const auto add_up = [&] {
    for (int c = 0; c < kPlanes; ++c) unpair(pairs.counts[c], sums[c], sums[c]);
  };
  int64_t units = 0;
  const int64_t stride = rows.channel_stride;
  const uint8_t* images = rows.images + first_channel * stride;
  for_each_run(rows, images, first, last, [&](const uint8_t* in, int64_t count) {
    const int64_t here = count / 2;
    if (units + here > kMaxUnits) {
      add_up();
      units = 0;
    }
    units += here;
    for (int64_t begin = 0; begin < here; begin += kPieceUnits) {
      const int64_t length = here - begin < kPieceUnits ? here - begin : kPieceUnits;
      const uint8_t* planes[kPlanes];
      bool same[kPlanes], any = false;
      for (int c = 0; c < kPlanes; ++c) {
        planes[c] = in + c * stride + 2 * begin;
        same[c] = all_same<2, 2>(planes[c], length);
        any = any || same[c];
      }
      if (!any) {
        for (int64_t i = 0; i < length; ++i) {
          for (int c = 0; c < kPlanes; ++c) add(pairs.counts[c], pair_at(planes[c] + 2 * i), 1);
        }
        continue;
      }
      for (int c = 0; c < kPlanes; ++c) {
        const uint16_t times = static_cast<uint16_t>(same[c] ? length : 1);
        for (int64_t i = 0; i < length; i += times) {
          add(pairs.counts[c], pair_at(planes[c] + 2 * i), times);
        }
      }
    }
    if (count % 2 == 0) return;
    for (int c = 0; c < kPlanes; ++c) ++sums[c][in[c * stride + count - 1]];
  });
  add_up();
  add_to_counts(rows, first_channel, sums[0], kPlanes);
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
  int64_t c = 0;
  if (pairs != nullptr && step == 1) {
    for (; c + PairTables::kTables <= rows.channels; c += PairTables::kTables) {
      count_paired_planes(rows, c, first, last, *pairs);
    }
  }
  for (; c < rows.channels; ++c) {
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
