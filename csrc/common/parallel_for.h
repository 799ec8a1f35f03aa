// How a kernel's launcher on the CPU gets threads, without knowing of torch.
#pragma once
#include <stdint.h>

namespace pixfuse {

// Splits [begin, end) over threads; the signature of torch's C function for it.
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain,
                                void (*body)(int64_t, int64_t, void*), void* context);

}  // namespace pixfuse
