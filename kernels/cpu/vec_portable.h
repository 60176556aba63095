// Plain loops over a tile, for every processor; compilers vectorise them with what the target has.
#pragma once

#include <cmath>

#include "draw.h"
#include "dtypes.h"

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

// A tile's decisions, one word for each element: many processors cannot shift lanes by different distances.
struct LaneDecisions {
  uint32_t kept[TILE];  // all ones where kept

  void read(const uint32_t from[4]) {
    for (int j = 0; j < 4; ++j) {
      for (int l = 0; l < 32; ++l) kept[32 * j + l] = from[j] & BITS.bit[l] ? ~0u : 0u;
    }
  }
  void write(uint32_t to[4]) const {
    for (int j = 0; j < 4; ++j) {
      to[j] = 0;
      for (int l = 0; l < 32; ++l) to[j] |= kept[32 * j + l] & BITS.bit[l];
    }
  }
  bool bit(int i) const { return kept[i] != 0; }
};

// One lane: a loop over elements is left to the compiler.
struct Float1 {
  static constexpr int WIDTH = 1;
  using Real = float;
  using Floats = float;
  using Kept = uint32_t;

  static Kept kept(const LaneDecisions& decisions, int i) { return decisions.kept[i]; }

  static float set(float x) { return x; }
  static float max(float a, float b) { return a > b ? a : b; }  // b where either is NaN
  static float sqrt(float a) { return std::sqrt(a); }
  static float sign(float a) { return static_cast<float>(a > 0) - static_cast<float>(a < 0); }

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

// A tile's counters at once, in one part.
class LoopDraw {
 public:
  using Decisions = LaneDecisions;
  static constexpr int COUNTERS = COUNTERS_PER_TILE;
  static constexpr int PARTS = 1;

  LoopDraw(const MaskStream& s, uint64_t tile, Decisions& decisions) : s_(s), tile_(tile), decisions_(decisions) {}

  template <int PART>
  void part(int) {
    uint32_t x[4][COUNTERS];
    consecutive_outputs<COUNTERS>(s_, tile_ * COUNTERS, Purpose::ELEMENT, x);
    for (int word = 0; word < 4; ++word) {
      for (int i = 0; i < 32; ++i) decisions_.kept[32 * word + i] = decide(s_, half(x[word][i / 2], i)) ? ~0u : 0u;
    }
  }

 private:
  const MaskStream& s_;
  uint64_t tile_;
  Decisions& decisions_;
};

}  // namespace
}  // namespace graddrop
