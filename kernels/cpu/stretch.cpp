#include "stretch.h"

#include <algorithm>

#include "elements.h"
#include "mask_words.h"
#include "rounding.h"

namespace graddrop {
namespace {

alignas(64) const char ZEROS[TILE * sizeof(double)] = {};
const uint32_t NO_WORDS[4] = {};

// The gradient's factor and the rule's, rounded once.
Factors factors_of(const Reals& reals, double inv_grad_scale) {
  Factors f = {};
  f.f64[0] = inv_grad_scale * reals.grad_factor;
  for (int k = 0; k < MAX_FACTORS; ++k) f.f64[1 + k] = reals.factor[k];
  for (int k = 0; k < 1 + MAX_FACTORS; ++k) f.f32[k] = static_cast<float>(f.f64[k]);
  return f;
}

// The update of one tensor. Its parameter and its states are treated alike.
class Update {
 public:
  Update(const Level& level, const Call& call, int64_t tensor)
      : level_(level),
        row_(call.layout[tensor]),
        effect_(call.integers[tensor].effect),
        words_(level, call, tensor),
        random_(level, call, tensor),
        drops_all_(words_.kind() == Mask::DROP),
        reads_grad_(row_.grad != 0 && !(drops_all_ && effect_ == Effect::GRADIENT)),
        noisy_(words_.kind() == Mask::GAUSSIAN && effect_ != Effect::UPDATE && reads_grad_),
        noise_std_(call.reals[tensor].noise_std),
        real_(arithmetic(call.dtypes.param)),
        states_(static_cast<int>(call.states)),
        factors_(factors_of(call.reals[tensor], reads_grad_ ? call.inv_grad_scale : 0.0)),
        block_table_(words_.kind() == Mask::BLOCK && effect_ == Effect::FREEZE ? row_.block_factors : 0),
        block_factors_(factors_),
        in_place_(level.kernels(call.rule, call.dtypes, random_.any())),
        on_copies_(level.kernels(call.rule, {real_, real_, real_}, false)) {
    param_.set(row_.param, call.dtypes.param, real_);
    grad_.set(row_.grad, call.dtypes.grad, real_);
    for (int k = 0; k < states_; ++k) state_[k].set(row_.state[k], call.dtypes.state, real_);
  }

  void operator()(int64_t begin, int64_t end) {
    if (drops_all_ && effect_ == Effect::FREEZE) return;
    if (unit(row_.param_stride, row_) && unit(row_.grad_stride, row_) && unit(row_.global_stride, row_)) {
      while (begin < end) begin = next_part(begin, end);
    } else {
      for (; begin < end; begin += TILE) copied_tile(begin, std::min<int64_t>(TILE, end - begin), false);
    }
  }

 private:
  // Updates as much of [begin, end) as goes in one way, of a linear tensor. Returns where that ends.
  int64_t next_part(int64_t begin, int64_t end) {
    const bool drawn = words_.kind() == Mask::ELEMENT, packed = words_.kind() == Mask::PACKED;
    const int64_t into_tile = (row_.offset + begin) & (TILE - 1);  // of the stream
    // up to where the stream's tiles begin; packed words must begin a tile
    const int64_t head = drawn || (random_.any() && !packed) ? (TILE - into_tile) & (TILE - 1) : 0;
    const bool out_of_step = packed && random_.any() && into_tile > 0;
    int64_t tiles = (end - begin) / TILE;
    if (head > 0 || tiles == 0 || noisy_ || out_of_step || !in_place_) {
      const int64_t count = std::min<int64_t>(head > 0 ? head : TILE, end - begin);
      copied_tile(begin, count, true);
      return begin + count;
    }
    Tiles some = tiles_at(begin);
    Select select = select_of(effect_);
    bool kept;
    if (drawn) {
      some.stream = &words_.stream();
    } else if (packed) {
      some.words = reinterpret_cast<const uint32_t*>(row_.packed) + begin / 32;
    } else if (const int64_t alike = words_.alike(begin, tiles, kept, block_table_ != 0); alike > 0) {
      tiles = alike;
      if (kept) {
        select = Select::NOWHERE;
        if (effect_ == Effect::FREEZE) some.to_next = to_kept(begin + tiles * TILE, end);
      } else {
        drop(some);
      }
    } else {  // a tile of blocks that are decided differently
      tiles = 1;
      elements_ = {begin, TILE, true};
      words_.of(elements_, bits_);
      some.words = bits_;
    }
    some.count = tiles;
    if (some.words == NO_WORDS && effect_ == Effect::FREEZE) return begin + tiles * TILE;
    if (block_table_ == 0) {
      in_place_[select](some, factors_);
    } else if (select == Select::NOWHERE) {
      in_place_[select](some, factors_at(words_.block_number(words_.global(begin))));
    } else {
      by_blocks(in_place_[select], some);
    }
    return begin + tiles * TILE;
  }

  // Elements from the tile before `begin` to the first one that is not dropped; 0: there is none before `end`.
  int64_t to_kept(int64_t begin, int64_t end) {
    bool kept = true;
    int64_t at = begin, dropped = 0;
    do {
      at += dropped * TILE;
      if (end - at < TILE) return 0;
      dropped = words_.alike(at, (end - at) / TILE, kept, true);
    } while (!kept && dropped > 0);
    return at - begin + TILE;
  }

  Tiles tiles_at(int64_t begin) const {
    Tiles some = {};
    some.param = param_.at(begin);
    some.grad = reads_grad_ ? grad_.at(begin) : ZEROS;
    some.grad_step = reads_grad_ ? TILE : 0;
    for (int k = 0; k < states_; ++k) some.state[k] = state_[k].at(begin);
    some.first_tile = words_.global(begin) / TILE;
    if (random_.any()) some.rounding = &random_.stream();
    return some;
  }

  // No element of the tiles is kept, so that their gradient need not be read unless the state takes it.
  void drop(Tiles& some) const {
    some.words = NO_WORDS;
    some.words_step = 0;
    if (effect_ == Effect::UPDATE) return;
    some.grad = ZEROS;
    some.grad_step = 0;
  }

  // Updates up to a tile's elements by way of copies: they are too few, or scattered, or of other dtypes.
  void copied_tile(int64_t begin, int64_t count, bool linear) {
    Elements& e = elements_;
    e.start = begin;
    e.count = static_cast<int>(count);
    e.linear = linear;
    if (!linear) walk(row_, e);
    words_.of(e, bits_);
    if (effect_ == Effect::FREEZE && (bits_[0] | bits_[1] | bits_[2] | bits_[3]) == 0) return;

    Tiles tile = {};
    tile.count = 1;
    tile.words = bits_;
    tile.grad = reads_grad_ ? gradient(e) : ZEROS;
    tile.param = param_.take(level_, e, e.param);
    for (int k = 0; k < states_; ++k) tile.state[k] = state_[k].take(level_, e, e.param);
    if (block_table_ == 0) {
      on_copies_[select_of(effect_)](tile, factors_);
    } else {
      by_blocks(on_copies_[select_of(effect_)], tile);
    }
    param_.put(level_, e, e.param, random_.of(e, Purpose::ROUND_PARAM));
    for (int k = 0; k < states_; ++k) state_[k].put(level_, e, e.param, random_.of(e, round_state(k)));
  }

  // A tile, elements_, that kept blocks of different step counts may share: an update for each of them.
  void by_blocks(UpdateTiles update, Tiles& tile) {
    const Elements& e = elements_;
    const auto global = [&](int i) {
      return e.linear ? words_.global(e.start) + static_cast<uint64_t>(i) : e.global[i];
    };
    uint32_t bits[4];
    tile.words = bits;
    for (int begin = 0, end; begin < e.count; begin = end) {
      const uint64_t first = global(begin), behind = words_.block_end(first);
      std::memset(bits, 0, sizeof bits);
      for (end = begin; end < e.count && first <= global(end) && global(end) < behind; ++end) {
        set_bit(bits, end, bits_[end / 32] >> (end % 32) & 1u);
      }
      if ((bits[0] | bits[1] | bits[2] | bits[3]) != 0) update(tile, factors_at(words_.block_number(first)));
    }
  }

  const Factors& factors_at(uint64_t block) {
    const int64_t row = static_cast<int64_t>(block - words_.block_number(words_.global(0))) * MAX_FACTORS;
    for (int k = 0; k < MAX_FACTORS; ++k) {
      if (real_ == Dtype::FLOAT64) {
        block_factors_.f64[1 + k] = reinterpret_cast<const double*>(block_table_)[row + k];
      } else {
        block_factors_.f32[1 + k] = reinterpret_cast<const float*>(block_table_)[row + k];
      }
    }
    return block_factors_;
  }

  const char* gradient(const Elements& e) {
    const char* grad = grad_.take(level_, e, e.grad);
    if (!noisy_) return grad;
    real_ == Dtype::FLOAT64 ? add_noise<double>(e, grad) : add_noise<float>(e, grad);
    return noisy_grad_.bytes;
  }

  // Multiplies by 1 + std * N(0, 1).
  template <class Real>
  void add_noise(const Elements& e, const void* from) {
    const auto* grad = static_cast<const Real*>(from);
    auto* noisy = reinterpret_cast<Real*>(noisy_grad_.bytes);
    const auto global = [&](int i) {
      return e.linear ? words_.global(e.start) + static_cast<uint64_t>(i) : e.global[i];
    };
    const bool neighbours = global(e.count - 1) - global(0) == static_cast<uint64_t>(e.count) - 1;
    for (int i = 0; i < e.count; ++i) {
      const auto normal = static_cast<double>(words_.normal(global(i), neighbours));
      noisy[i] = grad[i] * static_cast<Real>(1.0 + noise_std_ * normal);
    }
    std::fill(noisy + e.count, noisy + TILE, Real{0});
  }

  const Level& level_;
  const Layout& row_;
  const Effect effect_;
  MaskWords words_;
  RandomNumbers random_;
  const bool drops_all_, reads_grad_, noisy_;
  const double noise_std_;
  const Dtype real_;
  const int states_;
  const Factors factors_;
  const int64_t block_table_;  // address of the factors that blocks have of their own; 0: they have none
  Factors block_factors_;      // of the block at hand
  const Kernels in_place_, on_copies_;  // in_place_ may be empty
  Memory param_, grad_, state_[MAX_STATES];
  Buffer noisy_grad_;
  Elements elements_;
  uint32_t bits_[4];
};

}  // namespace

void update_stretch(const Level& level, const Call& call, int64_t tensor, int64_t begin, int64_t end) {
  Update(level, call, tensor)(begin, end);
}

void pack_stretch(const Level& level, const Call& call, int64_t tensor, int64_t begin, int64_t end) {
  const Layout& row = call.layout[tensor];
  MaskWords words(level, call, tensor);
  Elements e;
  e.linear = unit(row.global_stride, row);
  uint32_t bits[4];
  for (e.start = begin; e.start < end; e.start += TILE) {
    e.count = static_cast<int>(std::min<int64_t>(TILE, end - e.start));
    if (!e.linear) walk(row, e);
    words.of(e, bits);
    std::memcpy(reinterpret_cast<char*>(row.packed) + e.start / 8, bits, static_cast<size_t>((e.count + 31) / 32) * 4);
  }
}

void floor_stretch(const Level& level, const Call& call, int64_t tensor, int64_t begin, int64_t end) {
  const Layout& row = call.layout[tensor];
  const auto at = [](int64_t base, int64_t start) { return reinterpret_cast<float*>(base) + start; };
  for (int64_t start = begin; start + TILE <= end; start += TILE) {
    level.floor(at(row.param, start), at(row.grad, start), at(row.state[0], start), at(row.state[1], start),
                static_cast<float>(call.inv_grad_scale));
  }
}

}  // namespace graddrop
