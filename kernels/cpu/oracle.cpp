#include "oracle.h"

#include <cmath>

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
  const Stream stream = stream_of(call.seed, row);
  const auto global = static_cast<uint64_t>(e.global);
  switch (row.mask) {
    case Mask::DROP:
      return false;
    case Mask::ELEMENT:
      return element_kept(stream, global);
    case Mask::BLOCK:
      return block_kept(stream, global / static_cast<uint64_t>(row.block));
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
  const Stream stream = stream_of(call.seed, call.integers[tensor]);
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

template <class Real>
void adamw(const Call& call, int64_t tensor, const Element& e) {
  const Layout& row = call.layout[tensor];
  const Integers& integers = call.integers[tensor];
  const Reals& reals = call.reals[tensor];
  const bool keep = kept(call, tensor, e), update = integers.effect == Effect::UPDATE;
  if (integers.effect == Effect::FREEZE && !keep) return;

  const Real p = static_cast<Real>(read(call.param, row.param, e.param));
  const Real m = static_cast<Real>(read(call.state, row.m, e.param));
  const Real v = static_cast<Real>(read(call.state, row.v, e.param));
  Real g = 0;
  if (row.grad && (keep || update)) {
    g = static_cast<Real>(read(call.grad, row.grad, e.grad));
    if (integers.mask == Mask::GAUSSIAN && !update) g *= static_cast<Real>(noise(call, tensor, e));
    g *= static_cast<Real>(call.inv_grad_scale * reals.sign * (update ? 1.0 : reals.rescale));
  }

  const double scale = update ? reals.rescale : 1.0;
  const Real new_m = m + static_cast<Real>(1.0 - reals.beta1) * (g - m);
  const Real new_v = static_cast<Real>(reals.beta2) * v + static_cast<Real>(1.0 - reals.beta2) * g * g;
  Real vmax = new_v;
  if (row.vmax) {
    const Real old = static_cast<Real>(read(call.state, row.vmax, e.param));
    vmax = old > new_v ? old : new_v;
  }
  const Real denominator = std::sqrt(vmax) + static_cast<Real>(reals.eps * reals.bias_correction2_sqrt);
  const Real step = static_cast<Real>(scale * reals.step_size * reals.bias_correction2_sqrt);
  const Real new_p = p * static_cast<Real>(1.0 - scale * (1.0 - reals.decay)) - step * new_m / denominator;

  if (keep || !update) write(call.param, row.param, e.param, new_p);
  write(call.state, row.m, e.param, new_m);
  write(call.state, row.v, e.param, new_v);
  if (row.vmax) write(call.state, row.vmax, e.param, vmax);
}

template <class Real>
void mask(const Call& call, int64_t tensor, const Element& e) {
  const int64_t base = call.layout[tensor].grad;
  Real g = 0;
  if (kept(call, tensor, e)) {
    g = static_cast<Real>(read(call.grad, base, e.grad));
    if (call.integers[tensor].mask == Mask::GAUSSIAN) g *= static_cast<Real>(noise(call, tensor, e));
    g *= static_cast<Real>(call.reals[tensor].rescale);
  }
  write(call.grad, base, e.grad, g);
}

template <class Function>
void for_each_element(const Call& call, Function function) {
  for (int64_t t = 0; t < call.tensors; ++t) {
    for (int64_t i = 0; i < call.layout[t].numel; ++i) function(t, element_at(call.layout[t], i));
  }
}

}  // namespace

void oracle_adamw(const Call& call) {
  const bool wide = call.param == Dtype::FLOAT64;
  for_each_element(call, [&](int64_t t, const Element& e) {
    wide ? adamw<double>(call, t, e) : adamw<float>(call, t, e);
  });
}

void oracle_mask(const Call& call) {
  const bool wide = call.grad == Dtype::FLOAT64;
  for_each_element(call, [&](int64_t t, const Element& e) {
    if (call.layout[t].grad) wide ? mask<double>(call, t, e) : mask<float>(call, t, e);
  });
}

void oracle_pack(const Call& call) {
  for_each_element(call, [&](int64_t t, const Element& e) {
    auto& word = reinterpret_cast<uint32_t*>(call.layout[t].packed)[e.local / 32];
    if (e.local % 32 == 0) word = 0;
    word |= uint32_t{kept(call, t, e)} << (e.local % 32);
  });
}

}  // namespace graddrop
