// Picks the instruction set, repacks the weights, splits the work over threads, adds up what they
// counted.
#include <algorithm>
#include <atomic>
#include <bit>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "common/isa.h"
#include "common/read_ahead.h"
#include "conv_bias_relu/digits_plan.h"
#include "conv_bias_relu/winograd_plan.h"

namespace pixfuse {
namespace {

// Below this many multiply-adds (or elements of the last pass), starting threads costs more than
// they save.
constexpr int64_t kGrainMultiplyAdds = 1 << 20;
constexpr int64_t kGrainElements = 32768;

// Weights that stay in the second-level cache for one output row after the other; larger ones are
// used for several rows before the next block of channels comes.
constexpr int64_t kCachedWeightFloats = 1 << 16;

constexpr int64_t kLineFloats = kCacheLineBytes / sizeof(float);

// Taps of a row that are one sum where sums are apart; more are one for each pixel.
constexpr int64_t kMostTapsApart = 192;

struct Loops {
  int64_t lanes;
  int64_t max_vectors;
  Bounds::SumWeights sum_weights;
  void (*convolve)(const ConvBiasReluJob&, int64_t first, int64_t last, const Scratch&);
  void (*winograd)(const ConvBiasReluJob&, int64_t first, int64_t last, const Scratch&);
  void (*relu_count)(const ReluCountJob&, int64_t first, int64_t last);
  // Where bytes are multiplied, else null.
  void (*digits)(const ConvBiasReluJob&, int64_t first, int64_t last, const Scratch&) = nullptr;
  Digits::PackVector pack_digits = nullptr;
  DigitsIn digits_in = DigitsIn::vectors;
};

Loops loops_for(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
      return {avx2::vector_lanes(),      avx2::max_vectors(), avx2::sum_weights,
              avx2::conv_bias_relu_loop, avx2::winograd_loop, avx2::relu_count_loop};
    case Isa::avx512:
      return {avx512::vector_lanes(),      avx512::max_vectors(), avx512::sum_weights,
              avx512::conv_bias_relu_loop, avx512::winograd_loop, avx512::relu_count_loop};
    case Isa::vnni: {
      Loops loops = loops_for(Isa::avx512);
      loops.digits = vnni::digits_loop;
      loops.pack_digits = vnni::pack_digits;
      return loops;
    }
    case Isa::gfni: {
      Loops loops = loops_for(Isa::vnni);
      if (adds_beside_multiplying()) loops.digits_in = DigitsIn::pairs;
      return loops;
    }
    case Isa::amx: {
      Loops loops = loops_for(Isa::avx512);
      loops.digits = amx::digits_loop;
      loops.pack_digits = amx::pack_digits;
      loops.digits_in = DigitsIn::tiles;
      return loops;
    }
#elif defined(__aarch64__)
    case Isa::neon:
      return {neon::vector_lanes(),      neon::max_vectors(), neon::sum_weights,
              neon::conv_bias_relu_loop, neon::winograd_loop, neon::relu_count_loop};
#endif
    default:
      return {portable::vector_lanes(),      portable::max_vectors(), portable::sum_weights,
              portable::conv_bias_relu_loop, portable::winograd_loop, portable::relu_count_loop};
  }
}

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Uninitialized memory on a cache line of its own; null when there is none.
template <class T>
struct AlignedArray {
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(T* data) const { operator delete(data, kAlignment); }
  };
  std::unique_ptr<T, Delete> data;

  explicit AlignedArray(int64_t count)
      : data(static_cast<T*>(operator new(static_cast<size_t>(count) * sizeof(T), kAlignment,
                                          std::nothrow))) {}
  T* get() const { return data.get(); }
};

// Numbers of each item and channel, and their sums over items, in the order of the items.
struct ItemActivity {
  std::vector<int64_t> active, nan;
  std::vector<double> sum;

  explicit ItemActivity(int64_t count)
      : active(static_cast<size_t>(count)),
        nan(static_cast<size_t>(count)),
        sum(static_cast<size_t>(count)) {}

  // The numbers of channel c of an image are at (image * items + i) * item_step + c * channel_step.
  void add_to(const ChannelActivity& activity, int64_t images, int64_t items, int64_t channels,
              int64_t item_step, int64_t channel_step) const {
    for (int64_t n = 0; n < images; ++n) {
      for (int64_t c = 0; c < channels; ++c) {
        int64_t active_here = 0;
        for (int64_t i = 0; i < items; ++i) {
          const auto at = static_cast<size_t>((n * items + i) * item_step + c * channel_step);
          active_here += active[at];
          activity.nan[c] += nan[at];
          activity.output_sum[c] += sum[at];
        }
        activity.active[c] += active_here;
        activity.active_images[c] += active_here > 0 ? 1 : 0;
      }
    }
  }
};

// True when all are finite.
bool pack_weight(const ConvBiasReluJob& job, float* packed) {
  constexpr uint32_t kNotFinite = 0x7f800000;  // the exponent of infinities and NaNs
  bool finite = true;
  const ConvBiasReluArgs& args = job.args;
  const int64_t outputs = args.output_sizes[1], channels = args.input_sizes[1];
  const int64_t* strides = args.weight_strides;
  for (int64_t block = 0; block < job.blocks.count; ++block) {
    const int64_t first = job.blocks.first_vector(block) * job.blocks.lanes;
    const int64_t last = job.blocks.first_vector(block + 1) * job.blocks.lanes;
    for (int64_t ky = 0; ky < args.kernel[0]; ++ky) {
      for (int64_t kx = 0; kx < args.kernel[1]; ++kx) {
        for (int64_t c = 0; c < channels; ++c) {
          const float* tap = args.weight + c * strides[1] + ky * strides[2] + kx * strides[3];
          const int64_t real = last < outputs ? last : outputs;
          for (int64_t o = first; o < real; ++o) {
            const float weight = tap[o * strides[0]];
            finite &= (__builtin_bit_cast(uint32_t, weight) & kNotFinite) != kNotFinite;
            *packed++ = weight;
          }
          for (int64_t o = real; o < last; ++o) *packed++ = 0.0f;
        }
      }
    }
  }
  return finite;
}

// Rows of the kernel whose sums are added up apart: of about so many terms. Where that is all of
// it, 0. With many channels, torch adds up no less at a time.
int64_t rows_apart(const ConvBiasReluArgs& args) {
  constexpr int64_t kTerms = 96;
  const int64_t channels = args.input_sizes[1], rows = args.kernel[0];
  const int64_t apart = std::max(int64_t{1}, kTerms / (args.kernel[1] * channels));
  return channels > kMaxDirectChannels || apart >= rows ? 0 : apart;
}

// As many rows as the stage holds, of those that are counted together: whole lines of the caches
// then come from rows that are not.
int64_t rows_staged(int64_t width) {
  const int64_t most = std::clamp(kStagePixels / width, int64_t{1}, kItemRows);
  return static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(most)));
}

// Tiles can leave out a column of padding at either side, and rows of it, if every window then has
// a row and a column of the input. What is left out must have added 0: of weights that are finite,
// as 0 times others is NaN.
void leave_out_padding_if_possible(ConvBiasReluJob& job) {
  const ConvBiasReluArgs& args = job.args;
  const int64_t channels = args.input_sizes[1], *kernel = args.kernel, *stride = args.stride;
  if (!job.interleaved_lines || args.dilation[0] != 1 || args.dilation[1] != 1) return;
  const int64_t top = args.padding[0], left = args.padding[1];
  const int64_t last_row = (args.output_sizes[2] - 1) * stride[0] - top;
  const int64_t last_column = (args.output_sizes[3] - 1) * stride[1] - left;
  const int64_t beyond = last_column + kernel[1] - args.input_sizes[3];
  const int64_t right = beyond > 0 ? beyond : 0;
  if (left > 1 || right > 1 || left + right >= kernel[1]) return;
  if (top >= kernel[0] || last_row >= args.input_sizes[2]) return;
  job.leaves_out_padding = true;
  job.first_padding = left * channels;
  job.last_padding = right * channels;
}

// The constants of neighbouring values of a line.
void fill_cycle(ConvBiasReluJob& job) {
  const int64_t channels = job.args.input_sizes[1];
  for (int64_t i = 0; i < kCyclePixels * channels; ++i) {
    const int64_t c = job.interleaved_lines ? i % channels : i / kCyclePixels;
    const ChannelConstants& channel = job.args.channels[c];
    job.mean[i] = channel.mean;
    job.std[i] = channel.std;
    job.center_high[i] = channel.center_high;
    job.center_low[i] = channel.center_low;
    job.inverse_width[i] = channel.inverse_width;
  }
}

}  // namespace

int32_t conv_bias_relu_cpu(const ConvBiasReluArgs& args, ParallelFor parallel_for) {
  const int64_t images = args.output_sizes[0], outputs = args.output_sizes[1];
  const int64_t height = args.output_sizes[2], width = args.output_sizes[3];
  const int64_t channels = args.input_sizes[1];
  if (images == 0 || outputs == 0 || height == 0 || width == 0) return 0;
  const Loops loops = loops_for(active_isa());

  ConvBiasReluJob job{};
  job.args = args;
  std::optional<Winograd> winograd;
  std::optional<Digits> digits;
  const int64_t vectors = (outputs + loops.lanes - 1) / loops.lanes;
  std::optional<Bounds> bounds;
  if (args.input_type == ElementType::uint8) {
    bounds.emplace(args, loops.sum_weights);
    const bool in_points = winograd_suits(args, *bounds);
    // It saves more multiplications than vectors do by multiplying bytes, but no more than tiles.
    if (loops.digits != nullptr && digits_suit(args, *bounds, loops.digits_in) &&
        (loops.digits_in == DigitsIn::tiles || !in_points)) {
      digits.emplace(args, *bounds, vectors * loops.lanes, loops.digits_in);
    } else if (in_points) {
      winograd.emplace(args);
    }
  }
  // Rounding there could wake a channel that no image can fire; without weights and bias it cannot.
  const bool direct = !digits.has_value() && !winograd.has_value();
  const std::vector<bool> dead =
      direct ? std::vector<bool>(static_cast<size_t>(outputs)) : bounds->dead_channels();
  const int64_t most =
      digits.has_value() && digits->plan.in_pairs ? kPairsVectors : loops.max_vectors;
  job.blocks = {loops.lanes, vectors, (vectors + most - 1) / most};
  if (digits.has_value()) digits->choose_rows(args, job.blocks.count > 1);
  job.planes = direct && args.output_strides[1] != 1 && args.output_type == ElementType::float32;
  job.runs_apart = job.planes && channels > kMaxDirectChannels;
  job.rows_apart = rows_apart(args);
  job.rows_staged = job.planes ? rows_staged(width) : 1;
  // A line of the caches that is stored past them in part takes longer than through them. So all
  // lines are whole, and those of planes whole vectors of the pixels that are turned at once.
  const bool pixels_are_lines = args.output_strides[1] == 1 && outputs % kLineFloats == 0;
  const int64_t run = width * (digits.has_value() ? digits->rows_at_once : job.rows_staged);
  const bool runs_are_lines = loops.lanes == kLineFloats && outputs % loops.lanes == 0 &&
                              args.output_strides[3] == 1 && run % kLineFloats == 0 &&
                              height * width % kLineFloats == 0;
  job.past_caches = args.past_caches && args.output_type == ElementType::float32 &&
                    (pixels_are_lines || runs_are_lines) &&
                    reinterpret_cast<uintptr_t>(args.output) % kCacheLineBytes == 0;
  const bool pixels_are_interleaved =
      channels > 1 && args.input_strides[1] == 1 && args.input_strides[3] == channels;
  job.interleaved_lines = pixels_are_interleaved || channels > kMaxDirectChannels;
  job.line_pixels = (width - 1) * args.stride[1] + (args.kernel[1] - 1) * args.dilation[1] + 1;
  job.line_floats = round_up(job.line_pixels * channels, 16);
  int64_t weights_per_output = args.kernel[0] * args.kernel[1] * channels;
  if (winograd.has_value()) {
    job.winograd = &winograd->plan;
    job.line_pixels = winograd->line_pixels;
    job.line_floats = job.winograd->line_floats();
    weights_per_output = job.winograd->weights_per_output;
  } else if (digits.has_value()) {
    job.digits = &digits->plan;
    job.line_floats =
        round_up(job.line_pixels * channels, 64) / static_cast<int64_t>(sizeof(float));
    weights_per_output =
        digits->plan.weight_bytes_per_output() / static_cast<int64_t>(sizeof(float));
  }
  const int64_t padded = vectors * loops.lanes;
  const int64_t weight_floats = weights_per_output * padded;
  job.rows_at_once = weight_floats <= kCachedWeightFloats ? 1 : kItemRows;
  // A single block of weights is all read for each pair of rows anyway, however many they are.
  if (winograd.has_value() && (job.rows_at_once == 1 || job.blocks.count == 1)) {
    job.rows_at_once = kWinogradRows;
  }
  job.rows_at_once = std::max(job.rows_at_once, job.rows_staged);
  if (job.rows_at_once > height) job.rows_at_once = height;
  if (digits.has_value()) job.rows_at_once = digits->rows_at_once;
  if (winograd.has_value()) winograd->hold_rows(job.rows_at_once);
  job.lines = (job.rows_at_once - 1) * args.stride[0] + (args.kernel[0] - 1) * args.dilation[0] + 1;
  job.items_per_image = (height + kItemRows - 1) / kItemRows;
  if (args.input_type == ElementType::uint8) fill_cycle(job);

  job.tap_runs = {args.kernel[1], args.dilation[1], channels, job.line_pixels};
  if (job.interleaved_lines) {
    job.tap_runs = {args.kernel[1], args.dilation[1] * channels, channels, 1};
    const int64_t row_taps = args.kernel[1] * channels;
    if (args.dilation[1] == 1 && (!job.runs_apart || row_taps <= kMostTapsApart)) {
      job.tap_runs = {1, 0, row_taps, 1};
    }
  }
  const int64_t biases = digits.has_value() ? static_cast<int64_t>(digits->bias.size()) : padded;
  const AlignedArray<float> weight(weight_floats), bias(biases);
  if (weight.get() == nullptr || bias.get() == nullptr) throw std::bad_alloc();
  if (winograd.has_value()) {
    winograd->pack_weight(args, job.blocks, dead, weight.get());
  } else if (digits.has_value()) {
    digits->pack_weight(args, *bounds, job.blocks, dead, loops.pack_digits,
                        reinterpret_cast<int8_t*>(weight.get()));
  } else {
    if (pack_weight(job, weight.get())) leave_out_padding_if_possible(job);
    job.reads_input =
        job.leaves_out_padding && pixels_are_interleaved && args.input_type == ElementType::float32;
    if (job.reads_input) job.lines = 0;
  }
  for (int64_t i = 0; i < biases; ++i) {
    if (digits.has_value()) {
      bias.get()[i] = digits->bias[i];
    } else {
      bias.get()[i] = args.bias != nullptr && i < outputs && !dead[i] ? args.bias[i] : 0.0f;
    }
  }
  job.weight = weight.get();
  job.bias = bias.get();

  const int64_t items = images * job.items_per_image;
  ItemActivity activity(items * padded);
  job.item_active = activity.active.data();
  job.item_nan = activity.nan.data();
  job.item_sum = activity.sum.data();

  struct Shared {
    const ConvBiasReluJob& job;
    const Loops& loops;
    std::atomic<bool> no_memory = false;
  } shared{job, loops};
  const auto body = [](int64_t first, int64_t last, void* context) {
    Shared& shared = *static_cast<Shared*>(context);
    const ConvBiasReluJob& job = shared.job;
    const AlignedArray<float> floats(scratch_floats(job));
    const AlignedArray<int64_t> held_rows(job.lines);
    const AlignedArray<const float*> wanted(job.rows_at_once * job.args.kernel[0]);
    if (floats.get() == nullptr || held_rows.get() == nullptr || wanted.get() == nullptr) {
      shared.no_memory = true;
      return;
    }
    const auto convolve = job.digits != nullptr     ? shared.loops.digits
                          : job.winograd != nullptr ? shared.loops.winograd
                                                    : shared.loops.convolve;
    convolve(job, first, last, {floats.get(), held_rows.get(), wanted.get()});
  };
  const int64_t item_rows = height < kItemRows ? height : kItemRows;
  const int64_t item_work = weight_floats * width * item_rows;
  const int64_t grain = 1 + kGrainMultiplyAdds / item_work;
  int32_t status = 0;
  if (items <= grain) {
    body(0, items, &shared);
  } else {
    status = parallel_for(0, items, grain, body, &shared);
  }
  if (shared.no_memory) throw std::bad_alloc();
  activity.add_to(args.activity, images, job.items_per_image, outputs, padded, 1);
  return status;
}

int32_t relu_count_cpu(const ReluCountArgs& args, ParallelFor parallel_for) {
  if (args.images == 0 || args.channels == 0 || args.pixels == 0) return 0;
  ReluCountJob job{};
  job.args = args;
  // Lines that are stored past the caches in part would take longer.
  const int64_t row_floats = args.channels_last ? args.channels : args.pixels;
  job.past_caches = args.past_caches && !args.is_float64 &&
                    args.output_type == ElementType::float32 && row_floats % kLineFloats == 0 &&
                    reinterpret_cast<uintptr_t>(args.output) % kCacheLineBytes == 0;
  job.runs_per_image = (args.pixels + kRunPixels - 1) / kRunPixels;
  const int64_t items = args.images * (args.channels_last ? job.runs_per_image : args.channels);
  ItemActivity activity(args.channels_last ? items * args.channels : items);
  job.item_active = activity.active.data();
  job.item_nan = activity.nan.data();
  job.item_sum = activity.sum.data();

  struct Shared {
    const ReluCountJob& job;
    Loops loops;
  } shared{job, loops_for(active_isa())};
  const auto body = [](int64_t first, int64_t last, void* context) {
    const Shared& shared = *static_cast<const Shared*>(context);
    shared.loops.relu_count(shared.job, first, last);
  };
  const int64_t item_elements = args.images * args.channels * args.pixels / items;
  const int64_t grain = 1 + kGrainElements / (item_elements + 1);
  int32_t status = 0;
  if (items <= grain) {
    body(0, items, &shared);
  } else {
    status = parallel_for(0, items, grain, body, &shared);
  }
  if (args.channels_last) {
    activity.add_to(args.activity, args.images, job.runs_per_image, args.channels, args.channels,
                    1);
  } else {
    activity.add_to(args.activity, args.images, 1, args.channels, args.channels, 1);
  }
  return status;
}

}  // namespace pixfuse
