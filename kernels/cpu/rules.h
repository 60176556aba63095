// The update rules on vectors, in the order of graddrop_fused/rules.py: the new state and parameter from the old ones
// and a gradient that is masked already. A rule never sees the mask. Add one here and to RULES, below; its plain form
// for one element, which tests hold it to, goes to oracle.cpp.
//
// V does the arithmetic on F, a vector of `Real`s (or one). A rule is constructed from its factors, those of rules.py in
// its order, and works in three stages, which a pipeline lets overlap where STAGED:
//   begin(p, g, s)  replaces the state s and begins what the parameter will wait for
//   middle(x)       goes on with it
//   end(p, x)       gives the new parameter
#pragma once

#include "draw.h"

namespace graddrop {
namespace {

// A rule that waits for no long operation.
template <class V>
struct ShortRule {
  using F = typename V::Floats;
  static constexpr bool STAGED = false;
  GRADDROP_INLINE F middle(F x) const { return x; }
};

// states: exp_avg, exp_avg_sq, and with amsgrad max_exp_avg_sq
template <class V, int STATE_COUNT>
struct AdamW {
  using Vector = V;
  using F = typename V::Floats;
  static constexpr const char* NAME = "adamw";
  static constexpr int STATES = STATE_COUNT;
  static constexpr bool STAGED = true;
  struct Rooted {
    F m, root;
  };

  F decay, step, one_minus_beta1, beta2, one_minus_beta2, eps;
  GRADDROP_INLINE explicit AdamW(const typename V::Real* f)
      : decay(V::set(f[0])), step(V::set(f[1])), one_minus_beta1(V::set(f[2])), beta2(V::set(f[3])),
        one_minus_beta2(V::set(f[4])), eps(V::set(f[5])) {}

  GRADDROP_INLINE Rooted begin(F, F g, F* s) const {
    F &m = s[0], &v = s[1], &largest_v = s[STATES - 1];
    m = m + one_minus_beta1 * (g - m);
    v = beta2 * v + one_minus_beta2 * g * g;
    if (STATES == 3) largest_v = V::max(largest_v, v);
    return {m, V::sqrt(largest_v)};
  }
  GRADDROP_INLINE F middle(Rooted x) const { return step * x.m / (x.root + eps); }
  GRADDROP_INLINE F end(F p, F quotient) const { return p * decay - quotient; }
};

// states: momentum_buffer, or none
template <class V, int STATE_COUNT>
struct SGD : ShortRule<V> {
  using Vector = V;
  using F = typename V::Floats;
  static constexpr const char* NAME = "sgd";
  static constexpr int STATES = STATE_COUNT;

  F weight_decay, momentum, taken, grad_step, buffer_step;
  bool decays, looks_ahead;  // terms whose factor is 0 are left out: 0 times infinity is NaN
  GRADDROP_INLINE explicit SGD(const typename V::Real* f)
      : weight_decay(V::set(f[0])), momentum(V::set(f[1])), taken(V::set(f[2])), grad_step(V::set(f[3])),
        buffer_step(V::set(f[4])), decays(f[0] != 0), looks_ahead(f[3] != 0) {}

  GRADDROP_INLINE F begin(F p, F g, F* s) const {
    if (decays) g = g + weight_decay * p;
    if (STATES == 0) return grad_step * g;
    s[0] = momentum * s[0] + taken * g;
    const F step = buffer_step * s[0];
    return looks_ahead ? grad_step * g + step : step;
  }
  GRADDROP_INLINE F end(F p, F step) const { return p - step; }
};

// state: exp_avg
template <class V>
struct Lion : ShortRule<V> {
  using Vector = V;
  using F = typename V::Floats;
  static constexpr const char* NAME = "lion";
  static constexpr int STATES = 1;

  F decay, step, one_minus_beta1, one_minus_beta2;
  GRADDROP_INLINE explicit Lion(const typename V::Real* f)
      : decay(V::set(f[0])), step(V::set(f[1])), one_minus_beta1(V::set(f[2])), one_minus_beta2(V::set(f[3])) {}

  GRADDROP_INLINE F begin(F, F g, F* s) const {
    F& m = s[0];
    const F direction = V::sign(m + one_minus_beta1 * (g - m));
    m = m + one_minus_beta2 * (g - m);
    return step * direction;
  }
  GRADDROP_INLINE F end(F p, F step) const { return p * decay - step; }
};

// The gradient stands in the parameter's place and becomes the masked one.
template <class V>
struct MaskOnly : ShortRule<V> {
  using Vector = V;
  using F = typename V::Floats;
  static constexpr const char* NAME = "mask";
  static constexpr int STATES = 0;

  GRADDROP_INLINE explicit MaskOnly(const typename V::Real*) {}
  GRADDROP_INLINE F begin(F, F g, F*) const { return g; }
  GRADDROP_INLINE F end(F, F g) const { return g; }
};

template <class... Rule>
struct List {};

// Every rule with each number of states that it may keep. A rule's place in this list is its number.
template <class V>
using RULES = List<AdamW<V, 2>, AdamW<V, 3>, SGD<V, 0>, SGD<V, 1>, Lion<V>, MaskOnly<V>>;

}  // namespace
}  // namespace graddrop
