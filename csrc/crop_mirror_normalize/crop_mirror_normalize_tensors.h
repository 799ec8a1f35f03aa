// From torch tensors to a CropMirrorNormalizeCall and its output: what the CPU and the CUDA
// operator share beyond crop_mirror_normalize_args.h. Header-only, since each of the two libraries
// has its own copy.
#pragma once
#include <array>
#include <limits>
#include <optional>
#include <vector>

#include "common/tensor_view.h"
#include "crop_mirror_normalize/crop_mirror_normalize_args.h"

namespace pixfuse {

// (C, H, W) tensors and (n, C, H, W) batches, image by image. All lie where the first one does.
// `most` bounds the images: a batch without memory of its own may claim any number of them.
inline std::vector<ImageSource> sources_of(const std::vector<Tensor>& images,
                                           int64_t most = std::numeric_limits<int64_t>::max()) {
  std::vector<ImageSource> sources;
  check(!images.empty(), kCropMirrorNormalize, "at least 1 tensor of images, got none");
  for (const Tensor& tensor : images) {
    const int64_t rank = tensor.dim();
    check_dense(kCropMirrorNormalize, tensor, "images");
    check(tensor.scalar_type() == ScalarType::Byte, kCropMirrorNormalize, "images of dtype uint8");
    check(rank == 3 || rank == 4, kCropMirrorNormalize, "images to have 3 or 4 dimensions, got ",
          rank);
    check(tensor.is_cuda() == images[0].is_cuda() &&
              tensor.get_device_index() == images[0].get_device_index(),
          kCropMirrorNormalize, "images on one device");
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    const int64_t d = rank - 3, count = rank == 4 ? sizes[0] : 1;
    check(count <= most - static_cast<int64_t>(sources.size()), kCropMirrorNormalize, "at most ",
          most, " images, as placements has rows");
    const auto* pixels = static_cast<const uint8_t*>(tensor.const_data_ptr());
    for (int64_t n = 0; n < count; ++n) {
      sources.push_back({rank == 4 ? pixels + n * strides[0] : pixels, sizes[d + 1], sizes[d + 2],
                         sizes[d], strides[d + 1], strides[d + 2], strides[d]});
    }
  }
  return sources;
}

// How many images the placements are for, as far as it can be said before they are checked.
inline int64_t rows_of(const Tensor& placements) {
  return placements.dim() > 0 ? placements.size(0) : 0;
}

// The rows of a contiguous int64 CPU tensor of shape (N, 4).
inline const Placement* placements_of(const Tensor& placements, size_t count) {
  check_dense(kCropMirrorNormalize, placements, "placements");
  check(placements.is_cpu() && placements.scalar_type() == ScalarType::Long &&
            placements.dim() == 2 && placements.is_contiguous() && placements.size(1) == 4 &&
            placements.size(0) == static_cast<int64_t>(count),
        kCropMirrorNormalize, "placements to be a contiguous int64 CPU tensor of shape (", count,
        ", 4)");
  return static_cast<const Placement*>(placements.const_data_ptr());
}

// The type and the strides of an output that the operator allocates.
inline std::array<int64_t, 4> choose_output(CropMirrorNormalizeCall& call, int64_t dtype,
                                            int64_t memory_format) {
  check(dtype >= 0 && dtype <= 3, kCropMirrorNormalize,
        "dtype 0 (float32), 1 (float16), 2 (bfloat16) or 3 (uint8), got ", dtype);
  check(memory_format == 0 || memory_format == 1, kCropMirrorNormalize,
        "memory_format 0 (contiguous) or 1 (channels_last), got ", memory_format);
  call.set_dtype(static_cast<ElementType>(dtype));
  return dense_strides(call.args.sizes, memory_format == 1);
}

inline ElementType element_type_of(ScalarType dtype) {
  if (dtype == ScalarType::Byte) return ElementType::uint8;
  check(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
        kCropMirrorNormalize, "out.dtype to be float32, float16, bfloat16 or uint8");
  return float_type_of(kCropMirrorNormalize, dtype, "out");
}

// The memory of a mask, if there is one: bool, (N, H, W), contiguous, on the device of `out`.
inline uint8_t* mask_pointer(const CropMirrorNormalizeCall& call, const Tensor& out,
                             const std::optional<Tensor>& mask) {
  if (!mask.has_value()) return nullptr;
  const auto& sizes = call.args.sizes;
  check_dense(kCropMirrorNormalize, *mask, "mask");
  check(mask->scalar_type() == ScalarType::Bool && mask->dim() == 3 && mask->is_contiguous() &&
            mask->size(0) == sizes[0] && mask->size(1) == sizes[2] && mask->size(2) == sizes[3] &&
            mask->is_cuda() == out.is_cuda() && mask->get_device_index() == out.get_device_index(),
        kCropMirrorNormalize, "mask to be a contiguous bool tensor of shape (", sizes[0], ", ",
        sizes[2], ", ", sizes[3], ") on the device of out");
  return static_cast<uint8_t*>(mask->mutable_data_ptr());
}

// Checks a caller's output and mask against the call and takes them over.
inline void use_output(CropMirrorNormalizeCall& call, Tensor& out,
                       const std::optional<Tensor>& mask) {
  check_dense(kCropMirrorNormalize, out, "out");
  check(out.dim() == 4, kCropMirrorNormalize, "out to have 4 dimensions, got ", out.dim());
  const TensorView view = view_as_nchw(kCropMirrorNormalize, out, InputLayout::nchw, "out");
  const auto strides = strides_of_output(kCropMirrorNormalize, view, call.args.sizes);
  call.set_dtype(element_type_of(out.scalar_type()));
  call.set_output(out.mutable_data_ptr(), strides.data(), mask_pointer(call, out, mask));
}

}  // namespace pixfuse
