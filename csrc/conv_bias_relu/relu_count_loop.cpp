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

// The convolution has just been written, but is more than the nearest caches hold.
constexpr uintptr_t kAheadBytes = 4096;

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
Result relu_plane(const In* in, Out* out, int64_t count) {
  Result result;
  for (int64_t begin = 0; begin < count;) {
    const int64_t left = count - begin, most = kFloatSums * kLanes;
    const int64_t length = left < most ? left : most;
    Integers active{};
    Vector sum{};
    int64_t i = begin;
    for (; i + kLanes <= begin + length; i += kLanes) {
      read_ahead(reinterpret_cast<uintptr_t>(in + i) + kAheadBytes,
                 kLanes * static_cast<int64_t>(sizeof(In)));
      const Vector y = round_as<Out>(relu(load_floats(in + i)));
      active = count_positive(active, y);
      sum += y;
      store_exact(out + i, y);
    }
    if (i < begin + length) {
      const int64_t rest = begin + length - i;
      const Vector y = round_as<Out>(relu(load_floats(in + i, rest)));
      active = count_positive(active, y);
      sum += y;
      store_exact(out + i, y, rest);
    }
    double total = 0.0;
    for (int k = 0; k < kLanes; ++k) {
      result.active += active[k];
      total += static_cast<double>(sum[k]);
    }
    if (total != total) result.nan += count_nan(out + begin, length, 1);
    result.sum += total;
    begin += length;
  }
  return result;
}

// Sums and counts of a run of pixels, at its first channel.
struct Totals {
  int64_t* active;
  int64_t* nan;
  double* sum;
};

// `vectors` of the channels of `pixels`, or the first `wanted` channels of one vector; pixels are
// `step` apart. Lines that lie side by side are read together: the memory is the limit.
template <int vectors, bool whole, class In, class Out>
void relu_vectors(const In* in, Out* out, int64_t pixels, int64_t step, int64_t wanted,
                  const Totals& totals) {
  for (int64_t begin = 0; begin < pixels; begin += kFloatSums) {
    const int64_t end = begin + kFloatSums < pixels ? begin + kFloatSums : pixels;
    Integers active[vectors] = {};
    Vector sum[vectors] = {};
    for (int64_t p = begin; p < end; ++p) {
      read_ahead(reinterpret_cast<uintptr_t>(in + p * step) + kAheadBytes,
                 vectors * kLanes * static_cast<int64_t>(sizeof(In)));
      for (int v = 0; v < vectors; ++v) {
        const In* from = in + p * step + v * kLanes;
        Out* to = out + p * step + v * kLanes;
        const Vector x = whole ? load_floats(from) : load_floats(from, wanted);
        const Vector y = round_as<Out>(relu(x));
        active[v] = count_positive(active[v], y);
        sum[v] += y;
        if constexpr (whole) {
          store_exact(to, y);
        } else {
          store_exact(to, y, wanted);
        }
      }
    }
    for (int v = 0; v < vectors; ++v) {
      for (int k = 0; k < kLanes && (whole || k < wanted); ++k) {
        const int64_t c = v * kLanes + k;
        const float value = sum[v][k];
        totals.active[c] += active[v][k];
        totals.sum[c] += static_cast<double>(value);
        if (value != value) {  // the outputs, as the input may lie where they are now
          totals.nan[c] += count_nan(out + begin * step + c, end - begin, step);
        }
      }
    }
  }
}

// `pixels` with their channels side by side.
template <class In, class Out>
void relu_pixels(const In* in, Out* out, int64_t pixels, int64_t channels, const Totals& totals) {
  constexpr int kMost = 4;
  for (int64_t c = 0; c < channels;) {
    const Totals here{totals.active + c, totals.nan + c, totals.sum + c};
    const int64_t left = channels - c;
    if (left >= kMost * kLanes) {
      relu_vectors<kMost, true>(in + c, out + c, pixels, channels, 0, here);
      c += kMost * kLanes;
    } else if (left >= kLanes) {
      relu_vectors<1, true>(in + c, out + c, pixels, channels, 0, here);
      c += kLanes;
    } else {
      relu_vectors<1, false>(in + c, out + c, pixels, channels, left, here);
      c = channels;
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
  // The last ones first: what was written last is in the nearest cache still.
  for (int64_t item = last - 1; item >= first; --item) {
    if (!args.channels_last) {
      const int64_t begin = item * args.pixels;
      Result result;
      if constexpr (__is_same(In, double)) {
        relu_float64(in + begin, out + begin, args.pixels, 1, result);
      } else {
        result = relu_plane(in + begin, out + begin, args.pixels);
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
      relu_pixels(in + begin, out + begin, pixels, channels,
                  {job.item_active + at, job.item_nan + at, job.item_sum + at});
    }
  }
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
