// The contract's operations, and the benchmark's floor, on one stretch of one tensor: local elements [begin, end) in
// row-major order.
#pragma once

#include "contract.h"
#include "level.h"

namespace graddrop {

using Stretch = void (*)(const Level&, const Call&, int64_t tensor, int64_t begin, int64_t end);

// begin must be a multiple of 128. An element's result does not depend on how a tensor is cut.
void adamw_stretch(const Level&, const Call&, int64_t tensor, int64_t begin, int64_t end);
void mask_stretch(const Level&, const Call&, int64_t tensor, int64_t begin, int64_t end);
void pack_stretch(const Level&, const Call&, int64_t tensor, int64_t begin, int64_t end);
void stream_stretch(const Level&, const Call&, int64_t tensor, int64_t begin, int64_t end);  // benchmark floor

constexpr int64_t MAX_STRETCH = 131072;

}  // namespace graddrop
