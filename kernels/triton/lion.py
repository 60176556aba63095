"""The rule "lion" on loaded values, in the order of graddrop_fused/rules.py."""

import triton
import triton.language as tl


@triton.jit
def update(p, g, states, factors):
    """New p and new states from the old ones and the masked gradient."""
    decay, step, one_minus_beta1, one_minus_beta2 = factors
    difference = g - states[0]
    direction = states[0] + one_minus_beta1 * difference
    sign = tl.where(direction > 0, 1.0, tl.where(direction < 0, -1.0, 0.0))  # a NaN's is 0, as torch.sign's
    return p * decay - step * sign, (states[0] + one_minus_beta2 * difference,)
