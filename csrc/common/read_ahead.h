// Asking memory for what is read next, for loops that read by themselves too short a way ahead to
// keep it busy.
#pragma once
#include <stdint.h>

namespace pixfuse {

constexpr int64_t kCacheLineBytes = 64;

// The lines of [from, from + bytes), to be read, or written. They may lie past the end of what
// there is: nothing comes of that.
template <int to_write = 0>
static inline void read_ahead(uintptr_t from, int64_t bytes) {
  const uintptr_t end = from + static_cast<uintptr_t>(bytes);
  for (uintptr_t line = from; line < end; line += kCacheLineBytes) {
    __builtin_prefetch(reinterpret_cast<const void*>(line), to_write);
  }
}

}  // namespace pixfuse
