// The operator on CPU tensors: schema, checks, allocation; hands plain pointers to
// crop_mirror_normalize_cpu. And the outputs and threads of torch for the module of Python's
// images, which has no torch in it.
#include "common/cpu_output.h"
#include "crop_mirror_normalize/crop_mirror_normalize_tensors.h"

#include <tuple>

namespace pixfuse {
namespace {

void run(const CropMirrorNormalizeCall& call) {
  check(pixfuse_crop_mirror_normalize(&call.args) == 0, kCropMirrorNormalize,
        "torch's threads to run the loop");
}

Tensor empty_mask(const CropMirrorNormalizeCall& call, bool wanted) {
  const auto& sizes = call.args.sizes;
  const int64_t mask_sizes[3] = {wanted ? sizes[0] : 0, sizes[2], sizes[3]};
  const int64_t mask_strides[3] = {wanted ? sizes[2] * sizes[3] : 1, sizes[3], 1};
  return empty_cpu_output(wanted ? 3 : 1, mask_sizes, mask_strides, aoti_torch_dtype_bool(), 1);
}

std::tuple<Tensor, Tensor> crop_mirror_normalize(
    const std::vector<Tensor>& images, const Tensor& placements, int64_t channels, int64_t height,
    int64_t width, const std::vector<double>& mean, const std::vector<double>& std,
    int64_t rounding, const std::vector<double>& fill, bool fill_is_output, int64_t dtype,
    int64_t memory_format, bool return_mask) {
  const std::vector<ImageSource> sources = sources_of(images, rows_of(placements));
  CropMirrorNormalizeCall call(sources, placements_of(placements, sources.size()), channels, height,
                               width, mean, std, rounding, fill, fill_is_output);
  const auto strides = choose_output(call, dtype, memory_format);
  Tensor out = empty_cpu_output(4, call.args.sizes, strides.data(), shim_dtype(call.args.dtype),
                                element_bytes(call.args.dtype));
  Tensor mask = empty_mask(call, return_mask);
  call.set_output(out.mutable_data_ptr(), strides.data(),
                  return_mask ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr);
  run(call);
  return {out, mask};
}

void crop_mirror_normalize_out(const std::vector<Tensor>& images, const Tensor& placements,
                               int64_t channels, const std::vector<double>& mean,
                               const std::vector<double>& std, int64_t rounding,
                               const std::vector<double>& fill, bool fill_is_output, Tensor out,
                               std::optional<Tensor> mask) {
  check(out.is_cpu() && out.dim() == 4, kCropMirrorNormalize,
        "out of 4 dimensions on the device of images (cpu)");
  const std::vector<ImageSource> sources = sources_of(images, rows_of(placements));
  CropMirrorNormalizeCall call(sources, placements_of(placements, sources.size()), channels,
                               out.size(2), out.size(3), mean, std, rounding, fill, fill_is_output);
  use_output(call, out, mask);
  run(call);
}

// From the recycled output buffers.
Tensor empty_output(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                    int64_t dtype) {
  check(dtype >= 0 && dtype <= 3, "empty_output",
        "dtype 0 (float32), 1 (float16), 2 (bfloat16) or 3 (uint8), got ", dtype);
  check(sizes.size() == strides.size(), "empty_output", "as many strides as sizes");
  const auto type = static_cast<ElementType>(dtype);
  return empty_cpu_output(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                          shim_dtype(type), element_bytes(type));
}

}  // namespace
}  // namespace pixfuse

int32_t pixfuse_crop_mirror_normalize(const pixfuse::CropMirrorNormalizeArgs* args) {
  pixfuse::CropMirrorNormalizeArgs own = *args;
  const bool pixel_by_pixel = own.output_strides[1] == 1 && own.sizes[1] > 1;
  own.past_caches = pixfuse::is_best_past_caches(own.sizes, own.dtype, pixel_by_pixel);
  return pixfuse::crop_mirror_normalize_cpu(own, torch_parallel_for);
}

STABLE_TORCH_LIBRARY_FRAGMENT(pixfuse, m) {
  m.def(
      "crop_mirror_normalize(Tensor[] images, Tensor placements, int channels, SymInt height, "
      "SymInt width, float[] mean, float[] std, int rounding, float[] fill, bool fill_is_output, "
      "int dtype, int memory_format, bool return_mask) -> (Tensor, Tensor)");
  m.def(
      "crop_mirror_normalize_out(Tensor[] images, Tensor placements, int channels, float[] mean, "
      "float[] std, int rounding, float[] fill, bool fill_is_output, Tensor(a!) out, "
      "Tensor(b!)? mask) -> ()");
  m.def("empty_output(SymInt[] size, SymInt[] stride, int dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pixfuse, CPU, m) {
  m.impl("crop_mirror_normalize", TORCH_BOX(&pixfuse::crop_mirror_normalize));
  m.impl("crop_mirror_normalize_out", TORCH_BOX(&pixfuse::crop_mirror_normalize_out));
}

STABLE_TORCH_LIBRARY_IMPL(pixfuse, CompositeExplicitAutograd, m) {
  m.impl("empty_output", TORCH_BOX(&pixfuse::empty_output));
}
