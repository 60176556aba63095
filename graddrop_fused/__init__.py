"""graddrop_fused: masked fine-tuning for free. Optimizers with gradient masks drawn inside the update.

Where the mask is decided: mask_stream.py. Where the update is computed: rules.py, and kernels/ for speed.
"""

from .mask_stream import keep_mask, pack_mask, philox4x32, unpack_mask

__version__ = "0.2.0"

__all__ = ["keep_mask", "pack_mask", "philox4x32", "unpack_mask"]
