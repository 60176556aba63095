#include "instances.h"
#include "vec_avx512.h"

namespace graddrop {

extern const Level level_avx512 = make_level<TileDraw<Philox16>, MaskedFloats8>("avx512");

}  // namespace graddrop
