// Recycled memory for large CPU outputs.
//
// A freshly allocated 38 MB output costs several times the kernel that fills it: the kernel of the
// operating system has to find and clear every page. Here a block returns to a cache when torch
// frees the tensor that used it, and the next output of about that size takes it.
//
// Blocks are aligned to, and advised for, huge pages. Idle blocks are bounded by a limit in bytes
// (PIXFUSE_CACHE_BYTES, default 1 GiB, 0 turns the cache off); the block idle for longest goes
// first. Safe across threads. After a fork the child starts with an empty cache: it could only
// recycle the parent's pages by copying them.
#pragma once
#include <cstdint>

namespace pixfuse {

// Outputs below this are left to torch's allocator, which recycles them well.
constexpr int64_t kMinBufferBytes = int64_t{1} << 20;

// A block of at least `bytes`, or null when the cache is off, `bytes` is too small for it, or
// memory is short; then the caller allocates as usual. Throws std::invalid_argument when
// PIXFUSE_CACHE_BYTES is not a number of bytes.
void* acquire_output_buffer(int64_t bytes);

// Takes back a block of acquire_output_buffer; from any thread, never throws.
void release_output_buffer(void* block) noexcept;

// Returns all idle blocks to the operating system.
void empty_output_buffers();

struct OutputBufferStatistics {
  int64_t limit_bytes;   // of idle_bytes
  int64_t idle_bytes;    // waiting to be used again
  int64_t in_use_bytes;  // held by tensors
  int64_t allocated;     // blocks taken from the operating system so far
  int64_t reused;        // outputs that took an idle block so far
};
OutputBufferStatistics output_buffer_statistics();

}  // namespace pixfuse
