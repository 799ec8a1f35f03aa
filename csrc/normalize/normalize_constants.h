// From mean, std and a rounding to the constants of the arithmetic: the table of roundings in the
// README, one line of code each.
#pragma once
#include "normalize/normalize.h"

namespace pixfuse {

// `mean` and `std` hold one value per channel; fills `channels` and the fields of `args` that the
// rounding decides.
static inline void set_rounding(NormalizeArgs& args, ChannelConstants* channels, const double* mean,
                                const double* std, int64_t channel_count, Rounding rounding) {
  const bool pixel_units = rounding == Rounding::timm || rounding == Rounding::transformers;
  args.arithmetic = rounding == Rounding::nearest          ? Arithmetic::nearest
                    : rounding == Rounding::torchvision_v1 ? Arithmetic::divide
                                                           : Arithmetic::multiply;
  args.scale = pixel_units ? 1.0f : 1.0f / 255.0f;
  args.channels = channels;
  for (int64_t c = 0; c < channel_count; ++c) {
    ChannelConstants& constants = channels[c];
    const double m = mean[c], s = std[c];
    switch (rounding) {
      case Rounding::torchvision:
      case Rounding::torchvision_v1:
      case Rounding::nearest:
        constants.mean = static_cast<float>(m);
        constants.std = static_cast<float>(s);
        break;
      case Rounding::timm:
        constants.mean = static_cast<float>(255.0 * m);
        constants.std = static_cast<float>(255.0 * s);
        break;
      case Rounding::transformers:
        constants.mean = static_cast<float>(m) * 255.0f;
        constants.std = static_cast<float>(s) * 255.0f;
        break;
    }
    // x - 255 * mean cancels where x is near the mean: with the part of 255 * mean that a double
    // drops, the relative error of the result stays below 2^-50 everywhere.
    constants.center_high = 255.0 * m;
    constants.center_low = __builtin_fma(255.0, m, -constants.center_high);
    constants.inverse_width = 1.0 / (255.0 * s);
  }
}

}  // namespace pixfuse
