// Memory that ends, or begins, where nothing may be touched. With a sanitizer it comes from the
// heap; without one, from pages next to one that is forbidden.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
class GuardedMemory {
 public:
  GuardedMemory(int64_t bytes, bool) : base_(static_cast<uint8_t*>(std::malloc(bytes))) {}
  ~GuardedMemory() { std::free(base_); }
  uint8_t* data() const { return base_; }

 private:
  uint8_t* base_;
};
#else
class GuardedMemory {
 public:
  // The last byte stands before a forbidden page, or the first byte after one.
  GuardedMemory(int64_t bytes, bool at_end) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t inside = (bytes + page - 1) / page * page;
    mapped_bytes_ = inside + 2 * page;
    base_ = static_cast<uint8_t*>(
        mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) std::abort();
    mprotect(base_, page, PROT_NONE);
    mprotect(base_ + page + inside, page, PROT_NONE);
    data_ = base_ + page + (at_end ? inside - bytes : 0);
  }
  ~GuardedMemory() { munmap(base_, mapped_bytes_); }
  uint8_t* data() const { return data_; }

 private:
  uint8_t *base_, *data_;
  int64_t mapped_bytes_;
};
#endif
