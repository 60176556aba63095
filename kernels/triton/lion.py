"""The rule "lion" on loaded values, in the order of graddrop_fused/rules.py."""

import triton
import triton.language as tl


@triton.jit
def update(p, g, states, factors):
    """New p and new states from the old ones and the masked gradient."""
    decay, step, one_minus_beta1, one_minus_beta2 = factors
    difference = g - states[0]
    direction = states[0] + one_minus_beta1 * difference
    # zero and NaN are their own signs
    sign = tl.where(direction > 0, 1.0, tl.where(direction < 0, -1.0, direction))
    return p * decay - step * sign, (states[0] + one_minus_beta2 * difference,)
