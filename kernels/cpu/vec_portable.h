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

  LoopDraw(const Stream& s, uint64_t tile, uint32_t words[4]) : s_(s), tile_(tile), words_(words) {}

  template <int PIECE>
  void piece(int) {
    uint32_t x[4][32];
    outputs_of_tile(s_, tile_, Purpose::ELEMENT, x);
    for (int word = 0; word < 4; ++word) {
      uint32_t bits = 0;
      for (int l = 0; l < 32; ++l) bits |= decide(s_, x[word][l]) ? BITS.bit[l] : 0u;
      words_[word] = bits;
    }
  }

 private:
  const Stream& s_;
  uint64_t tile_;
  uint32_t* words_;
};

}  // namespace
}  // namespace graddrop
