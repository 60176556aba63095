// Philox4x32-10 and the mask stream's counters, one counter at a time. docs/mask-stream.md is the specification.
// Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
#pragma once

#include <cstdint>

#include "contract.h"

namespace graddrop {

constexpr int ROUNDS = 10;
constexpr int KEY_COPIES = 8;  // of every round key: AVX2 has no operands that broadcast from memory

// Everything that decides a tensor's masks but the element.
struct Stream {
  alignas(32) uint32_t key0[ROUNDS][KEY_COPIES], key1[ROUNDS][KEY_COPIES];
  uint32_t draw, stream, lo, span;
};

namespace {  // every translation unit has its own copy: they are compiled for different processors

constexpr uint32_t MULTIPLIER0 = 0xD2511F53, MULTIPLIER1 = 0xCD9E8D57;
constexpr uint32_t WEYL0 = 0x9E3779B9, WEYL1 = 0xBB67AE85;

enum class Purpose : uint32_t { ELEMENT, LAYER, GAUSSIAN, BLOCK };

struct Words {
  uint32_t word[4];
};

inline uint32_t high(uint64_t product) { return static_cast<uint32_t>(product >> 32); }
inline uint32_t low(uint64_t product) { return static_cast<uint32_t>(product); }

inline Stream stream_of(uint64_t seed, const Integers& row) {
  Stream s;
  for (uint32_t r = 0; r < ROUNDS; ++r) {
    for (int copy = 0; copy < KEY_COPIES; ++copy) {
      s.key0[r][copy] = low(seed) + r * WEYL0;
      s.key1[r][copy] = high(seed) + r * WEYL1;
    }
  }
  s.draw = static_cast<uint32_t>(row.draw);
  s.stream = static_cast<uint32_t>(row.stream);
  s.lo = static_cast<uint32_t>(row.lo);
  s.span = static_cast<uint32_t>(row.span);
  return s;
}

inline Words outputs(const Stream& s, uint64_t index, Purpose purpose) {
  Words c = {{low(index), high(index) | static_cast<uint32_t>(purpose) << 24, s.draw, s.stream}};
  for (int r = 0; r < ROUNDS; ++r) {
    const uint64_t product0 = uint64_t{MULTIPLIER0} * c.word[0], product2 = uint64_t{MULTIPLIER1} * c.word[2];
    c = {{high(product2) ^ c.word[1] ^ s.key0[r][0], low(product2),  //
          high(product0) ^ c.word[3] ^ s.key1[r][0], low(product0)}};
  }
  return c;
}

// A tile's 32 counters: lane l of the four outputs, by loops that compilers vectorise.
inline void outputs_of_tile(const Stream& s, uint64_t tile, Purpose purpose, uint32_t x[4][32]) {
  const uint64_t index = tile * 32;
  for (uint32_t l = 0; l < 32; ++l) {
    x[0][l] = low(index) + l;
    x[1][l] = high(index) | static_cast<uint32_t>(purpose) << 24;
    x[2][l] = s.draw;
    x[3][l] = s.stream;
  }
  for (int r = 0; r < ROUNDS; ++r) {
    const uint32_t key0 = s.key0[r][0], key1 = s.key1[r][0];
    for (int l = 0; l < 32; ++l) {
      const uint64_t product0 = uint64_t{MULTIPLIER0} * x[0][l], product2 = uint64_t{MULTIPLIER1} * x[2][l];
      x[0][l] = high(product2) ^ x[1][l] ^ key0;
      x[1][l] = low(product2);
      x[2][l] = high(product0) ^ x[3][l] ^ key1;
      x[3][l] = low(product0);
    }
  }
}

inline bool decide(const Stream& s, uint32_t word) { return word - s.lo <= s.span; }

inline uint64_t element_counter(uint64_t element) { return element / 128 * 32 + element % 32; }
inline int element_word(uint64_t element) { return static_cast<int>(element / 32 % 4); }

inline bool element_kept(const Stream& s, uint64_t element) {
  return decide(s, outputs(s, element_counter(element), Purpose::ELEMENT).word[element_word(element)]);
}

inline bool block_kept(const Stream& s, uint64_t block) {
  return decide(s, outputs(s, block / 4, Purpose::BLOCK).word[block % 4]);
}

inline bool layer_kept(const Stream& s) { return decide(s, outputs(s, 0, Purpose::LAYER).word[0]); }

}  // namespace
}  // namespace graddrop
