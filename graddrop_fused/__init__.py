"""graddrop_fused: masked fine-tuning for free. Optimizers with gradient masks drawn inside the update.

Where the mask is decided: mask_stream.py. Where the update is computed: rules.py, and kernels/ for speed.
"""

from .adamw import GradDropAdamW
from .attach import MaskHandle, attach
from .describe import describe
from .layers import param_groups
from .lion import GradDropLion
from .mask_stream import keep_mask, pack_mask, philox4x32, unpack_mask
from .policies import GradDrop, GradDropEpoch, GradFreeze, LayerGradDrop, Policy, StaticMask
from .policy_text import policy, policy_to_text
from .release import release_gradients
from .rows import skip_dropped_rows
from .schedules import LinearAnneal, Schedule
from .sgd import GradDropSGD
from .skip import skip_dropped_layers

__version__ = "0.2.0"

__all__ = [
    "GradDrop",
    "GradDropAdamW",
    "GradDropEpoch",
    "GradDropLion",
    "GradDropSGD",
    "GradFreeze",
    "LayerGradDrop",
    "LinearAnneal",
    "MaskHandle",
    "Policy",
    "Schedule",
    "StaticMask",
    "attach",
    "describe",
    "keep_mask",
    "pack_mask",
    "param_groups",
    "philox4x32",
    "policy",
    "policy_to_text",
    "release_gradients",
    "skip_dropped_layers",
    "skip_dropped_rows",
    "unpack_mask",
]
