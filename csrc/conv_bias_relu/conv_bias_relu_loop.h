// The loops of one instruction set, as conv_bias_relu_cpu.cpp sees them. The loop files are
// compiled once for each namespace below, but for that of the matrix unit.
#pragma once
#include "conv_bias_relu/conv_bias_relu.h"
#include "conv_bias_relu/digits.h"
#include "conv_bias_relu/winograd.h"

namespace pixfuse {

// The most input channels that always go through the direct convolution: lanes are output channels,
// so it needs no more of them than an image has to be fast. Of bytes there may be no more.
constexpr int64_t kMaxDirectChannels = 4;

// Results of this many output rows of an image are counted apart and then added in order, so that
// a sum has the same bits for any number of threads.
constexpr int64_t kItemRows = 8;

// Neighbouring pixels whose normalization constants are laid out one after the other.
constexpr int64_t kCyclePixels = 16;

// How many output channels a vector holds, and how the vectors are dealt to passes over the input.
struct ChannelBlocks {
  int64_t lanes;    // of a vector
  int64_t vectors;  // for all output channels, the last one filled up with zeros
  int64_t count;    // of blocks

  int64_t first_vector(int64_t block) const {
    const int64_t each = vectors / count, more = vectors % count;
    return block * each + (block < more ? block : more);
  }
};

// Where the taps of a kernel row are in a line, in floats from a pixel's first one: the runs `step`
// apart, and the taps of a run `tap_step`.
struct TapRuns {
  int64_t count, step;
  int64_t taps, tap_step;
};

// What all threads share.
struct ConvBiasReluJob {
  ConvBiasReluArgs args;
  ChannelBlocks blocks;
  TapRuns tap_runs;
  const float* weight;           // [block][kernel row][tap][channel of the block], aligned
  const WinogradPlan* winograd;  // or null; with it, weights are packed as it says
  const DigitsPlan* digits;      // the same
  const float* bias;             // [vectors * lanes], aligned; several of these for digits
  bool past_caches;              // outputs are stored so
  bool interleaved_lines;        // lines hold pixels side by side; else one run for each channel
  bool leaves_out_padding;       // lines have none
  bool reads_input;              // nor are there lines: rows of the input are read in its place
  bool planes;                   // of floats, and directly
  bool runs_apart;               // runs of taps are summed up apart, for planes of many channels
  int64_t rows_apart;            // of the kernel, likewise, for a few channels; 0: none
  int64_t rows_staged;           // rows of the output that are turned together for planes, else 1
  int64_t first_padding;         // taps of a kernel row that are left out at a row's first pixel
  int64_t last_padding;          // and at its last one
  int64_t line_pixels;           // as many as the kernel reaches, padding included
  int64_t line_floats;           // of a line, aligned
  int64_t lines;                 // held at a time: what `rows_at_once` output rows reach
  int64_t rows_at_once;
  int64_t items_per_image;
  float mean[kCyclePixels * kMaxDirectChannels];  // over neighbouring values of a line
  float std[kCyclePixels * kMaxDirectChannels];
  double center_high[kCyclePixels * kMaxDirectChannels];
  double center_low[kCyclePixels * kMaxDirectChannels];
  double inverse_width[kCyclePixels * kMaxDirectChannels];
  // One for each item and channel, vectors * lanes channels to an item.
  int64_t* item_active;
  int64_t* item_nan;
  double* item_sum;
};

// Floats of scratch memory that a call of the loop needs, aligned to 64 bytes: the lines, one of
// zeros, and the results of a few pixels, of up to 4 vectors of 16 channels.
constexpr int64_t kStagePixels = 112;
constexpr int64_t kStageFloats = kStagePixels * 64;
static inline int64_t scratch_floats(const ConvBiasReluJob& job) {
  return (job.lines + 1) * job.line_floats + kStageFloats +
         (job.winograd != nullptr ? job.winograd->scratch_floats : 0) +
         (job.digits != nullptr ? job.digits->scratch_floats : 0);
}

// Memory of one thread.
struct Scratch {
  float* floats;         // [scratch_floats]
  int64_t* held_rows;    // [lines]: which row of the image each line holds
  const float** wanted;  // [rows_at_once][kernel rows]: the lines that an output row reads
};

// The last pass over a ready convolution. An item is a plane of a contiguous output, or a run of
// kRunPixels pixels of a channels-last one; it has one number in each array, or one per channel.
struct ReluCountJob {
  ReluCountArgs args;
  bool past_caches;        // outputs are stored so
  int64_t runs_per_image;  // of a channels-last output
  int64_t* item_active;
  int64_t* item_nan;
  double* item_sum;
};
constexpr int64_t kRunPixels = 512;

// Of the weights between an input channel and an output channel.
struct WeightSums {
  double positive = 0.0, negative = 0.0;
  float largest = 0.0f;  // magnitude; infinite or NaN if one of the weights is
  int64_t zeros = 0;

  double sum() const { return positive + negative; }
};

// max_vectors: how many vectors of output channels one pass over the input computes at most.
// sum_weights: of up to kMaxDirectChannels channels that lie side by side, `count` weights in all;
// sums[channel]. The loops do the items [first, last); those of a convolution are counted along an
// image, then images.
namespace portable {
int64_t vector_lanes();
int64_t max_vectors();
void sum_weights(const float* weights, int64_t count, int64_t channels, WeightSums* sums);
void conv_bias_relu_loop(const ConvBiasReluJob& job, int64_t first, int64_t last,
                         const Scratch& scratch);
void winograd_loop(const ConvBiasReluJob& job, int64_t first, int64_t last, const Scratch& scratch);
void relu_count_loop(const ReluCountJob& job, int64_t first, int64_t last);
}  // namespace portable
namespace avx2 {
int64_t vector_lanes();
int64_t max_vectors();
void sum_weights(const float* weights, int64_t count, int64_t channels, WeightSums* sums);
void conv_bias_relu_loop(const ConvBiasReluJob& job, int64_t first, int64_t last,
                         const Scratch& scratch);
void winograd_loop(const ConvBiasReluJob& job, int64_t first, int64_t last, const Scratch& scratch);
void relu_count_loop(const ReluCountJob& job, int64_t first, int64_t last);
}  // namespace avx2
namespace avx512 {
int64_t vector_lanes();
int64_t max_vectors();
void sum_weights(const float* weights, int64_t count, int64_t channels, WeightSums* sums);
void conv_bias_relu_loop(const ConvBiasReluJob& job, int64_t first, int64_t last,
                         const Scratch& scratch);
void winograd_loop(const ConvBiasReluJob& job, int64_t first, int64_t last, const Scratch& scratch);
void relu_count_loop(const ReluCountJob& job, int64_t first, int64_t last);
}  // namespace avx512
namespace vnni {
void digits_loop(const ConvBiasReluJob& job, int64_t first, int64_t last, const Scratch& scratch);
void pack_digits(const DigitsPlan& plan, const DigitsWeights& from, int8_t* packed,
                 int32_t* starts);
}  // namespace vnni
namespace amx {
void digits_loop(const ConvBiasReluJob& job, int64_t first, int64_t last, const Scratch& scratch);
void pack_digits(const DigitsPlan& plan, const DigitsWeights& from, int8_t* packed,
                 int32_t* starts);
}  // namespace amx
namespace neon {
int64_t vector_lanes();
int64_t max_vectors();
void sum_weights(const float* weights, int64_t count, int64_t channels, WeightSums* sums);
void conv_bias_relu_loop(const ConvBiasReluJob& job, int64_t first, int64_t last,
                         const Scratch& scratch);
void winograd_loop(const ConvBiasReluJob& job, int64_t first, int64_t last, const Scratch& scratch);
void relu_count_loop(const ReluCountJob& job, int64_t first, int64_t last);
}  // namespace neon

}  // namespace pixfuse
