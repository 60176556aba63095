"""FakeTensorMode, whose tensors have shapes and no elements: those who trace or count memory run programs under it."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

_FAKE = torch._C._TorchDispatchModeKey.FAKE


def is_fake(value: Any) -> bool:
    return isinstance(value, FakeTensor)


def check_no_fake_mode() -> None:
    """Raises RuntimeError under FakeTensorMode, where number tables would have no elements."""
    if torch._C._get_dispatch_mode(_FAKE) is not None:
        raise RuntimeError(
            "masks must not be drawn under FakeTensorMode, which computes no numbers. There only step() of a masked "
            "optimizer works, if its parameters are fake, too: it makes its state"
        )
