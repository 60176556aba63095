"""The rule "adamw" on loaded values, in the order of graddrop_fused/rules.py. A third state is amsgrad's maximum."""

import triton
import triton.language as tl


@triton.jit
def update(p, g, states, factors):
    """New p and new states from the old ones and the masked gradient."""
    decay, step, one_minus_beta1, beta2, one_minus_beta2, eps = factors
    m = states[0] + one_minus_beta1 * (g - states[0])
    v = beta2 * states[1] + one_minus_beta2 * g * g
    if len(states) == 3:
        # a NaN spreads, as in torch.maximum
        vmax = tl.maximum(states[2], v, propagate_nan=tl.PropagateNan.ALL)
        return p * decay - step * (m / (tl.sqrt(vmax) + eps)), (m, v, vmax)
    else:
        return p * decay - step * (m / (tl.sqrt(v) + eps)), (m, v)
