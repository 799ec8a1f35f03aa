// The __shared__ variables of all kernels in this program or library.
#pragma once
#include <cstddef>

namespace cuda_on_cpu {

// Overwrites all of them with NaN, whatever float type they hold.
void fill_static_shared_memory_with_nan();

bool in_static_shared_memory(const void* address);

// The most that one kernel declares. A device counts it together with the dynamic shared memory.
size_t largest_static_shared_bytes();

}  // namespace cuda_on_cpu
