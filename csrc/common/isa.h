// The instruction set whose loops run: chosen once, when first asked for.
#pragma once
#include <cstdint>

namespace pixfuse {

// The names, in the order of preference, are in isa.cpp and in python/pixfuse/_library.py.
// What follows avx512 is that with more, and only some operators have loops for it: vectors that
// multiply bytes (`vnni`), that also turn matrices of bits and count bits (`gfni`: GFNI and
// AVX512-VPOPCNTDQ; on AMD's processors bytes are multiplied another way too), a matrix unit for
// bytes (`amx`).
enum class Isa : int32_t {
  portable = 0,
  avx2 = 1,
  avx512 = 2,
  neon = 3,
  amx = 4,
  vnni = 5,
  gfni = 6
};

// Whether loops for this level were compiled in and this machine can run them.
bool isa_available(Isa isa);

// The level in use. PIXFUSE_ISA forces one; throws std::invalid_argument when it names a level
// that does not exist or that this machine cannot run.
Isa active_isa();

// That level, or avx512 instead of what follows it: every operator has loops for these.
Isa common_isa();

// Whether vectors are added beside others that are multiplied, not instead of them: AMD's
// processors have four units that add, two of which multiply, Intel's have two for both in 512
// bits. Tests have themselves told so with PIXFUSE_ADDS_BESIDE_MULTIPLYING: results are the same
// anywhere.
bool adds_beside_multiplying();

// For tests and benchmarks, which compare levels within one process; throws as above.
void set_active_isa(Isa isa);

}  // namespace pixfuse
