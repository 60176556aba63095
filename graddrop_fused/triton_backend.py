"""The Triton backend's host side: device tables, and one launch per call. Device code: kernels/triton.

What a launch reads besides the tensors: a chunk table and a layout table on the device, built once per batch and kept
in ``batch.cache``, and the batch's two number tables. A call synchronises nothing. With tables on the device
(capturable) it copies nothing to the device either, unless gradients moved.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from .cuda_graph import capturing, check_not_capturing, to_device
from .contract import Batch, Effect, Integer, Layout, Mask, layout_row

_OLDEST = (3, 5)
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
        return f"triton cannot be imported ({error}): pip install 'triton>=3.5'"
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < _OLDEST:
        return f"triton {triton.__version__} is too old: pip install 'triton>=3.5'"
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
    if not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        return "Triton needs a C compiler for its launcher, and none is found: install gcc or set CC"
    return None


def adamw(batch: Batch, *, seed: int, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
    """One masked AdamW step for every tensor of the batch, in place, in one launch.

    ``grad_scale`` (AMP) divides every gradient; where ``found_inf`` is nonzero nothing changes. Both are one-element
    tensors on the batch's device and are read there.
    """
    from .kernels.triton.kernels import adamw_kernel

    amsgrad = any(t is not None for t in batch.max_exp_avg_sqs)
    # what a step leaves alone is not counted: it comes and goes with gradients
    occurring = pairs(batch) - {(Mask.DROP, Effect.FREEZE)}
    grad_dtype = next((g.dtype for g in batch.grads if g is not None), None)
    _launch(
        adamw_kernel,
        batch,
        batch.params,
        seed=seed,
        grad_scale=grad_scale,
        found_inf=found_inf,
        PARAM_DTYPE=batch.params[0].dtype if batch.params else None,
        GRAD_DTYPE=grad_dtype or (batch.params[0].dtype if batch.params else None),
        STATE_DTYPE=batch.exp_avgs[0].dtype if batch.exp_avgs else None,
        KINDS=_bits(mask for mask, _ in occurring),
        EFFECTS=_bits(effect for _, effect in occurring),
        AMSGRAD=amsgrad,
    )


def mask_grads(batch: Batch, *, seed: int) -> None:
    """rescale * grad where kept, else 0, in place on every gradient, in one launch."""
    from .kernels.triton.kernels import mask_grads_kernel

    present = [g for g in batch.grads if g is not None]
    if present:
        kinds = _bits(mask for mask, _ in pairs(batch))
        _launch(mask_grads_kernel, batch, present, seed=seed, GRAD_DTYPE=present[0].dtype, KINDS=kinds)


def pack(batch: Batch, *, seed: int) -> None:
    """Draw every tensor's mask and write it to ``batch.packed``, in one launch."""
    from .kernels.triton.kernels import pack_kernel

    _launch(pack_kernel, batch, batch.packed, seed=seed, KINDS=_bits(mask for mask, _ in pairs(batch)))


def shape(dtypes: Sequence[torch.dtype], warp_size: int) -> dict[str, int]:
    """The compile-time sizes of a kernel that accesses ``dtypes``.

    A thread takes 16 bytes of the smallest dtype at a time, and as many elements of the others in one or two accesses:
    values of different dtypes meet in the same thread.
    """
    vector = max(4, 16 // min(dtype.itemsize for dtype in dtypes))  # float64 takes two accesses
    threads = WARPS * warp_size
    return {"TILES": threads * vector // 32, "VECTOR": vector, "GENERAL": threads, "CHUNK": CHUNK, "num_warps": WARPS}


def pack_shape(warp_size: int) -> dict[str, int]:
    """The same for packing, where a thread draws a whole tile. One warp: its passes suit small tensors too."""
    return {"TILES": warp_size, "GENERAL": 4 * warp_size, "CHUNK": CHUNK, "num_warps": 1}


def pairs(batch: Batch) -> Set[tuple[int, int]]:
    """The (Mask, Effect) that may occur in the batch: what a kernel is specialised on."""
    if batch.pairs is not None:
        return batch.pairs
    return set(map(tuple, batch.integers[:, [Integer.MASK, Integer.EFFECT]].tolist()))


def _bits(numbers: Iterable[int]) -> int:
    return sum(1 << int(n) for n in set(numbers))


def _interpreted() -> bool:
    import triton

    # decided for triton's own functions when triton is imported, and the same for kernels that call them
    return not isinstance(triton.language.zeros, triton.JITFunction)


def _launch(kernel, batch: Batch, tensors: list[Tensor], *, seed: int, **arguments) -> None:
    """``tensors``: some of the batch that the kernel accesses 16 bytes at a time, on its device."""
    if not any(shard.numel for shard in batch.shards):
        return
    import triton.language as tl

    device = tensors[0].device
    warp_size = 32 if device.type == "cpu" else torch.cuda.get_device_properties(device).warp_size
    dtypes = [value for value in arguments.values() if isinstance(value, torch.dtype)]
    constants = {
        name: getattr(tl, str(value).removeprefix("torch.")) if isinstance(value, torch.dtype) else value
        for name, value in arguments.items()
    }
    with contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device):
        tables = batch.cache.get("triton")
        if tables is None:
            tables = batch.cache["triton"] = _Tables.of(batch, device)
        numbers = dict(zip(("integers", "reals"), _numbers(batch, device), strict=True))
        if "reals" not in kernel.arg_names:
            del numbers["reals"]
        sizes = shape(dtypes, warp_size) if dtypes else pack_shape(warp_size)
        kernel[(len(tables.chunks),)](
            chunks=tables.chunks,
            layout=tables.layout_now(batch),
            **numbers,
            seed=seed,
            **constants,
            **sizes,
            **OPTIONS,
        )


def _numbers(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Batch.integers and Batch.reals on the device, from the host in one copy that nothing waits for."""
    if batch.integers.device == device:
        return batch.integers, batch.reals
    size = batch.integers.numel()
    both = to_device(torch.cat([batch.integers.reshape(-1), batch.reals.reshape(-1).view(torch.int64)]), device)
    return both[:size], both[size:].view(torch.float64)


@dataclass
class _Tables:
    """What a batch's tensors are to a kernel, on their device. Only gradients may move."""

    chunks: Tensor  # (programs, 2), int64: tensor, first local element
    layout: Tensor  # (tensors, Layout.columns()), int64
    places: list  # of the gradients that `layout` points to
    in_graph: bool  # a captured graph reads `layout`: it must stay as it is
    spare: tuple[Tensor, Tensor] | None  # a layout on the host and one on the device, for the next capture
    captured: list  # what captured graphs read and copy, kept alive

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> "_Tables":
        check_not_capturing()
        counts = torch.tensor([-(-shard.numel // CHUNK) for shard in batch.shards])
        tensor = torch.repeat_interleave(torch.arange(len(counts)), counts)
        start = (torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]) * CHUNK
        chunks = torch.stack([tensor, start], 1).to(device)
        return cls(chunks, _layout(batch).to(device), _places(batch), False, None, [])

    def layout_now(self, batch: Batch) -> Tensor:
        """The layout table with the gradients' places of now."""
        places, device = _places(batch), self.chunks.device
        if capturing():
            return self._layout_for_graph(batch, places)
        if places != self.places:
            if self.in_graph:
                self.layout, self.in_graph = torch.empty_like(self.layout), False
            # in place: a kernel of an earlier step on this stream may still read the old one
            self.layout.copy_(_pinned(_layout(batch), device), non_blocking=True)
            self.places = places
        if self.spare is None and batch.integers.device.type != "cpu":
            self.spare = _pinned(_layout(batch), device), torch.empty_like(self.layout)
        return self.layout

    def _layout_for_graph(self, batch: Batch, places: list) -> Tensor:
        if places == self.places:
            self.in_graph = True
            self.captured.append(self.layout)
            return self.layout
        if self.spare is None:
            raise RuntimeError("gradients moved between two captures: take a step outside of capture between them")
        # gradients made inside the graph's own pool: the graph copies their places at every replay
        host, layout = self.spare
        self.spare = None
        self.captured.append((host, layout))
        host.copy_(_layout(batch))
        return layout.copy_(host, non_blocking=True)


def _layout(batch: Batch) -> Tensor:
    rows = [layout_row(batch, i) for i in range(len(batch.params))]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, Layout.columns())


def _places(batch: Batch) -> list:
    return [grad if grad is None else (grad.data_ptr(), grad.stride()) for grad in batch.grads]


def _pinned(host: Tensor, device: torch.device) -> Tensor:
    return host if device.type == "cpu" else host.pin_memory()
