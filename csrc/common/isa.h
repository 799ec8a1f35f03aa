// The instruction set whose loops run: chosen once, when first asked for.
#pragma once
#include <cstdint>

namespace pixfuse {

// In the order of preference: the last one that the machine has is taken. The names are in
// python/pixfuse/_library.py.
// `vnni` is `avx512` whose vectors multiply bytes, `amx` that with a matrix unit for bytes: only
// some operators have loops for them.
enum class Isa : int32_t { portable = 0, avx2 = 1, avx512 = 2, neon = 3, amx = 4, vnni = 5 };

// Whether loops for this level were compiled in and this machine can run them.
bool isa_available(Isa isa);

// The level in use. PIXFUSE_ISA forces one; throws std::invalid_argument when it names a level
// that does not exist or that this machine cannot run.
Isa active_isa();

// For tests and benchmarks, which compare levels within one process; throws as above.
void set_active_isa(Isa isa);

}  // namespace pixfuse
