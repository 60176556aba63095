// Mask words of one tile: 32 consecutive counters, four output words each, drawn on vectors.
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

// Draws a tile in batches of COUNTERS counters, and a batch in PIECES, so that a caller can put other work between
// them: a round waits for its multiplications, an update for its square root and division.
template <class Words>
class TileDraw {
  using W = typename Words::Vector;

 public:
  static constexpr int COUNTERS = Words::COUNTERS;
  static constexpr int PIECES = ROUNDS - 1;  // rounds 0 to 2 in one, the others, the decision

  // Only counter word 0 differs between the lanes, so one of the two products is a scalar in rounds 0 and 1.
  GRADDROP_INLINE TileDraw(const Stream& s, uint64_t tile, uint32_t words[4])
      : s_(s), words_(words), index_(tile * 32) {
    const uint64_t product2 = uint64_t{MULTIPLIER1} * s.draw;
    const uint32_t word0 = high(product2) ^ high(index_) ^ s.key0[0][0];  // after round 0; word 1 is low(product2)
    const uint64_t product0 = uint64_t{MULTIPLIER0} * word0;                          // round 1
    round0_word2_ = s.stream ^ s.key1[0][0];
    round1_word0_ = low(product2) ^ s.key0[1][0];
    round1_word2_ = high(product0) ^ s.key1[1][0];
    round2_word2_ = low(product0) ^ s.key1[2][0];
    words[0] = words[1] = words[2] = words[3] = 0;
  }

  template <int PIECE>
  GRADDROP_INLINE void piece(int first) {
    if constexpr (PIECE == 0) {
      first_rounds(first);
    } else if constexpr (PIECE < PIECES - 1) {
      round(PIECE + 2);
    } else {
      for (int j = 0; j < 4; ++j) words_[j] |= Words::decide(even_[j], odd_[j], s_.lo, s_.span) << first;
    }
  }

 private:
  GRADDROP_INLINE void first_rounds(int first) {
    first_rounds(first, even_);
    first_rounds(first + 1, odd_);
  }
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

  const Stream& s_;
  uint32_t* words_;
  uint64_t index_;
  uint32_t round0_word2_, round1_word0_, round1_word2_, round2_word2_;
  W even_[4], odd_[4];  // counters first, first + 2, ... and first + 1, first + 3, ...
};

// Pieces FIRST and on of the batch whose first counter is the tile's number `counter`.
template <int FIRST, class Draw, int... PIECE>
GRADDROP_INLINE void draw_pieces(Draw& draw, int counter, std::integer_sequence<int, PIECE...>) {
  (draw.template piece<FIRST + PIECE>(counter), ...);
}

template <class Draw>
void draw_tile(const Stream& stream, uint64_t tile, uint32_t words[4]) {
  Draw draw(stream, tile, words);
  for (int first = 0; first < 32; first += Draw::COUNTERS) {
    draw_pieces<0>(draw, first, std::make_integer_sequence<int, Draw::PIECES>{});
  }
}

}  // namespace
}  // namespace graddrop
