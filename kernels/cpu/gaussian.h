// Standard normals from Philox words (Box-Muller), in float32, within docs/mask-stream.md's tolerance of float64's.
// One order of operations for one element and for vectors, so that every level and the oracle give the same bits.
#pragma once

#include <cmath>

#include "dtypes.h"
#include "philox.h"

namespace graddrop {
namespace {

// sqrt(-2 ln u), u = (word + 0.5) / 2**32
inline float radius_of(uint32_t word) {
  // near 1 from the distance to 1, which keeps its relative precision; else by mantissa (around 1) and exponent of
  // 2**31 u
  const bool near_one = word >= 0xB504F334u;  // u >= sqrt(1/2)
  const float distance = (static_cast<float>(static_cast<int32_t>(~word & 0x7fffffffu)) + 0.5f) * 0x1p-32f;
  const float half = 0.5f * static_cast<float>(word & 1u);
  const float scaled = static_cast<float>(static_cast<int32_t>(word >> 1)) + 0.25f + half;
  const uint32_t bits = bits_of(scaled);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  const float mantissa = float_of(bits - (static_cast<uint32_t>(exponent) << 23));
  const float x = near_one ? -distance : mantissa - 1.0f;
  const float whole = near_one ? 0.0f : static_cast<float>(exponent - 31) * 0.69314718f;
  // ln(1 + x) = x - x**2 / 2 + x**3 r(x), r fitted to 2e-9 on [sqrt(1/2) - 1, sqrt(2) - 1]
  float r = -0.076311492f;
  r = r * x + 0.128549007f;
  r = r * x - 0.132079007f;
  r = r * x + 0.141900103f;
  r = r * x - 0.166165218f;
  r = r * x + 0.200016158f;
  r = r * x - 0.250010595f;
  r = r * x + 0.333333283f;
  const float square = x * x;
  return std::sqrt(-2.0f * (whole + (x + (square * (x * r) - 0.5f * square))));
}

// cos and sin of 2 pi v, v = (word + 0.5) / 2**32
inline void turn_of(uint32_t word, float& cosine, float& sine) {
  const uint32_t quadrant = (word + 0x20000000u) >> 30;  // the nearest multiple of a quarter turn
  const float angle = (static_cast<float>(static_cast<int32_t>(word - (quadrant << 30))) + 0.5f) * 1.46291808e-9f;
  const float square = angle * angle;
  const float s = angle + angle * (square * (-0.166666507f + square * (0.00833197865f + square * -0.000194956346f)));
  const float fourth = 0.0416666469f + square * (-0.00138873675f + square * 2.44384498e-05f);
  const float c = 1.0f - 0.5f * square + square * (square * fourth);
  const uint32_t swap = 0u - (quadrant & 1u);
  const uint32_t c_sign = (quadrant + 1u) << 30 & 0x80000000u, s_sign = quadrant << 30 & 0x80000000u;
  cosine = float_of(((bits_of(c) & ~swap) | (bits_of(s) & swap)) ^ c_sign);
  sine = float_of(((bits_of(s) & ~swap) | (bits_of(c) & swap)) ^ s_sign);
}

// Of one element. Normals take whole words: 32 counters make a tile of 128 elements.
inline float normal_of(const MaskStream& stream, uint64_t element) {
  const Words drawn = outputs(stream, element / TILE * 32 + element % 32, Purpose::GAUSSIAN);
  const auto word = static_cast<int>(element / 32 % 4), pair = word / 2 * 2;
  float cosine, sine;
  turn_of(drawn.word[pair + 1], cosine, sine);
  return radius_of(drawn.word[pair]) * (word % 2 ? sine : cosine);
}

// Of a tile's 128 elements, by loops that compilers vectorise.
inline void normals_of_tile(const MaskStream& stream, uint64_t tile, float normals[TILE]) {
  uint32_t words[4][32];
  consecutive_outputs<32>(stream, tile * 32, Purpose::GAUSSIAN, words);
  for (int pair = 0; pair < 4; pair += 2) {
    for (int l = 0; l < 32; ++l) {
      const float radius = radius_of(words[pair][l]);
      float cosine, sine;
      turn_of(words[pair + 1][l], cosine, sine);
      normals[32 * pair + l] = radius * cosine;
      normals[32 * pair + 32 + l] = radius * sine;
    }
  }
}

}  // namespace
}  // namespace graddrop
