// Philox4x32-10 and the mask stream's counters, one counter at a time. docs/mask-stream.md is the specification.
// Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
#pragma once

#include <cstdint>

#include "contract.h"

namespace graddrop {

// Bits 8 to 11 of counter word 1. From ROUND_STATE on: of the rule's first, second and third state.
enum class Purpose : uint32_t { ELEMENT, LAYER, GAUSSIAN, BLOCK, ROUND_PARAM, ROUND_STATE };

inline Purpose round_state(int k) { return static_cast<Purpose>(static_cast<int>(Purpose::ROUND_STATE) + k); }

constexpr int ROUNDS = 10;
constexpr int KEY_COPIES = 8;  // of every round key: AVX2 has no operands that broadcast from memory

// Everything that decides one tensor's masks but the element.
struct MaskStream {
  alignas(32) uint32_t key0[ROUNDS][KEY_COPIES], key1[ROUNDS][KEY_COPIES];
  uint32_t draw, id_low, id_high;  // id_high: the upper 20 bits
  uint16_t lo, span;
};

namespace {  // every translation unit has its own copy: they are compiled for different processors

constexpr uint32_t MULTIPLIER0 = 0xD2511F53, MULTIPLIER1 = 0xCD9E8D57;
constexpr uint32_t WEYL0 = 0x9E3779B9, WEYL1 = 0xBB67AE85;


struct Words {
  uint32_t word[4];
};

inline uint32_t high(uint64_t product) { return static_cast<uint32_t>(product >> 32); }
inline uint32_t low(uint64_t product) { return static_cast<uint32_t>(product); }

// Without a window.
inline MaskStream stream_of(uint64_t seed, int64_t draw, int64_t stream_id) {
  MaskStream s;
  for (uint32_t r = 0; r < ROUNDS; ++r) {
    for (int copy = 0; copy < KEY_COPIES; ++copy) {
      s.key0[r][copy] = low(seed) + r * WEYL0;
      s.key1[r][copy] = high(seed) + r * WEYL1;
    }
  }
  const auto id = static_cast<uint64_t>(stream_id);
  s.draw = static_cast<uint32_t>(draw);
  s.id_low = low(id);
  s.id_high = high(id);
  s.lo = s.span = 0;
  return s;
}

inline MaskStream stream_of(uint64_t seed, const Integers& row) {
  MaskStream s = stream_of(seed, row.draw, row.stream_id);
  s.lo = static_cast<uint16_t>(row.lo);
  s.span = static_cast<uint16_t>(row.span);
  return s;
}

// Counter word 1 of the 40-bit index.
inline uint32_t word1(const MaskStream& s, uint64_t index, Purpose purpose) {
  return high(index) | static_cast<uint32_t>(purpose) << 8 | s.id_high << 12;
}

inline Words outputs(const MaskStream& s, uint64_t index, Purpose purpose) {
  Words c = {{low(index), word1(s, index, purpose), s.draw, s.id_low}};
  for (int r = 0; r < ROUNDS; ++r) {
    const uint64_t product0 = uint64_t{MULTIPLIER0} * c.word[0], product2 = uint64_t{MULTIPLIER1} * c.word[2];
    c = {{high(product2) ^ c.word[1] ^ s.key0[r][0], low(product2),  //
          high(product0) ^ c.word[3] ^ s.key1[r][0], low(product0)}};
  }
  return c;
}

// COUNTERS consecutive counters from `index`, a multiple of COUNTERS, on: by loops that compilers vectorise.
template <int COUNTERS>
void consecutive_outputs(const MaskStream& s, uint64_t index, Purpose purpose, uint32_t x[4][COUNTERS]) {
  for (uint32_t l = 0; l < COUNTERS; ++l) {
    x[0][l] = low(index) + l;
    x[1][l] = word1(s, index, purpose);
    x[2][l] = s.draw;
    x[3][l] = s.id_low;
  }
  for (int r = 0; r < ROUNDS; ++r) {
    const uint32_t key0 = s.key0[r][0], key1 = s.key1[r][0];
    for (int l = 0; l < COUNTERS; ++l) {
      const uint64_t product0 = uint64_t{MULTIPLIER0} * x[0][l], product2 = uint64_t{MULTIPLIER1} * x[2][l];
      x[0][l] = high(product2) ^ x[1][l] ^ key0;
      x[1][l] = low(product2);
      x[2][l] = high(product0) ^ x[3][l] ^ key1;
      x[3][l] = low(product0);
    }
  }
}

// The 16 bits that decide, at one place of a sequence in which a counter's four words serve two neighbours each.
inline uint16_t half(uint32_t word, uint64_t place) { return static_cast<uint16_t>(word >> (16 * (place % 2))); }

inline bool decide(const MaskStream& s, uint16_t random) { return static_cast<uint16_t>(random - s.lo) <= s.span; }

inline uint16_t element_random(const MaskStream& s, uint64_t e, Purpose purpose) {
  return half(outputs(s, e / TILE * 16 + e % 32 / 2, purpose).word[e / 32 % 4], e);
}
inline bool element_kept(const MaskStream& s, uint64_t e) { return decide(s, element_random(s, e, Purpose::ELEMENT)); }

constexpr uint64_t BLOCKS_PER_COUNTER = 8;

inline Words block_words(const MaskStream& s, uint64_t block) {
  return outputs(s, block / BLOCKS_PER_COUNTER, Purpose::BLOCK);
}
inline bool block_kept(const MaskStream& s, uint64_t block, const Words& drawn) {
  return decide(s, half(drawn.word[block / 2 % 4], block));
}

inline bool layer_kept(const MaskStream& s) { return decide(s, half(outputs(s, 0, Purpose::LAYER).word[0], 0)); }

}  // namespace
}  // namespace graddrop
