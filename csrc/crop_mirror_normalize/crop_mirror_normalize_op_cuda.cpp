// The operator on CUDA tensors: checks, allocation, device and stream; hands plain pointers to
// crop_mirror_normalize_cuda.
#include <tuple>

#include "common/cuda_device.h"
#include "crop_mirror_normalize/crop_mirror_normalize_tensors.h"

namespace pixfuse {
namespace {

// `placements` lies on the CPU, and one CUDA tensor among the arguments is enough to come here.
int32_t device_of(const std::vector<Tensor>& images) {
  check(!images.empty() && images[0].is_cuda(), kCropMirrorNormalize,
        "images on the device of out (cuda)");
  return images[0].get_device_index();
}

// On torch's current stream; no synchronization.
void run(const CropMirrorNormalizeCall& call, int32_t device) {
  check_launch(
      kCropMirrorNormalize,
      crop_mirror_normalize_cuda(call.args, current_cuda_stream(kCropMirrorNormalize, device)));
}

Tensor empty_mask(const CropMirrorNormalizeCall& call, bool wanted, int32_t device) {
  const auto& sizes = call.args.sizes;
  const int64_t mask_sizes[3] = {wanted ? sizes[0] : 0, sizes[2], sizes[3]};
  const int64_t mask_strides[3] = {wanted ? sizes[2] * sizes[3] : 1, sizes[3], 1};
  return empty_cuda(kCropMirrorNormalize, wanted ? 3 : 1, mask_sizes, mask_strides,
                    aoti_torch_dtype_bool(), device);
}

std::tuple<Tensor, Tensor> crop_mirror_normalize(
    const std::vector<Tensor>& images, const Tensor& placements, int64_t channels, int64_t height,
    int64_t width, const std::vector<double>& mean, const std::vector<double>& std,
    int64_t rounding, const std::vector<double>& fill, bool fill_is_output, int64_t dtype,
    int64_t memory_format, bool return_mask) {
  const int32_t device = device_of(images);
  const std::vector<ImageSource> sources = sources_of(images, rows_of(placements));
  CropMirrorNormalizeCall call(sources, placements_of(placements, sources.size()), channels, height,
                               width, mean, std, rounding, fill, fill_is_output);
  const auto strides = choose_output(call, dtype, memory_format);
  const DeviceGuard guard(kCropMirrorNormalize, device);
  Tensor out = empty_cuda(kCropMirrorNormalize, 4, call.args.sizes, strides.data(),
                          shim_dtype(call.args.dtype), device);
  Tensor mask = empty_mask(call, return_mask, device);
  call.set_output(out.mutable_data_ptr(), strides.data(),
                  return_mask ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr);
  run(call, device);
  return {out, mask};
}

void crop_mirror_normalize_out(const std::vector<Tensor>& images, const Tensor& placements,
                               int64_t channels, const std::vector<double>& mean,
                               const std::vector<double>& std, int64_t rounding,
                               const std::vector<double>& fill, bool fill_is_output, Tensor out,
                               std::optional<Tensor> mask) {
  const int32_t device = device_of(images);
  check(out.is_cuda() && out.get_device_index() == device && out.dim() == 4, kCropMirrorNormalize,
        "out of 4 dimensions on the device of images (CUDA device ", device, ")");
  const std::vector<ImageSource> sources = sources_of(images, rows_of(placements));
  CropMirrorNormalizeCall call(sources, placements_of(placements, sources.size()), channels,
                               out.size(2), out.size(3), mean, std, rounding, fill, fill_is_output);
  use_output(call, out, mask);
  const DeviceGuard guard(kCropMirrorNormalize, device);
  run(call, device);
}

}  // namespace
}  // namespace pixfuse

STABLE_TORCH_LIBRARY_IMPL(pixfuse, CUDA, m) {
  m.impl("crop_mirror_normalize", TORCH_BOX(&pixfuse::crop_mirror_normalize));
  m.impl("crop_mirror_normalize_out", TORCH_BOX(&pixfuse::crop_mirror_normalize_out));
}
