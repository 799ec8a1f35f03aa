// Spans of bytes: what two tensors must not have in common. Without torch.
#pragma once
#include <stdint.h>

namespace pixfuse {

// First and one past the last byte that something reaches; equal when it has no elements.
struct ByteSpan {
  uintptr_t begin, end;
  bool overlaps(const ByteSpan& other) const { return begin < other.end && other.begin < end; }
};

// Of the elements at `data`, with gaps between them; strides count elements and have any sign.
template <int kRank>
inline ByteSpan span_of(const void* data, const int64_t (&sizes)[kRank],
                        const int64_t (&strides)[kRank], int64_t element_bytes) {
  const auto origin = reinterpret_cast<uintptr_t>(data);
  int64_t low = 0, high = 0;
  for (int d = 0; d < kRank; ++d) {
    if (sizes[d] <= 0) return {origin, origin};
    (strides[d] < 0 ? low : high) += (sizes[d] - 1) * strides[d];
  }
  return {origin + static_cast<uintptr_t>(low * element_bytes),
          origin + static_cast<uintptr_t>((high + 1) * element_bytes)};
}

// Of `count` elements side by side.
inline ByteSpan span_of(const void* data, int64_t count, int64_t element_bytes) {
  const auto origin = reinterpret_cast<uintptr_t>(data);
  return {origin, origin + static_cast<uintptr_t>(count * element_bytes)};
}

}  // namespace pixfuse
