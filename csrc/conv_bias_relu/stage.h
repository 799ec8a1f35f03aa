// From sums of a few neighbouring pixels to the output and its counts.
#pragma once
#include "conv_bias_relu/conv_bias_relu_loop.h"
#include "conv_bias_relu/vectors.h"

namespace pixfuse::PIXFUSE_ISA {
namespace {

// Vectors of output channels that are computed together, at most. With their accumulators, weights
// and a broadcast value fill the vector registers: 32, or 16 of x86 without AVX-512.
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int kMaxVectors = 4;
#else
constexpr int kMaxVectors = 2;
#endif

// Calls body(0) to body(count - 1), with numbers that are constants: only then does gcc keep an
// array of accumulators in registers from one kernel row to the next.
template <int i>
struct Constant {
  static constexpr int value = i;
};
template <int count, class Body>
[[gnu::always_inline]] inline void unrolled(const Body& body) {
  if constexpr (count > 1) unrolled<count - 1>(body);
  body(Constant<count - 1>{});
}

// Counts and sums of one channel block over a few pixels, so few that a sum in float32 is right to
// 1e-5.
template <int vectors>
struct Counts {
  Integers active[vectors] = {};
  Vector sum[vectors] = {};
};

// Sums and counts of one item, at the first channel of a block.
struct Totals {
  int64_t* active;
  int64_t* nan;
  double* sum;
};

// ReLU, rounding and activity of `pixels` times `vectors` on the stage, where the results stay.
template <class T, int vectors>
Counts<vectors> finish(float* stage, int64_t pixels) {
  Counts<vectors> counts;
  for (int64_t p = 0; p < pixels; ++p) {
    for (int v = 0; v < vectors; ++v) {
      float* at = stage + (p * vectors + v) * kLanes;
      const Vector y = round_as<T>(relu(load(at)));
      counts.active[v] = count_positive(counts.active[v], y);
      counts.sum[v] += y;
      store(at, y);
    }
  }
  return counts;
}

// Adds the counts of some pixels. The NaNs are counted in what became of the pixels: value (p, c)
// is at p * pixel_step + c * channel_step.
template <int vectors, class T>
void add_counts(const Counts<vectors>& counts, const Totals& totals, const T* values,
                int64_t pixels, int64_t channels, int64_t pixel_step, int64_t channel_step) {
  for (int v = 0; v < vectors; ++v) {
    add_to(totals.active + v * kLanes, counts.active[v]);
    add_to(totals.sum + v * kLanes, counts.sum[v]);
  }
  // No output is below 0, so a sum is NaN only when one of the outputs is.
  Integers any_nan = counts.sum[0] != counts.sum[0];
  for (int v = 1; v < vectors; ++v) any_nan |= counts.sum[v] != counts.sum[v];
  if (!is_any(any_nan)) return;
  for (int64_t c = 0; c < vectors * kLanes && c < channels; ++c) {
    for (int64_t p = 0; p < pixels; ++p) {
      const float value = to_float(values[p * pixel_step + c * channel_step]);
      totals.nan[c] += value != value ? 1 : 0;
    }
  }
}

// From the stage to an output whose channels of a pixel lie side by side.
template <class T, int vectors>
void store_pixels(const float* stage, int64_t pixels, int64_t channels, T* out, int64_t step) {
  for (int64_t p = 0; p < pixels; ++p) {
    for (int v = 0; v < vectors; ++v) {
      const int64_t left = channels - v * kLanes;
      if (left <= 0) break;
      const Vector y = load(stage + (p * vectors + v) * kLanes);
      T* to = out + p * step + v * kLanes;
      if (left >= kLanes) {
        store_exact(to, y);
      } else {
        store_exact(to, y, left);
      }
    }
  }
}

// From the stage to an output whose pixels of a channel lie side by side; past the caches only
// whole vectors.
template <class T, int vectors>
void store_planes(const float* stage, int64_t pixels, int64_t channels, T* out, int64_t plane,
                  bool past_caches = false) {
  for (int v = 0; v < vectors; ++v) {
    const int64_t left = channels - v * kLanes;
    if (left <= 0) break;
    const int64_t wanted = left < kLanes ? left : kLanes;
    for (int64_t p = 0; p < pixels; p += kLanes) {
      const int64_t count = pixels - p < kLanes ? pixels - p : kLanes;
      Vector square[kLanes];  // whatever is on the stage behind the last pixel: it is not stored
      unrolled<kLanes>([&](auto i) __attribute__((always_inline)) {
        square[i.value] = load(stage + ((p + i.value) * vectors + v) * kLanes);
      });
      transpose<kLanes / 2>(square);
      T* to = out + v * kLanes * plane + p;
      if (wanted == kLanes && count == kLanes) {
        if constexpr (__is_same(T, float)) {
          if (past_caches) {
            for (int c = 0; c < kLanes; ++c) store_past_caches(to + c * plane, square[c]);
            continue;
          }
        }
        for (int c = 0; c < kLanes; ++c) store_exact(to + c * plane, square[c]);
      } else {
        for (int64_t c = 0; c < wanted; ++c) store_exact(to + c * plane, square[c], count);
      }
    }
  }
}
}  // namespace
}  // namespace pixfuse::PIXFUSE_ISA
