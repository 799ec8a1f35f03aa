// The warp matrix instructions that csrc/common/tensor_core.h uses, with the fragments as the PTX
// manual lays them out over the lanes.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "emulator.h"

namespace cuda_on_cpu {

// Compute capability 7.5 has only some of the instructions; a test may ask for it.
inline bool has_deep_multiplication = true;
inline bool multiplies_16_deep() { return has_deep_multiplication; }

// To the nearest number of 10 bits of mantissa, halves away from zero.
inline float round_to_tf32(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  if (finite) bits += 0x1000u;
  bits &= finite || (bits & 0x7fffffu) == 0 ? ~0x1fffu : ~0u;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// What a lane brings to a multiplication: up to four registers of rows, up to two of columns.
struct Operands {
  unsigned rows[4];
  unsigned columns[2];
};

// d += 16 rows x `kDepth` times `kDepth` x 8 columns. Place says where element k of a row or column
// lies: in which register of the first eight rows, in which lane of four, in which half.
template <int kDepth, class Place, class Decode>
void multiply_in_warp(float (&d)[4], const Operands& operands, Place place, Decode decode,
                      SourceLocation where) {
  const LaneValues& values = exchange_in_warp(0xffffffffu, &operands, sizeof operands, where);
  if (values.lanes != 0xffffffffu) fail(where, "a matrix instruction needs all lanes of a warp");
  const auto operands_of = [&](unsigned lane) {
    Operands result;
    std::memcpy(&result, values.bytes[lane], sizeof result);
    return result;
  };
  const unsigned group = current_lane() / 4, lane_of_group = current_lane() % 4;
  for (unsigned k = 0; k < kDepth; ++k) {
    const auto [reg, lane, half] = place(k);
    float row[2], column[2];
    for (unsigned i = 0; i < 2; ++i) {
      row[i] = decode(operands_of(group * 4 + lane).rows[2 * reg + i], half);
      column[i] = decode(operands_of((lane_of_group * 2 + i) * 4 + lane).columns[reg], half);
    }
    for (unsigned i = 0; i < 4; ++i) d[i] += row[i / 2] * column[i % 2];
  }
}

struct ElementPlace {
  unsigned reg, lane, half;
};
inline ElementPlace place_of_16_bits(unsigned k) { return {k / 8, k % 8 / 2, k % 2}; }
inline ElementPlace place_of_tf32(unsigned k) { return {k / 4, k % 4, 0}; }

inline float decode_f16(unsigned bits, unsigned half) {
  __half_raw raw;
  raw.x = static_cast<unsigned short>(half != 0 ? bits >> 16 : bits);
  return __half2float(__half(raw));
}
inline float decode_bf16(unsigned bits, unsigned half) {
  __nv_bfloat16_raw raw;
  raw.x = static_cast<unsigned short>(half != 0 ? bits >> 16 : bits);
  return __bfloat162float(__nv_bfloat16(raw));
}
inline float decode_tf32(unsigned bits, unsigned) {
  bits &= ~0x1fffu;  // the rest is not looked at
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void require_deep_multiplication(SourceLocation where) {
  if (!has_deep_multiplication) fail(where, "this needs compute capability 8.0");
}

inline void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                             SourceLocation where = SourceLocation::current()) {
  require_deep_multiplication(where);
  multiply_in_warp<16>(d, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, place_of_16_bits, decode_f16,
                       where);
}
inline void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                              SourceLocation where = SourceLocation::current()) {
  require_deep_multiplication(where);
  multiply_in_warp<16>(d, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, place_of_16_bits, decode_bf16,
                       where);
}
inline void mma_m16n8k8_f16(float (&d)[4], unsigned a0, unsigned a1, unsigned b,
                            SourceLocation where = SourceLocation::current()) {
  multiply_in_warp<8>(d, {{a0, a1, 0, 0}, {b, 0}}, place_of_16_bits, decode_f16, where);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                             SourceLocation where = SourceLocation::current()) {
  require_deep_multiplication(where);
  multiply_in_warp<8>(d, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, place_of_tf32, decode_tf32,
                      where);
}

}  // namespace cuda_on_cpu
