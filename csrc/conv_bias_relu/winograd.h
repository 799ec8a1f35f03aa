// Convolutions with fewer multiplications: Winograd's algorithm along both sides.
//
// Two polynomials of m and r coefficients, evaluated at n = m + r - 1 points, need n products for
// their product, not m * r (Toom-Cook). Turned around, n products give m neighbouring outputs
// of a filter of r taps (Winograd, Arithmetic complexity of computations, 1980; for neural networks
// Lavin and Gray, arXiv:1509.09308):
//
//   y[j] = sum over k < r of w[k] * x[j + k]  =  sum over points i of A[j][i] * U[i] * V[i],
//   U[i] = sum over k of G[i][k] * w[k],         V[i] = sum over l < n of B[i][l] * x[l],
//
// with, for a point a[i] of the n - 1 finite ones, and M(z) the product of all (z - a[l]),
//
//   A[j][i] = a[i]^j    G[i][k] = a[i]^k / M'(a[i])    B[i] = coefficients of M(z) / (z - a[i]),
//
// and for infinity A[m - 1] = G[r - 1] = 1 and zeros else, and B the coefficients of M(z).
//
// Along the width m is 4. A row of a kernel of stride s is s rows of stride 1, each on every s-th
// pixel, and such a row is cut into pieces of 2 to 4 taps: the 7 taps of stride 2 are 4 and 3, with
// 7 and 6 products for 4 outputs instead of 28; the 11 taps of stride 4 are 3, 3, 3 and 2, with 23
// instead of 44. Along the height m is 2, and the pieces have up to 3 taps: 7 are 2, 2 and 3, with
// 10 products for 2 outputs instead of 14, and 11 are 3, 3, 3 and 2, with 15 instead of 22. So the
// stem of ResNet has a third of the multiplications, that of AlexNet 36 of 100.
//
// What is added up over input channels and pieces is the products at a pair of points, so the
// outputs are taken from the points (A) once for all of them, an input line is brought to the
// points of the width (B) once for all output channels and rows that it reaches, and to those of
// the height once for two output rows, and the weights (G) once.
//
// The price is accuracy: A, U and V amplify rounding. That decides the points. Those of the width
// make the root of sum A^2 |G|^2 |B|^2 small for 4 and for 3 taps together, in the worst of the 4
// outputs, among all pairs of eighths and zero; 0, 1, -1, 1/2, -1/2, 2 would be twice as far off.
// Those of the height, 1, -1 and 0, do so for 2 outputs, and cost an addition each. A and B are
// exact in float32. And the price is paid back, as fewer terms are added up one after the other:
// runs of kWinogradTerms, not all taps.
#pragma once
#include <stdint.h>

namespace pixfuse {

// m, of a tile.
constexpr int kWinogradOutputs = 4;
constexpr int kWinogradRows = 2;
constexpr int kWinogradMostTaps = 4;
constexpr int kWinogradMostPoints = kWinogradOutputs + kWinogradMostTaps - 1;

// Where sums are kept: along the width, at each of these points and its negative, at 0 and at
// infinity.
constexpr int kWinogradPairs = 3;
constexpr double kWinogradPairPoints[kWinogradPairs] = {0.25, 0.875, 1.5};
constexpr int kWinogradZero = 2 * kWinogradPairs, kWinogradInfinity = kWinogradZero + 1;
constexpr int kWinogradSlots = kWinogradInfinity + 1;

// The slots of a piece of 2, 3 or 4 taps, infinity last.
constexpr int kWinogradPointSlots[3][kWinogradMostPoints] = {
    {0, 1, 2, 3, kWinogradInfinity},
    {2, 3, 4, 5, kWinogradZero, kWinogradInfinity},
    {0, 1, 2, 3, 4, 5, kWinogradInfinity},
};

// And along the height at 1, -1, 0 and infinity.
constexpr int kWinogradRowSlots = 4;
constexpr int kWinogradRowInfinity = kWinogradRowSlots - 1;
constexpr double kWinogradRowPoints[kWinogradRowInfinity] = {1.0, -1.0, 0.0};
constexpr int kWinogradMostRowTaps = 3;
constexpr int kWinogradMostRowPoints = kWinogradRows + kWinogradMostRowTaps - 1;

// The slots of a piece of 1, 2 or 3 taps, infinity last.
constexpr int kWinogradRowPointSlots[3][kWinogradMostRowPoints] = {
    {2, kWinogradRowInfinity},
    {0, 1, kWinogradRowInfinity},
    {0, 1, 2, kWinogradRowInfinity},
};

// Terms that are added up one after the other, about, before their sum goes to the other ones: more
// would be less accurate.
constexpr int64_t kWinogradTerms = 12;

// Taps `first`, `first` + stride and so on of each kernel row.
struct WinogradPiece {
  int64_t first;
  int64_t taps;
  int64_t points;
  float input[kWinogradMostPoints][kWinogradMostPoints];  // B
};

// What two output rows see of a piece of kernel rows, at one of its points: of the lines of the
// input that both see, one, and another one times a factor (B).
struct WinogradLine {
  int64_t line, other;  // those of the first output row, then those of the second one
  float factor;
};

// A piece at one of its points, in some lines: terms that are added up one after the other.
struct WinogradRun {
  int64_t offset;  // floats: all points of the width have all lines one after the other
  int64_t first_line;
  int64_t lines;
};

struct WinogradPlan {
  int64_t tiles;  // of an output row
  int64_t pieces;
  const WinogradPiece* piece;
  const WinogradLine* lines;
  int64_t first_line[kWinogradRowSlots + 1];  // of each slot of the height
  const WinogradRun* runs;
  int64_t first_run[kWinogradSlots * kWinogradRowSlots + 1];  // [slot][slot of the height]
  int64_t residues;            // stride times outputs: pixels from a tile to the next
  int64_t residue_floats;      // from the pixels of one residue to those of the next
  int64_t points;              // of all pieces: what a held line has
  int64_t point_floats;        // in a line, from a point to the next
  int64_t weights_per_output;  // lines of all runs times input channels
  int64_t input_floats;        // of a row of input before that, as float32
  int64_t groups;              // of rows that share lines, held at a time
  int64_t scratch_floats;      // sums, lines, such a row, and the row spread over its residues

  int64_t line_floats() const { return points * point_floats; }
  int64_t group_floats() const { return first_line[kWinogradRowSlots] * line_floats(); }
};

// Tiles whose sums are held at a time, for up to 64 output channels.
constexpr int64_t kWinogradTiles = 28;
constexpr int64_t kWinogradSumFloats = kWinogradRows * kWinogradSlots * kWinogradTiles * 64;

}  // namespace pixfuse
