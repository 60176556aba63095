"""The rule "sgd" on loaded values, in the order of graddrop_fused/rules.py. Without momentum it has no state."""

import triton
import triton.language as tl  # noqa: F401 (the interpreter looks for it)


@triton.jit
def update(p, g, states, factors):
    """New p and new states from the old ones and the masked gradient."""
    weight_decay, momentum, taken, grad_step, buffer_step = factors
    g = g + weight_decay * p
    if len(states) == 0:
        return p - grad_step * g, ()
    else:
        m = momentum * states[0] + taken * g
        return p - (grad_step * g + buffer_step * m), (m,)
