"""The Triton backend's host side: device tables, and one launch per call. Device code: kernels/triton.

What a launch reads besides the tensors: a chunk table and a layout table on the device, built once per batch and kept
in ``batch.cache``, and the batch's two number tables. A call synchronises nothing. With tables on the device
(capturable) it copies nothing to the device either, unless gradients moved.
"""

import contextlib
import importlib
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .contract import Batch, Effect, Integer, Layout, Mask
from .cuda_graph import capturing, check_not_capturing, to_device
from .device_rows import DeviceRow, device_rows, indexing
from .layout import LayoutTable
from .rules import Rule

_OLDEST = (3, 6)  # the first with tl.sub
CHUNK = 8192  # elements of a program: enough to amortise its tables, few enough to balance small tensors
WARPS = 4
# Multiply-adds may contract, as in torch's own fused kernel; Triton's default is about to change. No register limit:
# given one, NVIDIA's compiler spills before it looks for another order (docs/gpu.md).
OPTIONS = {"enable_fp_fusion": True}


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot serve ``device``, in one line, or None."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}): pip install 'triton>=3.6'"
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < _OLDEST:
        return f"triton {triton.__version__} is too old: pip install 'triton>=3.6', as torch 2.10 and newer have it"
    if device.type == "cpu":
        return None if _interpreted() else "Triton serves CPU tensors in its interpreter only: set TRITON_INTERPRET=1"
    if device.type != "cuda":
        return f"Triton serves NVIDIA and AMD GPUs, not {device.type!r} devices"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if _interpreted():
        return "TRITON_INTERPRET=1 is set: Triton's interpreter serves CPU tensors only"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"Triton needs compute capability 8.0 or newer, {torch.cuda.get_device_name(device)} is older"
    return _no_launcher()


def _no_launcher() -> str | None:
    """Why Triton cannot build what launches its kernels, or None. It compiles that in C, for the running Python."""
    if not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang")))):
        return "Triton needs a C compiler for its launcher, and none is found: install gcc or set CC"
    scheme = sysconfig.get_default_scheme()  # Debian's own has its headers where nothing installs them
    include = sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)
    if not (Path(include) / "Python.h").exists():
        return f"Triton needs Python's headers for its launcher, and {include}/Python.h is missing: install python3-dev"
    return None


def update(
    batch: Batch, rule: Rule, *, seed: int, grad_scale: Tensor | None = None, found_inf: Tensor | None = None
) -> None:
    """One masked step of ``rule`` for every tensor of the batch, in place, in one launch.

    ``grad_scale`` (AMP) divides every gradient; where ``found_inf`` is nonzero nothing changes. Both are one-element
    tensors on the batch's device and are read there.
    """
    prepare(batch, rule, seed=seed, grad_scale=grad_scale, found_inf=found_inf)()


def prepare(
    batch: Batch, rule: Rule, *, seed: int, grad_scale: Tensor | None = None, found_inf: Tensor | None = None
) -> Callable[[], None]:
    """:func:`update` up to its launch, which is returned; only a kernel that must be compiled yet can fail there."""
    if not any(shard.numel for shard in batch.shards):
        return lambda: None
    from .kernels.triton.kernels import update_kernel

    device, param = batch.params[0].device, batch.params[0].dtype
    grad = next((g.dtype for g in batch.grads if g is not None), param)
    dtypes = param, grad, batch.states[0][0].dtype if batch.states else param
    with _on(device):
        tables = _tables(batch, device, in_memory_order=True)
        integers, reals, rounding = _numbers(batch, device)
        arguments = {
            "chunks": tables.chunks,
            "layout": tables.layout_now(batch),
            "integers": integers,
            "reals": reals,
            "rounding": rounding,
            "seed": seed,
            "grad_scale": grad_scale,
            "found_inf": found_inf,
            **rule_constants(rule),
            **dtype_constants(dtypes),
            **kinds_and_effects(batch),
            "OWN": any(table is not None for table in batch.block_factors),
            **tables.indexing,
            **sizes(dtypes, _warp_size(device)),
            **OPTIONS,
        }

    def launch() -> None:
        with _on(device):
            update_kernel[(len(tables.chunks),)](**arguments)

    return launch


def pack(batch: Batch, *, seed: int) -> None:
    """Draw every tensor's mask and write it to ``batch.packed``, in one launch."""
    if not any(shard.numel for shard in batch.shards):
        return
    from .kernels.triton.kernels import pack_kernel

    device = next(words.device for words in batch.packed if words is not None)
    with _on(device):
        tables = _tables(batch, device, in_memory_order=False)
        pack_kernel[(len(tables.chunks),)](
            chunks=tables.chunks,
            layout=tables.layout_now(batch),
            integers=_numbers(batch, device)[0],
            seed=seed,
            KINDS=kinds_and_effects(batch)["KINDS"] | 1 << Mask.DROP,
            **tables.indexing,
            **pack_sizes(_warp_size(device)),
            **OPTIONS,
        )


def rule_constants(rule: Rule) -> dict:
    """A rule's compile-time arguments. Raises NotImplementedError where kernels/triton has no rule of its name."""
    return {"RULE": _update_of(rule.name), "STATES": len(rule.states), "FACTORS": len(rule.factor_names)}


@cache
def _update_of(name: str) -> Any:
    try:
        return importlib.import_module(f"{__package__}.kernels.triton.{name}").update
    except (ModuleNotFoundError, AttributeError):
        raise NotImplementedError(
            f"the rule {name!r} has no Triton kernel: write kernels/triton/{name}.py, or choose backend='reference'"
        ) from None


def dtype_constants(dtypes: Iterable[torch.dtype]) -> dict:
    """The dtypes of parameters, gradients and state as compile-time arguments."""
    import triton.language as tl

    names = ("PARAM_DTYPE", "GRAD_DTYPE", "STATE_DTYPE")
    return {name: getattr(tl, str(d).removeprefix("torch.")) for name, d in zip(names, dtypes, strict=True)}


def sizes(dtypes: Iterable[torch.dtype], warp_size: int) -> dict[str, int]:
    """The compile-time sizes of an update of ``dtypes``.

    A thread takes 16 bytes of the smallest dtype at a time, and as many elements of the others in one or two accesses:
    values of different dtypes meet in the same thread.
    """
    vector = max(4, 16 // min(dtype.itemsize for dtype in dtypes))  # float64 takes two accesses
    threads = WARPS * warp_size
    return {
        "TILES": threads * vector // 32,
        "VECTOR": vector,
        "NARROW": threads // 32,
        "STRIDED": 2 * threads,
        "CHUNK": CHUNK,
        "num_warps": WARPS,
    }


def pack_sizes(warp_size: int) -> dict[str, int]:
    """The same for packing, where a thread draws a whole tile. One warp: its passes suit small tensors too."""
    return {"TILES": warp_size, "STRIDED": 4 * warp_size, "CHUNK": CHUNK, "num_warps": 1}


def kinds_and_effects(batch: Batch) -> dict[str, int]:
    """What kernels are specialised on: a bit for each Mask and Effect that may occur.

    Where the batch does not say what its schedules can reach, KEEP and DROP are added to what occurs now: most of them
    end in one of the two, and a kernel would be compiled in the middle of a training.
    """
    left_alone = {(Mask.DROP, Effect.FREEZE)}  # not counted: it comes and goes with gradients
    pairs = set(batch.pairs or ())
    if batch.pairs is None:
        pairs = {(m, e) for m, e in batch.integers[:, [Integer.MASK, Integer.EFFECT]].tolist()} - left_alone
        effects = {effect for _, effect in pairs} or {Effect.FREEZE}
        pairs |= {(mask, effect) for mask in (Mask.KEEP, Mask.DROP) for effect in effects}
    pairs = pairs - left_alone
    return {"KINDS": _bits(mask for mask, _ in pairs), "EFFECTS": _bits(effect for _, effect in pairs)}


def _bits(numbers: Iterable[int]) -> int:
    return sum(1 << int(n) for n in set(numbers))


def _interpreted() -> bool:
    import triton

    # decided for triton's own functions when triton is imported, and the same for kernels that call them
    return not isinstance(triton.language.zeros, triton.JITFunction)


def _warp_size(device: torch.device) -> int:
    return 32 if device.type == "cpu" else torch.cuda.get_device_properties(device).warp_size


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def _numbers(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Batch's integers, reals and rounding on the device, from the host in one copy that nothing waits for."""
    if batch.integers.device == device:
        return batch.integers, batch.reals, batch.rounding
    tables = [batch.reals.view(torch.int64), batch.integers]
    if batch.rounding is not None:
        tables.insert(1, batch.rounding)
    # rows of 64 and of 16 bytes first: Triton compiles anew for a table that is not 16-byte aligned
    copied = to_device(torch.cat([table.reshape(-1) for table in tables]), device)
    reals, *rounding, integers = copied.split([table.numel() for table in tables])
    return integers, reals.view(torch.float64), rounding[0] if rounding else None


def _tables(batch: Batch, device: torch.device, in_memory_order: bool) -> "_Tables":
    key = "triton" if in_memory_order else "triton pack"
    if key not in batch.cache:
        check_not_capturing()
        batch.cache[key] = _Tables(batch, device, in_memory_order)
    return batch.cache[key]


class _Tables:
    """What a batch's tensors are to a kernel, on their device. Only gradients may move."""

    def __init__(self, batch: Batch, device: torch.device, in_memory_order: bool):
        self.device, self.in_memory_order = device, in_memory_order
        self.host = LayoutTable(batch)
        self.chunks = chunk_table(self.host.table[:, Layout.NUMEL]).to(device)
        self.rows = device_rows(self.host.table, in_memory_order)  # on the host, as `host` was when `described`
        self.described = self.host.table.clone()
        self.indexing = indexing(self.rows)
        self.layout = self.rows.to(device, copy=True)
        self.stale = False  # a captured graph took rows that `layout` does not have
        self.in_graph = False  # a captured graph reads `layout`: it must stay as it is
        self.spare: tuple[Tensor, Tensor] | None = None  # layouts on the host and the device, for the next capture
        self.captured: list[Any] = []  # what captured graphs read and copy, kept alive

    def layout_now(self, batch: Batch) -> Tensor:
        """The layout table with the gradients' places of now."""
        changed = self.host.refresh(batch)
        if changed:
            self._refresh_rows()
        changed |= self.stale
        if capturing():
            return self._layout_for_graph(changed)
        if changed:
            if self.in_graph:
                self.layout, self.in_graph = torch.empty_like(self.layout), False
            # in place: a kernel of an earlier step on this stream may still read the old one
            self.layout.copy_(_pinned(self.rows, self.device), non_blocking=True)
            self.stale = False
        if self.spare is None and batch.integers.device.type != "cpu":
            self.spare = _pinned(self.rows, self.device), torch.empty_like(self.layout)
        return self.layout

    def _refresh_rows(self) -> None:
        table, first = self.host.table, DeviceRow.NUMEL
        if torch.equal(table[:, first:], self.described[:, first:]):  # the usual case: only addresses changed
            self.rows[:, :first] = table[:, :first]
        else:
            self.rows, self.described = device_rows(table, self.in_memory_order), table.clone()
            self.indexing = indexing(self.rows)

    def _layout_for_graph(self, changed: bool) -> Tensor:
        if not changed:
            self.in_graph = True
            self.captured.append(self.layout)
            return self.layout
        if self.spare is None:
            raise RuntimeError("gradients moved between two captures: take a step outside of capture between them")
        # gradients made inside the graph's own pool: the graph copies their places at every replay
        host, layout = self.spare
        self.spare, self.stale = None, True
        self.captured.append((host, layout))
        host.copy_(self.rows)
        return layout.copy_(host, non_blocking=True)


def chunk_table(numels: Sequence[int] | Tensor) -> Tensor:
    """(programs, 2), int64: the tensor and the first element of each program's chunk."""
    counts = -(-torch.as_tensor(numels, dtype=torch.int64, device="cpu") // CHUNK)
    tensor = torch.repeat_interleave(counts)
    start = (torch.arange(len(tensor), device="cpu") - (counts.cumsum(0) - counts)[tensor]) * CHUNK
    return torch.stack([tensor, start], 1)


def _pinned(host: Tensor, device: torch.device) -> Tensor:
    return host.clone() if device.type == "cpu" else host.pin_memory()
