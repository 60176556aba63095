// Mask words for up to 128 local elements, whatever the mask's kind and the tensor's layout.
#pragma once

#include <cstring>

#include "contract.h"
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

inline bool unit(const int64_t* stride, const Layout& row) {
  return row.ndim == 0 || (row.ndim == 1 && stride[0] == 1);
}

inline void fill_words(uint32_t words[4], bool kept) { std::memset(words, kept ? 0xff : 0, 16); }

inline void shift_down(uint32_t words[4], int by) {
  for (int j = 0; j < 4; ++j) {
    const int from = j + by / 32;
    const uint64_t low_word = from < 4 ? words[from] : 0, high_word = from + 1 < 4 ? words[from + 1] : 0;
    words[j] = static_cast<uint32_t>((low_word | high_word << 32) >> (by % 32));
  }
}

// Local elements start .. start + count - 1 and where they lie; filled by walk().
struct Elements {
  int64_t param[TILE], grad[TILE];
  uint64_t global[TILE];
};

inline void walk(const Layout& row, int64_t start, int count, Elements& out) {
  int64_t index[MAX_DIMS] = {};
  int64_t param = 0, grad = 0, global = row.offset;
  for (int64_t d = row.ndim - 1, rest = start; d >= 0; --d) {
    index[d] = rest % row.size[d];
    rest /= row.size[d];
    param += index[d] * row.param_stride[d];
    grad += index[d] * row.grad_stride[d];
    global += index[d] * row.global_stride[d];
  }
  for (int i = 0; i < count; ++i) {
    out.param[i] = param;
    out.grad[i] = grad;
    out.global[i] = static_cast<uint64_t>(global);
    for (int64_t d = row.ndim - 1; d >= 0; --d) {
      param += row.param_stride[d];
      grad += row.grad_stride[d];
      global += row.global_stride[d];
      if (++index[d] < row.size[d]) break;
      param -= row.size[d] * row.param_stride[d];
      grad -= row.size[d] * row.grad_stride[d];
      global -= row.size[d] * row.global_stride[d];
      index[d] = 0;
    }
  }
}

class MaskWords {
 public:
  MaskWords(const Level& level, const Call& call, int64_t tensor)
      : draw_(level.draw),
        normals_(level.normals),
        row_(call.layout[tensor]),
        stream_(stream_of(call.seed, call.integers[tensor])),
        kind_(kind_of(call, tensor)),
        block_(static_cast<uint64_t>(call.integers[tensor].block)) {}

  Mask kind() const { return kind_; }
  const Stream& stream() const { return stream_; }

  // Local elements [start, start + count) of a tensor whose global indices are consecutive. Unused bits are zero.
  void linear(int64_t start, int count, uint32_t words[4]) {
    const auto first = static_cast<uint64_t>(row_.offset + start);
    switch (kind_) {
      case Mask::ELEMENT:
        elements(first, count, words);
        break;
      case Mask::BLOCK:
        fill_words(words, false);
        for (int i = 0; i < count;) {
          const uint64_t left = block_ - (first + static_cast<uint64_t>(i)) % block_;
          const int stop = left < static_cast<uint64_t>(count - i) ? i + static_cast<int>(left) : count;
          const bool kept = block(first + static_cast<uint64_t>(i));
          for (; i < stop; ++i) words[i / 32] |= static_cast<uint32_t>(kept) << (i % 32);
        }
        break;
      default:
        other(start, count, words);
    }
    if (count < TILE) trim(count, words);
  }

  // The same for any global indices.
  void strided(int64_t start, int count, const uint64_t* global, uint32_t words[4]) {
    if (kind_ == Mask::ELEMENT || kind_ == Mask::BLOCK) {
      fill_words(words, false);
      for (int i = 0; i < count;) {
        int stop = i + 1;
        while (stop < count && global[stop] == global[stop - 1] + 1) ++stop;
        if (kind_ == Mask::ELEMENT && stop - i >= 4) {  // one vector draw costs about as much as four single ones
          uint32_t run[4];
          elements(global[i], stop - i, run);
          for (int j = i; j < stop; ++j) words[j / 32] |= (run[(j - i) / 32] >> ((j - i) % 32) & 1u) << (j % 32);
        } else {
          for (int j = i; j < stop; ++j) {
            const bool kept = kind_ == Mask::ELEMENT ? element_kept(stream_, global[j]) : block(global[j]);
            words[j / 32] |= static_cast<uint32_t>(kept) << (j % 32);
          }
        }
        i = stop;
      }
    } else {
      other(start, count, words);
    }
    if (count < TILE) trim(count, words);
  }

  bool block(uint64_t element) {
    const uint64_t b = element / block_;
    if (b != last_block_) {
      last_block_ = b;
      last_kept_ = block_kept(stream_, b);
    }
    return last_kept_;
  }

  // The first global index behind the block of this one.
  int64_t block_end(int64_t element) const {
    const auto block = static_cast<int64_t>(block_);
    return (element / block + 1) * block;
  }

  // The standard normal of one element; of neighbours after each other, a tile's at once.
  float normal(uint64_t element, bool neighbours) {
    if (!neighbours) return normal_of(stream_, element);
    if (element / TILE != normals_tile_) {
      normals_tile_ = element / TILE;
      normals_(stream_, normals_tile_, normal_);
    }
    return normal_[element % TILE];
  }

 private:
  void elements(uint64_t first, int count, uint32_t words[4]) const {
    const int at = static_cast<int>(first % TILE);
    draw_(stream_, first / TILE, words);
    if (at == 0) return;
    shift_down(words, at);
    if (at + count <= TILE) return;
    uint32_t next[4];
    draw_(stream_, first / TILE + 1, next);
    for (int i = TILE - at; i < TILE; ++i) {
      const int j = i - (TILE - at);
      words[i / 32] |= (next[j / 32] >> (j % 32) & 1u) << (i % 32);
    }
  }

  void other(int64_t start, int count, uint32_t words[4]) const {
    fill_words(words, kind_ != Mask::DROP);
    if (kind_ == Mask::PACKED) {
      const auto* packed = reinterpret_cast<const char*>(row_.packed);
      std::memcpy(words, packed + start / 8, static_cast<size_t>((count + 31) / 32) * 4);
    }
  }

  static void trim(int count, uint32_t words[4]) {
    for (int j = 0; j < 4; ++j) {
      const int bits = count - 32 * j;
      if (bits < 32) words[j] &= bits <= 0 ? 0u : (1u << bits) - 1u;
    }
  }

  DrawTile draw_;
  NormalsOfTile normals_;
  const Layout& row_;
  Stream stream_;
  Mask kind_;
  uint64_t block_;
  uint64_t last_block_ = ~uint64_t{0};
  bool last_kept_ = false;
  uint64_t normals_tile_ = ~uint64_t{0};
  float normal_[TILE];
};

}  // namespace
}  // namespace graddrop
