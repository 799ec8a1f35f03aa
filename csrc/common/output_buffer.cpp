#include "common/output_buffer.h"

#include <pthread.h>
#include <sys/mman.h>

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace pixfuse {
namespace {

constexpr int64_t kHugePageBytes = int64_t{2} << 20;
constexpr int64_t kDefaultLimitBytes = int64_t{1} << 30;

int64_t limit_from_environment() {
  const char* text = std::getenv("PIXFUSE_CACHE_BYTES");
  if (text == nullptr || *text == '\0') return kDefaultLimitBytes;
  int64_t value = 0;
  const char* end = text + std::strlen(text);
  const auto [stop, error] = std::from_chars(text, end, value);
  if (error != std::errc{} || stop != end || value < 0) {
    throw std::invalid_argument(
        "pixfuse: expected the environment variable PIXFUSE_CACHE_BYTES to be a whole number of "
        "bytes, 0 or more, got '" +
        std::string(text) + "'; 0 turns the output buffer cache off");
  }
  return value;
}

struct Block {
  void* memory;
  int64_t bytes;
};

void unmap(const Block& block) { munmap(block.memory, static_cast<size_t>(block.bytes)); }

// Memory aligned to a huge page: map one huge page too much, give the ends back.
void* map_aligned(int64_t bytes) {
  const size_t padded = static_cast<size_t>(bytes + kHugePageBytes);
  void* mapped = mmap(nullptr, padded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  const auto begin = reinterpret_cast<uintptr_t>(mapped);
  const uintptr_t aligned = (begin + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  const size_t before = aligned - begin, after = padded - before - static_cast<size_t>(bytes);
  if (before > 0) munmap(mapped, before);
  if (after > 0) munmap(reinterpret_cast<void*>(aligned + bytes), after);
  void* block = reinterpret_cast<void*>(aligned);
  madvise(block, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // advice: without it, only slower
  return block;
}

class Cache {
 public:
  void* acquire(int64_t bytes) {
    if (bytes < kMinBufferBytes || bytes > INT64_MAX / 2 || limit_bytes_ == 0) return nullptr;
    bytes = (bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
    const std::lock_guard lock(mutex_);
    forget_after_fork();
    // The last used block that fits is the likeliest to be in cache. A block an eighth too large
    // still fits: batches of about one size then share their blocks.
    for (auto block = idle_.rbegin(); block != idle_.rend(); ++block) {
      if (block->bytes < bytes || block->bytes > bytes + bytes / 8) continue;
      const Block found = *block;
      in_use_.emplace(found.memory, found.bytes);
      idle_.erase(std::next(block).base());
      statistics_.idle_bytes -= found.bytes;
      statistics_.in_use_bytes += found.bytes;
      ++statistics_.reused;
      return found.memory;
    }
    void* memory = map_aligned(bytes);
    if (memory == nullptr) return nullptr;
    // Room for the block's return now, so that release needs no memory.
    idle_.reserve(idle_.size() + in_use_.size() + 1);
    in_use_.emplace(memory, bytes);
    statistics_.in_use_bytes += bytes;
    ++statistics_.allocated;
    return memory;
  }

  void release(void* memory) noexcept {
    const std::lock_guard lock(mutex_);
    forget_after_fork();
    const auto entry = in_use_.find(memory);
    if (entry == in_use_.end()) return;  // not ours: nothing that could be done safely
    const Block block{entry->first, entry->second};
    in_use_.erase(entry);
    statistics_.in_use_bytes -= block.bytes;
    if (block.bytes > limit_bytes_) return unmap(block);
    idle_.push_back(block);
    statistics_.idle_bytes += block.bytes;
    trim(limit_bytes_);
  }

  void empty() {
    const std::lock_guard lock(mutex_);
    forget_after_fork();
    trim(0);
  }

  OutputBufferStatistics statistics() {
    const std::lock_guard lock(mutex_);
    forget_after_fork();
    OutputBufferStatistics result = statistics_;
    result.limit_bytes = limit_bytes_;
    return result;
  }

  // Around fork(), so that the child never inherits a cache in the middle of a change.
  void before_fork() { mutex_.lock(); }
  void after_fork_in_parent() { mutex_.unlock(); }
  void after_fork_in_child() {
    forked_ = true;  // the rest waits for the next call: little is allowed between fork and exec
    mutex_.unlock();
  }

 private:
  void trim(int64_t limit) {
    size_t oldest = 0;
    while (statistics_.idle_bytes > limit) {
      unmap(idle_[oldest]);
      statistics_.idle_bytes -= idle_[oldest].bytes;
      ++oldest;
    }
    idle_.erase(idle_.begin(), idle_.begin() + static_cast<std::ptrdiff_t>(oldest));
  }

  void forget_after_fork() {
    if (!forked_) return;
    forked_ = false;
    trim(0);
  }

  std::mutex mutex_;
  const int64_t limit_bytes_ = limit_from_environment();
  std::vector<Block> idle_;  // the one idle for longest first
  std::unordered_map<void*, int64_t> in_use_;
  OutputBufferStatistics statistics_{};
  bool forked_ = false;
};

// Never destroyed: tensors may outlive every static object.
Cache& cache() {
  static Cache* const instance = [] {
    auto* created = new Cache;
    pthread_atfork([] { cache().before_fork(); }, [] { cache().after_fork_in_parent(); },
                   [] { cache().after_fork_in_child(); });
    return created;
  }();
  return *instance;
}

}  // namespace

void* acquire_output_buffer(int64_t bytes) { return cache().acquire(bytes); }
void release_output_buffer(void* block) noexcept { cache().release(block); }
void empty_output_buffers() { cache().empty(); }
OutputBufferStatistics output_buffer_statistics() { return cache().statistics(); }

}  // namespace pixfuse
