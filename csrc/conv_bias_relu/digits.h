// Convolutions of bytes in whole numbers: for processors that multiply bytes, in tiles of a matrix
// unit or in vectors.
//
// A pixel is a whole number already, and so is a weight, once it is measured in steps that are
// small enough: 2^-23 of the largest one of its output channel, about. Such a number has three
// digits to the base of 256, from -128 to 127. So a sum of products of pixels and weights is three
// sums of products of bytes: exact, in any order. With x the byte of a pixel less a zero z,
//
//   normalized(x) = scale * (x - z) + offset      scale and offset of its input channel,
//   weight * scale = step * (65536 d2 + 256 d1 + d0),
//   output = relu(step * (65536 sum d2 x + 256 sum d1 x + sum d0 x) + offsets + bias).
//
// A pixel has a byte for each of its channels, of up to three; that of the padding, which is zero
// after the normalization, is 0 and adds nothing. The offsets are constants of an output channel
// and of the part of the kernel that lies inside the image: they are added to the bias, of which
// there is one for each such part.
//
// z is 0 where that is zero after the normalization too: then black is exactly nothing. Else it is
// 128, as most normalizations have their zero there, and signed bytes hold what remains.
//
// In pairs: vectors that add beside multiplying take the upper two digits as one word, w = 256 d2 +
// d1, and of two bytes x and x' of a patch, with their words,
//
//   (x + w') * (x' + w) = x * w + x' * w' + x * x' + w * w'.
//
// So one product does for two. The last two terms are of the patch alone, and of the weights alone:
// their sums are subtracted. All that is modulo 2^32; steps are large enough for what remains to
// have 32 bits. With the lowest digit, a multiplication of bytes and one of words, with two
// additions beside them, do what takes three multiplications of bytes else. This is S. Winograd's
// inner product ("A new algorithm for inner product", IEEE Transactions on Computers, 1968).
//
// What is wrong: a weight by half a step, and the normalized pixel by the roundings that its real
// value does not have. Both are of the order of what sums in float32 lose.
#pragma once
#include <stdint.h>

namespace pixfuse {

constexpr int64_t kDigits = 3;
constexpr int64_t kMostPixelBytes = 3;

// Bytes of one row of a left operand of matrix_tiles.h.
constexpr int64_t kStepBytes = 64;

// Bytes of a patch whose weights lie side by side for each output channel.
constexpr int64_t kQuadBytes = 4;

// Vectors of output channels that are computed together in pairs, at most.
constexpr int64_t kPairsVectors = 3;

// All bytes that an output pixel sees are brought side by side, row of the kernel after row of it:
// a patch, that is a row of the left operands, one step after the other. The weights of a vector of
// 16 output channels are [digit][step] in tiles, as matrix_tiles.h has the right operand, and
// [quad][digit][output channel][4 bytes] in vectors. In pairs the digits are d0, the words of the
// even bytes and those of the odd ones, and vectors of a block take turns with each quad.
struct DigitsPlan {
  bool is_signed;    // z is 128
  int64_t row_step;  // bytes of a patch from one row of the kernel to the next
  int64_t steps;
  int64_t quads;      // fours of bytes of a patch that are used
  const float* step;  // [vectors * 16 output channels]
  bool in_pairs;
  // [vector][digit][output channel]: what sums begin with in vectors, whose patches are x, also
  // where z is 128; in pairs, of d0 and of the words.
  const int32_t* starts;
  // Of an output row and of an output column: the biases of an output pixel, of all output
  // channels, are at the sum of the two in the job's `bias`.
  const int64_t *row_bias, *column_bias;
  bool is_gathered_once;   // all patches of the rows that are computed at once, for all blocks
  int64_t group_pixels;    // computed together, at most
  int64_t held_pixels;     // whose patches are held: those, or all of the rows; fills tiles
  int64_t scratch_floats;  // sums and patches

  int64_t patch_bytes() const { return steps * kStepBytes; }
  int64_t weight_bytes_per_output() const { return patch_bytes() * kDigits; }
  int64_t weight_bytes_per_vector() const { return weight_bytes_per_output() * 16; }
};

// Where 16 weights of an output channel lie that are side by side in a patch: in up to three runs
// of 8 floats, if they are all in such, as with channels that are planes. To gather them takes
// longer.
struct WeightRuns {
  int32_t starts[3];
  uint8_t used[3];  // of a run, a bit for each float
  bool are_all;
  int32_t order[16];  // of the weights among the runs' floats
};

// Weights of up to 16 output channels, to be packed.
struct DigitsWeights {
  const float* weights;  // of the first output channel
  int64_t output_step;   // floats from one output channel to the next
  int64_t outputs;
  const double* per_step;  // [outputs]: 1 / step, 0 where all digits are to be 0
  // [patch bytes]: what a byte is multiplied with is weights[offset] * scale.
  const int32_t* offsets;
  const double* scales;
  const WeightRuns* runs;  // [patch bytes / 16]
  int64_t quad_bytes;      // in vectors: from one quad to the next, where they are packed
};

// Output pixels that are computed together, of which the sums in float32 are right to 1e-5.
constexpr int64_t kTilesPixels = 32, kVectorsPixels = 64, kPairsPixels = 112;

// Of what is computed together, the sums in memory: of digits of two vectors in tiles, and in
// pairs.
constexpr int64_t kDigitsColumns = 2 * kDigits;
constexpr int64_t kTilesSums = kDigitsColumns * kTilesPixels * 16;
constexpr int64_t kPairsSums = kPairsVectors * 2 * kPairsPixels * 16;

}  // namespace pixfuse
