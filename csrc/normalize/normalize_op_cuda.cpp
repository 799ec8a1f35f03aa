// The operator on CUDA tensors, and on pinned ones: checks, allocation, device and stream; hands
// plain pointers to normalize_cuda.
#include "common/cuda_device.h"
#include "normalize/normalize_args.h"

namespace pixfuse {
namespace {

// On torch's current stream; no synchronization.
void run(const char* function, const NormalizeCall& call, int32_t device) {
  check_launch(function, normalize_cuda(call.args, current_cuda_stream(function, device)));
}

// Into a new tensor on `device`, which is current.
Tensor run_into_new(const char* function, NormalizeCall& call,
                    const std::array<int64_t, 4>& strides, int32_t device) {
  const int64_t skip = 4 - call.images.rank;
  Tensor out = empty_cuda(function, call.images.rank, call.args.sizes + skip, strides.data() + skip,
                          shim_dtype(call.args.dtype), device);
  call.args.output = out.mutable_data_ptr();
  run(function, call, device);
  return out;
}

Tensor normalize(const Tensor& images, const std::vector<double>& mean,
                 const std::vector<double>& std, int64_t rounding, int64_t input_layout,
                 int64_t dtype, int64_t memory_format) {
  NormalizeCall call(images, mean, std, rounding, input_layout);
  const auto strides = call.choose_output(dtype, memory_format);
  const int32_t device = images.get_device_index();
  const DeviceGuard guard("normalize", device);
  return run_into_new("normalize", call, strides, device);
}

void normalize_out(const Tensor& images, const std::vector<double>& mean,
                   const std::vector<double>& std, int64_t rounding, int64_t input_layout,
                   Tensor out) {
  NormalizeCall call(images, mean, std, rounding, input_layout);
  const int32_t device = images.get_device_index();
  check(out.is_cuda() && out.get_device_index() == device, "normalize",
        "out on the device of images (CUDA device ", device, ")");
  set_output(call, out);
  const DeviceGuard guard("normalize", device);
  run("normalize", call, device);
}

// Where the current device finds a byte of pinned host memory; null if the memory is not pinned.
const uint8_t* on_device(const uint8_t* host) {
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, host) != cudaSuccess) {
    cudaGetLastError();  // or the next launch would report it
    return nullptr;
  }
  if (attributes.type != cudaMemoryTypeHost) return nullptr;
  return static_cast<const uint8_t*>(attributes.devicePointer);
}

// The kernel reads the host's memory over the bus while it runs, so no copy of the bytes is made on
// the device. The caller keeps `images` alive and unchanged until the current stream has passed
// this point: neither torch nor this operator knows that a stream reads a CPU tensor.
Tensor normalize_pinned(const Tensor& images, const std::vector<double>& mean,
                        const std::vector<double>& std, int64_t rounding, int64_t input_layout,
                        int64_t dtype, int64_t memory_format, int64_t device_index) {
  constexpr const char* kFunction = "normalize_pinned";
  NormalizeCall call(images, mean, std, rounding, input_layout);
  const auto strides = call.choose_output(dtype, memory_format);
  check(device_index >= 0 && device_index <= 127, kFunction, "a CUDA device index, got ",
        device_index);
  const auto device = static_cast<int32_t>(device_index);
  const DeviceGuard guard(kFunction, device);
  const ByteRange bytes =
      bytes_reached(call.args.images, call.args.sizes, call.args.image_strides, 1);
  if (bytes.begin < bytes.end) {
    const uint8_t* first = on_device(call.args.images);
    const uint8_t* last = on_device(reinterpret_cast<const uint8_t*>(bytes.end - 1));
    check(first != nullptr && last != nullptr &&
              last - first == static_cast<int64_t>(bytes.end - 1 - bytes.begin),
          kFunction, "images in pinned memory; pass images.pin_memory()");
    call.args.images = first;
  }
  return run_into_new(kFunction, call, strides, device);
}

}  // namespace
}  // namespace pixfuse

STABLE_TORCH_LIBRARY_IMPL(pixfuse, CUDA, m) {
  m.impl("normalize", TORCH_BOX(&pixfuse::normalize));
  m.impl("normalize_out", TORCH_BOX(&pixfuse::normalize_out));
}

// The tensor that decides is the CPU's.
STABLE_TORCH_LIBRARY_IMPL(pixfuse, CPU, m) {
  m.impl("normalize_pinned", TORCH_BOX(&pixfuse::normalize_pinned));
}
