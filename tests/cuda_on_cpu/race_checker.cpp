// Finds accesses of two threads to one byte that no barrier orders, at least one of them a write,
// and reads of shared memory that nothing has written.
//
// gcc's -fsanitize=thread calls a function before every access; libtsan, which knows OS threads and
// not CUDA's, is not linked: these are the functions. Kernels alone are compiled so. Every byte has
// a shadow that remembers who touched it last and when; the first error aborts.
#include <unistd.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <unordered_map>

#include "emulator.h"

namespace cuda_on_cpu {
namespace {

enum class Kind : uint8_t { read, write, atomic };

struct Access {
  Moment moment{};  // launch 0: there was none
  Kind kind = Kind::read;
  const void* code = nullptr;
};

// Of the readers since the last write, two threads are enough: a later write by one thread is then
// compared with another, and a block barrier orders both or neither. (Of more than two readers in
// one warp between two warp barriers, one may be forgotten.)
struct Shadow {
  Access write;
  Access reads[2];
};

constexpr uintptr_t kPageBytes = 4096;
struct ShadowPage {
  Shadow bytes[kPageBytes];
};

Shadow& shadow_of(uintptr_t address) {
  static std::unordered_map<uintptr_t, std::unique_ptr<ShadowPage>> pages;
  static uintptr_t last_number = 0;
  static ShadowPage* last_page = nullptr;
  const uintptr_t number = address / kPageBytes;
  if (!last_page || number != last_number) {
    auto& page = pages[number];
    if (!page) page = std::make_unique<ShadowPage>();
    last_number = number;
    last_page = page.get();
  }
  return last_page->bytes[address % kPageBytes];
}

// Is `earlier` over before `now`, whatever the scheduling?
bool ordered(const Access& earlier, const Access& now, Memory memory) {
  const Moment &a = earlier.moment, &b = now.moment;
  if (a.launch != b.launch) return true;  // launches follow one another on a stream
  if (earlier.kind == Kind::atomic && now.kind == Kind::atomic) return true;
  if (a.block != b.block) return memory == Memory::shared;  // each block has its own
  if (a.thread == b.thread || a.block_epoch != b.block_epoch) return true;
  return a.thread / kWarpLanes == b.thread / kWarpLanes &&
         synchronized_with_lane(a.thread % kWarpLanes, a.lane_epoch);
}

void print_access(const char* when, const Access& access) {
  static const char* const kNames[] = {"read", "write", "atomic"};
  std::fprintf(stderr, "  %s: %s by block %u, thread %u, at ", when,
               kNames[static_cast<int>(access.kind)], access.moment.block, access.moment.thread);
  // The return address belongs to the next instruction: one byte back is the access itself.
  char command[128];
  std::snprintf(command, sizeof command, "addr2line -se /proc/%d/exe %#zx >&2 2>/dev/null",
                static_cast<int>(getpid()), reinterpret_cast<size_t>(access.code) - 1);
  std::fflush(stderr);
  if (std::system(command) != 0) std::fprintf(stderr, "%p\n", access.code);
}

[[noreturn]] void report_race(const Access& earlier, const Access& now, Memory memory) {
  std::fprintf(stderr, "cuda_on_cpu: race on %s memory\n",
               memory == Memory::shared ? "shared" : "global");
  print_access("one  ", earlier);
  print_access("other", now);
  std::abort();
}

[[noreturn]] void report_uninitialized(const Access& now) {
  std::fprintf(stderr, "cuda_on_cpu: uninitialized shared memory\n");
  print_access("here ", now);
  std::abort();
}

void remember_read(Shadow& shadow, const Access& now, Memory memory) {
  shadow.reads[ordered(shadow.reads[0], now, memory) ? 0 : 1] = now;
}

void check_byte(Shadow& shadow, const Access& now, Memory memory) {
  const Moment& written = shadow.write.moment;
  const bool initialized = written.launch == now.moment.launch && written.block == now.moment.block;
  if (memory == Memory::shared && now.kind != Kind::write && !initialized) {
    report_uninitialized(now);
  }
  if (!ordered(shadow.write, now, memory)) report_race(shadow.write, now, memory);
  if (now.kind == Kind::read) {
    remember_read(shadow, now, memory);
    return;
  }
  for (Access& read : shadow.reads) {
    if (!ordered(read, now, memory)) report_race(read, now, memory);
    read = {};
  }
  shadow.write = now;
}

uint64_t checked_bytes = 0;

void check(const void* address, size_t bytes, Kind kind, const void* code) {
  if (!in_kernel()) return;
  const Memory memory = memory_of(address);
  if (memory == Memory::thread_private) return;
  const Access now{current_moment(), kind, code};
  const auto first = reinterpret_cast<uintptr_t>(address);
  for (size_t i = 0; i < bytes; ++i) check_byte(shadow_of(first + i), now, memory);
  checked_bytes += bytes;
}

void check_atomic(const void* address, size_t bytes, const void* code) {
  check(address, bytes, Kind::atomic, code);
}

// That the checker saw anything at all is worth a line: a build without the calls finds no races.
struct Attached {
  Attached() { atomic_observer = &check_atomic; }
  ~Attached() {
    std::fprintf(stderr, "race checker: %llu bytes checked\n",
                 static_cast<unsigned long long>(checked_bytes));
  }
} attached;

}  // namespace
}  // namespace cuda_on_cpu

// The names that gcc calls.
#define CUDA_ON_CPU_CHECK(bytes, kind) \
  ::cuda_on_cpu::check(address, bytes, ::cuda_on_cpu::Kind::kind, __builtin_return_address(0))
#define CUDA_ON_CPU_HOOKS(bytes)                                                       \
  void __tsan_read##bytes(void* address) { CUDA_ON_CPU_CHECK(bytes, read); }           \
  void __tsan_write##bytes(void* address) { CUDA_ON_CPU_CHECK(bytes, write); }         \
  void __tsan_unaligned_read##bytes(void* address) { CUDA_ON_CPU_CHECK(bytes, read); } \
  void __tsan_unaligned_write##bytes(void* address) { CUDA_ON_CPU_CHECK(bytes, write); }

extern "C" {
CUDA_ON_CPU_HOOKS(1)
CUDA_ON_CPU_HOOKS(2)
CUDA_ON_CPU_HOOKS(4)
CUDA_ON_CPU_HOOKS(8)
CUDA_ON_CPU_HOOKS(16)
void __tsan_read_range(void* address, size_t bytes) { CUDA_ON_CPU_CHECK(bytes, read); }
void __tsan_write_range(void* address, size_t bytes) { CUDA_ON_CPU_CHECK(bytes, write); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
