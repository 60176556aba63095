"""The native CPU backend: one call of a C++ op (kernels/cpu) for all tensors, on torch's own threads.

The op is chosen for the processor when it runs; the environment variable GRADDROP_CPU_CAPABILITY=default|avx2|avx512
forces a level, in the manner of ATEN_CPU_CAPABILITY. Results do not depend on the level or the number of threads.
"""

import os
from array import array
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import build_op
from .contract import CONTRACT_VERSION, Batch, Integer, Layout, Real, layout_row

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


def adamw(
    batch: Batch,
    *,
    seed: int,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    level: int | None = None,
) -> None:
    """One masked AdamW step for every tensor of the batch, in place. See :func:`graddrop_fused.reference.adamw`.

    ``level`` (an index into ``LEVELS``, or ``ORACLE``) is for tests.
    """
    if not batch.params or (found_inf is not None and found_inf.item()):
        return
    inv_grad_scale = 1.0 if grad_scale is None else 1.0 / grad_scale.item()
    ops, level = _op(level)
    layout, dtypes = _layout(batch)
    ops.adamw(layout, batch.integers, batch.reals, dtypes, _signed(seed), inv_grad_scale, level)


def mask_grads(batch: Batch, *, seed: int, level: int | None = None) -> None:
    """Equation 2 alone, in place on every gradient: rescale * grad where kept, else 0."""
    if batch.grads:
        ops, level = _op(level)
        layout, dtypes = _layout(batch)
        ops.mask_grads(layout, batch.integers, batch.reals, dtypes, _signed(seed), level)


def pack(batch: Batch, *, seed: int, level: int | None = None) -> None:
    """Draw every tensor's mask and write it to ``batch.packed`` (int32 words, local row-major order)."""
    if batch.packed:
        ops, level = _op(level)
        layout, _ = _layout(batch)
        ops.pack(layout, batch.integers, batch.reals, _signed(seed), level)


def _layout(batch: Batch) -> tuple[Tensor, int]:
    """The layout table, gradients as of now, and the op's code for the batch's dtypes."""
    table = batch.cache.get("cpu")
    if table is None:
        table = batch.cache["cpu"] = _Table(batch)
    else:
        table.refresh(batch)
    return table.layout, table.dtypes


class _Table:
    def __init__(self, batch: Batch):
        rows = [layout_row(batch, i) for i in range(len(batch.shards))]
        self.layout = torch.tensor(rows, dtype=torch.int64).reshape(-1, Layout.columns())
        # of the gradients that the rows describe: where there is none, of the parameter, as in layout_row
        described = [p if g is None else g for p, g in zip(batch.params, batch.grads, strict=False)]
        self.grad_strides = [t.stride() for t in described]
        self.contiguous = all([t.is_contiguous() for t in described])
        self.pointers = self.layout[:, Layout.GRAD].tolist()
        self.fixed_dtypes = _dtype_code("parameter", batch.params) + 16 * _dtype_code("state", batch.exp_avgs)
        self.dtypes = self.fixed_dtypes + 4 * _dtype_code("gradient", batch.grads)

    def refresh(self, batch: Batch) -> None:
        pointers = [0 if g is None else g.data_ptr() for g in batch.grads]
        if pointers != self.pointers:
            self.pointers = pointers
            self.layout[:, Layout.GRAD] = torch.frombuffer(array("q", pointers), dtype=torch.int64)
            self.dtypes = self.fixed_dtypes + 4 * _dtype_code("gradient", batch.grads)
        # two contiguous tensors of one shape have the same strides, and asking for strides costs more
        if not (self.contiguous and _all_contiguous(batch.grads)):
            self._refresh_strides(batch)

    def _refresh_strides(self, batch: Batch) -> None:
        for i, grad in enumerate(batch.grads):
            if grad is not None and grad.stride() != self.grad_strides[i]:
                self.grad_strides[i] = grad.stride()
                self.layout[i] = torch.tensor(layout_row(batch, i), dtype=torch.int64)
        # an absent gradient's row still holds the strides of one that may have been another way round
        self.contiguous = None not in batch.grads and _all_contiguous(batch.grads)


def _all_contiguous(grads: Sequence[Tensor | None]) -> bool:
    return all([g is None or g.is_contiguous() for g in grads])  # a list is faster than a generator


def _dtype_code(name: str, tensors: Sequence[Tensor | None]) -> int:
    dtype = next((t.dtype for t in tensors if t is not None), torch.float32)
    if dtype not in _DTYPES:
        raise TypeError(f"{name} must have one of the dtypes {', '.join(map(str, _DTYPES))}, got {dtype}")
    return _DTYPES[dtype]


def _signed(seed: int) -> int:
    """The int64 with the bits of the unsigned 64-bit seed."""
    return seed - 2**64 if seed >= 2**63 else seed


def _op(level: int | None):
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
            "the native CPU op was not built; with a C++ compiler that takes half a minute: "
            "python -m graddrop_fused build"
        )
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return 0, f"the native CPU op {path.name} does not load: {str(error).splitlines()[0]}"
    ops = torch.ops.graddrop_fused_cpu
    built = ops.contract_version(), ops.layout_columns(), ops.integer_columns(), ops.real_columns()
    wanted = CONTRACT_VERSION, Layout.columns(), len(Integer), len(Real)
    if built != wanted:
        return 0, (
            f"the native CPU op {path.name} was built for another version of this package (contract {built}, "
            f"not {wanted}); build it again: python -m graddrop_fused build"
        )
    return _choose_level(os.environ.get(_CAPABILITY), ops.best_level())


def _choose_level(capability: str | None, best: int) -> tuple[int, str | None]:
    if not capability:
        return best, None
    if capability not in LEVELS[: best + 1]:
        return 0, f"{_CAPABILITY}={capability}: this processor runs {', '.join(LEVELS[: best + 1])}"
    return LEVELS.index(capability), None
