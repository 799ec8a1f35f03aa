// Rows of pixels, made long: what loops and kernels go over.
#pragma once
#include <stdint.h>

namespace pixfuse {

// For what reads one thing and writes another: makes as few and as long rows of N, C, H, W as both
// strides allow. When both sides go from one row of pixels straight to the next, the rows are one;
// likewise the images.
static inline void merge_rows(int64_t (&sizes)[4], int64_t (&from)[4], int64_t (&to)[4]) {
  constexpr int N = 0, H = 2, W = 3;
  const auto merge = [&](int outer, int inner) {
    const bool follows_on =
        sizes[outer] == 1 || sizes[inner] == 1 ||
        (from[outer] == from[inner] * sizes[inner] && to[outer] == to[inner] * sizes[inner]);
    if (!follows_on) return false;
    if (sizes[inner] == 1) {  // its strides meant nothing
      from[inner] = from[outer];
      to[inner] = to[outer];
    }
    sizes[inner] *= sizes[outer];
    sizes[outer] = 1;
    return true;
  };
  if (merge(H, W)) {
    merge(N, W);
  } else {
    merge(N, H);
  }
}

// For what may visit pixels in any order, as sums and counts do: reorders `count` dimensions, so
// that those come last whose pixels lie next to each other in memory.
static inline void sort_by_stride(int64_t* sizes, int64_t* strides, int count) {
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
}

// As above, and merges them, outermost first, so that the last one makes as few and as long rows as
// the strides allow. The same pixels are there afterwards, in another order.
static inline void make_long_rows(int64_t* sizes, int64_t* strides, int count) {
  sort_by_stride(sizes, strides, count);
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
