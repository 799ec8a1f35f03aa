#include "sample_kernels.h"

#include "common/cuda_launch.h"

namespace {

constexpr int kBlock = 128;
constexpr unsigned kAllLanes = 0xffffffffu;

// A function of both sides, as the product's formula is.
__host__ __device__ inline uint8_t plus_one(uint8_t value) {
  return static_cast<uint8_t>(value + 1);
}

// 16 bytes per thread where they are aligned and complete, single bytes elsewhere.
__global__ void __launch_bounds__(kBlock)
    add_one_kernel(const uint8_t* __restrict__ input, uint8_t* __restrict__ output, int64_t count,
                   Bug bug) {
  const int64_t first = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * 16;
  if (first >= count) return;
  const auto address = reinterpret_cast<uintptr_t>(input) | reinterpret_cast<uintptr_t>(output);
  const bool aligned = address % 16 == 0 || bug == Bug::misaligned_access;
  const bool complete = first + 16 <= count;
  if (aligned && (complete || bug == Bug::over_read)) {
    union {
      uint4 vector;
      uint8_t bytes[16];
    } pixels;
    pixels.vector = __ldg(reinterpret_cast<const uint4*>(input + first));
    for (uint8_t& byte : pixels.bytes) byte = plus_one(byte);
    if (complete) {
      *reinterpret_cast<uint4*>(output + first) = pixels.vector;
      return;
    }
  }
  for (int64_t i = first; i < min(first + 16, count); ++i) output[i] = plus_one(input[i]);
}

__device__ float sum_of_warp(float value, Bug bug) {
  for (int delta = warpSize / 2; delta > 0; delta /= 2) {
    value += __shfl_down_sync(kAllLanes, value, delta);
    if (bug == Bug::divergent_shuffle && threadIdx.x % 2) __shfl_sync(kAllLanes, value, 0);
  }
  return value;
}

// One block per row: shuffles in each warp, then the warps' sums through static shared memory. A
// template, as its __shared__ variables are kept by the linker in another way than plain ones.
template <int kThreads>
__global__ void sum_rows_kernel(const float* input, float* sums, int row_length, Bug bug) {
  __shared__ float warp_sums[kThreads / 32];
  __shared__ float total;
  const float* row = input + int64_t{blockIdx.x} * row_length;
  float sum = 0;
  for (int i = threadIdx.x; i < row_length; i += kThreads) sum += row[i];
  sum = sum_of_warp(sum, bug);
  const int warp = threadIdx.x / warpSize;
  const int lane = threadIdx.x % warpSize;
  if (bug == Bug::early_return && warp == 3) return;
  if (lane == 0 && !(bug == Bug::uninitialized_shared && warp == 2)) {
    float* slot = &warp_sums[warp];
    if (bug == Bug::static_shared_overrun_by_pointer) ++slot;
    if (bug == Bug::static_shared_overrun) {
      warp_sums[warp + 1] = sum;
    } else {
      *slot = sum;
    }
  }
  if (bug == Bug::divergent_barrier) {
    if (warp == 0) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (bug != Bug::missing_barrier) {
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    total = 0;
    for (float warp_sum : warp_sums) total += warp_sum;
  }
  __syncthreads();
  if (threadIdx.x == kThreads - 1) sums[blockIdx.x] = total;
}

// One block for all rows, through one row of dynamic shared memory.
__global__ void reverse_rows_kernel(const float* input, float* output, int row_count,
                                    int row_length, Bug bug) {
  PIXFUSE_DYNAMIC_SHARED(float, row);
  const auto thread =
      static_cast<int>((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x);
  const auto threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  for (int r = 0; r < row_count; ++r) {
    const int64_t start = int64_t{r} * row_length;
    for (int i = thread; i < row_length; i += threads) {
      row[row_length - 1 - i + (bug == Bug::dynamic_shared_overrun ? 1 : 0)] = input[start + i];
    }
    __syncthreads();
    for (int i = thread; i < row_length; i += threads) output[start + i] = row[i];
    if (bug != Bug::missing_barrier_in_loop) __syncthreads();
  }
}

// Each warp hands its values on by one lane through shared memory.
__global__ void rotate_warps_kernel(const float* input, float* output, int count, Bug bug) {
  __shared__ float values[kBlock];
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  values[threadIdx.x] = i < count ? input[i] : 0;
  if (bug == Bug::shuffle_as_warp_barrier) {
    __shfl_sync(kAllLanes, i, 0);  // waits for the lanes, but promises nothing about memory
  } else if (bug != Bug::missing_warp_barrier) {
    __syncwarp();
  }
  const unsigned first = threadIdx.x / warpSize * warpSize;
  const float value = values[first + (threadIdx.x + 1) % warpSize];
  if (i < count) output[i] = value;
}

// A histogram in shared memory, added to one in global memory.
__global__ void count_bytes_kernel(const uint8_t* input, unsigned* counts, int count, Bug bug) {
  __shared__ unsigned block_counts[256];
  for (unsigned i = threadIdx.x; i < 256; i += blockDim.x) block_counts[i] = 0;
  __syncthreads();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) {
    if (bug == Bug::plain_increment) {
      ++block_counts[input[i]];
    } else {
      atomicAdd(&block_counts[input[i]], 1u);
    }
  }
  __syncthreads();
  for (unsigned value = threadIdx.x; value < 256; value += blockDim.x) {
    if (bug == Bug::overlapping_blocks) {
      counts[value] += block_counts[value];
    } else if (block_counts[value] != 0) {
      atomicAdd(&counts[value], block_counts[value]);
    }
  }
}

// One warp; each lane writes what every warp function returns to it.
__global__ void warp_functions_kernel(int* results, Bug bug) {
  const int lane = static_cast<int>(threadIdx.x);
  const auto put = [&](int row, int value) { results[row * warpSize + lane] = value; };
  put(0, __shfl_sync(kAllLanes, lane, 5));
  put(1, __shfl_sync(kAllLanes, lane, 5, 8));
  put(2, __shfl_up_sync(kAllLanes, lane, 3));
  put(3, __shfl_up_sync(kAllLanes, lane, 3, 16));
  put(4, __shfl_down_sync(kAllLanes, lane, 3));
  put(5, __shfl_down_sync(kAllLanes, lane, 3, 16));
  put(6, __shfl_xor_sync(kAllLanes, lane, 1));
  put(7, __shfl_xor_sync(kAllLanes, lane, 16, 16));
  put(8, static_cast<int>(__ballot_sync(kAllLanes, lane % 3 == 0)));
  put(9, __any_sync(kAllLanes, lane == 7));
  put(10, __all_sync(kAllLanes, lane != 7));
  if (lane < 4) {
    const int source = bug == Bug::shuffle_outside_mask ? 9 : 3 - lane;
    put(11, __shfl_sync(0xfu, lane * 10, source));
  } else {
    put(11, static_cast<int>(__ballot_sync(~0xfu, lane > 20)));
  }
}

// Which thread came first, second, ...
__global__ void rank_threads_kernel(unsigned* ranks, unsigned* counter) {
  ranks[threadIdx.x] = atomicAdd(counter, 1u);
}

__global__ void nothing_kernel() {}

unsigned blocks_for(int64_t count, int64_t per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

}  // namespace

using pixfuse::launch;

int add_one_to_bytes(const uint8_t* input, uint8_t* output, int64_t count, Bug bug) {
  return launch(add_one_kernel, blocks_for(count, kBlock * 16), kBlock, 0, nullptr, input, output,
                count, bug);
}

int sum_rows(const float* input, float* sums, int row_count, int row_length, Bug bug) {
  return launch(sum_rows_kernel<kBlock>, static_cast<unsigned>(row_count), kBlock, 0, nullptr,
                input, sums, row_length, bug);
}

int reverse_rows(const float* input, float* output, int row_count, int row_length, Bug bug) {
  return launch(reverse_rows_kernel, 1, dim3(8, 4, 2), sizeof(float) * row_length, nullptr, input,
                output, row_count, row_length, bug);
}

int rotate_warps(const float* input, float* output, int count, Bug bug) {
  return launch(rotate_warps_kernel, blocks_for(count, kBlock), kBlock, 0, nullptr, input, output,
                count, bug);
}

int count_bytes(const uint8_t* input, unsigned* counts, int count, Bug bug) {
  return launch(count_bytes_kernel, blocks_for(count, kBlock), kBlock, 0, nullptr, input, counts,
                count, bug);
}

int warp_functions(int* results, Bug bug) {
  return launch(warp_functions_kernel, 1, 32, 0, nullptr, results, bug);
}

int rank_threads(unsigned* ranks, unsigned* counter, unsigned count) {
  return launch(rank_threads_kernel, 1, count, 0, nullptr, ranks, counter);
}

int launch_without_work(unsigned grid, unsigned block, size_t shared_bytes) {
  return launch(nothing_kernel, grid, block, shared_bytes, nullptr);
}

int allow_without_work(size_t shared_bytes) {
  return pixfuse::allow_shared_memory(nothing_kernel, static_cast<int64_t>(shared_bytes));
}
