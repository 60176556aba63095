// The tables of graddrop_fused/contract.py as they lie in memory: one struct per row.
// A changed column, enum or meaning there needs the same change here and a new CONTRACT_VERSION in both.
#pragma once

#include <cstdint>

namespace graddrop {

constexpr int64_t CONTRACT_VERSION = 4;
constexpr int64_t MASK_STREAM_VERSION = 2;  // of docs/mask-stream.md: the bits that philox.h and draw.h give
constexpr int MAX_DIMS = 6;
constexpr int MAX_STATES = 3;
constexpr int MAX_FACTORS = 6;
constexpr int TILE = 128;  // elements decided by 16 consecutive Philox counters

enum class Mask : int64_t { KEEP, DROP, ELEMENT, BLOCK, LAYER, PACKED, GAUSSIAN };
enum class Effect : int64_t { GRADIENT, FREEZE, UPDATE };
enum class Dtype : int64_t { FLOAT32, BFLOAT16, FLOAT16, FLOAT64 };

struct Integers {
  Mask mask;
  Effect effect;
  int64_t draw, stream_id, lo, span, block;
};

struct Reals {
  double grad_factor, noise_std, factor[MAX_FACTORS];
};

struct Rounding {
  int64_t draw, stream_id;
};

struct Layout {
  int64_t param, grad, state[MAX_STATES], packed, block_factors;  // addresses; 0: absent
  int64_t numel, offset, ndim;
  int64_t size[MAX_DIMS], param_stride[MAX_DIMS], grad_stride[MAX_DIMS], global_stride[MAX_DIMS];
};

struct Dtypes {
  Dtype param, grad, state;
};

// One call: every tensor of one combination of dtypes, and the rule that updates them.
struct Call {
  const Layout* layout;
  const Integers* integers;
  const Reals* reals;
  const Rounding* rounding;  // nullptr: to nearest
  int64_t tensors;
  int64_t rule;    // its place in rules.h's list
  int64_t states;  // that it keeps
  Dtypes dtypes;
  uint64_t seed;
  double inv_grad_scale;
};

// Arithmetic is float32, and float64 for float64 parameters.
inline Dtype arithmetic(Dtype param) { return param == Dtype::FLOAT64 ? Dtype::FLOAT64 : Dtype::FLOAT32; }

}  // namespace graddrop
