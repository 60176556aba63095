#include "oracle.h"

#include <cmath>
#include <cstring>

#include "dtypes.h"
#include "gaussian.h"
#include "philox.h"

namespace graddrop {
namespace {

struct Element {
  int64_t local, param, grad, global;  // indices: row-major in the tensor, in its memories, in the whole parameter
};

Element element_at(const Layout& row, int64_t local) {
  Element e = {local, 0, 0, row.offset};
  for (int64_t d = row.ndim - 1, rest = local; d >= 0; --d) {
    const int64_t index = rest % row.size[d];
    rest /= row.size[d];
    e.param += index * row.param_stride[d];
    e.grad += index * row.grad_stride[d];
    e.global += index * row.global_stride[d];
  }
  return e;
}

bool kept(const Call& call, int64_t tensor, const Element& e) {
  const Integers& row = call.integers[tensor];
  const MaskStream stream = stream_of(call.seed, row);
  const auto global = static_cast<uint64_t>(e.global);
  switch (row.mask) {
    case Mask::DROP:
      return false;
    case Mask::ELEMENT:
      return element_kept(stream, global);
    case Mask::BLOCK: {
      const uint64_t block = global / static_cast<uint64_t>(row.block);
      return block_kept(stream, block, block_words(stream, block));
    }
    case Mask::LAYER:
      return layer_kept(stream);
    case Mask::PACKED:
      return reinterpret_cast<const uint32_t*>(call.layout[tensor].packed)[e.local / 32] >> (e.local % 32) & 1;
    default:
      return true;
  }
}

// 1 + std * N(0, 1)
double noise(const Call& call, int64_t tensor, const Element& e) {
  const MaskStream stream = stream_of(call.seed, call.integers[tensor]);
  const double normal = static_cast<double>(normal_of(stream, static_cast<uint64_t>(e.global)));
  return 1.0 + call.reals[tensor].noise_std * normal;
}

double read(Dtype dtype, int64_t base, int64_t i) {
  switch (dtype) {
    case Dtype::FLOAT32:
      return reinterpret_cast<const float*>(base)[i];
    case Dtype::BFLOAT16:
      return to_float(reinterpret_cast<const bfloat16*>(base)[i]);
    case Dtype::FLOAT16:
      return to_float(reinterpret_cast<const float16*>(base)[i]);
    default:
      return reinterpret_cast<const double*>(base)[i];
  }
}

// Where bfloat16 is rounded stochastically: of the parameter (0) and the states (1 and on).
void write_rounded(const Call& call, int64_t tensor, int value, const Element& e, int64_t base, double x) {
  const Rounding& row = call.rounding[tensor];
  const auto purpose = static_cast<Purpose>(static_cast<int>(Purpose::ROUND_PARAM) + value);
  const MaskStream stream = stream_of(call.seed, row.draw, row.stream_id);
  const uint16_t random = element_random(stream, static_cast<uint64_t>(e.global), purpose);
  round_stochastically(static_cast<float>(x), random, reinterpret_cast<bfloat16*>(base) + e.param);
}

void write(Dtype dtype, int64_t base, int64_t i, double x) {
  switch (dtype) {
    case Dtype::FLOAT32:
      reinterpret_cast<float*>(base)[i] = static_cast<float>(x);
      break;
    case Dtype::BFLOAT16:
      from_float(static_cast<float>(x), reinterpret_cast<bfloat16*>(base) + i);
      break;
    case Dtype::FLOAT16:
      from_float(static_cast<float>(x), reinterpret_cast<float16*>(base) + i);
      break;
    default:
      reinterpret_cast<double*>(base)[i] = x;
  }
}

// The rules: from the old parameter and state, the masked gradient and the factors to the new parameter and state.

template <class Real>
void adamw(Real& p, Real g, Real* s, int64_t states, const Real* f) {
  const Real decay = f[0], step = f[1], one_minus_beta1 = f[2], beta2 = f[3], one_minus_beta2 = f[4], eps = f[5];
  s[0] = s[0] + one_minus_beta1 * (g - s[0]);
  s[1] = beta2 * s[1] + one_minus_beta2 * g * g;
  if (states == 3) s[2] = s[2] > s[1] || std::isnan(s[2]) ? s[2] : s[1];
  p = p * decay - step * s[0] / (std::sqrt(s[states - 1]) + eps);
}

template <class Real>
void sgd(Real& p, Real g, Real* s, int64_t states, const Real* f) {
  const Real weight_decay = f[0], momentum = f[1], taken = f[2], grad_step = f[3], buffer_step = f[4];
  if (weight_decay != 0) g = g + weight_decay * p;  // terms whose factor is 0 are left out: 0 times infinity is NaN
  Real step = states == 0 || grad_step != 0 ? grad_step * g : 0;
  if (states == 1) {
    s[0] = momentum * s[0] + taken * g;
    step = step + buffer_step * s[0];
  }
  p = p - step;
}

template <class Real>
void lion(Real& p, Real g, Real* s, int64_t, const Real* f) {
  const Real decay = f[0], step = f[1], one_minus_beta1 = f[2], one_minus_beta2 = f[3];
  const Real direction = s[0] + one_minus_beta1 * (g - s[0]);
  const Real sign = direction > 0 ? Real{1} : direction < 0 ? Real{-1} : Real{0};
  s[0] = s[0] + one_minus_beta2 * (g - s[0]);
  p = p * decay - step * sign;
}

template <class Real>
void mask(Real& p, Real g, Real*, int64_t, const Real*) {
  p = g;
}

template <class Real>
using Rule = void (*)(Real& p, Real g, Real* s, int64_t states, const Real* factors);

template <class Real>
Rule<Real> rule_called(const char* name) {
  if (std::strcmp(name, "adamw") == 0) return adamw<Real>;
  if (std::strcmp(name, "sgd") == 0) return sgd<Real>;
  if (std::strcmp(name, "lion") == 0) return lion<Real>;
  return std::strcmp(name, "mask") == 0 ? mask<Real> : nullptr;
}

template <class Real>
void update(const Call& call, Rule<Real> rule, int64_t tensor, const Element& e) {
  const Layout& row = call.layout[tensor];
  const Integers& integers = call.integers[tensor];
  const Reals& reals = call.reals[tensor];
  const bool keep = kept(call, tensor, e);
  if (integers.effect == Effect::FREEZE && !keep) return;

  Real g = 0;
  if (row.grad && (keep || integers.effect == Effect::UPDATE)) {
    g = static_cast<Real>(read(call.dtypes.grad, row.grad, e.grad));
    const bool noisy = integers.mask == Mask::GAUSSIAN && integers.effect != Effect::UPDATE;
    if (noisy) g *= static_cast<Real>(noise(call, tensor, e));
    g *= static_cast<Real>(call.inv_grad_scale * reals.grad_factor);
  }
  Real p = static_cast<Real>(read(call.dtypes.param, row.param, e.param)), s[MAX_STATES], factors[MAX_FACTORS];
  for (int64_t k = 0; k < call.states; ++k) {
    s[k] = static_cast<Real>(read(call.dtypes.state, row.state[k], e.param));
  }
  for (int k = 0; k < MAX_FACTORS; ++k) factors[k] = static_cast<Real>(reals.factor[k]);
  if (row.block_factors && integers.mask == Mask::BLOCK && integers.effect == Effect::FREEZE) {
    const int64_t block = e.global / integers.block - row.offset / integers.block;
    for (int k = 0; k < MAX_FACTORS; ++k) {
      factors[k] = reinterpret_cast<const Real*>(row.block_factors)[block * MAX_FACTORS + k];
    }
  }

  rule(p, g, s, call.states, factors);

  const auto put = [&](Dtype dtype, int64_t base, int value, Real x) {
    if (call.rounding != nullptr && dtype == Dtype::BFLOAT16) {
      write_rounded(call, tensor, value, e, base, static_cast<double>(x));
    } else {
      write(dtype, base, e.param, static_cast<double>(x));
    }
  };
  if (keep || integers.effect != Effect::UPDATE) put(call.dtypes.param, row.param, 0, p);
  for (int k = 0; k < call.states; ++k) put(call.dtypes.state, row.state[k], 1 + k, s[k]);
}

template <class Function>
void for_each_element(const Call& call, Function function) {
  for (int64_t t = 0; t < call.tensors; ++t) {
    for (int64_t i = 0; i < call.layout[t].numel; ++i) function(t, element_at(call.layout[t], i));
  }
}

}  // namespace

bool oracle_update(const Call& call, const char* name) {
  const bool wide = call.dtypes.param == Dtype::FLOAT64;
  if (rule_called<float>(name) == nullptr) return false;
  for_each_element(call, [&](int64_t t, const Element& e) {
    wide ? update<double>(call, rule_called<double>(name), t, e) : update<float>(call, rule_called<float>(name), t, e);
  });
  return true;
}

void oracle_pack(const Call& call) {
  for_each_element(call, [&](int64_t t, const Element& e) {
    auto& word = reinterpret_cast<uint32_t*>(call.layout[t].packed)[e.local / 32];
    if (e.local % 32 == 0) word = 0;
    word |= uint32_t{kept(call, t, e)} << (e.local % 32);
  });
}

}  // namespace graddrop
