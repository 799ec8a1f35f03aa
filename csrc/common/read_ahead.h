// Asking memory for what is read next, for loops that read by themselves too short a way ahead to
// keep it busy.
#pragma once
#include <stdint.h>

namespace pixfuse {

constexpr int64_t kCacheLineBytes = 64;

// The lines of [from, from + bytes), to be read, or written. They may lie past the end of what
// there is: nothing comes of that. In line: a function that does nothing else has no effect in
// gcc's eyes, so that it leaves out calls.
template <int to_write = 0>
[[gnu::always_inline]] static inline void read_ahead(uintptr_t from, int64_t bytes) {
  const uintptr_t end = from + static_cast<uintptr_t>(bytes);
  for (uintptr_t line = from; line < end; line += kCacheLineBytes) {
    __builtin_prefetch(reinterpret_cast<const void*>(line), to_write);
  }
}

// Runs of memory that are asked for some at a time, while something else is computed.
struct Ahead {
  uintptr_t next;
  int64_t runs = 0, step = 0, bytes = 0;  // those left, from one to the next, and of each
  int64_t runs_at_once = 0;

  [[gnu::always_inline]] void share_out(int64_t times) {
    runs_at_once = (runs + times - 1) / times;
  }

  template <int to_write>
  [[gnu::always_inline]] void ask() {
    const int64_t now = runs < runs_at_once ? runs : runs_at_once;
    for (int64_t i = 0; i < now; ++i, next += static_cast<uintptr_t>(step)) {
      read_ahead<to_write>(next, bytes);
    }
    runs -= now;
  }
};

}  // namespace pixfuse
