// For every processor: plain loops over a tile, which compilers vectorise with what the target has, and counters drawn
// on the vectors that every x86-64 processor has, since compilers make much less of those.
#pragma once

#include <cmath>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

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
  alignas(16) uint32_t kept[TILE];  // all ones where kept

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

#ifdef __SSE2__
  // Eight elements, for the counters `first` to `first` + 3, of word j.
  GRADDROP_INLINE void put(int j, int first, __m128i inside) {
    auto* to = reinterpret_cast<__m128i*>(kept + 32 * j + 2 * first);
    _mm_store_si128(to, _mm_unpacklo_epi16(inside, inside));
    _mm_store_si128(to + 1, _mm_unpackhi_epi16(inside, inside));
  }
#endif
};

// One lane: a loop over elements is left to the compiler.
struct Float1 {
  static constexpr int WIDTH = 1;
  using Real = float;
  using Floats = float;
  using Kept = uint32_t;

  static Kept kept(const LaneDecisions& decisions, int i) { return decisions.kept[i]; }

  static float set(float x) { return x; }
  static float max(float a, float b) { return a > b || a != a ? a : b; }  // NaN where either is
  static float sqrt(float a) { return std::sqrt(a); }
  static float sign(float a) { return static_cast<float>(a > 0) - static_cast<float>(a < 0); }

  static void pin(float&) {}
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
  static void store(bfloat16* x, float a, const uint16_t* random) { round_stochastically(a, *random, x); }
};

#ifdef __SSE2__

// Four counters with Philox words in the low half of 64-bit lanes.
struct Philox4 {
  using Decisions = LaneDecisions;
  static constexpr int COUNTERS = 4;
  using Vector = __m128i;  // upper halves are dirty: nothing may read them

  static Vector set(const uint32_t* x) { return _mm_set1_epi32(static_cast<int>(*x)); }
  static Vector key(const uint32_t x[KEY_COPIES]) { return _mm_load_si128(reinterpret_cast<const __m128i*>(x)); }
  // first and first + 2: every other counter, so that two vectors interleave into COUNTERS consecutive ones
  static Vector counters(uint32_t first) { return _mm_set_epi64x(first + 2, first); }
  static Vector multiply(Vector a, Vector b) { return _mm_mul_epu32(a, b); }
  static Vector high_half(Vector product) { return _mm_srli_epi64(product, 32); }
  static Vector exclusive_or(Vector a, Vector b) { return _mm_xor_si128(a, b); }
  static Vector exclusive_or(Vector a, Vector b, Vector c) { return _mm_xor_si128(a, _mm_xor_si128(b, c)); }
  // Consecutive counters' words, that is their halves.
  static Vector halves(Vector even, Vector odd) {
    return _mm_or_si128(_mm_and_si128(even, _mm_set1_epi64x(0xffffffff)), _mm_slli_epi64(odd, 32));
  }
  static void store(uint16_t* x, Vector halves) { _mm_storeu_si128(reinterpret_cast<__m128i*>(x), halves); }
  // All ones where a half lies in the window, two halves for each counter.
  static Vector decide(Vector halves, uint16_t lo, uint16_t span) {
    const Vector moved = _mm_sub_epi16(halves, _mm_set1_epi16(static_cast<int16_t>(lo)));
    return _mm_cmpeq_epi16(_mm_subs_epu16(moved, _mm_set1_epi16(static_cast<int16_t>(span))), _mm_setzero_si128());
  }
};
using PortableDraw = TileDraw<Philox4>;

#else

// A tile's counters at once, in one part.
class PortableDraw {
 public:
  using Decisions = LaneDecisions;
  using Result = Decisions;
  static constexpr int COUNTERS = COUNTERS_PER_TILE;
  static constexpr int PARTS = 1;

  PortableDraw(const MaskStream& s, uint64_t tile, Decisions& decisions, Purpose = Purpose::ELEMENT)
      : s_(s), tile_(tile), decisions_(decisions) {}

  template <int PART>
  void part(int) {
    uint32_t x[4][COUNTERS];
    consecutive_outputs<COUNTERS>(s_, tile_ * COUNTERS, Purpose::ELEMENT, x);
    for (int k = 0; k < TILE / 2; ++k) {
      const uint32_t word = x[k / COUNTERS][k % COUNTERS];
      decisions_.kept[2 * k] = decide(s_, half(word, 0)) ? ~0u : 0u;
      decisions_.kept[2 * k + 1] = decide(s_, half(word, 1)) ? ~0u : 0u;
    }
  }

 private:
  const MaskStream& s_;
  uint64_t tile_;
  Decisions& decisions_;
};

template <>
inline void draw_random<PortableDraw>(const MaskStream& s, uint64_t tile, Purpose purpose, uint16_t random[TILE]) {
  uint32_t x[4][COUNTERS_PER_TILE];
  consecutive_outputs<COUNTERS_PER_TILE>(s, tile * COUNTERS_PER_TILE, purpose, x);
  for (int k = 0; k < TILE; ++k) random[k] = half(x[k / 32][k % 32 / 2], static_cast<uint64_t>(k));
}

#endif

}  // namespace
}  // namespace graddrop
