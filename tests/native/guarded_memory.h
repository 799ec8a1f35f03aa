// Memory that ends, or begins, where nothing may be touched. With a sanitizer it comes from the
// heap; without one, from pages next to one that is forbidden.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <utility>

// Of the sanitizers' libraries: there if the program is linked with one. The test programs
// themselves are compiled without, once for all of their builds.
extern "C" {
[[gnu::weak]] void __asan_init();
[[gnu::weak]] void __tsan_init();
}
inline bool has_sanitizer() { return __asan_init != nullptr || __tsan_init != nullptr; }

class GuardedMemory {
 public:
  // The last byte stands before a forbidden page, or the first byte after one.
  GuardedMemory(int64_t bytes, bool at_end) {
    if (has_sanitizer()) {
      data_ = base_ = static_cast<uint8_t*>(std::malloc(bytes));
      return;
    }
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t inside = (bytes + page - 1) / page * page;
    mapped_bytes_ = inside + 2 * page;
    void* const mapped =
        mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) std::abort();
    base_ = static_cast<uint8_t*>(mapped);
    mprotect(base_, page, PROT_NONE);
    mprotect(base_ + page + inside, page, PROT_NONE);
    data_ = base_ + page + (at_end ? inside - bytes : 0);
  }
  GuardedMemory(GuardedMemory&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)),
        data_(other.data_),
        mapped_bytes_(other.mapped_bytes_) {}
  ~GuardedMemory() {
    if (mapped_bytes_ == 0) {
      std::free(base_);
    } else if (base_ != nullptr) {
      munmap(base_, mapped_bytes_);
    }
  }
  uint8_t* data() const { return data_; }

 private:
  uint8_t *base_ = nullptr, *data_ = nullptr;
  int64_t mapped_bytes_ = 0;
};
