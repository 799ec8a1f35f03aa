// The lines of input that some output rows reach, brought into a buffer that stays in the cache: as
// floats, with true zeros where the padding is. (Rows of floats that are lines already are read in
// the input.)
#pragma once
#include "conv_bias_relu/conv_bias_relu_loop.h"

namespace pixfuse::PIXFUSE_ISA {

// One row of the input, as far as the kernel reaches it; the padding stays as it is.
void fill_line(const ConvBiasReluJob& job, int64_t n, int64_t row, float* line);

}  // namespace pixfuse::PIXFUSE_ISA
