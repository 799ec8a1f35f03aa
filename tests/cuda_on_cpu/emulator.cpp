#include "emulator.h"

#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "fiber.h"
#include "static_shared_memory.h"

namespace cuda_on_cpu {

BuiltinVariables builtin_variables;
Device device;
void (*atomic_observer)(const void*, size_t, const void*) = nullptr;

namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 48 * 1024;  // static and dynamic, if nothing more is allowed

// The order in which the threads of a block start, and resume after a barrier.
enum class Order { forward, reverse, random };

// CUDA_ON_CPU_ORDER and CUDA_ON_CPU_SEED.
struct Options {
  Order order = Order::forward;
  unsigned seed = 1;

  static Options from_environment() {
    Options options;
    if (const char* order = std::getenv("CUDA_ON_CPU_ORDER")) options.order = parse_order(order);
    if (const char* seed = std::getenv("CUDA_ON_CPU_SEED")) {
      options.seed = static_cast<unsigned>(std::strtoul(seed, nullptr, 10));
    }
    return options;
  }

  static Order parse_order(std::string_view name) {
    if (name == "forward") return Order::forward;
    if (name == "reverse") return Order::reverse;
    if (name == "random") return Order::random;
    std::fprintf(stderr, "cuda_on_cpu: CUDA_ON_CPU_ORDER is forward, reverse or random\n");
    std::abort();
  }
};

// Threads of a warp that meet at warp operations with the same mask.
struct LaneGroup {
  unsigned mask = 0;
  unsigned arrived = 0;
  unsigned meeting = 0;  // how many meetings have ended
  SourceLocation where;  // of the meeting that is under way
  LaneValues values[2];  // by turns: a lane may be in the next meeting before all have read these
};

enum class State { ready, at_block_barrier, at_warp_operation, finished };

struct Thread {
  Fiber fiber;
  State state = State::finished;
  unsigned linear = 0;
  uint3 index{};
  SourceLocation waits_at;
  const LaneGroup* group = nullptr;  // of the warp operation that it waits in
  unsigned meeting = 0;
  // For the race checker, a vector clock over the lanes of the warp: its own entry counts this
  // thread's warp barriers; another entry is the last epoch of that lane known to be over.
  uint32_t lane_epochs[kWarpLanes] = {};

  unsigned lane() const { return linear % kWarpLanes; }
  unsigned warp() const { return linear / kWarpLanes; }
};

struct Warp {
  unsigned lanes = 0;  // those that exist: the last warp of a block may be partial
  Thread* threads[kWarpLanes] = {};
  std::vector<std::unique_ptr<LaneGroup>> groups;

  LaneGroup& group_of(unsigned mask) {
    for (auto& group : groups) {
      if (group->mask == mask) return *group;
    }
    groups.push_back(std::make_unique<LaneGroup>());
    groups.back()->mask = mask;
    return *groups.back();
  }
};

// The stacks of all threads of a block. Only pages that are touched take memory; the lowest page of
// each is a guard, so that a stack that overflows does not run into its neighbour.
std::byte* reserve_stacks() {
  void* memory = mmap(nullptr, kMaxThreads * Fiber::kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("cuda_on_cpu: cannot reserve the stacks");
    std::abort();
  }
  auto* stacks = static_cast<std::byte*>(memory);
  const auto page_bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  for (unsigned i = 0; i < kMaxThreads; ++i) {
    mprotect(stacks + i * Fiber::kStackBytes, page_bytes, PROT_NONE);
  }
  return stacks;
}

bool contains(const void* begin, size_t bytes, const void* address) {
  return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(begin) < bytes;
}

class Emulator {
 public:
  cudaError_t run_grid(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes);
  cudaError_t allow_shared_memory(const void* function, size_t dynamic_bytes);
  void block_barrier(SourceLocation where);
  const LaneValues& exchange_in_warp(unsigned mask, const void* value, size_t bytes,
                                     SourceLocation where);
  void synchronize_warp(unsigned mask, SourceLocation where);

  Moment current_moment() const;
  Memory memory_of(const void* address) const;
  bool in_kernel() const { return current_ != nullptr; }
  const Thread& current() const { return *current_; }
  void* dynamic_shared() const { return dynamic_shared_; }
  void print_position() const;

 private:
  static void run_threads();
  cudaError_t check_launch(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes) const;

  void begin_launch(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes);
  void run_block(uint3 block_index);
  void begin_block(uint3 block_index);
  bool start_threads();
  bool resume_threads();
  bool run_round();
  bool open_block_barrier();

  Thread& new_thread();
  void assign_next(Thread& thread);
  Thread* next_of_round();
  void set_current(Thread& thread);
  void leave(Thread& thread);
  void suspend_current(State state, SourceLocation where);
  const LaneValues& meet(unsigned mask, const void* value, size_t bytes, SourceLocation where,
                         bool orders_memory);
  void join_lane_epochs(const Warp& warp, unsigned lanes);
  [[noreturn]] void fail_stuck(const char* what) const;

  Options options_;
  std::mt19937 random_;
  std::byte* stacks_ = nullptr;

  Kernel kernel_{};
  std::map<const void*, size_t> allowed_shared_bytes_;  // of kernels, dynamic
  unsigned thread_count_ = 0;
  std::vector<unsigned> start_order_;
  void* dynamic_shared_ = nullptr;
  size_t dynamic_shared_bytes_ = 0;
  uint32_t launch_ = 0;

  uint32_t block_ = 0;
  uint32_t block_epoch_ = 0;
  std::vector<Warp> warps_;
  std::vector<std::unique_ptr<Thread>> threads_;  // of this and earlier blocks, to be used again
  std::vector<Thread*> started_;                  // of this block, in the order to resume them
  unsigned next_ = 0;                             // in start_order_
  bool starting_ = false;                         // the round that runs, or resuming
  size_t next_to_resume_ = 0;                     // in started_
  unsigned finished_ = 0;
  unsigned at_barrier_ = 0;
  Thread* current_ = nullptr;
};

Emulator emulator;

cudaError_t Emulator::allow_shared_memory(const void* function, size_t dynamic_bytes) {
  if (largest_static_shared_bytes() + dynamic_bytes > static_cast<size_t>(device.shared_bytes)) {
    return cudaErrorInvalidValue;
  }
  allowed_shared_bytes_[function] = dynamic_bytes;
  return cudaSuccess;
}

cudaError_t Emulator::check_launch(const Kernel& kernel, dim3 grid, dim3 block,
                                   size_t shared_bytes) const {
  const auto none = [](dim3 size) { return size.x == 0 || size.y == 0 || size.z == 0; };
  const bool grid_fits = grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535;
  const bool block_fits = block.x <= 1024 && block.y <= 1024 && block.z <= 64 &&
                          uint64_t{block.x} * block.y * block.z <= kMaxThreads;
  if (none(grid) || none(block) || !grid_fits || !block_fits) return cudaErrorInvalidConfiguration;
  if (largest_static_shared_bytes() + shared_bytes > kMaxSharedBytes) {
    const auto allowed = allowed_shared_bytes_.find(kernel.function);
    if (allowed == allowed_shared_bytes_.end() || shared_bytes > allowed->second) {
      return cudaErrorInvalidValue;
    }
  }
  return cudaSuccess;
}

cudaError_t Emulator::run_grid(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  const cudaError_t error = check_launch(kernel, grid, block, shared_bytes);
  if (error != cudaSuccess) return error;
  begin_launch(kernel, grid, block, shared_bytes);
  uint3 index;
  for (index.z = 0; index.z < grid.z; ++index.z) {
    for (index.y = 0; index.y < grid.y; ++index.y) {
      for (index.x = 0; index.x < grid.x; ++index.x) {
        run_block(index);
        ++block_;
      }
    }
  }
  std::free(dynamic_shared_);
  dynamic_shared_ = nullptr;
  return cudaSuccess;
}

void Emulator::begin_launch(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  if (!stacks_) stacks_ = reserve_stacks();
  options_ = Options::from_environment();
  random_.seed(options_.seed);
  builtin_variables.grid_dim = grid;
  builtin_variables.block_dim = block;
  kernel_ = kernel;
  thread_count_ = block.x * block.y * block.z;
  start_order_.resize(thread_count_);
  std::iota(start_order_.begin(), start_order_.end(), 0u);
  if (options_.order == Order::reverse) std::reverse(start_order_.begin(), start_order_.end());
  // Exactly this size: AddressSanitizer then sees the first byte beyond it.
  dynamic_shared_ = shared_bytes ? std::malloc(shared_bytes) : nullptr;
  dynamic_shared_bytes_ = shared_bytes;
  ++launch_;
  block_ = 0;
}

void Emulator::begin_block(uint3 block_index) {
  builtin_variables.block_index = block_index;
  fill_static_shared_memory_with_nan();
  if (dynamic_shared_) std::memset(dynamic_shared_, 0xff, dynamic_shared_bytes_);
  if (options_.order == Order::random) {
    std::shuffle(start_order_.begin(), start_order_.end(), random_);
  }
  block_epoch_ = 0;
  started_.clear();
  next_ = finished_ = at_barrier_ = 0;
  warps_.clear();
  warps_.resize((thread_count_ + kWarpLanes - 1) / kWarpLanes);
  for (unsigned thread = 0; thread < thread_count_; ++thread) {
    warps_[thread / kWarpLanes].lanes |= 1u << thread % kWarpLanes;
  }
}

void Emulator::run_block(uint3 block_index) {
  begin_block(block_index);
  while (finished_ < thread_count_) {
    bool progress = start_threads();
    progress |= resume_threads();
    progress |= open_block_barrier();
    if (!progress) fail_stuck("threads wait for each other forever");
  }
}

bool Emulator::start_threads() {
  starting_ = true;
  return run_round();
}

bool Emulator::resume_threads() {
  if (options_.order == Order::random) std::shuffle(started_.begin(), started_.end(), random_);
  starting_ = false;
  next_to_resume_ = 0;
  return run_round();
}

// Each thread of a round hands over to the next when it leaves; the last comes back here.
bool Emulator::run_round() {
  Thread* const first = next_of_round();
  if (first == nullptr) return false;
  set_current(*first);
  first->fiber.resume();
  current_ = nullptr;
  return true;
}

Thread* Emulator::next_of_round() {
  if (starting_) {
    if (next_ == thread_count_) return nullptr;
    Thread& thread = new_thread();
    assign_next(thread);
    return &thread;
  }
  while (next_to_resume_ < started_.size()) {
    Thread& thread = *started_[next_to_resume_++];
    if (thread.state == State::at_warp_operation && thread.group->meeting != thread.meeting) {
      thread.state = State::ready;
    }
    if (thread.state == State::ready) return &thread;
  }
  return nullptr;
}

// Stricter than a GPU, where threads that have returned may be missing and barriers on different
// lines may or may not be one: all threads of the block must stand at one line.
bool Emulator::open_block_barrier() {
  if (at_barrier_ == 0 || at_barrier_ + finished_ != thread_count_) return false;
  const char* divergent = "__syncthreads is not reached by all threads at one line";
  if (finished_ != 0) fail_stuck(divergent);
  const unsigned line = started_.front()->waits_at.line;
  for (const Thread* thread : started_) {
    if (thread->waits_at.line != line) fail_stuck(divergent);
  }
  for (Thread* thread : started_) thread->state = State::ready;
  at_barrier_ = 0;
  ++block_epoch_;
  return true;
}

Thread& Emulator::new_thread() {
  const size_t index = started_.size();
  if (index == threads_.size()) {
    threads_.push_back(std::make_unique<Thread>());
    // What threads use of their stacks would otherwise lie in the same few lines of the caches.
    const size_t unused = index % 128 * 704;
    threads_.back()->fiber.prepare(stacks_ + index * Fiber::kStackBytes, unused,
                                   &Emulator::run_threads);
  }
  started_.push_back(threads_[index].get());
  return *threads_[index];
}

void Emulator::assign_next(Thread& thread) {
  const dim3 block = builtin_variables.block_dim;
  const unsigned linear = start_order_[next_++];
  thread.state = State::ready;
  thread.linear = linear;
  thread.index = {linear % block.x, linear / block.x % block.y, linear / block.x / block.y};
  std::fill(std::begin(thread.lane_epochs), std::end(thread.lane_epochs), 0u);
  thread.lane_epochs[thread.lane()] = 1;
  warps_[thread.warp()].threads[thread.lane()] = &thread;
  builtin_variables.thread_index = thread.index;
}

void Emulator::set_current(Thread& thread) {
  current_ = &thread;
  builtin_variables.thread_index = thread.index;
}

void Emulator::leave(Thread& thread) {
  Thread* const next = next_of_round();
  if (next == nullptr) {
    thread.fiber.suspend();
  } else {
    set_current(*next);
    thread.fiber.suspend_for(next->fiber);
  }
}

// What every fiber runs. A thread that ends without having waited hands its fiber to the next
// thread: kernels without barriers cost no switch at all.
void Emulator::run_threads() {
  for (;;) {
    emulator.kernel_.call(emulator.kernel_.arguments);
    Thread& thread = *emulator.current_;
    thread.state = State::finished;
    ++emulator.finished_;
    if (emulator.next_ < emulator.thread_count_) {
      emulator.assign_next(thread);
    } else {
      emulator.leave(thread);
    }
  }
}

void Emulator::suspend_current(State state, SourceLocation where) {
  Thread& thread = *current_;
  thread.state = state;
  thread.waits_at = where;
  leave(thread);
}

void Emulator::block_barrier(SourceLocation where) {
  ++at_barrier_;
  suspend_current(State::at_block_barrier, where);
}

const LaneValues& Emulator::exchange_in_warp(unsigned mask, const void* value, size_t bytes,
                                             SourceLocation where) {
  return meet(mask, value, bytes, where, /*orders_memory=*/false);
}

void Emulator::synchronize_warp(unsigned mask, SourceLocation where) {
  meet(mask, nullptr, 0, where, /*orders_memory=*/true);
}

const LaneValues& Emulator::meet(unsigned mask, const void* value, size_t bytes,
                                 SourceLocation where, bool orders_memory) {
  Thread& thread = *current_;
  const unsigned lane_bit = 1u << thread.lane();
  if (!(mask & lane_bit)) fail(where, "the calling lane is not in the mask of its warp operation");
  Warp& warp = warps_[thread.warp()];
  LaneGroup& group = warp.group_of(mask);
  if (group.arrived == 0) group.where = where;
  if (group.where.line != where.line) {
    fail(where, "lanes of one mask meet at different warp operations");
  }
  const unsigned meeting = group.meeting;
  LaneValues& values = group.values[meeting % 2];
  values.lanes = mask & warp.lanes;
  if (bytes) std::memcpy(values.bytes[thread.lane()], value, bytes);
  group.arrived |= lane_bit;
  if (group.arrived == values.lanes) {
    if (orders_memory) join_lane_epochs(warp, values.lanes);
    group.arrived = 0;
    ++group.meeting;
  } else {
    thread.group = &group;
    thread.meeting = meeting;
    suspend_current(State::at_warp_operation, where);
  }
  return values;
}

void Emulator::join_lane_epochs(const Warp& warp, unsigned lanes) {
  uint32_t joined[kWarpLanes] = {};
  const auto for_each_lane = [&](auto body) {
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
      if (lanes >> lane & 1) body(lane, warp.threads[lane]->lane_epochs);
    }
  };
  for_each_lane([&](unsigned, uint32_t* epochs) {
    for (unsigned i = 0; i < kWarpLanes; ++i) joined[i] = std::max(joined[i], epochs[i]);
  });
  for_each_lane([&](unsigned lane, uint32_t* epochs) {
    std::copy(std::begin(joined), std::end(joined), epochs);
    ++epochs[lane];
  });
}

Moment Emulator::current_moment() const {
  return {launch_, block_, current_->linear, block_epoch_, current_->lane_epochs[current_->lane()]};
}

Memory Emulator::memory_of(const void* address) const {
  if (contains(stacks_, kMaxThreads * Fiber::kStackBytes, address) ||
      contains(kernel_.arguments, kernel_.argument_bytes, address) ||
      contains(&builtin_variables, sizeof builtin_variables, address)) {
    return Memory::thread_private;
  }
  if (contains(dynamic_shared_, dynamic_shared_bytes_, address) ||
      in_static_shared_memory(address)) {
    return Memory::shared;
  }
  return Memory::global;
}

void Emulator::print_position() const {
  const uint3 block = builtin_variables.block_index;
  std::fprintf(stderr, "  in block (%u,%u,%u)", block.x, block.y, block.z);
  if (in_kernel()) {
    std::fprintf(stderr, ", thread (%u,%u,%u)", current_->index.x, current_->index.y,
                 current_->index.z);
  }
  std::fprintf(stderr, "\n");
}

void Emulator::fail_stuck(const char* what) const {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", what);
  print_position();
  std::map<std::string, unsigned> threads_at;
  for (const Thread* thread : started_) {
    if (thread->state == State::finished) continue;
    const char* operation =
        thread->state == State::at_block_barrier ? "__syncthreads" : "a warp operation";
    ++threads_at["wait in " + std::string(operation) + " at " + thread->waits_at.file + ":" +
                 std::to_string(thread->waits_at.line)];
  }
  if (finished_ != 0) threads_at["have returned"] = finished_;
  for (const auto& [place, count] : threads_at) {
    std::fprintf(stderr, "  %u threads %s\n", count, place.c_str());
  }
  std::abort();
}

}  // namespace

cudaError_t run_grid(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  return emulator.run_grid(kernel, grid, block, shared_bytes);
}

cudaError_t allow_shared_memory(const void* function, size_t dynamic_bytes) {
  return emulator.allow_shared_memory(function, dynamic_bytes);
}

void* dynamic_shared_memory() { return emulator.dynamic_shared(); }

void block_barrier(SourceLocation where) { emulator.block_barrier(where); }

const LaneValues& exchange_in_warp(unsigned mask, const void* value, size_t bytes,
                                   SourceLocation where) {
  return emulator.exchange_in_warp(mask, value, bytes, where);
}

void synchronize_warp(unsigned mask, SourceLocation where) {
  emulator.synchronize_warp(mask, where);
}

unsigned current_lane() { return emulator.current().lane(); }

void fail(SourceLocation where, const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n  at %s:%u\n", what, where.file, where.line);
  emulator.print_position();
  std::abort();
}

bool has_mistake(int number) {
  static const int made = [] {
    const char* text = std::getenv("CUDA_ON_CPU_MISTAKE");
    return text == nullptr ? 0 : std::atoi(text);
  }();
  return number == made;
}

bool in_kernel() { return emulator.in_kernel(); }

Moment current_moment() { return emulator.current_moment(); }

bool synchronized_with_lane(unsigned lane, uint32_t lane_epoch) {
  return emulator.current().lane_epochs[lane] >= lane_epoch;
}

Memory memory_of(const void* address) { return emulator.memory_of(address); }

}  // namespace cuda_on_cpu
