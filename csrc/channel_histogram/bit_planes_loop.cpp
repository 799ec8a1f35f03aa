// The loop for processors that turn matrices of bits and count the bits of vectors (GFNI and
// AVX512-VPOPCNTDQ: Ice Lake, Zen 4 and later). PIXFUSE_ISA names its namespace.
//
// A table of counters takes one of them from memory and back for every byte. Here a piece of 512
// pixels becomes eight vectors of 512 bits, one for each bit of its bytes: the AND of some of them
// says which pixels have these bits, and counting its ones says how many. There are 256 such sets
// of bits, for each piece; but a piece of a photograph, 16 rows of 32 pixels, has few different
// upper halves of bytes, and only those are looked at. The order of the pixels does not matter, so
// they are moved about as is convenient.
#pragma GCC diagnostic push
// gcc 12 takes the undefined vectors of its own AVX-512 header for mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "channel_histogram/channel_histogram_loop.h"

namespace pixfuse::PIXFUSE_ISA {
namespace {

typedef __m512i Vector;
constexpr int kVectorBytes = 64;

static_assert(kPieceRows * kPieceColumns == 8 * kVectorBytes);  // a vector for each bit
constexpr int kHalves = 16;  // values of the upper, or of the lower, four bits of a byte
constexpr int kHalfBits = 4;

// --- from bytes to bits ---

// The first 32 pixels of two rows, one after the other: 64 bytes of them.
template <int kStep>
inline Vector load(const uint8_t* row, const uint8_t* other_row, int vector) {
  constexpr int kHalf = kVectorBytes / 2;
  const auto half_at = [&](int half) {
    return (half < kStep ? row : other_row) + half % kStep * kHalf;
  };
  const uint8_t *const low = half_at(2 * vector), *const high = half_at(2 * vector + 1);
  const bool of_one_row = (2 * vector + 1) % kStep != 0;
  if (of_one_row) return _mm512_loadu_si512(low);
  return _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low))),
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)), 1);
}

// The channels of a piece, eight vectors of bytes for each. A channel's bytes lie at every kStep-th
// place of kStep vectors, in each of them at other places than in the rest: so one vector holds
// them all.
template <int kChannels, int kStep>
inline void load_piece(const uint8_t* const* rows, int64_t offset, Vector (&bytes)[kChannels][8]) {
  constexpr uint64_t kEvery = kStep == 3 ? 0x9249249249249249 : 0x1111111111111111;
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    Vector v[kStep];
#pragma GCC unroll 4
    for (int k = 0; k < kStep; ++k) {
      v[k] = load<kStep>(rows[2 * i] + offset, rows[2 * i + 1] + offset, k);
    }
    if constexpr (kStep == 4) {  // else all have a channel at the same places
      v[1] = _mm512_rol_epi32(v[1], 8);
      v[2] = _mm512_rol_epi32(v[2], 16);
      v[3] = _mm512_rol_epi32(v[3], 24);
    }
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) {
      Vector all = v[0];
#pragma GCC unroll 4
      for (int k = 1; k < kStep; ++k) {
        const int first = kStep == 3 ? (c + 2 * k) % 3 : (c + k) % 4;
        all = _mm512_mask_mov_epi8(all, kEvery << first, v[k]);
      }
      bytes[c][i] = all;
    }
  }
}

// The bits 0 to 7 of 512 bytes.
inline void turn(Vector (&v)[8]) {
  // Eight bytes become one for each bit: the product of the unit matrix and their bits, turned.
  const Vector unit = _mm512_set1_epi64(INT64_C(0x8040201008040201));
  Vector a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) v[i] = _mm512_gf2p8affine_epi64_epi8(unit, v[i], 0);
  // And what belongs to one bit comes together: 2 bytes, 4, 8, 16 of each.
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_unpacklo_epi8(v[2 * i], v[2 * i + 1]);
    a[i + 4] = _mm512_unpackhi_epi8(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_unpacklo_epi16(a[2 * i], a[2 * i + 1]);      // bits 0 to 3
    b[i + 4] = _mm512_unpackhi_epi16(a[2 * i], a[2 * i + 1]);  // bits 4 to 7
  }
#pragma GCC unroll 2
  for (int half = 0; half < 8; half += 4) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      a[half + i] = _mm512_unpacklo_epi32(b[half + 2 * i], b[half + 2 * i + 1]);
      a[half + 2 + i] = _mm512_unpackhi_epi32(b[half + 2 * i], b[half + 2 * i + 1]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = _mm512_unpacklo_epi64(a[2 * i], a[2 * i + 1]);
    v[2 * i + 1] = _mm512_unpackhi_epi64(a[2 * i], a[2 * i + 1]);
  }
}

inline int least_byte(Vector v) {
  const __m256i half = _mm256_min_epu8(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  const __m128i quarter =
      _mm_min_epu8(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m128i pairs = _mm_min_epu8(quarter, _mm_srli_epi16(quarter, 8));
  return _mm_cvtsi128_si32(_mm_minpos_epu16(pairs)) & 0xff;
}

// --- counting ---

// One channel of a piece.
struct Plane {
  Vector lower[kHalfBits];  // bits 0 to 3
  Vector upper[2][4];       // which pixels have 0, 1, 2, 3 in bits 4 and 5, in bits 6 and 7
};

inline void set_equal(Vector low, Vector high, Vector (&to)[4]) {
  to[0] = ~(low | high);
  to[1] = low & ~high;
  to[2] = high & ~low;
  to[3] = low & high;
}

// Counts pieces, several at a time: the more it goes over at once, the seldomer the processor
// guesses wrongly that there is more.
template <int kChannels>
class Counter {
 public:
  void clear() {
    __builtin_memset(words_, 0, sizeof words_);
    __builtin_memset(with_bits_, 0, sizeof with_bits_);
    counted_ = waiting_ = wanted_ = 0;
  }

  void add(Vector (&piece)[kChannels][8]) {
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) {
      Vector(&bytes)[8] = piece[c];
      const int number = waiting_ * kChannels + c;
      want_halves_of(bytes, number);
      turn(bytes);
      Plane& plane = planes_[number];
      for (int bit = 0; bit < kHalfBits; ++bit) plane.lower[bit] = bytes[bit];
      set_equal(bytes[4], bytes[5], plane.upper[0]);
      set_equal(bytes[6], bytes[7], plane.upper[1]);
    }
    if (++waiting_ == kWaiting) count();
  }

  // How often each value was found in a channel.
  void sums_of(int channel, int64_t (&sums)[kByteValues]) {
    if (waiting_ > 0) count();
    add_words();
    for (int half = 0; half < kHalves; ++half) {
      int64_t* const values = sums + half * kHalves;
      const int64_t* const with_bits = with_bits_ + channel * kByteValues + half * kHalves;
      __builtin_memcpy(values, with_bits, kHalves * sizeof *values);
      // Those with some bits, or more, without those that have one more: for each bit.
      for (int bit = 1; bit < kHalves; bit *= 2) {
        for (int i = 0; i < kHalves; ++i) {
          if ((i & bit) == 0) values[i] -= values[i | bit];
        }
      }
    }
  }

 private:
  static constexpr int kWaiting = (11 + kChannels) / kChannels;  // pieces: a dozen planes
  static constexpr int kPlanes = kWaiting * kChannels;
  static constexpr int kWords = kHalves / 4;          // vectors of words
  static constexpr int kMostPieces = INT16_MAX / 64;  // a word holds what 64 bits are counted to

  // Upper halves from that of the least byte to that of the greatest. All sixteen numbers that
  // follow the first are written; the next ones replace those that are too many.
  void want_halves_of(const Vector (&bytes)[8], int plane) {
    Vector least = bytes[0], greatest = bytes[0];
#pragma GCC unroll 8
    for (int i = 1; i < 8; ++i) {
      least = _mm512_min_epu8(least, bytes[i]);
      greatest = _mm512_max_epu8(greatest, bytes[i]);
    }
    const int first = least_byte(least) >> kHalfBits;
    const int last = (0xff - least_byte(~greatest)) >> kHalfBits;
    const __m256i numbers = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m256i start = _mm256_set1_epi16(static_cast<int16_t>(plane * kHalves + first));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(wanted_halves_ + wanted_),
                        _mm256_add_epi16(numbers, start));
    wanted_ += last - first + 1;
  }

  void count() {
    for (int k = 0; k < wanted_; ++k) {
      const int number = wanted_halves_[k] / kHalves, half = wanted_halves_[k] % kHalves;
      const Plane& plane = planes_[number];
      Vector* const words = words_ + (number % kChannels * kHalves + half) * kWords;
      Vector with[kHalves];  // these lower bits, or more
      with[0] = plane.upper[0][half % 4] & plane.upper[1][half / 4];
#pragma GCC unroll 16
      for (unsigned i = 1; i < kHalves; ++i) {
        with[i] = with[i & (i - 1)] & plane.lower[__builtin_ctz(i)];
      }
#pragma GCC unroll 4
      for (int w = 0; w < kWords; ++w) {
        Vector ones[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) ones[i] = _mm512_popcnt_epi64(with[4 * w + i]);
        // All but the first word of each of these numbers is zero.
        const Vector packed = _mm512_packus_epi32(_mm512_packus_epi32(ones[0], ones[1]),
                                                  _mm512_packus_epi32(ones[2], ones[3]));
        words[w] = _mm512_add_epi16(words[w], packed);
      }
    }
    counted_ += waiting_;
    waiting_ = wanted_ = 0;
    if (counted_ + kWaiting > kMostPieces) add_words();
  }

  void add_words() {
    for (int i = 0; i < kChannels * kHalves * kWords; ++i) {
      // Pairs of words are four sums, and these stand there four times.
      const Vector pairs = _mm512_madd_epi16(words_[i], _mm512_set1_epi16(1));
      const __m256i half =
          _mm256_add_epi32(_mm512_castsi512_si256(pairs), _mm512_extracti64x4_epi64(pairs, 1));
      const __m128i sums =
          _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
      const auto to = reinterpret_cast<__m256i*>(with_bits_ + 4 * i);
      _mm256_storeu_si256(to,
                          _mm256_add_epi64(_mm256_loadu_si256(to), _mm256_cvtepi32_epi64(sums)));
      words_[i] = Vector{};
    }
    counted_ = 0;
  }

  // By the channel and the upper half of a byte: how many have some of the lower bits, or more.
  Vector words_[kChannels * kHalves * kWords];  // of what was counted last
  int64_t with_bits_[kChannels * kByteValues];  // of the pieces before
  int counted_;                                 // pieces, in the words
  Plane planes_[kPlanes];
  int waiting_;                                      // pieces, in the planes
  uint16_t wanted_halves_[(kPlanes + 1) * kHalves];  // 16 * plane + half
  int wanted_;
};

template <int kChannels, int kStep>
void count_strips(const HistogramGrid& grid, int64_t first_channel, int64_t first, int64_t last) {
  constexpr int64_t kRowBytes = kPieceColumns * kStep;
  const HistogramRows& rows = grid.rows;
  Counter<kChannels> counter;
  counter.clear();
  int64_t padding = 0;
  const int64_t height = rows.sizes[1], width = rows.sizes[2];
  for (int64_t strip = first; strip < last; ++strip) {
    const int64_t y = strip % strips_per_image(grid) * kPieceRows;
    const int64_t here = height - y < kPieceRows ? height - y : kPieceRows;
    // Of rows that repeat the same pixels, each is the last one.
    const bool is_last = y + here == height || rows.strides[1] == 0;
    const uint8_t* strip_rows[kPieceRows];
    for (int64_t row = 0; row < here; ++row) {
      strip_rows[row] = rows.images + first_channel * rows.channel_stride +
                        strip / strips_per_image(grid) * rows.strides[0] +
                        (y + row) * rows.strides[1];
    }
    for (int64_t x = 0; x < width; x += kPieceColumns) {
      const int64_t columns = width - x < kPieceColumns ? width - x : kPieceColumns;
      const int64_t last_columns = grid.last_row - x < columns ? grid.last_row - x : columns;
      // Of the last pixel of all, the bytes after its channels may not be there.
      const bool has_end = kStep > kChannels && x + columns == width;
      const bool is_cut = is_last && (last_columns < kPieceColumns || has_end);
      Vector bytes[kChannels][8];
      if (here < kPieceRows || columns < kPieceColumns || is_cut) {
        alignas(kVectorBytes) uint8_t copy[kPieceRows][kRowBytes] = {};
        const uint8_t* copied_rows[kPieceRows];
        for (int64_t row = 0; row < kPieceRows; ++row) {
          copied_rows[row] = copy[row];
          if (row >= here) continue;
          const int64_t pixels = is_last && row == here - 1 ? last_columns : columns;
          if (pixels <= 0) continue;
          __builtin_memcpy(copy[row], strip_rows[row] + x * kStep,
                           static_cast<size_t>((pixels - 1) * kStep + kChannels));
          padding -= pixels;
        }
        padding += kPieceRows * kPieceColumns;
        load_piece<kChannels, kStep>(copied_rows, 0, bytes);
      } else {
        load_piece<kChannels, kStep>(strip_rows, x * kStep, bytes);
      }
      counter.add(bytes);
    }
  }
  for (int c = 0; c < kChannels; ++c) {
    int64_t sums[kByteValues];
    counter.sums_of(c, sums);
    sums[0] -= padding;
    add_to_counts(rows, first_channel + c, sums, 1);
  }
}

}  // namespace

void bit_planes_loop(const HistogramGrid& grid, int64_t first, int64_t last) {
  const HistogramRows& rows = grid.rows;
  const int64_t step = rows.strides[2];
  if (step == 3) return count_strips<3, 3>(grid, 0, first, last);
  if (step == 4 && rows.channels == 3) return count_strips<3, 4>(grid, 0, first, last);
  if (step == 4) return count_strips<4, 4>(grid, 0, first, last);
  for (int64_t c = 0; c < rows.channels; ++c) count_strips<1, 1>(grid, c, first, last);
}

}  // namespace pixfuse::PIXFUSE_ISA
