// Element types and their conversions, one value at a time.
#pragma once

#include <cstdint>
#include <cstring>

#include "contract.h"

namespace graddrop {
namespace {

struct bfloat16 {
  uint16_t bits;
};
struct rounded_bfloat16 : bfloat16 {};  // is stored by stochastic rounding
struct float16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return float_of(uint32_t{x.bits} << 16); }
inline float to_float(float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | (magnitude << 13) | 0x7f800000u);  // infinity, NaN
  if (magnitude < 0x400u) return float_of(sign | bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f));
  return float_of(sign | ((magnitude << 13) + (uint32_t{112} << 23)));  // from half's bias of the exponent to float's
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, bfloat16* out) {  // to nearest, ties to even
  const uint32_t bits = bits_of(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
// Up by as many units of float32's last place as `random` says; a NaN as to nearest.
inline void round_stochastically(float x, uint16_t random, bfloat16* out) {
  const uint32_t bits = bits_of(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + random) >> 16);
}
inline void from_float(float x, float16* out) {  // to nearest, ties to even
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00;
  } else if (magnitude < 0x38800000u) {  // below 2**-14: adding 0.5 leaves the rounded subnormal in the low bits
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

// By way of float32, in which every dtype but float64 is held exactly.
template <class From, class To>
void convert(From from, To* to) {
  from_float(to_float(from), to);
}
inline void convert(double from, float* to) { *to = static_cast<float>(from); }
inline void convert(double from, bfloat16* to) { from_float(static_cast<float>(from), to); }
inline void convert(double from, float16* to) { from_float(static_cast<float>(from), to); }
inline void convert(double from, double* to) { *to = from; }
template <class From>
void convert(From from, double* to) {
  *to = static_cast<double>(to_float(from));
}

inline int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::FLOAT64:
      return 8;
    case Dtype::FLOAT32:
      return 4;
    default:
      return 2;
  }
}

}  // namespace
}  // namespace graddrop
