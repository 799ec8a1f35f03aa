// The emulator's own test.
//
//   test_samples          expects right results from all sample kernels
//   test_samples <bug>    has one of them make that mistake
//   test_samples order    prints the order in which the threads of a block start
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "common/cuda_launch.h"
#include "sample_kernels.h"

namespace {

int failures = 0;

void expect(bool right, const std::string& what) {
  if (right) return;
  ++failures;
  std::fprintf(stderr, "wrong value: %s\n", what.c_str());
}

// Exactly sized, so that AddressSanitizer sees the first element beyond it; unlike a vector it has
// no spare capacity.
template <class T>
struct Buffer {
  explicit Buffer(size_t count) : size(count), data(new T[count]()) {}
  size_t size;
  std::unique_ptr<T[]> data;
};

void test_add_one(Bug bug) {
  for (int misalignment : {0, 1, 8, 15}) {
    for (int count : {1, 15, 16, 17, 3000}) {
      Buffer<uint8_t> input(misalignment + count), output(count);
      std::iota(input.data.get(), input.data.get() + input.size, uint8_t{7});
      const uint8_t* first = input.data.get() + misalignment;
      expect(add_one_to_bytes(first, output.data.get(), count, bug) == 0, "add_one_to_bytes");
      for (int i = 0; i < count; ++i) {
        const auto expected = static_cast<uint8_t>(first[i] + 1);
        if (output.data[i] != expected) return expect(false, "add_one_to_bytes");
      }
    }
  }
}

void test_sum_rows(Bug bug) {
  for (int length : {0, 1, 5, 130, 1000}) {
    const int rows = 3;
    Buffer<float> input(static_cast<size_t>(rows) * length), sums(rows);
    for (size_t i = 0; i < input.size; ++i) input.data[i] = static_cast<float>(i % 50);
    sum_rows(input.data.get(), sums.data.get(), rows, length, bug);
    for (int r = 0; r < rows; ++r) {
      const float* row = input.data.get() + static_cast<size_t>(r) * length;
      expect(sums.data[r] == std::accumulate(row, row + length, 0.0f), "sum_rows");
    }
  }
}

void test_reverse_rows(Bug bug) {
  const int rows = 3, length = 99;
  Buffer<float> input(rows * length), output(rows * length);
  std::iota(input.data.get(), input.data.get() + input.size, 1.0f);
  reverse_rows(input.data.get(), output.data.get(), rows, length, bug);
  for (int i = 0; i < rows * length; ++i) {
    const int mirrored = i / length * length + length - 1 - i % length;
    expect(output.data[i] == input.data[mirrored], "reverse_rows");
  }
}

void test_rotate_warps(Bug bug) {
  const int count = 256;
  Buffer<float> input(count), output(count);
  std::iota(input.data.get(), input.data.get() + input.size, 1.0f);
  rotate_warps(input.data.get(), output.data.get(), count, bug);
  for (int i = 0; i < count; ++i) {
    expect(output.data[i] == input.data[i / 32 * 32 + (i + 1) % 32], "rotate_warps");
  }
}

void test_count_bytes(Bug bug) {
  const int count = 1000;
  Buffer<uint8_t> input(count);
  Buffer<unsigned> counts(256);
  std::vector<unsigned> expected(256);
  for (int i = 0; i < count; ++i) {
    input.data[i] = static_cast<uint8_t>(i * i % 11);
    ++expected[input.data[i]];
  }
  count_bytes(input.data.get(), counts.data.get(), count, bug);
  expect(std::equal(expected.begin(), expected.end(), counts.data.get()), "count_bytes");
}

void test_warp_functions(Bug bug) {
  // What CUDA's programming guide says of each function, worked out by hand for one lane or two.
  Buffer<int> results(12 * 32);
  warp_functions(results.data.get(), bug);
  const auto at = [&](int row, int lane) { return results.data[row * 32 + lane]; };
  expect(at(0, 0) == 5 && at(0, 31) == 5, "__shfl_sync");
  expect(at(1, 3) == 5 && at(1, 20) == 21, "__shfl_sync in segments");
  expect(at(2, 2) == 2 && at(2, 17) == 14, "__shfl_up_sync");
  expect(at(3, 17) == 17 && at(3, 20) == 17, "__shfl_up_sync in segments");
  expect(at(4, 14) == 17 && at(4, 30) == 30, "__shfl_down_sync");
  expect(at(5, 14) == 14 && at(5, 12) == 15, "__shfl_down_sync in segments");
  expect(at(6, 6) == 7 && at(6, 7) == 6, "__shfl_xor_sync");
  expect(at(7, 3) == 3 && at(7, 19) == 3, "__shfl_xor_sync in segments");
  expect(at(8, 11) == 0x49249249, "__ballot_sync");
  expect(at(9, 1) == 1 && at(10, 1) == 0, "__any_sync and __all_sync");
  expect(at(11, 0) == 30 && at(11, 2) == 10, "__shfl_sync of some lanes");
  expect(at(11, 31) == static_cast<int>(0xffe00000u), "__ballot_sync of some lanes");
}

// The emulator refuses what a device refuses.
void test_launch_limits(Bug) {
  constexpr size_t kStatic = 256 * sizeof(unsigned);  // of count_bytes_kernel, which has the most
  constexpr size_t kLargest = 48 * 1024 - kStatic;
  expect(launch_without_work(1, 1024, kLargest) == cudaSuccess, "largest launch");
  expect(launch_without_work(0, 32, 0) == cudaErrorInvalidConfiguration, "empty grid");
  expect(launch_without_work(1, 1025, 0) == cudaErrorInvalidConfiguration, "large block");
  expect(launch_without_work(1, 32, kLargest + 1) == cudaErrorInvalidValue, "shared memory");

  // More for the kernel that it is allowed to, up to what the device has.
  cuda_on_cpu::device.shared_bytes = 100 * 1024;
  constexpr size_t kAllowed = 100 * 1024 - kStatic;
  expect(allow_without_work(kAllowed + 1) == cudaErrorInvalidValue, "more than the device has");
  expect(launch_without_work(1, 32, kLargest + 1) == cudaErrorInvalidValue, "not yet allowed");
  expect(allow_without_work(kAllowed) == cudaSuccess, "all that the device has");
  expect(launch_without_work(1, 32, kAllowed) == cudaSuccess, "largest launch when allowed");
  expect(launch_without_work(1, 32, kAllowed + 1) == cudaErrorInvalidValue, "more than allowed");
  expect(reverse_rows(nullptr, nullptr, 0, kLargest / 4 + 1, Bug::none) == cudaErrorInvalidValue,
         "another kernel than the one that it is allowed to");
}

void test_intrinsics(Bug) {
  expect(__dp4a(0x01ff02ffu, 0x0102ff03u, 5u) == 5 + 1 + 510 + 510 + 765, "__dp4a");
  expect(min(3, 5u) == 3u && max(2.0f, NAN) == 2.0f && max(-1, int64_t{4}) == 4, "min and max");
  // Exactly between two halves: to the even one.
  expect(__half2float(__float2half_rn(2049.0f)) == 2048.0f, "__float2half_rn");
  expect(__bfloat162float(__float2bfloat16_rn(257.0f)) == 256.0f, "__float2bfloat16_rn");
}

void print_order() {
  constexpr unsigned kThreads = 64;
  Buffer<unsigned> ranks(kThreads), counter(1);
  rank_threads(ranks.data.get(), counter.data.get(), kThreads);
  for (size_t i = 0; i < ranks.size; ++i) std::printf("%u ", ranks.data[i]);
  std::puts("");
}

struct NamedBug {
  const char* name;
  Bug bug;
  void (*test)(Bug);
};
const NamedBug kBugs[] = {
    {"over_read", Bug::over_read, test_add_one},
    {"misaligned_access", Bug::misaligned_access, test_add_one},
    {"missing_barrier", Bug::missing_barrier, test_sum_rows},
    {"missing_barrier_in_loop", Bug::missing_barrier_in_loop, test_reverse_rows},
    {"divergent_barrier", Bug::divergent_barrier, test_sum_rows},
    {"early_return", Bug::early_return, test_sum_rows},
    {"static_shared_overrun", Bug::static_shared_overrun, test_sum_rows},
    {"static_shared_overrun_by_pointer", Bug::static_shared_overrun_by_pointer, test_sum_rows},
    {"dynamic_shared_overrun", Bug::dynamic_shared_overrun, test_reverse_rows},
    {"uninitialized_shared", Bug::uninitialized_shared, test_sum_rows},
    {"missing_warp_barrier", Bug::missing_warp_barrier, test_rotate_warps},
    {"shuffle_as_warp_barrier", Bug::shuffle_as_warp_barrier, test_rotate_warps},
    {"shuffle_outside_mask", Bug::shuffle_outside_mask, test_warp_functions},
    {"divergent_shuffle", Bug::divergent_shuffle, test_sum_rows},
    {"plain_increment", Bug::plain_increment, test_count_bytes},
    {"overlapping_blocks", Bug::overlapping_blocks, test_count_bytes},
};

int report() {
  if (failures == 0) std::puts("all right");
  return failures == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 1) {
    for (auto* test :
         {test_add_one, test_sum_rows, test_reverse_rows, test_rotate_warps, test_count_bytes,
          test_warp_functions, test_launch_limits, test_intrinsics}) {
      test(Bug::none);
    }
    return report();
  }
  if (std::strcmp(argv[1], "order") == 0) {
    print_order();
    return 0;
  }
  for (const NamedBug& named : kBugs) {
    if (std::strcmp(named.name, argv[1]) != 0) continue;
    named.test(named.bug);
    return report();
  }
  std::fprintf(stderr, "unknown bug %s\n", argv[1]);
  return 2;
}
