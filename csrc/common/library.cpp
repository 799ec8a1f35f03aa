// Defines the `pixfuse` namespace of torch.ops and the operators that have no tensors: what
// pixfuse.info() and pixfuse.empty_cache() stand on. No strings cross this border, since they leak
// in torch 2.13's stable ABI: levels are the numbers of enum Isa.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/isa.h"
#include "common/output_buffer.h"

namespace {

int64_t active_isa() { return static_cast<int64_t>(pixfuse::active_isa()); }
bool isa_available(int64_t isa) { return pixfuse::isa_available(static_cast<pixfuse::Isa>(isa)); }
void set_active_isa(int64_t isa) { pixfuse::set_active_isa(static_cast<pixfuse::Isa>(isa)); }

void empty_cache() { pixfuse::empty_output_buffers(); }

std::vector<int64_t> output_buffer() {
  const pixfuse::OutputBufferStatistics s = pixfuse::output_buffer_statistics();
  return {s.limit_bytes, s.idle_bytes, s.in_use_bytes, s.allocated, s.reused};
}

}  // namespace

STABLE_TORCH_LIBRARY(pixfuse, m) {
  m.def("active_isa() -> int");
  m.def("isa_available(int isa) -> bool");
  m.def("set_active_isa(int isa) -> ()");
  m.def("empty_cache() -> ()");
  m.def("output_buffer() -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(pixfuse, CompositeExplicitAutograd, m) {
  m.impl("active_isa", TORCH_BOX(&active_isa));
  m.impl("isa_available", TORCH_BOX(&isa_available));
  m.impl("set_active_isa", TORCH_BOX(&set_active_isa));
  m.impl("empty_cache", TORCH_BOX(&empty_cache));
  m.impl("output_buffer", TORCH_BOX(&output_buffer));
}
