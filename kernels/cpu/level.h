// What one instruction-set level provides: functions on single tiles of 128 elements. The driver (step.cpp) knows
// nothing of vectors, a level nothing of tensors, layouts or threads.
#pragma once

#include "contract.h"
#include "philox.h"

namespace graddrop {

// How the mask words enter an update. ALL: every element is kept, no words are read.
enum class Select { ALL, GRADIENT, FREEZE, UPDATE };

// Run-time numbers of one tensor's update, combined in float64 and rounded once.
template <class Real>
struct Scalars {
  Real grad_scale, decay, one_minus_beta1, beta2, one_minus_beta2, step, eps;
};

struct Numbers {
  Scalars<float> f32;
  Scalars<double> f64;
};

// Consecutive tiles of 128 elements.
struct Run {
  void* p;
  const void* g;
  void *m, *v, *vmax;  // vmax is 0 without amsgrad
  int64_t tiles;
  int64_t grad_step = TILE;             // elements from a tile's gradient to the next one's; 0: one tile serves all
  const uint32_t* words = nullptr;      // the tiles' mask words, four each; unread under Select::ALL
  int64_t words_step = 4;               // 0: four words serve all tiles
  const Stream* stream = nullptr;       // in place of words: draw them
  uint64_t first_tile = 0;              // global, if drawn
};

using DrawTile = void (*)(const Stream&, uint64_t tile, uint32_t words[4]);
using NormalsOfTile = void (*)(const Stream&, uint64_t tile, float normals[TILE]);
using AdamwRun = void (*)(const Run&, const Numbers&);
using MaskTile = void (*)(void* grad, const uint32_t words[4], double scale);
using StreamTile = void (*)(float* p, const float* g, float* m, float* v, float zero);

struct Level {
  const char* name;
  DrawTile draw;
  NormalsOfTile normals;
  // grad is param's dtype or the arithmetic's (float32, or float64 for float64 parameters)
  AdamwRun (*adamw)(Dtype param, Dtype grad, Dtype state, Select, bool amsgrad);
  MaskTile (*mask)(Dtype grad);
  StreamTile stream;  // float32: reads four streams, writes three, hardly computes: the floor benchmarks compare with
};

extern const Level level_default;
#ifdef GRADDROP_X86
extern const Level level_avx2, level_avx512;
#endif

}  // namespace graddrop
