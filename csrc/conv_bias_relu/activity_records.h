// How the CUDA kernels add up what became of each channel, with the same bits in every run: each
// block leaves a record of the pixels that it had, in a place of its own, and a second kernel adds
// the records in a fixed order. No atomics, and nothing that has to be cleared before.
#pragma once
#include "common/cuda_launch.h"
#include "conv_bias_relu/conv_bias_relu.h"

namespace pixfuse {
namespace {

// Of one channel in one run of pixels of an image. Records are [channel][image][run].
struct Record {
  double sum;
  unsigned active, nan;
};

constexpr int kWarpThreads = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The number of runs of an image is a power of two, so that the runs of an image share a warp, or
// fill some.
constexpr int64_t runs_at_least(int64_t wanted, int64_t most) {
  int64_t runs = 1;
  while (runs < wanted && runs < most) runs *= 2;
  return runs;
}

template <class T>
__device__ __forceinline__ T sum_of_warp(T value) {
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

struct AddRecordsParameters {
  const Record* records;
  int64_t images, runs;
  ChannelActivity activity;
};

constexpr int kAddThreads = 256;

// One block for each channel. A warp takes 32 runs at a time, or all runs of one image.
__global__ void __launch_bounds__(kAddThreads) add_records_kernel(const AddRecordsParameters p) {
  constexpr int kWarps = kAddThreads / kWarpThreads;
  __shared__ long long warp_active[kWarps], warp_nan[kWarps], warp_images[kWarps];
  __shared__ double warp_sum[kWarps];
  const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  const int64_t count = p.images * p.runs;
  const Record* records = p.records + blockIdx.x * count;
  const int64_t chunk = p.runs < kWarpThreads ? kWarpThreads : p.runs;
  // Where an image has less than 32 runs: the lanes of the image that begins with this lane.
  const unsigned own_lanes =
      p.runs < kWarpThreads ? ((1u << p.runs) - 1) << (lane & ~(p.runs - 1)) : kAllLanes;
  const bool begins_image = (lane & (p.runs - 1)) == 0;

  long long active = 0, nan = 0, images = 0;
  double sum = 0.0;
  for (int64_t begin = warp * chunk; begin < count; begin += kWarps * chunk) {
    bool fired = false;
    for (int64_t i = begin + lane; i < begin + chunk; i += kWarpThreads) {
      if (i >= count) break;
      const Record record = records[i];
      active += record.active;
      nan += record.nan;
      sum += record.sum;
      fired = fired || record.active != 0;
    }
    const unsigned firing = __ballot_sync(kAllLanes, fired);
    if (begins_image && (firing & own_lanes) != 0) ++images;
  }
  active = sum_of_warp(active);
  nan = sum_of_warp(nan);
  images = sum_of_warp(images);
  sum = sum_of_warp(sum);
  if (lane == 0) {
    warp_active[warp] = active;
    warp_nan[warp] = nan;
    warp_images[warp] = images;
    warp_sum[warp] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) {
      active += warp_active[w];
      nan += warp_nan[w];
      images += warp_images[w];
      sum += warp_sum[w];
    }
    p.activity.active[blockIdx.x] = active;
    p.activity.nan[blockIdx.x] = nan;
    p.activity.active_images[blockIdx.x] = images;
    p.activity.output_sum[blockIdx.x] = sum;
  }
}

cudaError_t add_records(const void* records, int64_t images, int64_t runs, int64_t channels,
                        const ChannelActivity& activity, cudaStream_t stream) {
  const AddRecordsParameters p{static_cast<const Record*>(records), images, runs, activity};
  return launch(add_records_kernel, dim3(static_cast<unsigned>(channels)), dim3(kAddThreads), 0,
                stream, p);
}

// --- numbers of a type that is known only at run time ---

__device__ __forceinline__ float load_float(const void* from, ElementType type, int64_t i) {
  switch (type) {
    case ElementType::float32:
      return __ldg(static_cast<const float*>(from) + i);
    case ElementType::float16:
      return __half2float(__ldg(static_cast<const __half*>(from) + i));
    case ElementType::bfloat16:
      return __bfloat162float(__ldg(static_cast<const __nv_bfloat16*>(from) + i));
    case ElementType::uint8:
      break;
  }
  return static_cast<float>(__ldg(static_cast<const uint8_t*>(from) + i));
}

__device__ __forceinline__ float rounded_to(ElementType type, float value) {
  if (type == ElementType::float16) return __half2float(__float2half_rn(value));
  if (type == ElementType::bfloat16) return __bfloat162float(__float2bfloat16_rn(value));
  return value;
}

// What is not above 0 becomes 0, but NaN stays NaN.
template <class T>
__device__ __forceinline__ T relu(T x) {
  return x <= T(0) ? T(0) : x;
}

}  // namespace
}  // namespace pixfuse
