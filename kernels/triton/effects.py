"""What a dropped element means, on loaded values."""

import triton
import triton.language as tl

from .tables import FREEZE, GRADIENT, UPDATE

# A select, not an or: Triton's interpreter gives a scalar comparison that is broadcast another type than bool.


@triton.jit
def takes_grad(kept, effect):
    """Does the element's gradient reach its state?"""
    return tl.where(effect == UPDATE, True, kept)


@triton.jit
def writes_param(kept, effect):
    return tl.where(effect == GRADIENT, True, kept)


@triton.jit
def writes_state(kept, effect):
    return tl.where(effect == FREEZE, kept, True)
