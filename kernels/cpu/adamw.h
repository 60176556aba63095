// Masked AdamW on a run of tiles, in the order of graddrop_fused/reference.py. No fused multiply-adds: every level and
// the oracle give the same bits.
#pragma once

#include <cmath>

#include "draw.h"
#include "dtypes.h"
#include "gaussian.h"
#include "level.h"

namespace graddrop {
namespace {

// One lane of float64, for float64 parameters.
struct Double {
  static constexpr int WIDTH = 1;
  using Floats = double;
  using Kept = bool;
  struct Decisions {
    const uint32_t* words;
    void read(const uint32_t from[4]) { words = from; }
    bool at(int i) const { return words[i / 32] >> (i % 32) & 1u; }
  };
  static double set(double x) { return x; }
  static double add(double a, double b) { return a + b; }
  static double sub(double a, double b) { return a - b; }
  static double mul(double a, double b) { return a * b; }
  static double div(double a, double b) { return a / b; }
  static double max(double a, double b) { return a > b ? a : b; }
  static double sqrt(double a) { return std::sqrt(a); }
  static double keep(bool kept, double a) { return kept ? a : 0.0; }
  static double select(bool kept, double a, double b) { return kept ? a : b; }
  static double load(const double* x) { return *x; }
  static void store(double* x, double a) { *x = a; }
};

inline const Scalars<float>& scalars_of(const Numbers& n, float) { return n.f32; }
inline const Scalars<double>& scalars_of(const Numbers& n, double) { return n.f64; }

#if defined(__clang__)
#define GRADDROP_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define GRADDROP_INDEPENDENT _Pragma("GCC ivdep")
#else
#define GRADDROP_INDEPENDENT
#endif

// A batch of counters, its pieces spread evenly between the updates.
template <int WIDTH, class Draw, class Update, int... GROUP>
GRADDROP_INLINE void interleave(Draw& draw, int first, const Update& update, std::integer_sequence<int, GROUP...>) {
  constexpr int GROUPS = sizeof...(GROUP);
  ((draw_pieces<GROUP * Draw::PIECES / GROUPS>(
        draw, first / 4,
        std::make_integer_sequence<int, (GROUP + 1) * Draw::PIECES / GROUPS - GROUP * Draw::PIECES / GROUPS>{}),
    update(first + GROUP * WIDTH)),
   ...);
}

// V does the arithmetic, Draw draws: the next tile's mask words between the updates of this one, since an update waits
// for memory, a square root and a division, and a draw for multiplications. Updates wait so long that a processor's
// window holds few whole ones: they go in three stages, of three neighbouring vectors at a time.
template <class Draw, class V, class Real, class Param, class Grad, class State, Select SELECT, bool AMSGRAD>
void adamw_run(const Run& run, const Numbers& numbers) {
  using F = typename V::Floats;
  const Scalars<Real>& s = scalars_of(numbers, Real{});
  const F grad_scale = V::set(s.grad_scale), decay = V::set(s.decay), step = V::set(s.step), eps = V::set(s.eps);
  const F one_minus_beta1 = V::set(s.one_minus_beta1);
  const F beta2 = V::set(s.beta2), one_minus_beta2 = V::set(s.one_minus_beta2);
  auto* param = static_cast<Param*>(run.p);
  auto* grad = static_cast<const Grad*>(run.g);
  auto *exp_avg = static_cast<State*>(run.m), *exp_avg_sq = static_cast<State*>(run.v);
  auto* max_exp_avg_sq = static_cast<State*>(run.vmax);
  typename V::Decisions decisions{};

  constexpr bool STAGES = V::WIDTH > 1;  // else the loop over elements is the compiler's to vectorise
  constexpr bool SELECT_PARAM = SELECT == Select::FREEZE || SELECT == Select::UPDATE;
  constexpr bool SELECT_STATE = SELECT == Select::FREEZE;
  struct Rooted {
    F p, m, root;
    typename V::Kept kept;
    Param* to;
  };
  struct Divided {
    F p, quotient;
    typename V::Kept kept;
    Param* to;
  };
  Param nowhere[V::WIDTH];  // takes what the first two vectors find in the later stages
  Rooted rooted = {V::set(0), V::set(0), V::set(1), {}, nowhere};
  Divided divided = {V::set(0), V::set(0), {}, nowhere};
  const auto divide = [&](const Rooted& x) __attribute__((always_inline)) {
    return Divided{x.p, V::div(V::mul(step, x.m), V::add(x.root, eps)), x.kept, x.to};
  };
  const auto write = [&](const Divided& x) __attribute__((always_inline)) {
    const F new_p = V::sub(V::mul(x.p, decay), x.quotient);
    V::store(x.to, SELECT_PARAM ? V::select(x.kept, new_p, x.p) : new_p);
  };
  const auto write_pending = [&] {
    if (!STAGES) return;
    write(divided);
    write(divide(rooted));
  };

  const auto update = [&](int i) __attribute__((always_inline)) {
    typename V::Kept kept{};
    if (SELECT != Select::ALL) kept = decisions.at(i);
    const F p = V::load(param + i), m = V::load(exp_avg + i), v = V::load(exp_avg_sq + i);
    F g = V::mul(V::load(grad + i), grad_scale);
    if (SELECT == Select::GRADIENT || SELECT == Select::FREEZE) g = V::keep(kept, g);

    const F new_m = V::add(m, V::mul(one_minus_beta1, V::sub(g, m)));
    const F new_v = V::add(V::mul(beta2, v), V::mul(V::mul(one_minus_beta2, g), g));
    F old_vmax{}, vmax = new_v;
    if (AMSGRAD) {
      old_vmax = V::load(max_exp_avg_sq + i);
      vmax = V::max(old_vmax, new_v);
    }
    const Rooted now = {p, new_m, V::sqrt(vmax), kept, param + i};
    if constexpr (STAGES) {
      write(divided);
      divided = divide(rooted);
      rooted = now;
    } else {
      write(divide(now));
    }
    V::store(exp_avg + i, SELECT_STATE ? V::select(kept, new_m, m) : new_m);
    V::store(exp_avg_sq + i, SELECT_STATE ? V::select(kept, new_v, v) : new_v);
    if (AMSGRAD) V::store(max_exp_avg_sq + i, SELECT_STATE ? V::select(kept, vmax, old_vmax) : vmax);
  };
  const auto next_tile = [&] {
    param += TILE;
    grad += run.grad_step;
    exp_avg += TILE;
    exp_avg_sq += TILE;
    if (AMSGRAD) max_exp_avg_sq += TILE;
  };
  constexpr int BATCH = 4 * Draw::COUNTERS;  // elements that one batch of counters decides

  if (SELECT == Select::ALL || run.stream == nullptr) {
    for (int64_t t = 0; t < run.tiles; ++t) {
      if (SELECT != Select::ALL) decisions.read(run.words + t * run.words_step);
      GRADDROP_INDEPENDENT
      for (int i = 0; i < TILE; i += V::WIDTH) update(i);
      next_tile();
    }
    return write_pending();
  }
  uint32_t drawn[2][4];  // this tile's words and the next one's
  draw_tile<Draw>(*run.stream, run.first_tile, drawn[0]);
  for (int64_t t = 0; t < run.tiles; ++t) {
    decisions.read(drawn[t % 2]);
    Draw draw(*run.stream, run.first_tile + static_cast<uint64_t>(t) + 1, drawn[(t + 1) % 2]);
    for (int first = 0; first < TILE; first += BATCH) {
      if constexpr (V::WIDTH > 1) {
        interleave<V::WIDTH>(draw, first, update, std::make_integer_sequence<int, BATCH / V::WIDTH>{});
      } else {
        draw_pieces<0>(draw, first / 4, std::make_integer_sequence<int, Draw::PIECES>{});
        GRADDROP_INDEPENDENT
        for (int i = first; i < first + BATCH; i += V::WIDTH) update(i);
      }
    }
    next_tile();
  }
  write_pending();
}

template <class V, class Real, class Grad>
void mask_tile(void* gradient, const uint32_t words[4], double scale) {
  auto* grad = static_cast<Grad*>(gradient);
  const auto factor = V::set(static_cast<Real>(scale));
  typename V::Decisions decisions{};
  decisions.read(words);
  for (int i = 0; i < TILE; i += V::WIDTH) {
    V::store(grad + i, V::keep(decisions.at(i), V::mul(V::load(grad + i), factor)));
  }
}

template <class V>
void stream_tile(float* p, const float* grad, float* m, float* v, float zero) {
  const auto factor = V::set(zero);
  for (int i = 0; i < TILE; i += V::WIDTH) {
    const auto g = V::mul(V::load(grad + i), factor);
    V::store(p + i, V::add(V::load(p + i), g));
    V::store(m + i, V::add(V::load(m + i), g));
    V::store(v + i, V::add(V::load(v + i), g));
  }
}

// From run-time types to an instantiation

template <class Draw, class V, class Real, class Param, class Grad, class State>
AdamwRun pick_select(Select select, bool amsgrad) {
  switch (select) {
    case Select::ALL:
      return amsgrad ? adamw_run<Draw, V, Real, Param, Grad, State, Select::ALL, true>
                     : adamw_run<Draw, V, Real, Param, Grad, State, Select::ALL, false>;
    case Select::GRADIENT:
      return amsgrad ? adamw_run<Draw, V, Real, Param, Grad, State, Select::GRADIENT, true>
                     : adamw_run<Draw, V, Real, Param, Grad, State, Select::GRADIENT, false>;
    case Select::FREEZE:
      return amsgrad ? adamw_run<Draw, V, Real, Param, Grad, State, Select::FREEZE, true>
                     : adamw_run<Draw, V, Real, Param, Grad, State, Select::FREEZE, false>;
    default:
      return amsgrad ? adamw_run<Draw, V, Real, Param, Grad, State, Select::UPDATE, true>
                     : adamw_run<Draw, V, Real, Param, Grad, State, Select::UPDATE, false>;
  }
}

template <class Draw, class V, class Param>
AdamwRun pick_grad_state(bool native_grad, Dtype state, Select select, bool amsgrad) {
  if (state == Dtype::FLOAT32) {
    return native_grad ? pick_select<Draw, V, float, Param, Param, float>(select, amsgrad)
                       : pick_select<Draw, V, float, Param, float, float>(select, amsgrad);
  }
  return native_grad ? pick_select<Draw, V, float, Param, Param, bfloat16>(select, amsgrad)
                     : pick_select<Draw, V, float, Param, float, bfloat16>(select, amsgrad);
}

template <class Draw, class V>
AdamwRun pick_adamw(Dtype param, Dtype grad, Dtype state, Select select, bool amsgrad) {
  switch (param) {
    case Dtype::FLOAT32:
      return pick_grad_state<Draw, V, float>(true, state, select, amsgrad);
    case Dtype::BFLOAT16:
      return pick_grad_state<Draw, V, bfloat16>(grad == param, state, select, amsgrad);
    case Dtype::FLOAT16:
      return pick_grad_state<Draw, V, float16>(grad == param, state, select, amsgrad);
    default:
      return pick_select<Draw, Double, double, double, double, double>(select, amsgrad);
  }
}

template <class V>
MaskTile pick_mask(Dtype grad) {
  switch (grad) {
    case Dtype::FLOAT32:
      return mask_tile<V, float, float>;
    case Dtype::BFLOAT16:
      return mask_tile<V, float, bfloat16>;
    case Dtype::FLOAT16:
      return mask_tile<V, float, float16>;
    default:
      return mask_tile<Double, double, double>;
  }
}

template <class Draw, class V>
constexpr Level level_of(const char* name) {
  return {name, draw_tile<Draw>, normals_of_tile, pick_adamw<Draw, V>, pick_mask<V>, stream_tile<V>};
}

}  // namespace
}  // namespace graddrop
