// The random numbers that round a tensor's bfloat16 values.
#pragma once

#include "contract.h"
#include "elements.h"
#include "level.h"
#include "philox.h"

namespace graddrop {
namespace {

class RandomNumbers {
 public:
  RandomNumbers(const Level& level, const Call& call, int64_t tensor)
      : level_(level), offset_(static_cast<uint64_t>(call.layout[tensor].offset)), rounds_(call.rounding != nullptr) {
    if (rounds_) stream_ = stream_of(call.seed, call.rounding[tensor].draw, call.rounding[tensor].stream_id);
  }

  bool any() const { return rounds_; }
  const MaskStream& stream() const { return stream_; }

  // One for each of the elements, 128 in all; nullptr if values are rounded to nearest. They stand until the next call.
  const uint16_t* of(const Elements& e, Purpose purpose) {
    if (!rounds_) return nullptr;
    if (!e.linear) {
      scattered(e, purpose);
      return numbers_;
    }
    const uint64_t first = offset_ + static_cast<uint64_t>(e.start);
    level_.random(stream_, first / TILE, purpose, numbers_);
    if (first % TILE + static_cast<uint64_t>(e.count) > TILE) {
      level_.random(stream_, first / TILE + 1, purpose, numbers_ + TILE);
    }
    return numbers_ + first % TILE;
  }

 private:
  void scattered(const Elements& e, Purpose purpose) {
    uint16_t* const of_tile = numbers_ + TILE;
    uint64_t drawn = ~uint64_t{0};
    for (int i = 0; i < e.count; ++i) {
      const uint64_t tile = e.global[i] / TILE;
      // one tile's draw costs about as much as four single ones
      if (tile != drawn && i + 3 < e.count && e.global[i + 3] == e.global[i] + 3) {
        level_.random(stream_, tile, purpose, of_tile);
        drawn = tile;
      }
      numbers_[i] = tile == drawn ? of_tile[e.global[i] % TILE] : element_random(stream_, e.global[i], purpose);
    }
  }

  const Level& level_;
  const uint64_t offset_;  // global index of the local element 0
  const bool rounds_;
  MaskStream stream_;
  uint16_t numbers_[2 * TILE] = {};
};

}  // namespace
}  // namespace graddrop
