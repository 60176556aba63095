// Mask words for up to 128 local elements, whatever the mask's kind and the tensor's layout.
#pragma once

#include <algorithm>
#include <cstring>

#include "contract.h"
#include "elements.h"
#include "gaussian.h"
#include "level.h"
#include "philox.h"

namespace graddrop {
namespace {

// A tensor's mask kind once its layer is decided.
inline Mask kind_of(const Call& call, int64_t tensor) {
  const Mask mask = call.integers[tensor].mask;
  if (mask != Mask::LAYER) return mask;
  return layer_kept(stream_of(call.seed, call.integers[tensor])) ? Mask::KEEP : Mask::DROP;
}

inline void fill_words(uint32_t words[4], bool kept) { std::memset(words, kept ? 0xff : 0, 16); }

inline void shift_down(uint32_t words[4], int by) {
  for (int j = 0; j < 4; ++j) {
    const int from = j + by / 32;
    const uint64_t low_word = from < 4 ? words[from] : 0, high_word = from + 1 < 4 ? words[from + 1] : 0;
    words[j] = static_cast<uint32_t>((low_word | high_word << 32) >> (by % 32));
  }
}

inline void set_bit(uint32_t words[4], int i, bool kept) { words[i / 32] |= static_cast<uint32_t>(kept) << (i % 32); }

class MaskWords {
 public:
  MaskWords(const Level& level, const Call& call, int64_t tensor)
      : level_(level),
        row_(call.layout[tensor]),
        stream_(stream_of(call.seed, call.integers[tensor])),
        kind_(kind_of(call, tensor)),
        block_(static_cast<uint64_t>(call.integers[tensor].block)) {}

  Mask kind() const { return kind_; }
  const MaskStream& stream() const { return stream_; }
  uint64_t global(int64_t local) const { return static_cast<uint64_t>(row_.offset + local); }  // of linear tensors

  // The words of the elements. Unused bits are zero.
  void of(const Elements& e, uint32_t words[4]) {
    fill_words(words, kind_ == Mask::KEEP || kind_ == Mask::GAUSSIAN);
    if (kind_ == Mask::PACKED) {
      const auto* packed = reinterpret_cast<const char*>(row_.packed);
      std::memcpy(words, packed + e.start / 8, static_cast<size_t>((e.count + 31) / 32) * 4);
    } else if (kind_ == Mask::ELEMENT || kind_ == Mask::BLOCK) {
      if (e.linear) {
        neighbours(global(e.start), 0, e.count, words);
      } else {
        scattered(e, words);
      }
    }
    if (e.count < TILE) trim(e.count, words);
  }

  // How many of the next `tiles` tiles, from local element `start` of a linear tensor on, have one decision: `kept`.
  // For every kind but ELEMENT and PACKED. `one_block`: of kept blocks, those of the first one.
  int64_t alike(int64_t start, int64_t tiles, bool& kept, bool one_block) {
    kept = kind_ != Mask::DROP;
    if (kind_ != Mask::BLOCK) return tiles;
    const uint64_t first = global(start), last = first + static_cast<uint64_t>(tiles) * TILE;
    uint64_t block = block_number(first);
    kept = decided(block++);
    while (block * block_ < last && !(kept && one_block) && decided(block) == kept) ++block;
    return static_cast<int64_t>((std::min(block * block_, last) - first) / TILE);
  }

  // The block of an element, and the first element behind it.
  uint64_t block_number(uint64_t element) const { return element / block_; }
  uint64_t block_end(uint64_t element) const { return (element / block_ + 1) * block_; }

  // The standard normal of one element; of neighbours after each other, a tile's at once.
  float normal(uint64_t element, bool neighbours) {
    if (!neighbours) return normal_of(stream_, element);
    if (element / TILE != normals_tile_) {
      normals_tile_ = element / TILE;
      level_.normals(stream_, normals_tile_, normal_);
    }
    return normal_[element % TILE];
  }

 private:
  // Bits [begin, end) of the words: of ELEMENT's or BLOCK's consecutive elements `first` and on.
  void neighbours(uint64_t first, int begin, int end, uint32_t words[4]) {
    if (kind_ == Mask::ELEMENT) {
      uint32_t drawn[4];
      elements(first, end - begin, drawn);
      if (begin == 0) {
        std::memcpy(words, drawn, sizeof drawn);
        return trim(end, words);
      }
      for (int i = begin; i < end; ++i) set_bit(words, i, drawn[(i - begin) / 32] >> ((i - begin) % 32) & 1u);
      return;
    }
    uint64_t block = block_number(first);
    for (int i = begin; i < end; ++block) {
      const uint64_t left = (block + 1) * block_ - (first + static_cast<uint64_t>(i - begin));
      const int stop = left < static_cast<uint64_t>(end - i) ? i + static_cast<int>(left) : end;
      const bool kept = decided(block);
      for (; i < stop; ++i) set_bit(words, i, kept);
    }
  }

  void scattered(const Elements& e, uint32_t words[4]) {
    for (int i = 0; i < e.count;) {
      int stop = i + 1;
      while (stop < e.count && e.global[stop] == e.global[stop - 1] + 1) ++stop;
      if (kind_ == Mask::BLOCK || stop - i >= 4) {  // one tile's draw costs about as much as four single ones
        neighbours(e.global[i], i, stop, words);
      } else {
        for (int j = i; j < stop; ++j) set_bit(words, j, element_kept(stream_, e.global[j]));
      }
      i = stop;
    }
  }

  // From bit 0 on; bits behind `count` may be anything.
  void elements(uint64_t first, int count, uint32_t words[4]) const {
    const int at = static_cast<int>(first % TILE);
    level_.draw(stream_, first / TILE, words);
    if (at == 0) return;
    shift_down(words, at);
    if (at + count <= TILE) return;
    uint32_t next[4];
    level_.draw(stream_, first / TILE + 1, next);
    for (int i = TILE - at; i < TILE; ++i) {
      const int j = i - (TILE - at);
      set_bit(words, i, next[j / 32] >> (j % 32) & 1u);
    }
  }

  bool decided(uint64_t block) {
    if (block / BLOCKS_PER_COUNTER != counter_) {
      counter_ = block / BLOCKS_PER_COUNTER;
      drawn_ = block_words(stream_, block);
    }
    return block_kept(stream_, block, drawn_);
  }

  static void trim(int count, uint32_t words[4]) {
    for (int j = 0; j < 4; ++j) {
      const int bits = count - 32 * j;
      if (bits < 32) words[j] &= bits <= 0 ? 0u : (1u << bits) - 1u;
    }
  }

  const Level& level_;
  const Layout& row_;
  MaskStream stream_;
  Mask kind_;
  uint64_t block_;
  uint64_t counter_ = ~uint64_t{0};  // of the eight blocks' words in drawn_
  Words drawn_ = {};
  uint64_t normals_tile_ = ~uint64_t{0};
  float normal_[TILE];
};

}  // namespace
}  // namespace graddrop
