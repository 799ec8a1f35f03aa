// The types an operator can write, and the conversion from float32 (round half to even) that gives
// the same bits everywhere.
//
// Written with integers and without branches: gcc turns a conversion to _Float16 into a scalar
// library call, while it vectorizes this.
#pragma once
#include <stdint.h>

namespace pixfuse {

// uint8 stands for bytes that are copied, not computed; not every operator offers it.
enum class ElementType : int32_t { float32 = 0, float16 = 1, bfloat16 = 2, uint8 = 3 };

constexpr int64_t element_bytes(ElementType type) {
  return type == ElementType::float32 ? 4 : type == ElementType::uint8 ? 1 : 2;
}

// Storage of one element; distinct types so that templates can tell them apart.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
static inline T round_to(float value);

template <>
inline float round_to<float>(float value) {
  return value;
}

// The values are never NaN (finite mean, finite non-zero std), so NaN needs no case of its own.
template <>
inline BFloat16 round_to<BFloat16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t half_to_even = 0x7fffu + ((bits >> 16) & 1u);
  return {static_cast<uint16_t>((bits + half_to_even) >> 16)};
}

template <>
inline Float16 round_to<Float16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: rebias the exponent from 127 to 15, round the 13 bits that go.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Results below 2^-14: adding 0.5 makes the float32 adder align and round the last 10 bits.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // rounds to 65536 or more: infinity
  return {static_cast<uint16_t>(sign | result)};
}

}  // namespace pixfuse
