"""The one place where a backend is chosen."""

import importlib
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .contract import MAX_DIMS
from .fakes import is_fake
from .shards import local

NAMES = ("triton", "cpu", "reference")


@cache
def load(name: str) -> ModuleType:
    """The module of backend ``name``: prepare, update, pack and unavailable, as kernels/README.md says."""
    modules = {"triton": "triton_backend", "cpu": "cpu", "reference": "reference"}
    return importlib.import_module(f".{modules[name]}", __package__)


@cache
def choose(requested: str, device: torch.device, dtype: torch.dtype, dim: int = 1) -> ModuleType:
    """The backend that serves parameters of ``dtype`` and ``dim`` dimensions on ``device``.

    Args:
        requested: a backend's name, or "auto": the device's own kernels where they can run, else the reference, with
            one RuntimeWarning that says why if they cannot run at all.

    Raises:
        RuntimeError: if ``requested`` names a backend that cannot run here, with its reason.
    """
    if requested == "auto":
        own = "cpu" if device.type == "cpu" else "triton"
        if _unavailable(own, device, dtype, dim) is None:
            return load(own)
        _warn_if_unavailable(own, device)
        return load("reference")
    reason = _unavailable(requested, device, dtype, dim)
    if reason is not None:
        raise RuntimeError(f"backend={requested!r} cannot serve {dtype} tensors on {device}: {reason}")
    return load(requested)


def choose_for(requested: str, param: Tensor) -> ModuleType:
    """The backend that serves ``param``. Raises RuntimeError if ``requested`` names one that cannot."""
    if is_fake(param):
        raise RuntimeError(
            "parameters must all be FakeTensors or none of them, and with attach() and release_gradients() none, got a "
            "FakeTensor: it has no elements to mask"
        )
    part = local(param)
    subclass = type(part) not in (Tensor, torch.nn.Parameter)
    if subclass or part.is_neg():
        # kernels go by addresses, and what a subclass means by its elements need not lie there, as a lazy sign does not
        if requested in ("auto", "reference"):
            return load("reference")
        what = f"of class {type(part).__name__}" if subclass else "with a lazy negative sign"
        raise RuntimeError(f"backend={requested!r} cannot serve a parameter {what}; backend='auto' takes the reference")
    return choose(requested, param.device, param.dtype, param.dim())


@cache
def _warn_if_unavailable(name: str, device: torch.device) -> None:
    """Say once why the device's own kernels cannot run at all; what they leave to the reference needs no warning."""
    reason = load(name).unavailable(device)
    if reason is not None:
        warnings.warn(
            f"graddrop_fused: the slower PyTorch reference serves {device} tensors: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )


def _unavailable(name: str, device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    if name != "reference" and dim > MAX_DIMS:
        return f"kernels take tensors of up to {MAX_DIMS} dimensions, not {dim}; backend='auto' takes the reference"
    if name == "triton" and dtype == torch.float64:
        return "its arithmetic is float32; backend='auto' takes the reference"
    return load(name).unavailable(device)


def check_name(requested: str) -> None:
    if requested not in ("auto", *NAMES):
        raise ValueError(f"backend must be one of 'auto', {', '.join(map(repr, NAMES))}, got {requested!r}")
