// Asking memory for what is read next, for loops that read by themselves too short a way ahead to
// keep it busy.
#pragma once
#include <stdint.h>

namespace pixfuse {

// The lines of [from, from + bytes). They may lie past the end of what there is: nothing comes of
// that.
static inline void read_ahead(uintptr_t from, int64_t bytes) {
  constexpr uintptr_t kLineBytes = 64;  // of the caches
  const uintptr_t end = from + static_cast<uintptr_t>(bytes);
  for (uintptr_t line = from; line < end; line += kLineBytes) {
    __builtin_prefetch(reinterpret_cast<const void*>(line));
  }
}

}  // namespace pixfuse
