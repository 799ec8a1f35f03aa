// Small kernels that use each part of the emulator, and the mistakes that they can be asked to
// make.
#pragma once
#include <cstddef>
#include <cstdint>

enum class Bug : int {
  none,
  over_read,
  misaligned_access,
  missing_barrier,
  missing_barrier_in_loop,
  divergent_barrier,
  early_return,
  static_shared_overrun,
  static_shared_overrun_by_pointer,
  dynamic_shared_overrun,
  uninitialized_shared,
  missing_warp_barrier,
  shuffle_as_warp_barrier,
  shuffle_outside_mask,
  divergent_shuffle,
  plain_increment,
  overlapping_blocks,
};

// Each returns a cudaError_t.
int add_one_to_bytes(const uint8_t* input, uint8_t* output, int64_t count, Bug bug);
int sum_rows(const float* input, float* sums, int row_count, int row_length, Bug bug);
int reverse_rows(const float* input, float* output, int row_count, int row_length, Bug bug);
int rotate_warps(const float* input, float* output, int count, Bug bug);
int count_bytes(const uint8_t* input, unsigned* counts, int count, Bug bug);
int warp_functions(int* results, Bug bug);
int rank_threads(unsigned* ranks, unsigned* counter, unsigned count);
int launch_without_work(unsigned grid, unsigned block, size_t shared_bytes);
int allow_without_work(size_t shared_bytes);
