// Rows of pixels for what may visit them in any order: sums and counts.
#pragma once
#include <stdint.h>

namespace pixfuse {

// Reorders and merges `count` dimensions of pixels, outermost first, so that the last one makes as
// few and as long rows as the strides allow, with the pixels of a row as near to each other as they
// lie in memory. The same pixels are there afterwards, in another order.
static inline void make_long_rows(int64_t* sizes, int64_t* strides, int count) {
  // A dimension of one pixel, or one that repeats the same pixels, goes outside.
  const auto rank = [&](int d) {
    return sizes[d] == 1 || strides[d] == 0 ? INT64_MAX : strides[d];
  };
  const auto swap = [](int64_t& a, int64_t& b) {
    const int64_t old = a;
    a = b;
    b = old;
  };
  for (int end = count - 1; end > 0; --end) {
    for (int d = 0; d < end; ++d) {
      if (rank(d) >= rank(d + 1)) continue;
      swap(sizes[d], sizes[d + 1]);
      swap(strides[d], strides[d + 1]);
    }
  }
  const int row = count - 1;
  for (int d = row - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (sizes[row] == 1) strides[row] = strides[d];  // one pixel: its stride meant nothing
    if (sizes[row] != 1 && strides[d] != strides[row] * sizes[row]) return;
    sizes[row] *= sizes[d];
    sizes[d] = 1;
  }
}

}  // namespace pixfuse
