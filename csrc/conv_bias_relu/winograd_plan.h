// The rule that decides for the convolution by winograd.h, and what its loop is given.
#pragma once
#include <vector>

#include "conv_bias_relu/bounds.h"

namespace pixfuse {

// Whether it is faster than the direct convolution, and as good as torch's: for bytes, as what
// normalizes them bounds them (an infinite value would spoil its neighbours, a huge one their last
// bits); for finite weights that are not mostly zeros; where each phase of the stride has at least
// two taps, the points of a line at least 20 terms, the kernel 100, and an image 65536 outputs. It
// does not depend on the number of images: a batch has the bits of its images.
bool winograd_suits(const ConvBiasReluArgs& args, const Bounds& bounds);

struct Winograd {
  std::vector<WinogradPiece> pieces;
  std::vector<WinogradLine> lines;
  std::vector<WinogradRun> runs;
  WinogradPlan plan{};  // points into the above
  int64_t line_pixels;  // of a row of input, as far as the tiles reach

  explicit Winograd(const ConvBiasReluArgs& args);
  Winograd(const Winograd&) = delete;
  Winograd& operator=(const Winograd&) = delete;

  // For so many output rows at a time.
  void hold_rows(int64_t rows);
  // [block][run][line][input channel][channel of the block]; zeros for a dead channel.
  void pack_weight(const ConvBiasReluArgs& args, const ChannelBlocks& blocks,
                   const std::vector<bool>& dead, float* packed) const;

 private:
  void add_piece(int64_t first, int64_t step, int64_t taps);
  void add_line(int slot, int64_t rows, int64_t first, int64_t step, int64_t taps);
  void put_sizes(const ConvBiasReluArgs& args);
  void put_runs(int64_t channels);

  // The taps of the kernel that a point needs, and what each is multiplied with (G).
  struct Factors {
    int64_t first, step, taps;
    double of[kWinogradMostTaps];
  };
  std::vector<Factors> column_factors;  // of each point of a line
  std::vector<Factors> row_factors;     // of each line
};

}  // namespace pixfuse
