// An update rule over consecutive tiles, its mask read or drawn. No fused multiply-adds: every level and the oracle give
// the same bits.
#pragma once

#include "level.h"
#include "rules.h"

namespace graddrop {
namespace {

inline const float* factors_of(const Factors& factors, float) { return factors.f32; }
inline const double* factors_of(const Factors& factors, double) { return factors.f64; }

#if defined(__clang__)
#define GRADDROP_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define GRADDROP_INDEPENDENT _Pragma("GCC ivdep")
#else
#define GRADDROP_INDEPENDENT
#endif

#if defined(__GNUC__)
#define GRADDROP_PREFETCH(address) __builtin_prefetch(address)
#else
#define GRADDROP_PREFETCH(address)
#endif

// A tile that is drawn is drawn while its predecessor is updated: an update waits for memory, a square root and a
// division, and a draw for multiplications. Updates wait so long that a processor's window holds few whole ones.
// Therefore the stages of a rule that has any overlap: of three neighbouring vectors at a time.
template <class Draw, class Rule, class Param, class Grad, class State, Select SELECT>
class Pipeline {
  using V = typename Rule::Vector;
  using F = typename V::Floats;
  using Decisions = typename Draw::Decisions;
  static constexpr bool SELECTS_GRADIENT = SELECT == Select::GRADIENT;  // else what comes of a dropped one is dropped
  static constexpr bool SELECTS_PARAM = SELECT == Select::PARAMETER || SELECT == Select::EVERYTHING;
  static constexpr bool SELECTS_STATE = SELECT == Select::EVERYTHING;
  // one lane: the loop over elements is the compiler's to vectorise
  static constexpr bool STAGED = Rule::STAGED && V::WIDTH > 1;

 public:
  // nowhere: V::WIDTH elements that take what the first two vectors find in the later stages
  GRADDROP_INLINE Pipeline(const Tiles& tiles, const typename V::Real* factors, Param* nowhere)
      : tiles_(tiles), rule_(factors + 1), grad_factor_(V::set(factors[0])), param_(static_cast<Param*>(tiles.param)),
        grad_(static_cast<const Grad*>(tiles.grad)) {
    for (int k = 0; k < Rule::STATES; ++k) state_[k] = static_cast<State*>(tiles.state[k]);
    if constexpr (STAGED) {
      F zeros[MAX_STATES] = {V::set(0), V::set(0), V::set(0)};
      const typename V::Kept kept{};
      begun_ = {rule_.begin(zeros[0], zeros[0], zeros), zeros[0], kept, nowhere};
      halfway_ = {rule_.middle(begun_.x), zeros[0], kept, nowhere};
    }
  }

  GRADDROP_INLINE void run() {
    SELECT != Select::NOWHERE && tiles_.stream ? run_drawn() : run_read();
    if constexpr (STAGED) {
      write(halfway_);
      write(advance(begun_));
    }
  }

 private:
  // A vector that waits for its second and its third stage.
  struct Begun {
    decltype(std::declval<const Rule&>().begin(F(), F(), nullptr)) x;
    F p;
    typename V::Kept kept;
    Param* to;
  };
  struct Halfway {
    F x, p;
    typename V::Kept kept;
    Param* to;
  };

  GRADDROP_INLINE void run_read() {
    Decisions decisions;
    for (int64_t t = 0; t < tiles_.count; ++t) {
      if (SELECT != Select::NOWHERE) decisions.read(tiles_.words + t * tiles_.words_step);
      GRADDROP_INDEPENDENT
      for (int i = 0; i < TILE; i += V::WIDTH) update(decisions, i);
      next_tile();
    }
  }

  GRADDROP_INLINE void run_drawn() {
    constexpr int GROUP = Draw::COUNTERS * ELEMENTS_PER_COUNTER;  // elements that a group of counters decides
    Decisions decisions, next;
    draw_tile<Draw>(*tiles_.stream, tiles_.first_tile, decisions);
    for (int64_t t = 0; t < tiles_.count; ++t) {
      Draw draw(*tiles_.stream, tiles_.first_tile + static_cast<uint64_t>(t) + 1, next);
      for (int first = 0; first < TILE; first += GROUP) {
        if constexpr (V::WIDTH > 1) {
          interleaved(draw, first, decisions, std::make_integer_sequence<int, GROUP / V::WIDTH>{});
        } else {
          draw_parts<0>(draw, first / ELEMENTS_PER_COUNTER, std::make_integer_sequence<int, Draw::PARTS>{});
          GRADDROP_INDEPENDENT
          for (int i = first; i < first + GROUP; ++i) update(decisions, i);
        }
      }
      decisions = next;
      next_tile();
    }
  }

  // A group of the next tile's counters, its parts spread evenly between the updates of as many of this tile's elements.
  template <int... VECTOR>
  GRADDROP_INLINE void interleaved(Draw& draw, int first, const Decisions& decisions,
                                   std::integer_sequence<int, VECTOR...>) {
    constexpr int VECTORS = sizeof...(VECTOR), PARTS = Draw::PARTS;
    ((draw_parts<VECTOR * PARTS / VECTORS>(
          draw, first / ELEMENTS_PER_COUNTER,
          std::make_integer_sequence<int, (VECTOR + 1) * PARTS / VECTORS - VECTOR * PARTS / VECTORS>{}),
      prefetch(first + VECTOR * V::WIDTH), update(decisions, first + VECTOR * V::WIDTH)),
     ...);
  }

  // The next tile's lines. A draw's instructions fill the processor's window, which would otherwise reach these loads.
  GRADDROP_INLINE void prefetch(int i) const {
    prefetch(param_, i);
    prefetch(grad_, i);
    for (int k = 0; k < Rule::STATES; ++k) prefetch(state_[k], i);
  }
  template <class T>
  GRADDROP_INLINE static void prefetch(const T* x, int i) {
    constexpr int LINE = 64;  // bytes
    if (i * static_cast<int>(sizeof(T)) % LINE == 0) GRADDROP_PREFETCH(x + TILE + i);
  }

  GRADDROP_INLINE void update(const Decisions& decisions, int i) {
    typename V::Kept kept{};
    if (SELECT != Select::NOWHERE) kept = V::kept(decisions, i);
    const F p = V::load(param_ + i);
    F g = V::load(grad_ + i);
    if (SELECTS_GRADIENT) V::pin(g);
    g = g * grad_factor_;
    if (SELECTS_GRADIENT) g = V::keep(kept, g);
    F old_state[MAX_STATES], state[MAX_STATES];
    for (int k = 0; k < Rule::STATES; ++k) old_state[k] = state[k] = V::load(state_[k] + i);

    const Begun begun = {rule_.begin(p, g, state), p, kept, param_ + i};
    if constexpr (STAGED) {
      write(halfway_);
      halfway_ = advance(begun_);
      begun_ = begun;
    } else {
      write(advance(begun));
    }
    for (int k = 0; k < Rule::STATES; ++k) {
      V::store(state_[k] + i, SELECTS_STATE ? V::select(kept, state[k], old_state[k]) : state[k]);
    }
  }

  GRADDROP_INLINE Halfway advance(const Begun& a) const { return {rule_.middle(a.x), a.p, a.kept, a.to}; }

  GRADDROP_INLINE void write(const Halfway& a) const {
    const F p = rule_.end(a.p, a.x);
    V::store(a.to, SELECTS_PARAM ? V::select(a.kept, p, a.p) : p);
  }

  GRADDROP_INLINE void next_tile() {
    param_ += TILE;
    grad_ += tiles_.grad_step;
    for (int k = 0; k < Rule::STATES; ++k) state_[k] += TILE;
  }

  const Tiles& tiles_;
  const Rule rule_;
  const F grad_factor_;
  Param* param_;
  const Grad* grad_;
  State* state_[MAX_STATES] = {};
  Begun begun_{};
  Halfway halfway_{};
};

template <class Draw, class Rule, class Param, class Grad, class State, Select SELECT>
void update_tiles(const Tiles& tiles, const Factors& factors) {
  using V = typename Rule::Vector;
  Param nowhere[V::WIDTH];
  Pipeline<Draw, Rule, Param, Grad, State, SELECT>(tiles, factors_of(factors, typename V::Real{}), nowhere).run();
}

}  // namespace
}  // namespace graddrop
