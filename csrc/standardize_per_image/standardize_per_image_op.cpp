// The operator on CPU tensors: schema, checks, allocation; hands plain pointers to
// standardize_per_image_cpu.
#include <vector>

#include "common/cpu_output.h"
#include "standardize_per_image/standardize_per_image_args.h"

namespace pixfuse {
namespace {

void run(StandardizeCall& call) {
  StandardizeArgs& args = call.args;
  const auto count = static_cast<size_t>(args.sizes[0] * args.sizes[1]);
  std::vector<int64_t> sums(2 * count);
  std::vector<ChannelConstants> constants(count);
  args.sums = sums.data();
  args.squares = sums.data() + count;
  args.constants = constants.data();
  check(standardize_per_image_cpu(args, torch_parallel_for) == 0, call.kName,
        "torch's threads to run the loop");
}

Tensor standardize_per_image(const Tensor& images, bool per_channel, double floor,
                             int64_t input_layout, int64_t dtype, int64_t memory_format,
                             int64_t /*way*/) {
  StandardizeCall call(images, per_channel, floor, input_layout);
  call.choose_output(dtype, memory_format);
  StandardizeArgs& args = call.args;
  const int64_t skip = 4 - call.view.rank;
  Tensor out = empty_cpu_output(call.view.rank, args.sizes + skip, args.output_strides + skip,
                                shim_dtype(args.dtype), element_bytes(args.dtype));
  args.output = out.mutable_data_ptr();
  run(call);
  return out;
}

void standardize_per_image_out(const Tensor& images, bool per_channel, double floor,
                               int64_t input_layout, Tensor out, int64_t /*way*/) {
  StandardizeCall call(images, per_channel, floor, input_layout);
  check(out.is_cpu(), call.kName, "out on the device of images (cpu)");
  call.set_output(out);
  run(call);
}

}  // namespace
}  // namespace pixfuse

STABLE_TORCH_LIBRARY_FRAGMENT(pixfuse, m) {
  m.def(
      "standardize_per_image(Tensor images, bool per_channel, float floor, int input_layout, "
      "int dtype, int memory_format, int way=0) -> Tensor");
  m.def(
      "standardize_per_image_out(Tensor images, bool per_channel, float floor, int input_layout, "
      "Tensor(a!) out, int way=0) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pixfuse, CPU, m) {
  m.impl("standardize_per_image", TORCH_BOX(&pixfuse::standardize_per_image));
  m.impl("standardize_per_image_out", TORCH_BOX(&pixfuse::standardize_per_image_out));
}
