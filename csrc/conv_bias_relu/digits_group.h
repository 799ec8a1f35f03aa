// A few output pixels of the convolution by digits.h: what they see, and where they go.
#pragma once
#include "conv_bias_relu/rows.h"
#include "conv_bias_relu/stage.h"

namespace pixfuse::PIXFUSE_ISA {
namespace {

struct Patches {
  uint8_t* bytes;     // [pixel][patch bytes]
  uint8_t* words;     // in pairs: [pixel][step][even bytes, odd bytes][32 words]
  int32_t* products;  // in pairs: [pixel], the sum of the products of two bytes

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

  // Asks for the lines of the caches that planes are going to be stored to: of the channels
  // [begin, end), which may be other vectors', a few pixels each, more than a processor foresees.
  // In line: a function that does nothing else has no effect in gcc's eyes, and is not called.
  [[gnu::always_inline]] void prefetch_planes(int64_t begin, int64_t end, int64_t pixels) const {
    if (channel_step == 1 || past_caches) return;
    for (int64_t c = begin; c < channels && c < end; ++c) {
      const auto* const first = reinterpret_cast<const char*>(out + c * channel_step);
      const auto* const last = reinterpret_cast<const char*>(out + c * channel_step + pixels) - 1;
      for (const char* at = first; at < last; at += 64) __builtin_prefetch(at, 1);
      __builtin_prefetch(last, 1);
    }
  }

  // The same of pixels.
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
