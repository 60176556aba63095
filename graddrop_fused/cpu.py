"""The native CPU backend: one call of a C++ op (kernels/cpu) for all tensors, on torch's own threads.

The op is chosen for the processor when it runs; the environment variable GRADDROP_CPU_CAPABILITY=default|avx2|avx512
forces a level, in the manner of ATEN_CPU_CAPABILITY. Results do not depend on the level or the number of threads.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import build_op, mask_stream
from .contract import CONTRACT_VERSION, Batch, Integer, Layout, Real
from .layout import LayoutTable
from .rules import Rule

LEVELS = ("default", "avx2", "avx512")
ORACLE = 3  # one element at a time; only tests ask for it
_CAPABILITY = "GRADDROP_CPU_CAPABILITY"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # kernels/cpu/contract.h


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot serve ``device`` (one line), or None."""
    if torch.device(device).type != "cpu":
        return f"the CPU backend serves CPU tensors, not {device}"
    return _load()[1]


def levels() -> list[str]:
    """The instruction-set levels that the op has and this processor can run, slowest first."""
    return [] if unavailable(torch.device("cpu")) else list(LEVELS[: torch.ops.graddrop_fused_cpu.best_level() + 1])


def update(
    batch: Batch,
    rule: Rule,
    *,
    seed: int,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    level: int | None = None,
) -> None:
    """One masked step of ``rule`` for every tensor of the batch, in place. See :func:`graddrop_fused.reference.update`.

    ``level`` (an index into ``LEVELS``, or ``ORACLE``) is for tests.
    """
    prepare(batch, rule, seed=seed, grad_scale=grad_scale, found_inf=found_inf, level=level)()


def prepare(
    batch: Batch,
    rule: Rule,
    *,
    seed: int,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    level: int | None = None,
) -> Callable[[], None]:
    """:func:`update` up to its launch, which is returned; nothing after this allocates or can be refused."""
    if not batch.params or (found_inf is not None and found_inf.item()):
        return lambda: None
    inv_grad_scale = 1.0 if grad_scale is None else 1.0 / grad_scale.item()
    ops, level = _op(level)
    number = _rule_number(rule.name, len(batch.states))
    layout, dtypes = _tables(batch)
    tables = layout, batch.integers, batch.reals, batch.rounding
    return partial(ops.update, *tables, number, dtypes, _signed(seed), inv_grad_scale, level)


def pack(batch: Batch, *, seed: int, level: int | None = None) -> None:
    """Draw every tensor's mask and write it to ``batch.packed`` (int32 words, local row-major order)."""
    if batch.packed:
        ops, level = _op(level)
        layout, _ = _tables(batch)
        ops.pack(layout, batch.integers, batch.reals, _signed(seed), level)


def _tables(batch: Batch) -> tuple[Tensor, int]:
    """The layout table, gradients as of now, and the op's code for the batch's dtypes."""
    cached = batch.cache.get("cpu")
    if cached is None:
        cached = batch.cache["cpu"] = [LayoutTable(batch), _dtypes(batch)]
    if cached[0].refresh(batch):
        cached[1] = _dtypes(batch)
    return cached[0].table, cached[1]


def _dtypes(batch: Batch) -> int:
    param = _dtype_code("parameter", batch.params)
    state = _dtype_code("state", batch.states[0] if batch.states else batch.params)
    return param + 4 * _dtype_code("gradient", batch.grads) + 16 * state


def _dtype_code(name: str, tensors: Sequence[Tensor | None]) -> int:
    dtype = next((t.dtype for t in tensors if t is not None), torch.float32)
    if dtype not in _DTYPES:
        raise TypeError(f"{name} must have one of the dtypes {', '.join(map(str, _DTYPES))}, got {dtype}")
    return _DTYPES[dtype]


def _signed(seed: int) -> int:
    """The int64 with the bits of the unsigned 64-bit seed."""
    return seed - 2**64 if seed >= 2**63 else seed


@cache
def _rule_number(name: str, states: int) -> int:
    number = torch.ops.graddrop_fused_cpu.rule(name, states)
    if number < 0:
        raise ValueError(
            f"rule must be one that kernels/cpu/rules.h lists with its number of states, got {name!r} with {states}; "
            "backend='reference' takes any"
        )
    return number


def _op(level: int | None) -> tuple[Any, int]:
    """The loaded op and the level to run."""
    default, reason = _load()
    if reason:
        raise RuntimeError(reason)
    return torch.ops.graddrop_fused_cpu, default if level is None else level


@cache
def _load() -> tuple[int, str | None]:
    """Load the op: (level to run, why it is unavailable or None)."""
    path = build_op.find(Path(__file__).parent)
    if path is None:
        return 0, (
            "the native CPU op was not built; with a C++ compiler that takes about a minute: "
            "python -m graddrop_fused build"
        )
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return 0, f"the native CPU op {path.name} does not load: {str(error).splitlines()[0]}"
    difference = _difference(torch.ops.graddrop_fused_cpu)
    if difference:
        return 0, (
            f"the native CPU op {path.name} was built for another version of this package ({difference}); "
            "build it again: python -m graddrop_fused build"
        )
    return _choose_level(os.environ.get(_CAPABILITY), torch.ops.graddrop_fused_cpu.best_level())


def _difference(ops: Any) -> str | None:
    """What the op was built for, where that is not what this package needs."""
    needed = {
        "contract_version": CONTRACT_VERSION,
        "mask_stream_version": mask_stream.VERSION,
        "layout_columns": Layout.columns(),
        "integer_columns": len(Integer),
        "real_columns": Real.columns(),
    }
    for name, number in needed.items():
        built = getattr(ops, name)() if hasattr(ops, name) else None
        if built != number:
            return f"{name.replace('_', ' ')} {built}, not {number}"
    return None


def _choose_level(capability: str | None, best: int) -> tuple[int, str | None]:
    if not capability:
        return best, None
    if capability not in LEVELS[: best + 1]:
        return 0, f"{_CAPABILITY}={capability}: this processor runs {', '.join(LEVELS[: best + 1])}"
    return LEVELS.index(capability), None
