// From rules and dtypes as run-time values to one of the compiled pipelines of a level.
#pragma once

#include <cmath>
#include <cstring>

#include "dtypes.h"
#include "gaussian.h"
#include "pipeline.h"

namespace graddrop {
namespace {

// One lane of float64, for float64 parameters.
struct Double {
  static constexpr int WIDTH = 1;
  using Real = double;
  using Floats = double;
  using Kept = bool;
  template <class Decisions>
  static bool kept(const Decisions& decisions, int i) {
    return decisions.bit(i);
  }
  static double set(double x) { return x; }
  static double max(double a, double b) { return a > b || a != a ? a : b; }
  static double sqrt(double a) { return std::sqrt(a); }
  static double sign(double a) { return static_cast<double>(a > 0) - static_cast<double>(a < 0); }
  static void pin(double&) {}
  static double keep(bool kept, double a) { return kept ? a : 0.0; }
  static double select(bool kept, double a, double b) { return kept ? a : b; }
  static double load(const double* x) { return *x; }
  static void store(double* x, double a) { *x = a; }
};

template <class Draw, class Rule, class Param, class State, class Grad = Param>
constexpr Kernels kernels_for() {
  return {{update_tiles<Draw, Rule, Param, Grad, State, Select::NOWHERE>,
           update_tiles<Draw, Rule, Param, Grad, State, Select::GRADIENT>,
           update_tiles<Draw, Rule, Param, Grad, State, Select::EVERYTHING>,
           update_tiles<Draw, Rule, Param, Grad, State, Select::PARAMETER>}};
}

// The combinations of dtypes that have pipelines of their own. The driver widens all others tile by tile.
template <class Draw, class Rule>
Kernels narrow_kernels(Dtypes dtypes) {
  if (dtypes.param != dtypes.grad) return {};
  if (Rule::STATES > 0 && dtypes.state != Dtype::FLOAT32 && dtypes.state != Dtype::BFLOAT16) return {};
  const bool f32_state = Rule::STATES == 0 || dtypes.state == Dtype::FLOAT32;
  switch (dtypes.param) {
    case Dtype::FLOAT32:
      if (f32_state) return kernels_for<Draw, Rule, float, float>();
      if constexpr (Rule::STATES > 0) return kernels_for<Draw, Rule, float, bfloat16>();
      break;
    case Dtype::BFLOAT16:
      if (f32_state) return kernels_for<Draw, Rule, bfloat16, float>();
      if constexpr (Rule::STATES > 0) return kernels_for<Draw, Rule, bfloat16, bfloat16>();
      break;
    case Dtype::FLOAT16:
      if (f32_state) return kernels_for<Draw, Rule, float16, float>();
      break;
    default:
      break;
  }
  return {};
}

// Those that round stochastically.
template <class Draw, class Rule>
Kernels rounded_kernels(Dtypes dtypes) {
  if (dtypes.param != Dtype::BFLOAT16 || dtypes.grad != Dtype::BFLOAT16) return {};
  if (Rule::STATES == 0 || dtypes.state == Dtype::FLOAT32) {
    return kernels_for<Draw, Rule, rounded_bfloat16, float, bfloat16>();
  }
  if constexpr (Rule::STATES > 0) {
    if (dtypes.state == Dtype::BFLOAT16) return kernels_for<Draw, Rule, rounded_bfloat16, rounded_bfloat16, bfloat16>();
  }
  return {};
}

template <class Draw, class... Narrow, class... Wide>
Kernels find_kernels(int64_t rule, Dtypes dtypes, bool rounds, List<Narrow...>, List<Wide...>) {
  int64_t k = 0;
  Kernels found = {};
  if (rounds) {
    ((rule == k++ ? void(found = rounded_kernels<Draw, Narrow>(dtypes)) : void()), ...);
  } else if (dtypes.param == Dtype::FLOAT64) {
    if (dtypes.grad != Dtype::FLOAT64 || dtypes.state != Dtype::FLOAT64) return {};
    ((rule == k++ ? void(found = kernels_for<Draw, Wide, double, double>()) : void()), ...);
  } else {
    ((rule == k++ ? void(found = narrow_kernels<Draw, Narrow>(dtypes)) : void()), ...);
  }
  return found;
}

template <class Draw, class V>
Kernels kernels(int64_t rule, Dtypes dtypes, bool rounds) {
  return find_kernels<Draw>(rule, dtypes, rounds, RULES<V>{}, RULES<Double>{});
}

template <class... Rule>
int64_t find_rule(const char* name, int64_t states, List<Rule...>) {
  int64_t k = 0, found = -1;
  ((found = std::strcmp(name, Rule::NAME) == 0 && states == Rule::STATES ? k : found, ++k), ...);
  return found;
}

template <class... Rule>
RuleName name_rule(int64_t number, List<Rule...>) {
  constexpr RuleName NAMES[] = {{Rule::NAME, Rule::STATES}...};
  return 0 <= number && number < static_cast<int64_t>(sizeof...(Rule)) ? NAMES[number] : RuleName{};
}

template <class V>
RuleName rule_name(int64_t number) {
  return name_rule(number, RULES<V>{});
}
template <class V>
int64_t rule_number(const char* name, int64_t states) {
  return find_rule(name, states, RULES<V>{});
}

template <class V, class From, class To>
void convert_vectors(const void* from, void* to) {
  for (int i = 0; i < TILE; i += V::WIDTH) V::store(static_cast<To*>(to) + i, V::load(static_cast<const From*>(from) + i));
}
template <class From, class To>
void convert_each(const void* from, void* to) {
  for (int i = 0; i < TILE; ++i) convert(static_cast<const From*>(from)[i], static_cast<To*>(to) + i);
}

// A tile in another dtype; `real` is float32 or float64.
template <class V>
void widen(Dtype dtype, const void* from, Dtype real, void* to) {
  const bool f64 = real == Dtype::FLOAT64;
  switch (dtype) {
    case Dtype::FLOAT32:
      return f64 ? convert_each<float, double>(from, to) : convert_each<float, float>(from, to);
    case Dtype::BFLOAT16:
      return f64 ? convert_each<bfloat16, double>(from, to) : convert_vectors<V, bfloat16, float>(from, to);
    case Dtype::FLOAT16:
      return f64 ? convert_each<float16, double>(from, to) : convert_vectors<V, float16, float>(from, to);
    case Dtype::FLOAT64:
      return f64 ? convert_each<double, double>(from, to) : convert_each<double, float>(from, to);
  }
}
template <class V>
void narrow(Dtype real, const void* from, Dtype dtype, void* to) {
  const bool f64 = real == Dtype::FLOAT64;
  switch (dtype) {
    case Dtype::FLOAT32:
      return f64 ? convert_each<double, float>(from, to) : convert_each<float, float>(from, to);
    case Dtype::BFLOAT16:
      return f64 ? convert_each<double, bfloat16>(from, to) : convert_vectors<V, float, bfloat16>(from, to);
    case Dtype::FLOAT16:
      return f64 ? convert_each<double, float16>(from, to) : convert_vectors<V, float, float16>(from, to);
    case Dtype::FLOAT64:
      return f64 ? convert_each<double, double>(from, to) : convert_each<float, double>(from, to);
  }
}

template <class V>
void round_tile(const float* from, const uint16_t* random, void* to) {
  for (int i = 0; i < TILE; i += V::WIDTH) V::store(static_cast<bfloat16*>(to) + i, V::load(from + i), random + i);
}

template <class V>
void floor_tile(float* p, const float* grad, float* m, float* v, float zero) {
  const auto factor = V::set(zero);
  for (int i = 0; i < TILE; i += V::WIDTH) {
    const auto g = V::load(grad + i) * factor;
    V::store(p + i, V::load(p + i) + g);
    V::store(m + i, V::load(m + i) + g);
    V::store(v + i, V::load(v + i) + g);
  }
}

template <class Draw, class V>
constexpr Level make_level(const char* name) {
  return {name,     rule_number<V>, rule_name<V>,  kernels<Draw, V>, draw_words<Draw>, draw_random<Draw>, normals_of_tile,
          widen<V>, narrow<V>,      round_tile<V>, floor_tile<V>};
}

}  // namespace
}  // namespace graddrop
