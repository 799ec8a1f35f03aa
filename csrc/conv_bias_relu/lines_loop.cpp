// Compiled once per instruction set, with PIXFUSE_ISA naming its namespace.
#include "conv_bias_relu/lines.h"
#include "conv_bias_relu/vectors.h"

namespace pixfuse::PIXFUSE_ISA {
namespace {

template <Arithmetic arithmetic>
inline float normalized(uint8_t x, float scale, float mean, float std, double center_high,
                        double center_low, double inverse_width) {
  if constexpr (arithmetic == Arithmetic::multiply) {
    return ((static_cast<float>(x) * scale) - mean) / std;
  } else if constexpr (arithmetic == Arithmetic::divide) {
    return ((static_cast<float>(x) / 255.0f) - mean) / std;
  } else {
    const double centered = (static_cast<double>(x) - center_high) - center_low;
    return static_cast<float>(centered * inverse_width);
  }
}

// `count` bytes; the constants repeat after `period` of them, and begin at `first`.
template <Arithmetic arithmetic, int period>
void normalize_run(const ConvBiasReluJob& job, const uint8_t* __restrict in, float* __restrict out,
                   int64_t count, int64_t first) {
  const float scale = job.args.scale;
  const float *mean = job.mean + first, *std = job.std + first;
  const double *high = job.center_high + first, *low = job.center_low + first,
               *inverse_width = job.inverse_width + first;
  int64_t begin = 0;
  for (; begin + period <= count; begin += period) {
    for (int i = 0; i < period; ++i) {
      out[begin + i] = normalized<arithmetic>(in[begin + i], scale, mean[i], std[i], high[i],
                                              low[i], inverse_width[i]);
    }
  }
  for (int64_t i = 0; begin + i < count; ++i) {
    out[begin + i] = normalized<arithmetic>(in[begin + i], scale, mean[i], std[i], high[i], low[i],
                                            inverse_width[i]);
  }
}

template <Arithmetic arithmetic>
void normalize_run(const ConvBiasReluJob& job, const uint8_t* in, float* out, int64_t count,
                   int64_t first, int64_t period) {
  switch (period / kCyclePixels) {
    case 1:
      return normalize_run<arithmetic, kCyclePixels>(job, in, out, count, first);
    case 2:
      return normalize_run<arithmetic, 2 * kCyclePixels>(job, in, out, count, first);
    case 3:
      return normalize_run<arithmetic, 3 * kCyclePixels>(job, in, out, count, first);
    default:
      return normalize_run<arithmetic, 4 * kCyclePixels>(job, in, out, count, first);
  }
}

inline void convert_run(const ConvBiasReluJob& job, const uint8_t* in, float* out, int64_t count,
                        int64_t first, int64_t period) {
  switch (job.args.arithmetic) {
    case Arithmetic::multiply:
      return normalize_run<Arithmetic::multiply>(job, in, out, count, first, period);
    case Arithmetic::divide:
      return normalize_run<Arithmetic::divide>(job, in, out, count, first, period);
    case Arithmetic::nearest:
      return normalize_run<Arithmetic::nearest>(job, in, out, count, first, period);
  }
}

template <class T>
void convert_run(const ConvBiasReluJob&, const T* __restrict in, float* __restrict out,
                 int64_t count, int64_t, int64_t) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(in[i]);
}

// From pixels of a channel side by side to channels of a pixel.
template <class T>
void interleave(const T* in, int64_t plane, int64_t channels, int64_t pixels, float* out) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t rows = channels - c < kLanes ? channels - c : kLanes;
    for (int64_t p = 0; p < pixels; p += kLanes) {
      const int64_t columns = pixels - p < kLanes ? pixels - p : kLanes;
      Vector square[kLanes] = {};
      for (int64_t i = 0; i < rows; ++i) {
        const T* from = in + (c + i) * plane + p;
        square[i] = columns == kLanes ? load_floats(from) : load_floats(from, columns);
      }
      transpose<kLanes / 2>(square);
      for (int64_t i = 0; i < columns; ++i) {
        float* to = out + (p + i) * channels + c;
        if (rows == kLanes) {
          store(to, square[i]);
        } else {
          store_exact(to, square[i], rows);
        }
      }
    }
  }
}

template <class T>
void fill_line_of(const ConvBiasReluJob& job, int64_t n, int64_t row, float* line) {
  const ConvBiasReluArgs& args = job.args;
  const int64_t channels = args.input_sizes[1], width = args.input_sizes[3];
  const int64_t channel_step = args.input_strides[1], pixel_step = args.input_strides[3];
  const int64_t left = args.padding[1];
  const int64_t reached = job.line_pixels - left;
  const int64_t count = reached < width ? reached : width;
  if (count <= 0) return;
  const T* in =
      static_cast<const T*>(args.input) + n * args.input_strides[0] + row * args.input_strides[2];
  const int64_t period = kCyclePixels * channels;
  if (job.interleaved_lines) {
    float* const target = job.leaves_out_padding ? line : line + left * channels;
    if (channel_step != 1) return interleave(in, channel_step, channels, count, target);
    return convert_run(job, in, target, count * channels, 0, period);
  }
  constexpr int64_t kGathered = 256;
  T run[kGathered];
  for (int64_t c = 0; c < channels; ++c) {
    const T* source = in + c * channel_step;
    float* target = line + c * job.line_pixels + left;
    const int64_t first = c * kCyclePixels;  // a channel's constants stand together
    if (pixel_step == 1) {
      convert_run(job, source, target, count, first, kCyclePixels);
      continue;
    }
    for (int64_t begin = 0; begin < count; begin += kGathered) {
      const int64_t length = count - begin < kGathered ? count - begin : kGathered;
      for (int64_t i = 0; i < length; ++i) run[i] = source[(begin + i) * pixel_step];
      convert_run(job, run, target + begin, length, first, kCyclePixels);
    }
  }
}

}  // namespace

void fill_line(const ConvBiasReluJob& job, int64_t n, int64_t row, float* line) {
  switch (job.args.input_type) {
    case ElementType::float32:
      return fill_line_of<float>(job, n, row, line);
    case ElementType::float16:
      return fill_line_of<Float16>(job, n, row, line);
    case ElementType::bfloat16:
      return fill_line_of<BFloat16>(job, n, row, line);
    case ElementType::uint8:
      return fill_line_of<uint8_t>(job, n, row, line);
  }
}

}  // namespace pixfuse::PIXFUSE_ISA
