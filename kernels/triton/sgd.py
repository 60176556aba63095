"""The rule "sgd" on loaded values, in the order of graddrop_fused/rules.py. Without momentum it has no state."""

import triton
import triton.language as tl


@triton.jit
def update(p, g, states, factors):
    """New p and new states from the old ones and the masked gradient."""
    weight_decay, momentum, taken, grad_step, buffer_step = factors
    # terms whose factor is 0 are left out: 0 times infinity is NaN
    g = tl.where(weight_decay != 0, g + weight_decay * p, g)
    if len(states) == 0:
        return p - grad_step * g, ()
    else:
        m = momentum * states[0] + taken * g
        step = buffer_step * m
        step = tl.where(grad_step != 0, grad_step * g + step, step)
        return p - step, (m,)
