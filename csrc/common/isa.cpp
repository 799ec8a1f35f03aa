#include "common/isa.h"

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pixfuse {
namespace {

struct Level {
  Isa isa;
  const char* name;
};
// The last one that the machine has is taken.
constexpr Level kLevels[] = {
    {Isa::portable, "portable"}, {Isa::avx2, "avx2"}, {Isa::avx512, "avx512"}, {Isa::vnni, "vnni"},
    {Isa::gfni, "gfni"},         {Isa::amx, "amx"},   {Isa::neon, "neon"}};

std::string available_names() {
  std::string names;
  for (const Level& level : kLevels) {
    if (isa_available(level.isa)) names += (names.empty() ? "" : ", ") + std::string(level.name);
  }
  return names;
}

Isa best_isa() {
  Isa best = Isa::portable;
  for (const Level& level : kLevels) {
    if (isa_available(level.isa)) best = level.isa;
  }
  return best;
}

Isa choose_isa() {
  const char* forced = std::getenv("PIXFUSE_ISA");
  if (forced == nullptr || *forced == '\0') return best_isa();
  for (const Level& level : kLevels) {
    if (std::string(forced) == level.name && isa_available(level.isa)) return level.isa;
  }
  throw std::invalid_argument(
      "pixfuse: expected the environment variable PIXFUSE_ISA to be one of " + available_names() +
      " on this machine, got '" + forced + "'; unset it to let pixfuse choose");
}

#if defined(__x86_64__)
// Tiles are registers so large that a process must ask Linux for them, once.
bool tiles_available() {
#if defined(PIXFUSE_PLAIN_TILES)
  return true;
#else
  static const bool available = [] {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return available;
#endif
}
#endif

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{choose_isa()};  // stays unset, and throws again, while it throws
  return isa;
}

}  // namespace

bool isa_available(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return true;
#if defined(__x86_64__)
    case Isa::avx2:  // what -march=x86-64-v3 may use, as far as the loops can
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
    case Isa::avx512:  // -march=x86-64-v4
      return isa_available(Isa::avx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::vnni:
      return isa_available(Isa::avx512) && __builtin_cpu_supports("avx512vnni");
    case Isa::gfni:
      return isa_available(Isa::vnni) && __builtin_cpu_supports("gfni") &&
             __builtin_cpu_supports("avx512vpopcntdq");
    case Isa::amx:
      return isa_available(Isa::avx512) && tiles_available();
#elif defined(__aarch64__)
    case Isa::neon:
      return true;
#endif
    default:
      return false;
  }
}

bool adds_beside_multiplying() {
#if defined(PIXFUSE_ADDS_BESIDE_MULTIPLYING)
  return true;
#elif defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

Isa common_isa() {
  const Isa isa = active_isa();
  switch (isa) {
    case Isa::vnni:
    case Isa::gfni:
    case Isa::amx:
      return Isa::avx512;
    default:
      return isa;
  }
}

void set_active_isa(Isa isa) {
  if (!isa_available(isa)) {
    throw std::invalid_argument("pixfuse: expected an instruction set that this machine can run (" +
                                available_names() + ")");
  }
  active().store(isa, std::memory_order_relaxed);
}

}  // namespace pixfuse
