// What the tests of the kernels share: what a byte becomes, in plain scalar arithmetic, and memory
// of exactly the size that is needed.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "normalize/normalize.h"

#if defined(CUDA_ON_CPU_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#endif

namespace {

using pixfuse::ElementType;
using pixfuse::Rounding;

constexpr Rounding kRoundings[] = {Rounding::torchvision, Rounding::torchvision_v1, Rounding::timm,
                                   Rounding::transformers, Rounding::nearest};

// --- What a byte becomes ---

// Each channel has its own normalization. In every third one the byte 128 lies on the mean, where
// `nearest` has to keep what cancels.
inline double mean_of(int64_t channel) {
  return channel % 3 == 2 ? 128.0 / 255.0 : 0.485 - 0.0123 * static_cast<double>(channel % 40);
}
inline double std_of(int64_t channel) { return 0.229 + 0.0071 * static_cast<double>(channel % 50); }

#if defined(__SIZEOF_FLOAT128__)
using Exact = __float128;
#else
using Exact = long double;  // the same where gcc has no such type
#endif

// The table of roundings in the README, each step rounded to float.
inline float expected_float(uint8_t byte, int64_t channel, Rounding rounding) {
  const auto x = static_cast<float>(byte);
  const double mean = mean_of(channel), std = std_of(channel);
  const auto m = static_cast<float>(mean), s = static_cast<float>(std);
  switch (rounding) {
    case Rounding::torchvision: {
      const float unit = x * static_cast<float>(1.0 / 255.0);
      return (unit - m) / s;
    }
    case Rounding::torchvision_v1: {
      const float unit = x / 255.0f;
      return (unit - m) / s;
    }
    case Rounding::timm:
      return (x - static_cast<float>(255.0 * mean)) / static_cast<float>(255.0 * std);
    case Rounding::transformers:
      return (x - m * 255.0f) / (s * 255.0f);
    case Rounding::nearest:
      break;
  }
  return static_cast<float>((Exact{x} / 255 - Exact{mean}) / Exact{std});
}

// The bits of the 16-bit float nearest to `value` (half to even), from the definition of the
// format: so it shares nothing with the conversions that it checks. No value here overflows.
inline uint32_t round_to_16_bits(float value, int significand_bits, int exponent_bits) {
  const uint32_t sign = std::signbit(value) ? 0x8000u : 0u;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  // Subnormal numbers, and zero with them, share an exponent.
  const int lowest = value == 0 ? 1 - bias : std::max(std::ilogb(value), 1 - bias);
  const double last_bit = std::ldexp(1.0, lowest - (significand_bits - 1));
  const auto units = static_cast<uint32_t>(std::nearbyint(std::fabs(value) / last_bit));
  // `units` counts from the exponent `lowest`; its top bit adds one to the exponent field.
  const auto field = static_cast<uint32_t>(lowest + bias - 1);
  return sign | ((field << (significand_bits - 1)) + units);
}

// The bits of a result when it is rounded to `type`; for uint8, an integer.
inline uint32_t bits_as(ElementType type, float value) {
  if (type == ElementType::uint8) return static_cast<uint32_t>(value);
  if (type == ElementType::float16) return round_to_16_bits(value, 11, 5);
  if (type == ElementType::bfloat16) return round_to_16_bits(value, 8, 8);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline uint32_t expected_bits(uint8_t byte, int64_t channel, Rounding rounding, ElementType type) {
  if (type == ElementType::uint8) return byte;
  return bits_as(type, expected_float(byte, channel, rounding));
}

// --- Memory ---

// The bytes from `data` on end where the allocation ends; the `offset_bytes` before them are not to
// be touched (AddressSanitizer can forbid them in steps of eight).
class Buffer {
 public:
  Buffer(int64_t bytes, int64_t offset_bytes, uint8_t fill)
      : memory_(static_cast<uint8_t*>(std::malloc(static_cast<size_t>(offset_bytes + bytes)))),
        offset_bytes_(offset_bytes) {
    std::memset(memory_, fill, static_cast<size_t>(offset_bytes + bytes));
#if defined(CUDA_ON_CPU_ADDRESS_SANITIZER)
    __asan_poison_memory_region(memory_, static_cast<size_t>(offset_bytes) / 8 * 8);
#endif
  }
  ~Buffer() { std::free(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  uint8_t* data() { return memory_ + offset_bytes_; }

 private:
  uint8_t* memory_;
  int64_t offset_bytes_;
};

inline uint32_t element_bits(const uint8_t* output, int64_t offset, int64_t element_bytes) {
  uint32_t bits = 0;
  std::memcpy(&bits, output + offset * element_bytes, static_cast<size_t>(element_bytes));
  return bits;
}

// Address space without memory: pages that are touched exist, all others cost nothing.
inline uint8_t* reserve(int64_t bytes) {
  void* memory = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("cannot reserve address space");
    std::exit(2);
  }
  return static_cast<uint8_t*>(memory);
}

}  // namespace
