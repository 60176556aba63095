"""graddrop_fused: masked fine-tuning for free. AdamW with gradient masks drawn inside the update.

Where the mask is decided: mask_stream.py. Where AdamW is computed: reference.py, and kernels/ for speed.
"""

from .attach import MaskHandle, attach
from .layers import param_groups
from .mask_stream import keep_mask, pack_mask, philox4x32, unpack_mask
from .optimizer import GradDropAdamW
from .policies import GradDrop, GradDropEpoch, GradFreeze, LayerGradDrop, LinearAnneal, Policy, StaticMask

__version__ = "0.2.0"

__all__ = [
    "GradDrop",
    "GradDropAdamW",
    "GradDropEpoch",
    "GradFreeze",
    "LayerGradDrop",
    "LinearAnneal",
    "MaskHandle",
    "Policy",
    "StaticMask",
    "attach",
    "keep_mask",
    "pack_mask",
    "param_groups",
    "philox4x32",
    "unpack_mask",
]
