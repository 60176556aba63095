// The contract's functions one element at a time, in the order of graddrop_fused/reference.py: slow, and plainly right.
// Tests hold every level to its bits.
#pragma once

#include "contract.h"

namespace graddrop {

bool oracle_update(const Call&, const char* rule);  // false: it knows no such rule
void oracle_pack(const Call&);

}  // namespace graddrop
