"""Triton's interpreter, repaired where it does otherwise than compiled kernels, or does not run at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch


@contextmanager
def repaired_interpreter() -> Iterator[None]:
    """It truncates to bfloat16 where every GPU rounds to nearest even, it prepares Triton's modules anew for each call
    of a jitted function, which takes nine tenths of its time, and in Triton 3.6 it gives arrays of one element to
    int(), which numpy 2.4 refuses. NumPy's warnings of NaN and infinities in gradients are left out."""
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    convert = interpreter._convert_float

    def rounded(values, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(np.array(values)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        return convert(values, source, target, rounding)

    prepared = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    prepared.set_attr(tl.core.tensor, "__index__", lambda self: int(self.handle.data.squeeze()))  # as 3.7 has it
    try:
        with (
            patch.object(interpreter, "_convert_float", rounded),
            patch.object(interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope()),
            np.errstate(all="ignore"),
        ):
            yield
    finally:
        prepared.restore()
