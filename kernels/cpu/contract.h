// The tables of graddrop_fused/contract.py as they lie in memory: one struct per row.
// A changed column, enum or meaning there needs the same change here and a new CONTRACT_VERSION in both.
#pragma once

#include <cstdint>

namespace graddrop {

constexpr int64_t CONTRACT_VERSION = 1;
constexpr int MAX_DIMS = 6;
constexpr int TILE = 128;  // elements decided by 32 consecutive Philox counters

enum class Mask : int64_t { KEEP, DROP, ELEMENT, BLOCK, LAYER, PACKED, GAUSSIAN };
enum class Effect : int64_t { GRADIENT, FREEZE, UPDATE };
enum class Dtype : int64_t { FLOAT32, BFLOAT16, FLOAT16, FLOAT64 };

struct Integers {
  Mask mask;
  Effect effect;
  int64_t draw, stream, lo, span, block;
};

struct Reals {
  double sign, rescale, noise_std, decay, step_size, beta1, beta2, eps, bias_correction2_sqrt;
};

struct Layout {
  int64_t param, grad, m, v, vmax, packed;  // addresses; 0: absent
  int64_t numel, offset, ndim;
  int64_t size[MAX_DIMS], param_stride[MAX_DIMS], grad_stride[MAX_DIMS], global_stride[MAX_DIMS];
};

// One call: every tensor of one combination of dtypes.
struct Call {
  const Layout* layout;
  const Integers* integers;
  const Reals* reals;
  int64_t tensors;
  Dtype param, grad, state;
  uint64_t seed;
  double inv_grad_scale;
};

}  // namespace graddrop
