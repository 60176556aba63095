// What one instruction-set level provides: functions on tiles of 128 elements. The driver (stretch.cpp) knows nothing of
// vectors, a level nothing of tensors, layouts or threads.
#pragma once

#include "contract.h"
#include "philox.h"

namespace graddrop {

// Where an update selects by the mask. NOWHERE: every element is kept, and no mask words are read.
enum class Select { NOWHERE, GRADIENT, EVERYTHING, PARAMETER };
constexpr int SELECTS = 4;

inline Select select_of(Effect effect) {
  switch (effect) {
    case Effect::GRADIENT:
      return Select::GRADIENT;
    case Effect::FREEZE:
      return Select::EVERYTHING;
    default:
      return Select::PARAMETER;
  }
}

// One tensor's numbers, rounded once.
struct Factors {
  float f32[1 + MAX_FACTORS];  // the gradient's factor, then the rule's
  double f64[1 + MAX_FACTORS];
};

// Consecutive tiles of one tensor, and where their mask words come from.
struct Tiles {
  void* param;
  const void* grad;
  void* state[MAX_STATES];
  int64_t count;
  int64_t grad_step = TILE;            // elements from a tile's gradient to the next one's; 0: one tile serves all
  int64_t to_next = 0;                 // elements from the last tile to what is updated after it; 0: nothing is known
  const uint32_t* words = nullptr;     // four a tile
  int64_t words_step = 4;              // 0: four words serve all tiles
  const MaskStream* stream = nullptr;  // in place of words: draw them
  const MaskStream* rounding = nullptr;  // draws what rounds bfloat16, where kernels round stochastically
  uint64_t first_tile = 0;               // of the whole parameter, if anything is drawn
};

using UpdateTiles = void (*)(const Tiles&, const Factors&);

// An update of one rule and one combination of dtypes; empty if there is none for these dtypes.
struct Kernels {
  UpdateTiles by_select[SELECTS];

  UpdateTiles operator[](Select select) const { return by_select[static_cast<int>(select)]; }
  explicit operator bool() const { return by_select[0] != nullptr; }
};

struct RuleName {
  const char* name;  // nullptr: there is no rule of this number
  int64_t states;
};

struct Level {
  const char* name;
  int64_t (*rule_number)(const char* name, int64_t states);  // -1: there is none
  RuleName (*rule_name)(int64_t number);
  // For float32 and float64 there is always one with gradients and state of the same dtype. `rounds`: stochastically.
  Kernels (*kernels)(int64_t rule, Dtypes, bool rounds);
  void (*draw)(const MaskStream&, uint64_t tile, uint32_t words[4]);
  void (*random)(const MaskStream&, uint64_t tile, Purpose, uint16_t random[TILE]);
  void (*normals)(const MaskStream&, uint64_t tile, float normals[TILE]);
  // a tile to float32 or float64 (`real`), and back
  void (*widen)(Dtype dtype, const void* from, Dtype real, void* to);
  void (*narrow)(Dtype real, const void* from, Dtype dtype, void* to);
  // a tile of float32 to bfloat16, by 128 random numbers
  void (*round)(const float* from, const uint16_t* random, void* to);
  // float32: reads four arrays and writes three as an unmasked AdamW does, and hardly computes
  void (*floor)(float* p, const float* g, float* m, float* v, float zero);
};

extern const Level level_default;
#ifdef GRADDROP_X86
extern const Level level_avx2, level_avx512;
#endif

}  // namespace graddrop
