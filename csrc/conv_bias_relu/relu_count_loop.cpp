// The last pass over a convolution that somebody else computed: ReLU, rounding, activity. Compiled
// once per instruction set, with PIXFUSE_ISA naming its namespace.
#include "common/read_ahead.h"
#include "conv_bias_relu/conv_bias_relu_loop.h"
#include "conv_bias_relu/vectors.h"

namespace pixfuse::PIXFUSE_ISA {
namespace {

// Values that are added up in float32, to each lane, before a sum goes on in float64: so few that a
// sum of theirs is right to 1e-5.
constexpr int64_t kFloatSums = 64;

// The convolution has just been written, but is more than the nearest caches hold. So everything
// goes from the end to the beginning: what was written last is in these caches still.
constexpr uintptr_t kAheadBytes = 4096;

inline void read_below(const void* at, int64_t bytes) {
  read_ahead(reinterpret_cast<uintptr_t>(at) - kAheadBytes, bytes);
}

template <class Out>
inline void store_result(Out* to, Vector y, bool past_caches) {
  if constexpr (__is_same(Out, float)) {
    if (past_caches) return store_past_caches(to, y);
  }
  store_exact(to, y);
}

struct Result {
  int64_t active = 0;
  int64_t nan = 0;
  double sum = 0.0;
};

template <class Out>
int64_t count_nan(const Out* out, int64_t count, int64_t step) {
  int64_t nan = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float value = to_float(out[i * step]);
    nan += value != value ? 1 : 0;
  }
  return nan;
}

// Neighbouring values of one channel.
template <class In, class Out>
Result relu_plane(const In* in, Out* out, int64_t count, bool past_caches) {
  constexpr int64_t kMost = kFloatSums * kLanes;
  Result result;
  for (int64_t begin = (count - 1) / kMost * kMost; begin >= 0; begin -= kMost) {
    const int64_t length = count - begin < kMost ? count - begin : kMost;
    Integers active{};
    Vector sum{};
    int64_t i = begin + length / kLanes * kLanes;
    if (const int64_t rest = begin + length - i; rest > 0) {
      const Vector y = round_as<Out>(relu(load_floats(in + i, rest)));
      active = count_positive(active, y);
      sum += y;
      store_exact(out + i, y, rest);
    }
    for (i -= kLanes; i >= begin; i -= kLanes) {
      read_below(in + i, kLanes * static_cast<int64_t>(sizeof(In)));
      const Vector y = round_as<Out>(relu(load_floats(in + i)));
      active = count_positive(active, y);
      sum += y;
      store_result(out + i, y, past_caches);
    }
    int32_t active_here = 0;
    double sums[kLanes];
    for (int k = 0; k < kLanes; ++k) active_here += active[k];
    for (int k = 0; k < kLanes; ++k) sums[k] = static_cast<double>(sum[k]);
    for (int half = kLanes / 2; half > 0; half /= 2) {  // pairs, which need not wait for each other
      for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
    }
    const double total = sums[0];
    result.active += active_here;
    if (total != total) result.nan += count_nan(out + begin, length, 1);
    result.sum += total;
  }
  return result;
}

// Sums and counts of a run of pixels, at its first channel.
struct Totals {
  int64_t* active;
  int64_t* nan;
  double* sum;
};

// `vectors` of the channels of up to kFloatSums pixels, or the first `wanted` channels of one
// vector; pixels are `step` apart. Lines that lie side by side are read together: the memory is the
// limit.
template <int vectors, bool whole, class In, class Out>
void relu_vectors(const In* in, Out* out, int64_t pixels, int64_t step, int64_t wanted,
                  bool past_caches, const Totals& totals) {
  Integers active[vectors] = {};
  Vector sum[vectors] = {};
  for (int64_t p = pixels - 1; p >= 0; --p) {
    read_below(in + p * step, vectors * kLanes * static_cast<int64_t>(sizeof(In)));
    for (int v = 0; v < vectors; ++v) {
      const In* from = in + p * step + v * kLanes;
      Out* to = out + p * step + v * kLanes;
      const Vector x = whole ? load_floats(from) : load_floats(from, wanted);
      const Vector y = round_as<Out>(relu(x));
      active[v] = count_positive(active[v], y);
      sum[v] += y;
      if constexpr (whole) {
        store_result(to, y, past_caches);
      } else {
        store_exact(to, y, wanted);
      }
    }
  }
  const int64_t channels = whole ? vectors * kLanes : wanted;
  float sums[vectors * kLanes];
  int32_t counts[vectors * kLanes];
  __builtin_memcpy(sums, sum, sizeof sums);
  __builtin_memcpy(counts, active, sizeof counts);
  int64_t* __restrict all_active = totals.active;
  double* __restrict all_sums = totals.sum;
  int32_t unordered = 0;
  for (int64_t c = 0; c < channels; ++c) {
    all_active[c] += counts[c];
    all_sums[c] += static_cast<double>(sums[c]);
    unordered += sums[c] != sums[c];
  }
  if (unordered == 0) return;
  for (int64_t c = 0; c < channels; ++c) {
    // Of the outputs, as the input may lie where they are now.
    if (sums[c] != sums[c]) totals.nan[c] += count_nan(out + c, pixels, step);
  }
}

// `pixels` with their channels side by side.
template <class In, class Out>
void relu_pixels(const In* in, Out* out, int64_t pixels, int64_t channels, bool past_caches,
                 const Totals& totals) {
  constexpr int kMost = 8;
  for (int64_t begin = (pixels - 1) / kFloatSums * kFloatSums; begin >= 0; begin -= kFloatSums) {
    const int64_t some = pixels - begin < kFloatSums ? pixels - begin : kFloatSums;
    for (int64_t c = 0; c < channels;) {
      const Totals here{totals.active + c, totals.nan + c, totals.sum + c};
      const In* from = in + begin * channels + c;
      Out* to = out + begin * channels + c;
      const int64_t left = channels - c;
      if (left >= kMost * kLanes) {
        relu_vectors<kMost, true>(from, to, some, channels, 0, past_caches, here);
        c += kMost * kLanes;
      } else if (left >= kMost / 2 * kLanes) {
        relu_vectors<kMost / 2, true>(from, to, some, channels, 0, past_caches, here);
        c += kMost / 2 * kLanes;
      } else if (left >= kLanes) {
        relu_vectors<1, true>(from, to, some, channels, 0, past_caches, here);
        c += kLanes;
      } else {
        relu_vectors<1, false>(from, to, some, channels, left, past_caches, here);
        c = channels;
      }
    }
  }
}

// float64 is for checking derivatives: one value at a time.
void relu_float64(const double* in, double* out, int64_t count, int64_t step, Result& result) {
  for (int64_t i = 0; i < count; ++i) {
    const double x = in[i * step], y = x <= 0.0 ? 0.0 : x;
    out[i * step] = y;
    result.active += y > 0.0 ? 1 : 0;
    result.nan += y != y ? 1 : 0;
    result.sum += y;
  }
}

template <class In, class Out>
void run_items(const ReluCountJob& job, int64_t first, int64_t last) {
  const ReluCountArgs& args = job.args;
  const In* in = static_cast<const In*>(args.input);
  Out* out = static_cast<Out*>(args.output);
  const int64_t channels = args.channels;
  for (int64_t item = last - 1; item >= first; --item) {
    if (!args.channels_last) {
      const int64_t begin = item * args.pixels;
      Result result;
      if constexpr (__is_same(In, double)) {
        relu_float64(in + begin, out + begin, args.pixels, 1, result);
      } else {
        result = relu_plane(in + begin, out + begin, args.pixels, job.past_caches);
      }
      job.item_active[item] = result.active;
      job.item_nan[item] = result.nan;
      job.item_sum[item] = result.sum;
      continue;
    }
    const int64_t run = item % job.runs_per_image * kRunPixels;
    const int64_t pixels = args.pixels - run < kRunPixels ? args.pixels - run : kRunPixels;
    const int64_t begin = (item / job.runs_per_image * args.pixels + run) * channels;
    const int64_t at = item * channels;
    for (int64_t c = 0; c < channels; ++c) {
      Result result;
      if constexpr (__is_same(In, double)) {
        relu_float64(in + begin + c, out + begin + c, pixels, channels, result);
      }
      job.item_active[at + c] = result.active;
      job.item_nan[at + c] = result.nan;
      job.item_sum[at + c] = result.sum;
    }
    if constexpr (!__is_same(In, double)) {
      relu_pixels(in + begin, out + begin, pixels, channels, job.past_caches,
                  {job.item_active + at, job.item_nan + at, job.item_sum + at});
    }
  }
  if (job.past_caches) finish_past_caches();
}

template <class Out>
void run_items_to(const ReluCountJob& job, int64_t first, int64_t last) {
  if (job.args.input_type == ElementType::float32) return run_items<float, Out>(job, first, last);
  run_items<Out, Out>(job, first, last);
}

}  // namespace

void relu_count_loop(const ReluCountJob& job, int64_t first, int64_t last) {
  if (job.args.is_float64) return run_items<double, double>(job, first, last);
  switch (job.args.output_type) {
    case ElementType::float32:
      return run_items_to<float>(job, first, last);
    case ElementType::float16:
      return run_items_to<Float16>(job, first, last);
    case ElementType::bfloat16:
      return run_items_to<BFloat16>(job, first, last);
    case ElementType::uint8:
      return;  // no such output
  }
}

}  // namespace pixfuse::PIXFUSE_ISA
