// The decisions of one tile, drawn on vectors: 16 consecutive counters, each of whose four words decides two elements.
#pragma once

#include <utility>

#include "philox.h"

#if defined(__GNUC__)
#define GRADDROP_INLINE inline __attribute__((always_inline))
#else
#define GRADDROP_INLINE inline
#endif

namespace graddrop {
namespace {

constexpr int COUNTERS_PER_TILE = 16;
constexpr int ELEMENTS_PER_COUNTER = TILE / COUNTERS_PER_TILE;

// A tile's decisions as four mask words: bit l of word j is element 32 j + l.
struct WordDecisions {
  uint32_t word[4];

  GRADDROP_INLINE void read(const uint32_t from[4]) {
    for (int j = 0; j < 4; ++j) word[j] = from[j];
  }
  GRADDROP_INLINE void write(uint32_t to[4]) const {
    for (int j = 0; j < 4; ++j) to[j] = word[j];
  }
  GRADDROP_INLINE bool bit(int i) const { return word[i / 32] >> (i % 32) & 1u; }

  // Two elements for each of the counters `first` and on, of word j.
  GRADDROP_INLINE void put(int j, int first, uint32_t bits) { word[j] = first == 0 ? bits : word[j] | bits << (2 * first); }
};

// What becomes of a group's words: even and odd counters from the tile's number `first` on, of word j.
template <class Words>
struct Decide {
  using Result = typename Words::Decisions;
  using W = typename Words::Vector;
  GRADDROP_INLINE static void take(const MaskStream& s, int j, int first, W even, W odd, Result& result) {
    result.put(j, first, Words::decide(Words::halves(even, odd), s.lo, s.span));
  }
};

// The numbers themselves.
struct RandomNumbersAt {
  uint16_t* place;
};
template <class Words>
struct Store {
  using Result = RandomNumbersAt;
  using W = typename Words::Vector;
  GRADDROP_INLINE static void take(const MaskStream&, int j, int first, W even, W odd, Result& result) {
    Words::store(result.place + 32 * j + 2 * first, Words::halves(even, odd));
  }
};

// Draws a tile in groups of COUNTERS counters, and a group in PARTS, so that a caller can put other work between them:
// a round waits for its multiplications, an update for its square root and division.
template <class Words, template <class> class Sink = Decide>
class TileDraw {
  using W = typename Words::Vector;

 public:
  using Decisions = typename Words::Decisions;
  using Result = typename Sink<Words>::Result;
  using Random = TileDraw<Words, Store>;  // the numbers in place of decisions
  static constexpr int COUNTERS = Words::COUNTERS;
  static constexpr int PARTS = ROUNDS - 1;  // rounds 0 to 2 in one, the others, the decision

  // Only counter word 0 differs between the lanes, so one of the two products is a scalar in rounds 0 and 1.
  GRADDROP_INLINE TileDraw(const MaskStream& s, uint64_t tile, Result& result, Purpose purpose = Purpose::ELEMENT)
      : s_(s), result_(result), index_(tile * COUNTERS_PER_TILE) {
    const uint64_t product2 = uint64_t{MULTIPLIER1} * s.draw;
    // after round 0; word 1 is low(product2)
    const uint32_t word0 = high(product2) ^ word1(s, index_, purpose) ^ s.key0[0][0];
    const uint64_t product0 = uint64_t{MULTIPLIER0} * word0;  // round 1
    round0_word2_ = s.id_low ^ s.key1[0][0];
    round1_word0_ = low(product2) ^ s.key0[1][0];
    round1_word2_ = high(product0) ^ s.key1[1][0];
    round2_word2_ = low(product0) ^ s.key1[2][0];
  }

  // Of the group whose first counter is the tile's number `first`.
  template <int PART>
  GRADDROP_INLINE void part(int first) {
    if constexpr (PART == 0) {
      first_rounds(first, even_);
      first_rounds(first + 1, odd_);
    } else if constexpr (PART < PARTS - 1) {
      round(PART + 2);
    } else {
      for (int j = 0; j < 4; ++j) Sink<Words>::take(s_, j, first, even_[j], odd_[j], result_);
    }
  }

 private:
  GRADDROP_INLINE void first_rounds(int first, W x[4]) {
    const W multiplier0 = Words::set(&MULTIPLIER0), multiplier1 = Words::set(&MULTIPLIER1);
    const W round0 = Words::multiply(Words::counters(low(index_) + static_cast<uint32_t>(first)), multiplier0);
    const W word2 = Words::exclusive_or(Words::high_half(round0), Words::set(&round0_word2_));
    const W round1 = Words::multiply(word2, multiplier1);
    x[0] = Words::exclusive_or(Words::high_half(round1), Words::set(&round1_word0_));
    x[2] = Words::exclusive_or(round0, Words::set(&round1_word2_));
    const W round2_0 = Words::multiply(x[0], multiplier0), round2_2 = Words::multiply(x[2], multiplier1);
    x[0] = Words::exclusive_or(Words::high_half(round2_2), round1, Words::key(s_.key0[2]));
    x[1] = round2_2;
    x[2] = Words::exclusive_or(Words::high_half(round2_0), Words::set(&round2_word2_));
    x[3] = round2_0;
  }

  GRADDROP_INLINE void round(int r) {
    const W multiplier0 = Words::set(&MULTIPLIER0), multiplier1 = Words::set(&MULTIPLIER1);
    const W key0 = Words::key(s_.key0[r]), key1 = Words::key(s_.key1[r]);
    const auto half = [&](W x[4]) {
      const W product0 = Words::multiply(x[0], multiplier0), product2 = Words::multiply(x[2], multiplier1);
      x[0] = Words::exclusive_or(Words::high_half(product2), x[1], key0);
      x[1] = product2;
      x[2] = Words::exclusive_or(Words::high_half(product0), x[3], key1);
      x[3] = product0;
    };
    half(even_);
    half(odd_);
  }

  const MaskStream& s_;
  Result& result_;
  uint64_t index_;
  uint32_t round0_word2_, round1_word0_, round1_word2_, round2_word2_;
  W even_[4], odd_[4];  // counters first, first + 2, ... and first + 1, first + 3, ...
};

// Parts FIRST and on of the group whose first counter is the tile's number `counter`.
template <int FIRST, class Draw, int... PART>
GRADDROP_INLINE void draw_parts(Draw& draw, int counter, std::integer_sequence<int, PART...>) {
  (draw.template part<FIRST + PART>(counter), ...);
}

template <class Draw>
GRADDROP_INLINE void draw_tile(const MaskStream& stream, uint64_t tile, typename Draw::Result& result,
                               Purpose purpose = Purpose::ELEMENT) {
  Draw draw(stream, tile, result, purpose);
  for (int first = 0; first < COUNTERS_PER_TILE; first += Draw::COUNTERS) {
    draw_parts<0>(draw, first, std::make_integer_sequence<int, Draw::PARTS>{});
  }
}

template <class Draw>
void draw_words(const MaskStream& stream, uint64_t tile, uint32_t words[4]) {
  typename Draw::Decisions decisions;
  draw_tile<Draw>(stream, tile, decisions);
  decisions.write(words);
}

template <class Draw>
void draw_random(const MaskStream& stream, uint64_t tile, Purpose purpose, uint16_t random[TILE]) {
  RandomNumbersAt at = {random};
  draw_tile<typename Draw::Random>(stream, tile, at, purpose);
}

}  // namespace
}  // namespace graddrop
