// Vectors of floats of the instruction set that the including file is compiled for, and what the
// loops do with them. gcc's vector types; intrinsics only for what those cannot say.
#pragma once
#if defined(__AVX2__)
// gcc 12 takes the undefined vectors of its own AVX-512 header for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "common/element_type.h"

namespace pixfuse::PIXFUSE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));

inline Vector load(const float* from) {
  Vector v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Vector v) { __builtin_memcpy(to, &v, sizeof v); }

// Whether any of them is not 0.
inline bool is_any(Integers numbers) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)numbers, (__m512i)numbers) != 0;
#elif defined(__AVX2__)
  return _mm256_testz_si256((__m256i)numbers, (__m256i)numbers) == 0;
#else
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= numbers[i];
  return found != 0;
#endif
}

// To numbers of twice the width.
template <class Number, class Numbers>
inline void add_to(Number* to, Numbers numbers) {
  typedef Number Wide __attribute__((vector_size(sizeof(Number) * kLanes)));
  Wide all;
  __builtin_memcpy(&all, to, sizeof all);
  all += __builtin_convertvector(numbers, Wide);
  __builtin_memcpy(to, &all, sizeof all);
}

// Past the caches, where the machine can: `to` is aligned to the vector. Whoever is told that the
// work is done sees it after finish_past_caches().
inline void store_past_caches(float* to, Vector v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(to, (__m256)v);
#else
  store(to, v);
#endif
}

inline void finish_past_caches() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Minus zero leaves every value as it is, so the compiler leaves it out.
inline Vector broadcast(float value) { return value - Vector{}; }

// a * b + c; rounded once where the machine can.
inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (Vector)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// What is not above 0 becomes 0, and no minus zero, but NaN stays NaN.
inline Vector relu(Vector x) {
// Of a NaN, and of zeros, the maximum is the second operand. The sum of zeros is minus zero if both
// are.
#if defined(__AVX512F__)
  return (Vector)_mm512_max_ps(_mm512_setzero_ps(), (__m512)x) + Vector{};
#elif defined(__AVX2__)
  return (Vector)_mm256_max_ps(_mm256_setzero_ps(), (__m256)x) + Vector{};
#else
  return x <= 0.0f ? Vector{} : x;
#endif
}

inline Integers count_positive(Integers counts, Vector x) { return counts - (x > 0.0f); }

// Rounds values that ReLU left (0 and above, or NaN) to T, half to even; they stay floats.
template <class T>
inline Vector round_as(Vector x);

template <>
inline Vector round_as<float>(Vector x) {
  return x;
}

template <>
inline Vector round_as<BFloat16>(Vector x) {
  const Integers bits = (Integers)x;
  const Integers rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff;
  const Integers nan = (bits | 0x400000) & ~0xffff;
  return (Vector)(x != x ? nan : rounded);
}

template <>
inline Vector round_as<Float16>(Vector x) {
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  return (Vector)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  const Integers bits = (Integers)x;
  const Vector normal = (Vector)((bits + 0xfff + ((bits >> 13) & 1)) & ~0x1fff);
  const Vector subnormal = (x + 0.5f) - 0.5f;  // the adder rounds to multiples of 2^-24
  const Vector finite = bits < (113 << 23) ? subnormal : normal;
  const Vector infinity = (Vector)(Integers{} + 0x7f800000);
  return x != x ? x : x >= 65520.0f ? infinity : finite;
#endif
}

// The bits of a value that round_as<T> left.
template <class T>
inline T exact_as(float value);

template <>
inline float exact_as<float>(float value) {
  return value;
}

template <>
inline BFloat16 exact_as<BFloat16>(float value) {
  return {static_cast<uint16_t>(bits_of(value) >> 16)};
}

template <>
inline Float16 exact_as<Float16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t subnormal = bits_of(value + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (bits - (112u << 23)) >> 13;
  const uint32_t finite = bits < (113u << 23) ? subnormal : normal;
  const uint32_t result = bits > 0x7f800000u ? 0x7e00u : bits == 0x7f800000u ? 0x7c00u : finite;
  return {static_cast<uint16_t>(result)};
}

// Stores the values of a vector that round_as<T> left.
template <class T>
inline void store_exact(T* to, Vector v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    __m256i half;
    if constexpr (__is_same(T, Float16)) {
      half = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
    } else {
      half = _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)v, 16));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
    return;
  }
#endif
  if constexpr (sizeof(T) == 4) {
    __builtin_memcpy(to, &v, sizeof v);
  } else {
    alignas(64) float values[kLanes];
    T rounded[kLanes];
    store(values, v);
    for (int i = 0; i < kLanes; ++i) rounded[i] = exact_as<T>(values[i]);
    __builtin_memcpy(to, rounded, sizeof rounded);
  }
}

// The first `count` of them.
template <class T>
inline void store_exact(T* to, Vector v, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
    return;
  }
#endif
  T all[kLanes];
  store_exact(all, v);
  for (int64_t i = 0; i < count; ++i) to[i] = all[i];
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

inline float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  // The float of these bits is the value times 2^-112, subnormal ones too: exact to undo.
  const uint32_t finite = bits_of(float_of(magnitude) * float_of((127u + 112u) << 23));
  return float_of(sign | (magnitude >= (31u << 23) ? magnitude | 0x7f800000u : finite));
}

template <class T>
inline Vector load_floats(const T* from) {
  if constexpr (__is_same(T, float)) {
    return load(from);
  } else {
    float values[kLanes];
    for (int i = 0; i < kLanes; ++i) values[i] = to_float(from[i]);
    return load(values);
  }
}

// The first `count`, and zeros.
template <class T>
inline Vector load_floats(const T* from, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (__is_same(T, float)) {
    return (Vector)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
  }
#endif
  float values[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = to_float(from[i]);
  return load(values);
}

// --- square transposes ---

template <int step>
inline Integers even_parts() {
  Integers index{};
  for (int i = 0; i < kLanes; ++i) index[i] = (i & step) == 0 ? i : kLanes + i - step;
  return index;
}

template <int step>
inline Integers odd_parts() {
  Integers index{};
  for (int i = 0; i < kLanes; ++i) index[i] = (i & step) == 0 ? i + step : kLanes + i;
  return index;
}

// Swaps blocks of `step` rows with blocks of `step` columns, then smaller ones within them.
template <int step>
inline void transpose(Vector (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    if ((i & step) != 0) continue;
    const Vector upper = rows[i], lower = rows[i + step];
    rows[i] = __builtin_shuffle(upper, lower, even_parts<step>());
    rows[i + step] = __builtin_shuffle(upper, lower, odd_parts<step>());
  }
  if constexpr (step > 1) transpose<step / 2>(rows);
}

}  // namespace
}  // namespace pixfuse::PIXFUSE_ISA
