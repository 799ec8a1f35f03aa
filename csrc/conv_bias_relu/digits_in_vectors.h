// Sums of digits in vectors that multiply bytes (VNNI): of each digit, or in pairs.
#pragma once
#include "conv_bias_relu/digits_group.h"

namespace pixfuse::PIXFUSE_ISA {
namespace {

inline __m512i broadcast_quad(const uint8_t* from) {
  int32_t four;
  __builtin_memcpy(&four, from, sizeof four);
  return _mm512_set1_epi32(four);
}

// --- each digit ---

// Pixels whose sums of all digits are in registers at a time, with the weights.
constexpr int kDotPixels = 8;

// Four bytes of each patch are multiplied with a vector's weights at a time.
template <class T, int pixels>
void sum_up(const DigitsPlan& plan, const uint8_t* patches, const int8_t* weight,
            const int32_t* start, const Steps& steps, const float* bias, const int64_t* biases,
            const Outputs<T>& outputs, int64_t first, Counts<1>& counts) {
  const int64_t patch_bytes = plan.patch_bytes();
  outputs.template prefetch_pixels<pixels>(first);
  Integers sums[kDigits * pixels];
  unrolled<kDigits>([&](auto digit) __attribute__((always_inline)) {
    const Integers before = load_integers(start + digit.value * kLanes);
    unrolled<pixels>([&](auto p) __attribute__((always_inline)) {
      sums[p.value * kDigits + digit.value] = before;
    });
  });
  for (int64_t quad = 0; quad < plan.quads; ++quad) {
    Integers w[kDigits];
    unrolled<kDigits>([&](auto digit) __attribute__((always_inline)) {
      w[digit.value] = load_integers(weight + digit.value * kStepBytes);
    });
    unrolled<pixels>([&](auto p) __attribute__((always_inline)) {
      const __m512i bytes = broadcast_quad(patches + p.value * patch_bytes);
      unrolled<kDigits>([&](auto digit) __attribute__((always_inline)) {
        Integers& sum = sums[p.value * kDigits + digit.value];
        sum = (Integers)_mm512_dpbusd_epi32((__m512i)sum, bytes, (__m512i)w[digit.value]);
      });
    });
    patches += kQuadBytes;
    weight += kDigits * kStepBytes;
  }
  Counts<1> all = counts;
  unrolled<pixels>([&](auto p) __attribute__((always_inline)) {
    const Integers* const of = sums + p.value * kDigits;
    outputs.put(first + p.value, steps.output(of[0], of[1], of[2], load(bias + biases[p.value])),
                all);
  });
  counts = all;
}

// --- pairs ---

// Makes words of the patches, and sums of their products.
void widen(const DigitsPlan& plan, int64_t pixels, const Patches& patches) {
  const uint8_t* bytes = patches.bytes;
  uint8_t* words = patches.words;
  const __m512i low_quads =
      _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high_quads = _mm512_add_epi32(low_quads, _mm512_set1_epi32(8));
  for (int64_t p = 0; p < pixels; ++p) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t left = plan.quads * kQuadBytes; left > 0; left -= kStepBytes) {
      // What follows the last quad is anything: it is not multiplied.
      const __mmask64 mine = ~uint64_t{0} >> (left < kStepBytes ? kStepBytes - left : 0);
      const __m512i loaded = _mm512_maskz_loadu_epi8(mine, bytes);
      const __m512i even = _mm512_and_si512(loaded, _mm512_set1_epi16(0xff));
      const __m512i odd = _mm512_srli_epi16(loaded, 8);
      sum = _mm512_dpwssd_epi32(sum, even, odd);
      _mm512_storeu_si512(words, _mm512_permutex2var_epi32(even, low_quads, odd));
      _mm512_storeu_si512(words + kStepBytes, _mm512_permutex2var_epi32(even, high_quads, odd));
      bytes += kStepBytes;
      words += 2 * kStepBytes;
    }
    patches.products[p] = _mm512_reduce_add_epi32(sum);
  }
}

// Adds the products of the quads [first, last) to the sums of some vectors and some tiles of
// pixels: [pixel][vector][lower, upper][output channel]; with the first quad they begin. A part of
// `output` is asked for with each tile.
template <int vectors, int pixels>
void add_pairs(const DigitsPlan& plan, int64_t first, int64_t last, int64_t tiles,
               const Patches& patches, const int8_t* weight, const int32_t* starts, int32_t* sums,
               Ahead& output) {
  constexpr int kSums = vectors * pixels;
  constexpr int64_t kVectorBytes = kDigits * kStepBytes;  // of a quad
  const int64_t patch_bytes = plan.patch_bytes();
  const uint8_t* tile_bytes = patches.bytes + first * kQuadBytes;
  const uint8_t* tile_words = patches.words + first * 2 * kQuadBytes;
  const int32_t* products = patches.products;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    __m512i lower[kSums], upper[kSums];
    unrolled<kSums>([&](auto i) __attribute__((always_inline)) {
      constexpr int64_t p = i.value / vectors, v = i.value % vectors;
      const int32_t* const from =
          first == 0 ? starts + v * kDigits * kLanes : sums + i.value * 2 * kLanes;
      lower[i.value] = _mm512_loadu_si512(from);
      upper[i.value] = _mm512_loadu_si512(from + kLanes);
      if (first == 0) {
        upper[i.value] = _mm512_sub_epi32(upper[i.value], _mm512_set1_epi32(products[p]));
      }
    });
    output.ask<1>();
    const uint8_t *bytes = tile_bytes, *words = tile_words;
    const int8_t* weights = weight + first * vectors * kVectorBytes;
    for (int64_t quad = first; quad < last; ++quad) {
      __m512i digits[vectors], even_weights[vectors], odd_weights[vectors];
      unrolled<vectors>([&](auto v) __attribute__((always_inline)) {
        const int8_t* const from = weights + v.value * kVectorBytes;
        digits[v.value] = _mm512_loadu_si512(from);
        even_weights[v.value] = _mm512_loadu_si512(from + kStepBytes);
        odd_weights[v.value] = _mm512_loadu_si512(from + 2 * kStepBytes);
        // Else the compiler loads them anew for each pixel, and loads are what there are most of.
        asm("" : "+v"(digits[v.value]), "+v"(even_weights[v.value]), "+v"(odd_weights[v.value]));
      });
      unrolled<pixels>([&](auto p) __attribute__((always_inline)) {
        const uint8_t* const two = words + p.value * 2 * patch_bytes;
        const __m512i four = broadcast_quad(bytes + p.value * patch_bytes);
        const __m512i even = broadcast_quad(two), odd = broadcast_quad(two + kQuadBytes);
        unrolled<vectors>([&](auto v) __attribute__((always_inline)) {
          constexpr int i = p.value * vectors + v.value;
          upper[i] = _mm512_dpwssd_epi32(upper[i], _mm512_add_epi16(even, odd_weights[v.value]),
                                         _mm512_add_epi16(odd, even_weights[v.value]));
          lower[i] = _mm512_dpbusd_epi32(lower[i], four, digits[v.value]);
        });
      });
      bytes += kQuadBytes;
      words += 2 * kQuadBytes;
      weights += vectors * kVectorBytes;
    }
    unrolled<kSums>([&](auto i) __attribute__((always_inline)) {
      _mm512_storeu_si512(sums + i.value * 2 * kLanes, lower[i.value]);
      _mm512_storeu_si512(sums + i.value * 2 * kLanes + kLanes, upper[i.value]);
    });
    tile_bytes += pixels * patch_bytes;
    tile_words += pixels * 2 * patch_bytes;
    products += pixels;
    sums += kSums * 2 * kLanes;
  }
}

// As many quads at a time as leave the weights in the first-level cache while pixels pass by.
constexpr int64_t kQuadsAtOnce = 48;

template <class T, int vectors>
void run_pairs(const ConvBiasReluJob& job, const RowBlock& row, const Patches& patches,
               const int64_t* biases, int64_t pixels, int32_t* sums, T* out) {
  // Sums, weights and bytes fill the registers.
  constexpr int kPixels = vectors == 3 ? 3 : vectors == 2 ? 5 : 8;
  static_assert(vectors <= kPairsVectors);
  const DigitsPlan& plan = *job.digits;
  const auto* const weight = reinterpret_cast<const int8_t*>(job.weight) +
                             row.channel / kLanes * plan.weight_bytes_per_vector();
  const int32_t* const starts = plan.starts + row.channel * kDigits;
  const Outputs<T> outputs[kPairsVectors] = {
      {job, row, 0, out}, {job, row, 1, out}, {job, row, 2, out}};
  Ahead output{};
  for (int64_t first = 0; first < plan.quads; first += kQuadsAtOnce) {
    const int64_t last = plan.quads - first < kQuadsAtOnce ? plan.quads : first + kQuadsAtOnce;
    const int64_t tiles = pixels / kPixels;
    if (last == plan.quads && tiles > 0) output = outputs[0].planes_ahead(vectors, pixels, tiles);
    const auto add = [&](auto count, int64_t times, int64_t p) {
      add_pairs<vectors, count.value>(plan, first, last, times, patches.from(plan, p), weight,
                                      starts, sums + p * vectors * 2 * kLanes, output);
    };
    add(Constant<kPixels>{}, tiles, 0);
    int64_t p = tiles * kPixels;
    for (; pixels - p >= 2; p += 2) add(Constant<2>{}, 1, p);
    if (p < pixels) add(Constant<1>{}, 1, p);
  }
  Counts<1> counts[vectors];
  // All channels of a few pixels, as pixels may lie pages apart.
  for (int64_t begin = 0; begin < pixels; begin += kLanes) {
    const int64_t end = pixels - begin < kLanes ? pixels : begin + kLanes;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t channel = row.channel + v * kLanes;
      const Steps steps(plan.step + channel);
      const float* const bias = job.bias + channel;
      const Outputs<T> own = outputs[v];
      Counts<1> all = counts[v];
      for (int64_t p = begin; p < end; ++p) {
        const int32_t* const at = sums + (p * vectors + v) * 2 * kLanes;
        const Integers lower = load_integers(at), upper = load_integers(at + kLanes);
        own.put(p, steps.output(lower, upper, load(bias + biases[p])), all);
      }
      counts[v] = all;
    }
  }
  for (int64_t v = 0; v < vectors; ++v) outputs[v].finish(pixels, counts[v]);
}

template <class T, bool is_signed>
void run_group(const ConvBiasReluJob& job, const RowBlock& row, const Patches& patches,
               const int64_t* biases, int64_t pixels, int32_t* sums, T* out) {
  const DigitsPlan& plan = *job.digits;
  if (plan.in_pairs) {
    return row.vectors == 1   ? run_pairs<T, 1>(job, row, patches, biases, pixels, sums, out)
           : row.vectors == 2 ? run_pairs<T, 2>(job, row, patches, biases, pixels, sums, out)
                              : run_pairs<T, 3>(job, row, patches, biases, pixels, sums, out);
  }
  for (int64_t v = 0; v < row.vectors; ++v) {
    const int64_t channel = row.channel + v * kLanes;
    const Outputs<T> outputs(job, row, v, out);
    outputs.planes_ahead(1, pixels, 1).template ask<1>();
    const auto* const weight =
        reinterpret_cast<const int8_t*>(job.weight) + channel * plan.weight_bytes_per_output();
    const int32_t* const start = plan.starts + channel * kDigits;
    const Steps steps(plan.step + channel);
    Counts<1> counts;
    for (int64_t p = 0; p < pixels;) {
      const auto sum = [&](auto count) {
        sum_up<T, count.value>(plan, patches.bytes + p * plan.patch_bytes(), weight, start, steps,
                               job.bias + channel, biases + p, outputs, p, counts);
        p += count.value;
      };
      if (pixels - p >= kDotPixels) {
        sum(Constant<kDotPixels>{});
      } else if (pixels - p >= 4) {
        sum(Constant<4>{});
      } else if (pixels - p >= 2) {
        sum(Constant<2>{});
      } else {
        sum(Constant<1>{});
      }
    }
    outputs.finish(pixels, counts);
  }
}

}  // namespace
}  // namespace pixfuse::PIXFUSE_ISA
