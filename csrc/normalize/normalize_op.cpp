// The operator on CPU tensors: schema, checks, allocation; hands plain pointers to normalize_cpu.
#include "common/cpu_output.h"
#include "normalize/normalize_args.h"

namespace pixfuse {
namespace {

void run(const NormalizeCall& call) {
  check(pixfuse_normalize(&call.args) == 0, "normalize", "torch's threads to run the loop");
}

Tensor normalize(const Tensor& images, const std::vector<double>& mean,
                 const std::vector<double>& std, int64_t rounding, int64_t input_layout,
                 int64_t dtype, int64_t memory_format) {
  NormalizeCall call(images, mean, std, rounding, input_layout);
  const auto strides = call.choose_output(dtype, memory_format);
  const int64_t skip = 4 - call.images.rank;
  Tensor out = empty_cpu_output(call.images.rank, call.args.sizes + skip, strides.data() + skip,
                                shim_dtype(call.args.dtype), element_bytes(call.args.dtype));
  call.args.output = out.mutable_data_ptr();
  run(call);
  return out;
}

void normalize_out(const Tensor& images, const std::vector<double>& mean,
                   const std::vector<double>& std, int64_t rounding, int64_t input_layout,
                   Tensor out) {
  NormalizeCall call(images, mean, std, rounding, input_layout);
  check(out.is_cpu(), "normalize", "out on the device of images (cpu)");
  set_output(call, out);
  run(call);
}

}  // namespace
}  // namespace pixfuse

int32_t pixfuse_normalize(const pixfuse::NormalizeArgs* args) {
  pixfuse::NormalizeArgs own = *args;
  const bool pixel_by_pixel = own.output_strides[1] == 1 && own.sizes[1] > 1;
  own.past_caches = pixfuse::is_best_past_caches(own.sizes, own.dtype, pixel_by_pixel);
  return pixfuse::normalize_cpu(own, torch_parallel_for);
}

STABLE_TORCH_LIBRARY_FRAGMENT(pixfuse, m) {
  m.def(
      "normalize(Tensor images, float[] mean, float[] std, int rounding, int input_layout, "
      "int dtype, int memory_format) -> Tensor");
  m.def(
      "normalize_out(Tensor images, float[] mean, float[] std, int rounding, int input_layout, "
      "Tensor(a!) out) -> ()");
  // Of a pinned CPU tensor, with the result on CUDA device `device`; its kernel is in the CUDA
  // library. `images` must stay alive and unchanged until the current stream has passed.
  m.def(
      "normalize_pinned(Tensor images, float[] mean, float[] std, int rounding, "
      "int input_layout, int dtype, int memory_format, int device) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pixfuse, CPU, m) {
  m.impl("normalize", TORCH_BOX(&pixfuse::normalize));
  m.impl("normalize_out", TORCH_BOX(&pixfuse::normalize_out));
}
