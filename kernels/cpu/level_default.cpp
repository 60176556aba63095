#include "instances.h"
#include "vec_portable.h"

namespace graddrop {

extern const Level level_default = make_level<PortableDraw, Float1>("default");

}  // namespace graddrop
