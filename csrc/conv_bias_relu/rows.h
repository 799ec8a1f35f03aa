// The way through the items of a convolution: which lines of input are held, which are needed.
#pragma once
#include "conv_bias_relu/conv_bias_relu_loop.h"
#include "conv_bias_relu/stage.h"

namespace pixfuse::PIXFUSE_ISA {
namespace {

// One block of channels of one output row, or of a few.
struct RowBlock {
  int64_t image;
  int64_t first_row;  // of the output
  int64_t rows;
  const float* const* lines;  // [rows][kernel rows]; null for rows that are padding and left out
  int64_t vectors;
  int64_t channel;        // the first one
  int64_t output_offset;  // elements, to the first channel's first pixel
  Totals totals;
  float* stage;
};

// Does the items [first, last). fill(image, row, line) brings a row of the input into a line, which
// is zeros or an older one of the same kind; run_block(RowBlock) computes, up to `most_rows` rows
// of those whose lines are held.
template <class Fill, class RunBlock>
void run_rows(const ConvBiasReluJob& job, int64_t first, int64_t last, const Scratch& scratch,
              const Fill& fill, const RunBlock& run_block, int64_t most_rows = 1) {
  const ConvBiasReluArgs& args = job.args;
  float* const lines = scratch.floats;
  int64_t* const held_rows = scratch.held_rows;
  float* const zeros = lines + job.lines * job.line_floats;
  float* const stage = zeros + job.line_floats;
  for (int64_t i = 0; i < (job.lines + 1) * job.line_floats; ++i) lines[i] = 0.0f;
  const int64_t height = args.output_sizes[2], kernel_rows = args.kernel[0];
  const int64_t padded = job.blocks.vectors * kLanes;
  int64_t held_image = -1;

  for (int64_t item = first; item < last; ++item) {
    const int64_t n = item / job.items_per_image;
    const int64_t item_row = item % job.items_per_image * kItemRows;
    const int64_t item_end = item_row + kItemRows < height ? item_row + kItemRows : height;
    if (n != held_image) {
      for (int64_t i = 0; i < job.lines; ++i) held_rows[i] = -1;
      held_image = n;
    }
    const Totals item_totals{job.item_active + item * padded, job.item_nan + item * padded,
                             job.item_sum + item * padded};
    for (int64_t c = 0; c < padded; ++c) {
      item_totals.active[c] = 0;
      item_totals.nan[c] = 0;
      item_totals.sum[c] = 0.0;
    }
    for (int64_t row = item_row; row < item_end; row += job.rows_at_once) {
      const int64_t row_end = row + job.rows_at_once < item_end ? row + job.rows_at_once : item_end;
      for (int64_t y = row; y < row_end; ++y) {
        for (int64_t k = 0; k < kernel_rows; ++k) {
          const int64_t source = y * args.stride[0] - args.padding[0] + k * args.dilation[0];
          const float** line = scratch.wanted + (y - row) * kernel_rows + k;
          if (source < 0 || source >= args.input_sizes[2]) {
            *line = job.leaves_out_padding ? nullptr : zeros;
            continue;
          }
          if (job.reads_input) {
            *line = static_cast<const float*>(args.input) + n * args.input_strides[0] +
                    source * args.input_strides[2];
            continue;
          }
          const int64_t slot = source % job.lines;
          float* held = lines + slot * job.line_floats;
          if (held_rows[slot] != source) {
            fill(n, source, held);
            held_rows[slot] = source;
          }
          *line = held;
        }
      }
      for (int64_t block = 0; block < job.blocks.count; ++block) {
        const int64_t vector = job.blocks.first_vector(block);
        const int64_t channel = vector * kLanes;
        for (int64_t y = row; y < row_end; y += most_rows) {
          run_block(RowBlock{
              n,
              y,
              row_end - y < most_rows ? row_end - y : most_rows,
              scratch.wanted + (y - row) * kernel_rows,
              job.blocks.first_vector(block + 1) - vector,
              channel,
              n * args.output_strides[0] + channel * args.output_strides[1] +
                  y * args.output_strides[2],
              {item_totals.active + channel, item_totals.nan + channel, item_totals.sum + channel},
              stage});
        }
      }
    }
  }
}

// Calls run(a value of the type of the output).
template <class Run>
void with_output_type(const ConvBiasReluJob& job, const Run& run) {
  switch (job.args.output_type) {
    case ElementType::float32:
      return run(float{});
    case ElementType::float16:
      return run(Float16{});
    case ElementType::bfloat16:
      return run(BFloat16{});
    case ElementType::uint8:
      return;  // no such output
  }
}

}  // namespace
}  // namespace pixfuse::PIXFUSE_ISA
