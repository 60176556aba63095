#include "instances.h"
#include "vec_avx2.h"

namespace graddrop {

extern const Level level_avx2 = make_level<TileDraw<Philox8>, Floats8>("avx2");

}  // namespace graddrop
