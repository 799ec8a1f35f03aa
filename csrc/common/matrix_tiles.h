// Matrix multiplication of bytes in a processor's tiles (AMX): the one place that knows how.
// Without the instructions, or with PIXFUSE_PLAIN_TILES, plain loops that do the same: for tests on
// any machine, where a sanitizer sees every access.
//
// There are eight tiles of 16 rows of 64 bytes. A left operand has 16 rows of 64 bytes; a right one
// has 16 groups of 4 rows, with the 4 bytes of a column side by side:
//
//   sum[i][j] += sum over k < 64 of left[i][k] * right[k / 4][4 * j + k % 4],   int32
//
// Tiles are between begin_tiles() and end_tiles() of one thread.
#pragma once
#include <stdint.h>

namespace pixfuse::PIXFUSE_ISA {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileRowBytes = 64;
constexpr int kTileBytes = kTileRows * kTileRowBytes;

#if defined(__AMX_INT8__) && !defined(PIXFUSE_PLAIN_TILES)

inline void begin_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } shapes;
  for (int tile = 0; tile < 8; ++tile) {
    shapes.row_bytes[tile] = kTileRowBytes;
    shapes.rows[tile] = kTileRows;
  }
  asm volatile("ldtilecfg %0" ::"m"(shapes));
}

inline void end_tiles() { asm volatile("tilerelease"); }

template <int tile>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}

// `row_bytes` from one row in memory to the next.
template <int tile>
inline void load_tile(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(tile) : "memory");
}

// The sums of a tile, one row after the other.
template <int tile>
inline void store_tile(int32_t* to) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(int64_t{kTileRowBytes}), "i"(tile)
               : "memory");
}

// The right operand is of signed bytes.
template <bool left_is_signed, int sum, int left, int right>
inline void add_products() {
  if constexpr (left_is_signed) {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(left), "i"(right));
  } else {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(left), "i"(right));
  }
}

#else

thread_local int32_t plain_tiles[8][kTileBytes / 4];

inline void begin_tiles() {}
inline void end_tiles() {}

template <int tile>
inline void clear_tile() {
  for (int32_t& number : plain_tiles[tile]) number = 0;
}

template <int tile>
inline void load_tile(const void* from, int64_t row_bytes) {
  for (int64_t row = 0; row < kTileRows; ++row) {
    __builtin_memcpy(plain_tiles[tile] + row * kTileRowBytes / 4,
                     static_cast<const char*>(from) + row * row_bytes, kTileRowBytes);
  }
}

template <int tile>
inline void store_tile(int32_t* to) {
  for (int i = 0; i < kTileBytes / 4; ++i) to[i] = plain_tiles[tile][i];
}

template <bool left_is_signed, int sum, int left, int right>
inline void add_products() {
  // Copies that no other thread can know of: a sanitizer has nothing to check in the loops.
  uint8_t bytes[kTileBytes];
  int8_t factors[kTileBytes];
  int32_t sums[kTileBytes / 4];
  __builtin_memcpy(bytes, plain_tiles[left], kTileBytes);
  __builtin_memcpy(factors, plain_tiles[right], kTileBytes);
  __builtin_memcpy(sums, plain_tiles[sum], kTileBytes);
  for (int i = 0; i < kTileRows; ++i) {
    for (int k = 0; k < kTileRowBytes; ++k) {
      const uint8_t byte = bytes[i * kTileRowBytes + k];
      const int32_t value = left_is_signed ? static_cast<int8_t>(byte) : byte;
      const int row = k / 4 * kTileRowBytes + k % 4;
      for (int j = 0; j < kTileRows; ++j) sums[i * kTileRows + j] += value * factors[row + 4 * j];
    }
  }
  __builtin_memcpy(plain_tiles[sum], sums, kTileBytes);
}

#endif

}  // namespace
}  // namespace pixfuse::PIXFUSE_ISA
