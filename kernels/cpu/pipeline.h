// An update rule over consecutive tiles, its mask read or drawn. No fused multiply-adds: every level and the oracle give
// the same bits.
#pragma once

#include <type_traits>

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

// Where a vector is stored, and for a rounded_bfloat16 the random numbers that round it.
template <class T>
struct Place {
  T* at;
  template <class V>
  GRADDROP_INLINE void store(typename V::Floats x) const {
    V::store(at, x);
  }
};
template <>
struct Place<rounded_bfloat16> {
  rounded_bfloat16* at;
  const uint16_t* random;
  template <class V>
  GRADDROP_INLINE void store(typename V::Floats x) const {
    V::store(at, x, random);
  }
};

// Random numbers for the first VALUES of an element's parameter and states. Of three tiles: the next one's are drawn while
// the last vectors of the one before still wait for their later stages.
template <int VALUES>
struct RandomTiles {
  alignas(64) uint16_t number[3][VALUES][TILE];
  int now = 0;
  GRADDROP_INLINE const uint16_t* of(int value, int i) const { return number[now][value] + i; }
  GRADDROP_INLINE int next() const { return now == 2 ? 0 : now + 1; }
};
template <>
struct RandomTiles<0> {};

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
  static constexpr bool ROUNDS_STATE = std::is_same_v<State, rounded_bfloat16>;
  static constexpr int LINE = 64;  // bytes
  static constexpr int VALUES = !std::is_same_v<Param, rounded_bfloat16> ? 0 : ROUNDS_STATE ? 1 + Rule::STATES : 1;

 public:
  // nowhere: V::WIDTH elements that take what the first two vectors find in the later stages
  GRADDROP_INLINE Pipeline(const Tiles& tiles, const typename V::Real* factors, Param* nowhere)
      : tiles_(tiles), rule_(factors + 1), grad_factor_(V::set(factors[0])), param_(static_cast<Param*>(tiles.param)),
        grad_(static_cast<const Grad*>(tiles.grad)) {
    for (int k = 0; k < Rule::STATES; ++k) state_[k] = static_cast<State*>(tiles.state[k]);
    if constexpr (STAGED) {
      F zeros[MAX_STATES] = {V::set(0), V::set(0), V::set(0)};
      const typename V::Kept kept{};
      begun_ = {rule_.begin(zeros[0], zeros[0], zeros), zeros[0], kept, place(nowhere, 0, 0)};
      halfway_ = {rule_.middle(begun_.x), zeros[0], kept, begun_.to};
    }
  }

  GRADDROP_INLINE void run() {
    if constexpr (VALUES > 0) {
      SELECT != Select::NOWHERE && tiles_.stream ? run_rounded<true>() : run_rounded<false>();
    } else {
      SELECT != Select::NOWHERE && tiles_.stream ? run_drawn() : run_read();
    }
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
    Place<Param> to;
  };
  struct Halfway {
    F x, p;
    typename V::Kept kept;
    Place<Param> to;
  };

  // Of element i of the tile; `value`: 0 for the parameter, 1 and on for the states.
  template <class T>
  GRADDROP_INLINE Place<T> place(T* to, int value, int i) const {
    if constexpr (std::is_same_v<T, rounded_bfloat16>) {
      return {to, random_.of(value, i)};
    } else {
      return {to};
    }
  }

  GRADDROP_INLINE void run_read() {
    Decisions decisions;
    for (int64_t t = 0; t < tiles_.count; ++t) {
      look_ahead(t);
      if (SELECT != Select::NOWHERE) decisions.read(tiles_.words + t * tiles_.words_step);
      if constexpr (V::WIDTH > 1) {
        constexpr int GROUP = LINE / 2;  // elements of a line of the narrowest dtype
        for (int first = 0; first < TILE; first += GROUP) {
          steps(first, decisions, std::make_integer_sequence<int, GROUP / V::WIDTH>{});
        }
      } else {
        GRADDROP_INDEPENDENT
        for (int i = 0; i < TILE; ++i) update(decisions, i);
      }
      next_tile();
    }
  }

  GRADDROP_INLINE void run_drawn() {
    constexpr int GROUP = Draw::COUNTERS * ELEMENTS_PER_COUNTER;  // elements that a group of counters decides
    Decisions decisions, next;
    draw_tile<Draw>(*tiles_.stream, tiles_.first_tile, decisions);
    for (int64_t t = 0; t < tiles_.count; ++t) {
      look_ahead(t);
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
      step(decisions, first + VECTOR * V::WIDTH)),
     ...);
  }

  // As above; the next tile's random numbers are drawn between the updates too, one value's after another's.
  template <bool DRAWN>
  void run_rounded() {
    Decisions decisions, next;
    if constexpr (DRAWN) draw_tile<Draw>(*tiles_.stream, tiles_.first_tile, decisions);
    for (int value = 0; value < VALUES; ++value) {
      draw_random<Draw>(*tiles_.rounding, tiles_.first_tile, rounding_of(value), random_.number[0][value]);
    }
    for (int64_t t = 0; t < tiles_.count; ++t) {
      look_ahead(t);
      const uint64_t next_index = tiles_.first_tile + static_cast<uint64_t>(t) + 1;
      if (SELECT != Select::NOWHERE && !DRAWN) decisions.read(tiles_.words + t * tiles_.words_step);
      if constexpr (V::WIDTH > 1) {
        rounded_tile<DRAWN>(next_index, decisions, next, std::make_integer_sequence<int, VALUES>{});
      } else {
        if constexpr (DRAWN) draw_tile<Draw>(*tiles_.stream, next_index, next);
        for (int value = 0; value < VALUES; ++value) {
          draw_random<Draw>(*tiles_.rounding, next_index, rounding_of(value), random_.number[random_.next()][value]);
        }
        GRADDROP_INDEPENDENT
        for (int i = 0; i < TILE; ++i) update(decisions, i);
      }
      if constexpr (DRAWN) decisions = next;
      random_.now = random_.next();
      next_tile();
    }
  }

  template <bool DRAWN, int... VALUE>
  GRADDROP_INLINE void rounded_tile(uint64_t next_index, const Decisions& decisions, Decisions& next,
                                    std::integer_sequence<int, VALUE...>) {
    constexpr int GROUP = Draw::COUNTERS * ELEMENTS_PER_COUNTER;
    using Random = typename Draw::Random;
    typename Random::Result at[] = {{random_.number[random_.next()][VALUE]}...};
    Random random[] = {Random(*tiles_.rounding, next_index, at[VALUE], rounding_of(VALUE))...};
    const MaskStream& stream = DRAWN ? *tiles_.stream : *tiles_.rounding;
    Draw draw(stream, next_index, next);
    for (int first = 0; first < TILE; first += GROUP) {
      rounded_group<DRAWN>(draw, random, first, decisions, std::make_integer_sequence<int, GROUP / V::WIDTH>{});
    }
  }

  template <bool DRAWN, class Random, int... VECTOR>
  GRADDROP_INLINE void rounded_group(Draw& draw, Random* random, int first, const Decisions& decisions,
                                     std::integer_sequence<int, VECTOR...>) {
    constexpr int VECTORS = sizeof...(VECTOR), PARTS = Draw::PARTS * DRAWN, ALL = Draw::PARTS * VALUES;
    ((draw_parts<VECTOR * PARTS / VECTORS>(
          draw, first / ELEMENTS_PER_COUNTER,
          std::make_integer_sequence<int, (VECTOR + 1) * PARTS / VECTORS - VECTOR * PARTS / VECTORS>{}),
      random_parts<VECTOR * ALL / VECTORS>(
          random, first / ELEMENTS_PER_COUNTER,
          std::make_integer_sequence<int, (VECTOR + 1) * ALL / VECTORS - VECTOR * ALL / VECTORS>{}),
      step(decisions, first + VECTOR * V::WIDTH)),
     ...);
  }

  template <int FIRST, class Random, int... PART>
  GRADDROP_INLINE static void random_parts(Random* random, int counter, std::integer_sequence<int, PART...>) {
    (random[(FIRST + PART) / Draw::PARTS].template part<(FIRST + PART) % Draw::PARTS>(counter), ...);
  }

  static Purpose rounding_of(int value) { return value == 0 ? Purpose::ROUND_PARAM : round_state(value - 1); }

  // How far the lines are that are asked for during tile t: AHEAD tiles on, behind the run's end where the driver says.
  GRADDROP_INLINE void look_ahead(int64_t t) {
    constexpr int64_t AHEAD = 2;
    const int64_t behind_end = tiles_.to_next == 0 ? 0 : tiles_.to_next + (tiles_.count > 1 ? TILE : 0);
    ahead_ = t + AHEAD < tiles_.count ? AHEAD * TILE : behind_end;
    grad_ahead_ = tiles_.grad_step == 0 ? 0 : ahead_;
  }

  template <int... VECTOR>
  GRADDROP_INLINE void steps(int first, const Decisions& decisions, std::integer_sequence<int, VECTOR...>) {
    (step(decisions, first + VECTOR * V::WIDTH), ...);
  }

  // Updates a vector once the same one of a tile to come is asked for. Updates wait long, and draws take instructions:
  // they fill the processor's window, which would otherwise reach the next tile's loads.
  GRADDROP_INLINE void step(const Decisions& decisions, int i) {
    prefetch(param_ + ahead_, i);
    prefetch(grad_ + grad_ahead_, i);
    for (int k = 0; k < Rule::STATES; ++k) prefetch(state_[k] + ahead_, i);
    update(decisions, i);
  }
  template <class T>
  GRADDROP_INLINE static void prefetch(const T* x, int i) {
    if (i * static_cast<int>(sizeof(T)) % LINE == 0) GRADDROP_PREFETCH(x + i);
  }

  GRADDROP_INLINE void update(const Decisions& decisions, int i) {
    typename V::Kept kept{};
    if (SELECT != Select::NOWHERE) kept = V::kept(decisions, i);
    const F p = V::load(param_ + i);
    F g = V::load(grad_ + i);
    if (SELECTS_GRADIENT) V::pin(g);
    F factor = grad_factor_;
    if constexpr (SELECTS_GRADIENT && VALUES > 0) V::pin(factor);  // which is in memory where registers are short
    g = g * factor;
    if (SELECTS_GRADIENT) g = V::keep(kept, g);
    F old_state[MAX_STATES], state[MAX_STATES];
    for (int k = 0; k < Rule::STATES; ++k) old_state[k] = state[k] = V::load(state_[k] + i);

    const Begun begun = {rule_.begin(p, g, state), p, kept, place(param_ + i, 0, i)};
    if constexpr (STAGED) {
      write(halfway_);
      halfway_ = advance(begun_);
      begun_ = begun;
    } else {
      write(advance(begun));
    }
    for (int k = 0; k < Rule::STATES; ++k) {
      const F new_state = SELECTS_STATE ? V::select(kept, state[k], old_state[k]) : state[k];
      place(state_[k] + i, 1 + k, i).template store<V>(new_state);
    }
  }

  GRADDROP_INLINE Halfway advance(const Begun& a) const { return {rule_.middle(a.x), a.p, a.kept, a.to}; }

  GRADDROP_INLINE void write(const Halfway& a) const {
    const F p = rule_.end(a.p, a.x);
    a.to.template store<V>(SELECTS_PARAM ? V::select(a.kept, p, a.p) : p);
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
  int64_t ahead_ = 0, grad_ahead_ = 0;  // elements from this tile to the one that is asked for
  Begun begun_{};
  Halfway halfway_{};
  RandomTiles<VALUES> random_;
};

template <class Draw, class Rule, class Param, class Grad, class State, Select SELECT>
void update_tiles(const Tiles& tiles, const Factors& factors) {
  using V = typename Rule::Vector;
  Param nowhere[V::WIDTH];
  Pipeline<Draw, Rule, Param, Grad, State, SELECT>(tiles, factors_of(factors, typename V::Real{}), nowhere).run();
}

}  // namespace
}  // namespace graddrop
