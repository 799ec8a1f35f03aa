// Sums of digits in the tiles of a matrix unit.
#pragma once
#include "common/matrix_tiles.h"
#include "conv_bias_relu/digits_group.h"

namespace pixfuse::PIXFUSE_ISA {
namespace {

static_assert(kLanes == kTileRows && kStepBytes == kTileRowBytes);

constexpr int kGroupTiles = kTilesPixels / kTileRows;
constexpr int kTileSums = kTileRows * kLanes;
constexpr int kColumnSums = kGroupTiles * kTileSums;
static_assert(kGroupTiles == 2 && kTilesSums == kDigitsColumns * kColumnSums);

// Of up to 32 pixels with a few columns: a column has the weights of one digit of a vector of
// output channels, and the sums [pixel][output channel]. Two tiles of pixels and two columns need
// the fewest loads that eight tiles allow: each is for two multiplications. With another thread on
// its core a processor renames no tiles, and waits for each load as for each multiplication.
template <bool is_signed, int tiles, int columns>
void sum_up(const DigitsPlan& plan, const uint8_t* patches, const int8_t* weight, int32_t* sums) {
  constexpr int kLeft = tiles * columns, kRight = kLeft + tiles;
  static_assert(kRight + columns <= 8);
  const int64_t patch_bytes = plan.patch_bytes(), column_bytes = plan.steps * kTileBytes;
  unrolled<kLeft>([&](auto sum) { clear_tile<sum.value>(); });
  for (int64_t step = 0; step < plan.steps; ++step) {
    unrolled<tiles>([&](auto tile) __attribute__((always_inline)) {
      load_tile<kLeft + tile.value>(patches + tile.value * kTileRows * patch_bytes, patch_bytes);
      unrolled<columns>([&](auto column) __attribute__((always_inline)) {
        if constexpr (tile.value == 0) {
          load_tile<kRight + column.value>(weight + column.value * column_bytes, kTileRowBytes);
        }
        add_products<is_signed, tile.value * columns + column.value, kLeft + tile.value,
                     kRight + column.value>();
      });
    });
    patches += kStepBytes;
    weight += kTileBytes;
  }
  unrolled<tiles>([&](auto tile) __attribute__((always_inline)) {
    unrolled<columns>([&](auto column) __attribute__((always_inline)) {
      store_tile<tile.value * columns + column.value>(sums + column.value * kColumnSums +
                                                      tile.value * kTileSums);
    });
  });
}

template <bool is_signed, int columns>
void sum_up(const DigitsPlan& plan, const uint8_t* patches, int64_t tiles, const int8_t* weight,
            int32_t* sums) {
  tiles == 1 ? sum_up<is_signed, 1, columns>(plan, patches, weight, sums)
             : sum_up<is_signed, 2, columns>(plan, patches, weight, sums);
}

template <class T, bool is_signed>
void run_group(const ConvBiasReluJob& job, const RowBlock& row, const Patches& patches,
               const int64_t* biases, int64_t pixels, int32_t* sums, T* out) {
  const DigitsPlan& plan = *job.digits;
  const auto* const weight =
      reinterpret_cast<const int8_t*>(job.weight) + row.channel * plan.weight_bytes_per_output();
  const int64_t tiles = pixels > kTileRows ? 2 : 1, columns = row.vectors * kDigits;
  for (int64_t column = 0; column < columns; column += 2) {
    const int64_t vector = column / kDigits, channel = row.channel + vector * kLanes;
    const bool is_last = (column + 2) / kDigits > vector;  // of the vector's columns
    const Outputs<T> outputs(job, row, vector, out);
    if (is_last) outputs.planes_ahead(1, pixels, 1).template ask<1>();
    const int8_t* const factors = weight + column * plan.steps * kTileBytes;
    int32_t* const to = sums + column % kDigitsColumns * kColumnSums;
    column + 1 < columns ? sum_up<is_signed, 2>(plan, patches.bytes, tiles, factors, to)
                         : sum_up<is_signed, 1>(plan, patches.bytes, tiles, factors, to);
    if (!is_last) continue;
    const Steps steps(plan.step + channel);
    const int32_t* at = sums + vector * kDigits % kDigitsColumns * kColumnSums;
    Counts<1> counts;
    for (int64_t p = 0; p < pixels; ++p, at += kLanes) {
      const Integers low = load_integers(at), middle = load_integers(at + kColumnSums);
      const Integers high = load_integers(at + 2 * kColumnSums);
      outputs.put(p, steps.output(low, middle, high, load(job.bias + channel + biases[p])), counts);
    }
    outputs.finish(pixels, counts);
  }
}

}  // namespace
}  // namespace pixfuse::PIXFUSE_ISA
