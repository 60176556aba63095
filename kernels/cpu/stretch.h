// The contract's functions, and the benchmarks' floor, on one stretch of one tensor: its local elements [begin, end) in
// row-major order.
#pragma once

#include "contract.h"
#include "level.h"

namespace graddrop {

// begin must be a multiple of 128. An element's result does not depend on how a tensor is cut into stretches.
using OnStretch = void (*)(const Level&, const Call&, int64_t tensor, int64_t begin, int64_t end);

void update_stretch(const Level&, const Call&, int64_t tensor, int64_t begin, int64_t end);
void pack_stretch(const Level&, const Call&, int64_t tensor, int64_t begin, int64_t end);
void floor_stretch(const Level&, const Call&, int64_t tensor, int64_t begin, int64_t end);

}  // namespace graddrop
