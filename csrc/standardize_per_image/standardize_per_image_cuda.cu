// Which of two ways a call goes, the kernel of the second way, and the launcher. No torch.
//
// One pass: standardize_per_image_one_pass.h, for what fits into shared memory. Two kernels: the
// sums are those of `image_moments`, and a kernel converts. There the constants of an image are
// computed from its sums by each block that converts a part of it: that costs a few instructions
// and spares a launch and a trip through memory. Threads go along the output, so that stores are
// coalesced; the bytes are read a second time, from cache where the batch fits in it.
#include "common/cuda_launch.h"
#include "image_moments/image_moments.h"
#include "standardize_per_image/standardize_per_image_one_pass.h"

namespace pixfuse {
namespace {

constexpr int64_t kValuesPerThread = 8;
constexpr int64_t kMaxBlocks = 65536;  // and then each thread takes more

struct Parameters {
  const uint8_t* images;
  void* output;
  const int64_t *sums, *squares;  // [N, all_channels]
  int64_t image_strides[4], output_strides[4];
  int64_t width;
  int64_t pixels;
  int64_t all_channels;
  int first_channel, channels;  // of this launch
  unsigned blocks_per_image;
  bool per_channel, planar;
  double floor;
};

template <class T>
__global__ void __launch_bounds__(kThreads) standardize_kernel(const Parameters p) {
  __shared__ double high[kMaxChannels], low[kMaxChannels], inverse_width[kMaxChannels];
  const int64_t n = blockIdx.x / p.blocks_per_image;
  if (threadIdx.x < p.channels) {
    const int64_t* sums = p.sums + n * p.all_channels;
    const int64_t* squares = p.squares + n * p.all_channels;
    const int64_t own = p.first_channel + threadIdx.x;
    int64_t sum = p.per_channel ? sums[own] : 0, square = p.per_channel ? squares[own] : 0;
    int64_t count = p.pixels;
    if (!p.per_channel) {
      for (int64_t c = 0; c < p.all_channels; ++c) {
        sum += sums[c];
        square += squares[c];
      }
      count *= p.all_channels;
    }
    const ChannelConstants constants = standardization_of(count, sum, square, p.floor);
    high[threadIdx.x] = constants.center_high;
    low[threadIdx.x] = constants.center_low;
    inverse_width[threadIdx.x] = constants.inverse_width;
  }
  __syncthreads();  // The constants of the image are there.

  const uint8_t* image = p.images + n * p.image_strides[0];
  T* output = static_cast<T*>(p.output) + n * p.output_strides[0];
  const int64_t values = p.pixels * p.channels;
  const int64_t stride = static_cast<int64_t>(p.blocks_per_image) * kThreads;
  const int64_t start = static_cast<int64_t>(blockIdx.x % p.blocks_per_image) * kThreads;
  for (int64_t i = start + threadIdx.x; i < values; i += stride) {
    const int64_t channel = p.planar ? i / p.pixels : i % p.channels;
    const int64_t pixel = p.planar ? i % p.pixels : i / p.channels;
    const int64_t h = pixel / p.width, w = pixel % p.width;
    const uint8_t byte = __ldg(image + channel * p.image_strides[1] + h * p.image_strides[2] +
                               w * p.image_strides[3]);
    const double centered =
        __dsub_rn(__dsub_rn(static_cast<double>(byte), high[channel]), low[channel]);
    T result;
    convert(__double2float_rn(__dmul_rn(centered, inverse_width[channel])), result);
    output[channel * p.output_strides[1] + h * p.output_strides[2] + w * p.output_strides[3]] =
        result;
  }
}

template <class T>
cudaError_t launch_channels(const StandardizeArgs& args, int64_t first, int64_t count,
                            cudaStream_t stream) {
  Parameters p{};
  p.images = args.images + first * args.image_strides[1];
  p.output = static_cast<T*>(args.output) + first * args.output_strides[1];
  for (int d = 0; d < 4; ++d) {
    p.image_strides[d] = args.image_strides[d];
    p.output_strides[d] = args.output_strides[d];
  }
  p.sums = args.sums;
  p.squares = args.squares;
  p.width = args.sizes[3];
  p.pixels = args.sizes[2] * args.sizes[3];
  p.all_channels = args.sizes[1];
  p.first_channel = static_cast<int>(first);
  p.channels = static_cast<int>(count);
  p.per_channel = args.per_channel;
  p.planar = args.output_strides[3] == 1;
  p.floor = args.floor;
  constexpr int64_t kPerBlock = kThreads * kValuesPerThread;
  int64_t blocks = (p.pixels * count + kPerBlock - 1) / kPerBlock;
  const int64_t images = args.sizes[0];
  const int64_t most = images < kMaxBlocks ? kMaxBlocks / images : 1;
  if (blocks > most) blocks = most;
  p.blocks_per_image = static_cast<unsigned>(blocks);
  return launch(standardize_kernel<T>, dim3(static_cast<unsigned>(images * blocks)), dim3(kThreads),
                0, stream, p);
}

template <class T>
cudaError_t launch_type(const StandardizeArgs& args, cudaStream_t stream) {
  if (args.sums == nullptr) {
    DeviceLimits limits{};
    if (const cudaError_t error = read_limits(limits)) return error;
    const OnePass plan = plan_one_pass(args, limits);
    return plan.fits ? launch_one_pass<T>(plan, stream) : cudaErrorInvalidValue;
  }
  ImageMomentsArgs moments{};
  moments.images = args.images;
  for (int d = 0; d < 4; ++d) {
    moments.sizes[d] = args.sizes[d];
    moments.strides[d] = args.image_strides[d];
  }
  moments.sums = args.sums;
  moments.squares = args.squares;
  if (const int error = image_moments_cuda(moments, stream)) return static_cast<cudaError_t>(error);
  for (int64_t first = 0; first < args.sizes[1]; first += kMaxChannels) {
    const int count = smaller(kMaxChannels, args.sizes[1] - first);
    const cudaError_t error = launch_channels<T>(args, first, count, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

bool is_empty(const StandardizeArgs& args) {
  for (int64_t size : args.sizes) {
    if (size == 0) return true;
  }
  return false;
}

// The rule. One pass moves fewer bytes and launches one kernel instead of three, but a group has
// one block, which only one multiprocessor works on: a few large groups leave most of the GPU idle,
// where two kernels would fill it. So large groups go in one pass only if there is one for every
// fourth multiprocessor. Not yet measured on a GPU; where a measurement says otherwise, this is the
// place to say so.
bool is_faster_in_one_pass(const OnePass& plan, const DeviceLimits& limits) {
  return plan.shared_bytes <= kSmallGroupBytes || 4 * plan.groups >= limits.multiprocessors;
}

}  // namespace

int choose_standardize_way(const StandardizeArgs& args, StandardizeWay& way) {
  if (way == StandardizeWay::two_kernels) return cudaSuccess;
  DeviceLimits limits{};
  if (const cudaError_t error = read_limits(limits)) return error;
  if (is_empty(args)) {
    way = StandardizeWay::one_pass;  // of nothing
    return cudaSuccess;
  }
  const OnePass plan = plan_one_pass(args, limits);
  if (way == StandardizeWay::one_pass) return plan.fits ? cudaSuccess : cudaErrorInvalidValue;
  way = plan.fits && is_faster_in_one_pass(plan, limits) ? StandardizeWay::one_pass
                                                         : StandardizeWay::two_kernels;
  return cudaSuccess;
}

int standardize_per_image_cuda(const StandardizeArgs& args, void* stream) {
  if (is_empty(args)) return cudaSuccess;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case ElementType::float32:
      return launch_type<float>(args, cuda_stream);
    case ElementType::float16:
      return launch_type<__half>(args, cuda_stream);
    case ElementType::bfloat16:
      return launch_type<__nv_bfloat16>(args, cuda_stream);
    case ElementType::uint8:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace pixfuse
