// A few output pixels of the convolution by digits.h: what they see, and where they go.
#pragma once
#include "common/read_ahead.h"
#include "conv_bias_relu/rows.h"
#include "conv_bias_relu/stage.h"

namespace pixfuse::PIXFUSE_ISA {
namespace {

// The last two in pairs only.
struct Patches {
  uint8_t* bytes;     // [pixel][patch bytes]
  uint8_t* words;     // [pixel][quad]: its even bytes, and its odd ones, as words
  int32_t* products;  // [pixel]: the sum of the products of each even byte and the odd one after it

  Patches from(const DigitsPlan& plan, int64_t pixel) const {
    const int64_t at = pixel * plan.patch_bytes();
    return {bytes + at, words + 2 * at, products + pixel};
  }
};

inline Integers load_integers(const void* from) {
  Integers v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

// What the sums of the digits are multiplied with.
struct Steps {
  Vector low, middle, high;

  explicit Steps(const float* step) : low(load(step)), middle(low * 256.0f), high(low * 65536.0f) {}
  Vector output(Integers lows, Integers middles, Integers highs, Vector bias) const {
    Vector y = __builtin_convertvector(lows, Vector) * low;
    y = multiply_add(__builtin_convertvector(middles, Vector), middle, y);
    y = multiply_add(__builtin_convertvector(highs, Vector), high, y);
    return y + bias;  // the last, as it may be larger than all: so it is rounded with once
  }
  // `highs` in steps of the middle digit.
  Vector output(Integers lows, Integers highs, Vector bias) const {
    const Vector y = __builtin_convertvector(lows, Vector) * low;
    return multiply_add(__builtin_convertvector(highs, Vector), middle, y) + bias;
  }
};

// Where a vector of output channels goes, of some pixels: with ReLU, and counted.
template <class T>
class Outputs {
 public:
  Outputs(const ConvBiasReluJob& job, const RowBlock& row, int64_t vector, T* out)
      : channels(job.args.output_sizes[1] - row.channel - vector * kLanes),
        channel_step(job.args.output_strides[1]),
        pixel_step(job.args.output_strides[3]),
        is_straight(channel_step == 1 && channels >= kLanes),
        past_caches(job.past_caches),
        stage(row.stage + vector * kStagePixels * kLanes),
        out(out + vector * kLanes * channel_step),
        totals{row.totals.active + vector * kLanes, row.totals.nan + vector * kLanes,
               row.totals.sum + vector * kLanes} {}

  // Where planes are going to be stored, of this and the following vectors: more rows than a
  // processor foresees. To be asked for in so many parts.
  Ahead planes_ahead(int64_t vectors, int64_t pixels, int64_t parts) const {
    Ahead ahead{reinterpret_cast<uintptr_t>(out)};
    if (channel_step == 1 || past_caches) return ahead;
    ahead.runs = channels < vectors * kLanes ? channels : vectors * kLanes;
    ahead.step = channel_step * static_cast<int64_t>(sizeof(T));
    ahead.bytes = pixels * static_cast<int64_t>(sizeof(T));
    ahead.share_out(parts);
    return ahead;
  }

  // Asks for where some pixels are going to be stored.
  template <int pixels>
  [[gnu::always_inline]] void prefetch_pixels(int64_t first) const {
    if (!is_straight || past_caches) return;
    unrolled<pixels>([&](auto p) __attribute__((always_inline)) {
      __builtin_prefetch(out + (first + p.value) * pixel_step, 1);
    });
  }

  [[gnu::always_inline]] void put(int64_t pixel, Vector sum, Counts<1>& counts) const {
    const Vector y = round_as<T>(relu(sum));
    counts.active[0] = count_positive(counts.active[0], y);
    counts.sum[0] += y;
    if (!is_straight) {
      store(stage + pixel * kLanes, y);
    } else if (__is_same(T, float) && past_caches) {
      store_past_caches(reinterpret_cast<float*>(out + pixel * pixel_step), y);
    } else {
      store_exact(out + pixel * pixel_step, y);
    }
  }

  // All of the pixels have been put.
  void finish(int64_t pixels, const Counts<1>& counts) const {
    if (!is_straight && channel_step == 1) {
      store_pixels<T, 1>(stage, pixels, channels, out, pixel_step);
    } else if (!is_straight) {
      store_planes<T, 1>(stage, pixels, channels, out, channel_step, past_caches);
    }
    add_counts<1>(counts, totals, out, pixels, channels, pixel_step, channel_step);
  }

 private:
  int64_t channels, channel_step, pixel_step;
  bool is_straight, past_caches;
  float* stage;
  T* out;
  Totals totals;
};

}  // namespace
}  // namespace pixfuse::PIXFUSE_ISA
