// Where a tensor's local elements lie in its memories, and moving up to 128 of them to a tile and back.
#pragma once

#include <cstring>

#include "contract.h"
#include "dtypes.h"
#include "level.h"

namespace graddrop {
namespace {

inline bool unit(const int64_t* stride, const Layout& row) {
  return row.ndim == 0 || (row.ndim == 1 && stride[0] == 1);
}

// Local elements start .. start + count - 1. Where the tensor is not linear, walk() says where each of them is.
struct Elements {
  int64_t start;
  int count;
  bool linear;
  int64_t param[TILE], grad[TILE];  // in memory
  uint64_t global[TILE];            // in the whole parameter
};

inline void walk(const Layout& row, Elements& out) {
  int64_t index[MAX_DIMS] = {};
  int64_t param = 0, grad = 0, global = row.offset;
  for (int64_t d = row.ndim - 1, rest = out.start; d >= 0; --d) {
    index[d] = rest % row.size[d];
    rest /= row.size[d];
    param += index[d] * row.param_stride[d];
    grad += index[d] * row.grad_stride[d];
    global += index[d] * row.global_stride[d];
  }
  for (int i = 0; i < out.count; ++i) {
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

template <class T>
void gather_as(const char* from, const int64_t* at, int count, char* to) {
  constexpr int64_t SIZE = sizeof(T);
  for (int i = 0; i < count; ++i) std::memcpy(to + i * SIZE, from + at[i] * SIZE, SIZE);
}
template <class T>
void scatter_as(const char* from, const int64_t* at, int count, char* to) {
  constexpr int64_t SIZE = sizeof(T);
  for (int i = 0; i < count; ++i) std::memcpy(to + at[i] * SIZE, from + i * SIZE, SIZE);
}
inline void gather(int64_t size, const char* from, const int64_t* at, int count, char* to) {
  (size == 8 ? gather_as<uint64_t> : size == 4 ? gather_as<uint32_t> : gather_as<uint16_t>)(from, at, count, to);
}
inline void scatter(int64_t size, const char* from, const int64_t* at, int count, char* to) {
  (size == 8 ? scatter_as<uint64_t> : size == 4 ? scatter_as<uint32_t> : scatter_as<uint16_t>)(from, at, count, to);
}

struct alignas(64) Buffer {
  char bytes[TILE * sizeof(double)];
};

// One of a tensor's memories (its parameter, its gradient or a state) as tiles in the arithmetic's dtype.
class Memory {
 public:
  void set(int64_t address, Dtype dtype, Dtype real) {
    base_ = reinterpret_cast<char*>(address);
    dtype_ = dtype;
    real_ = real;
    size_ = size_of(dtype);
  }

  char* at(int64_t element) const { return base_ + element * size_; }

  // The elements as a tile: in their place if they are a whole tile of `real`, else a copy, with zeros behind them.
  // `place`: of each element, where they are not linear.
  char* take(const Level& level, const Elements& e, const int64_t* place) {
    char* tile = at(e.start);
    if (!in_place(e)) {
      tile = copy_.bytes;
      if (e.count < TILE) std::memset(tile, 0, sizeof copy_.bytes);
      e.linear ? void(std::memcpy(tile, at(e.start), bytes(e))) : gather(size_, base_, place, e.count, tile);
    }
    if (dtype_ == real_) return tile;
    level.widen(dtype_, tile, real_, converted_.bytes);
    return converted_.bytes;
  }

  // Writes back what became of the tile that take() gave. `random`: what rounds bfloat16; nullptr: to nearest.
  void put(const Level& level, const Elements& e, const int64_t* place, const uint16_t* random) {
    char* const tile = in_place(e) ? at(e.start) : copy_.bytes;
    if (random != nullptr && dtype_ == Dtype::BFLOAT16) {
      level.round(reinterpret_cast<const float*>(converted_.bytes), random, tile);
    } else if (dtype_ != real_) {
      level.narrow(real_, converted_.bytes, dtype_, tile);
    }
    if (in_place(e)) return;
    e.linear ? void(std::memcpy(at(e.start), tile, bytes(e))) : scatter(size_, tile, place, e.count, base_);
  }

 private:
  static bool in_place(const Elements& e) { return e.linear && e.count == TILE; }
  size_t bytes(const Elements& e) const { return static_cast<size_t>(e.count * size_); }

  char* base_;
  Dtype dtype_, real_;
  int64_t size_;
  Buffer copy_, converted_;
};

}  // namespace
}  // namespace graddrop
