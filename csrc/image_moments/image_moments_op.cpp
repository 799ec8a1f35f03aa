// The operator on CPU tensors: schema, checks, allocation; hands plain pointers to
// image_moments_cpu.
#include <tuple>

#include "common/counts.h"
#include "image_moments/image_moments_args.h"

namespace pixfuse {
namespace {

std::tuple<Tensor, Tensor> image_moments(const Tensor& images, int64_t input_layout) {
  ImageMomentsArgs args = moments_args("image_moments", images, input_layout);
  Tensor sums = zero_cpu_counts("image_moments", 2, args.sizes);
  Tensor squares = zero_cpu_counts("image_moments", 2, args.sizes);
  args.sums = static_cast<int64_t*>(sums.mutable_data_ptr());
  args.squares = static_cast<int64_t*>(squares.mutable_data_ptr());
  check(image_moments_cpu(args, torch_parallel_for) == 0, "image_moments",
        "torch's threads to run the loop");
  return {sums, squares};
}

}  // namespace
}  // namespace pixfuse

int32_t pixfuse_image_moments(const pixfuse::ImageMomentsArgs* args) {
  return pixfuse::image_moments_cpu(*args, torch_parallel_for);
}

STABLE_TORCH_LIBRARY_FRAGMENT(pixfuse, m) {
  m.def("image_moments(Tensor images, int input_layout) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pixfuse, CPU, m) {
  m.impl("image_moments", TORCH_BOX(&pixfuse::image_moments));
}
