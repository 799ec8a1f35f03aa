// The operator on CPU tensors: schema, checks, allocation; hands plain pointers to denormalize_cpu.
#include <tuple>

#include "common/cpu_output.h"
#include "denormalize/denormalize_args.h"

namespace pixfuse {
namespace {

// Returns the tallies: empty when nothing is to be counted.
Tensor run(DenormalizeCall& call, bool count) {
  const int64_t size = count ? static_cast<int64_t>(Tally::count) : 0;
  Tensor tallies = zero_cpu_counts(call.kName, 1, &size);
  if (count) call.args.tallies = static_cast<int64_t*>(tallies.mutable_data_ptr());
  check(denormalize_cpu(call.args, torch_parallel_for) == 0, call.kName,
        "torch's threads to run the loop");
  return tallies;
}

std::tuple<Tensor, Tensor> denormalize(const Tensor& values, const std::vector<double>& mean,
                                       const std::vector<double>& std, int64_t output_layout,
                                       bool count) {
  DenormalizeCall call(values, mean, std, output_layout);
  const int64_t skip = 4 - call.rank;
  Tensor out = empty_cpu_output(call.rank, call.output_sizes + skip, call.output_strides + skip,
                                aoti_torch_dtype_uint8(), 1);
  call.args.output = static_cast<uint8_t*>(out.mutable_data_ptr());
  Tensor tallies = run(call, count);
  return {out, tallies};
}

Tensor denormalize_out(const Tensor& values, const std::vector<double>& mean,
                       const std::vector<double>& std, int64_t output_layout, bool count,
                       Tensor out) {
  DenormalizeCall call(values, mean, std, output_layout);
  check(out.is_cpu(), call.kName, "out on the device of tensor (cpu)");
  call.set_output(out);
  return run(call, count);
}

}  // namespace
}  // namespace pixfuse

STABLE_TORCH_LIBRARY_FRAGMENT(pixfuse, m) {
  m.def(
      "denormalize(Tensor values, float[] mean, float[] std, int output_layout, bool count) -> "
      "(Tensor, Tensor)");
  m.def(
      "denormalize_out(Tensor values, float[] mean, float[] std, int output_layout, bool count, "
      "Tensor(a!) out) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pixfuse, CPU, m) {
  m.impl("denormalize", TORCH_BOX(&pixfuse::denormalize));
  m.impl("denormalize_out", TORCH_BOX(&pixfuse::denormalize_out));
}
