// Plain loops over a tile, for every processor; compilers vectorise them with what the target has.
#pragma once

#include <cmath>

#include "dtypes.h"
#include "philox.h"

namespace graddrop {
namespace {

struct Bits {
  uint32_t bit[32];
};
constexpr Bits each_bit() {
  Bits all{};
  for (int l = 0; l < 32; ++l) all.bit[l] = uint32_t{1} << l;
  return all;
}
constexpr Bits BITS = each_bit();

// One lane: a loop over elements is left to the compiler.
struct Float1 {
  static constexpr int WIDTH = 1;
  using Floats = float;
  using Kept = uint32_t;  // all ones where kept

  struct Decisions {  // spread over words, as many processors cannot shift lanes by different distances
    uint32_t kept[TILE];
    void read(const uint32_t words[4]) {
      for (int j = 0; j < 4; ++j) {
        for (int l = 0; l < 32; ++l) kept[32 * j + l] = words[j] & BITS.bit[l] ? ~0u : 0u;
      }
    }
    Kept at(int i) const { return kept[i]; }
  };

  static float set(float x) { return x; }
  static float add(float a, float b) { return a + b; }
  static float sub(float a, float b) { return a - b; }
  static float mul(float a, float b) { return a * b; }
  static float div(float a, float b) { return a / b; }
  static float max(float a, float b) { return a > b ? a : b; }  // b where either is NaN
  static float sqrt(float a) { return std::sqrt(a); }

  static float keep(Kept kept, float a) { return float_of(bits_of(a) & kept); }
  static float select(Kept kept, float a, float b) { return float_of((bits_of(a) & kept) | (bits_of(b) & ~kept)); }

  template <class T>
  static float load(const T* x) {
    return to_float(*x);
  }
  template <class T>
  static void store(T* x, float a) {
    from_float(a, x);
  }
};

// A tile's 32 counters at once, in one piece.
class LoopDraw {
 public:
  static constexpr int COUNTERS = 32;
  static constexpr int PIECES = 1;

  LoopDraw(const Stream& s, uint64_t tile, uint32_t words[4]) : s_(s), words_(words), index_(tile * 32) {}

  template <int PIECE>
  void piece(int) {
    uint32_t x[4][32];
    for (uint32_t l = 0; l < 32; ++l) {
      x[0][l] = low(index_) + l;
      x[1][l] = high(index_);
      x[2][l] = s_.draw;
      x[3][l] = s_.stream;
    }
    for (int r = 0; r < ROUNDS; ++r) {
      const uint32_t key0 = s_.key0[r][0], key1 = s_.key1[r][0];
      for (int l = 0; l < 32; ++l) {
        const uint64_t product0 = uint64_t{MULTIPLIER0} * x[0][l], product2 = uint64_t{MULTIPLIER1} * x[2][l];
        x[0][l] = high(product2) ^ x[1][l] ^ key0;
        x[1][l] = low(product2);
        x[2][l] = high(product0) ^ x[3][l] ^ key1;
        x[3][l] = low(product0);
      }
    }
    for (int word = 0; word < 4; ++word) {
      uint32_t bits = 0;
      for (int l = 0; l < 32; ++l) bits |= decide(s_, x[word][l]) ? BITS.bit[l] : 0u;
      words_[word] = bits;
    }
  }

 private:
  const Stream& s_;
  uint32_t* words_;
  uint64_t index_;
};

}  // namespace
}  // namespace graddrop
