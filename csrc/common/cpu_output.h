// Where the CPU operators get their outputs: large ones from the output buffer cache.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "common/checks.h"
#include "common/element_type.h"
#include "common/output_buffer.h"

// Since torch 2.11; the library is built for 2.10, where it is missing and outputs are fresh.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes_ptr, const int64_t* strides_ptr,
    int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
    AtenTensorHandle* ret, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace pixfuse {

// A dense, uninitialized CPU tensor; `shim_dtype` is the number that torch's C functions use.
inline torch::stable::Tensor empty_cpu_output(int64_t rank, const int64_t* sizes,
                                              const int64_t* strides, int32_t shim_dtype,
                                              int64_t element_bytes) {
  constexpr int32_t kNoDeviceIndex = -1;
  const int32_t cpu = aoti_torch_device_type_cpu();
  AtenTensorHandle handle = nullptr;

  int64_t bytes = element_bytes;
  for (int64_t d = 0; d < rank; ++d) bytes *= sizes[d];
  void* buffer = torch_from_blob != nullptr ? acquire_output_buffer(bytes) : nullptr;
  if (buffer != nullptr) {
    const auto release = [](void* data, void*) { release_output_buffer(data); };
    if (torch_from_blob(buffer, rank, sizes, strides, 0, shim_dtype, cpu, kNoDeviceIndex, &handle,
                        aoti_torch_layout_strided(), nullptr, 0, release,
                        nullptr) == AOTI_TORCH_SUCCESS) {
      return torch::stable::Tensor(handle);
    }
    release_output_buffer(buffer);
  }
  check(aoti_torch_empty_strided(rank, sizes, strides, shim_dtype, cpu, kNoDeviceIndex, &handle) ==
            AOTI_TORCH_SUCCESS,
        "pixfuse", "torch to allocate an output of ", bytes, " bytes");
  return torch::stable::Tensor(handle);
}

// Whether floats are best stored past the caches: where they are so many that in the caches they
// would push out each other before anybody reads them, and every line would be read from memory
// just to be overwritten. The sizes are measured ones, since what the system says of the last cache
// is not to be trusted: that of several sockets, or of all the virtual machines that share it.
// `pixel_by_pixel`: normalized pixel by pixel, which takes longer than plane by plane, so that
// memory has more time for them: measured on AMD's processors, the others on Intel's too.
inline bool is_best_past_caches(const int64_t (&sizes)[4], ElementType dtype,
                                bool pixel_by_pixel = false) {
  const int64_t least = int64_t{pixel_by_pixel ? 24 : 8} << 20;
  return sizes[0] * sizes[1] * sizes[2] * sizes[3] * element_bytes(dtype) >= least;
}

}  // namespace pixfuse
