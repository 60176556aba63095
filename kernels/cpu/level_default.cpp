#include "adamw.h"
#include "vec_portable.h"

namespace graddrop {

extern const Level level_default = level_of<LoopDraw, Float1>("default");

}  // namespace graddrop
