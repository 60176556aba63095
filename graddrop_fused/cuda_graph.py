"""Guards of CUDA graph capture: no host value changes between the replays of a captured graph."""

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """``host`` on ``device``, by a copy that nothing waits for. Raises RuntimeError during CUDA graph capture."""
    if device.type == "cpu":
        return host
    check_not_capturing()
    # the allocator keeps the pinned block until the copy is done
    return host.pin_memory().to(device, non_blocking=True)


def capturing() -> bool:
    """Is a CUDA graph being captured on the current stream?"""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def check_not_capturing() -> None:
    """Raises RuntimeError where a CUDA graph is being captured: its replays would read stale memory of the host."""
    if capturing():
        raise RuntimeError(
            "a step under CUDA graph capture needs its tables on the device already: make the optimizer with "
            "capturable=True, and take a step outside of capture first and after every change of groups, "
            "hyperparameters or gradients' dtypes"
        )
