"""The layout table of a batch: for each tensor its addresses, and how its memory runs through the whole parameter."""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from .contract import MAX_DIMS, MAX_STATES, Batch, Layout, Runs, Shard


def collapse(shard: Shard, *memory_strides: Sequence[int]) -> tuple[list[int], ...]:
    """Merge neighbouring dimensions that every index walks as one.

    Returns:
        (sizes, global strides, *memory strides), each with as few dimensions as possible; size-1 dimensions vanish.
    """
    all_strides = (shard.strides, *memory_strides)
    dims: list[list[int]] = []  # [size, stride, stride, ...], outermost first
    for d, size in enumerate(shard.shape):
        if size == 1:
            continue
        strides = [s[d] for s in all_strides]
        if dims and all(outer == inner * size for outer, inner in zip(dims[-1][1:], strides, strict=True)):
            dims[-1] = [dims[-1][0] * size, *strides]
        else:
            dims.append([size, *strides])
    return tuple([dim[i] for dim in dims] for i in range(1 + len(all_strides)))


def layout_row(batch: Batch, i: int) -> list[int]:
    """Tensor i's row of the layout table. Its gradient's pointer and strides are those of now.

    Raises ValueError if the tensor has too many dimensions for compiled backends.
    """
    shard = batch.shards[i]
    grad = batch.grads[i] if batch.grads else None
    strides = batch.params[i].stride() if batch.params else Shard.whole(shard.shape).strides
    sizes, global_strides, param_strides, grad_strides = collapse(
        shard, strides, strides if grad is None else grad.stride()
    )
    if len(sizes) > MAX_DIMS:
        raise ValueError(
            f"a tensor of shape {tuple(shard.shape)} must collapse to at most {MAX_DIMS} dimensions for compiled "
            f"backends, got {len(sizes)} (strides {strides}); backend='reference' takes any"
        )

    def pad(values: Sequence[int]) -> list[int]:
        return list(values) + [0] * (MAX_DIMS - len(values))

    states = [batch.states[k][i].data_ptr() if k < len(batch.states) else 0 for k in range(MAX_STATES)]
    packed = batch.packed[i] if batch.packed else None
    block_factors = batch.block_factors[i] if batch.block_factors else None
    return [
        batch.params[i].data_ptr() if batch.params else 0,
        0 if grad is None else grad.data_ptr(),
        *states,
        0 if packed is None else packed.data_ptr(),
        0 if block_factors is None else block_factors.data_ptr(),
        shard.numel,
        shard.offset,
        len(sizes),
        *pad(sizes),
        *pad(param_strides),
        *pad(grad_strides),
        *pad(global_strides),
    ]


def _run_rows(batch: Batch, runs: Runs) -> Tensor:
    """The rows of a batch's runs, gradients left out."""
    table = torch.zeros(len(runs.tensors), Layout.columns(), dtype=torch.int64, device="cpu")
    table[:, Layout.PARAM] = _addresses(batch.params, runs.tensors, runs.starts)
    for k, tensors in enumerate(batch.states):
        table[:, Layout.STATE + k] = _addresses(tensors, runs.tensors, runs.state_starts)
    table[:, [Layout.NUMEL, Layout.SIZE]] = runs.lengths[:, None]
    table[:, Layout.OFFSET] = runs.offsets
    table[:, [Layout.NDIM, Layout.PARAM_STRIDE, Layout.GRAD_STRIDE, Layout.GLOBAL_STRIDE]] = 1
    return table


def _addresses(tensors: Sequence[Tensor | None], which: Tensor, starts: Tensor) -> Tensor:
    """Of element ``starts`` of each of ``tensors[which]``; 0 for one that is absent. All have one dtype."""
    first = torch.tensor([0 if t is None else t.data_ptr() for t in tensors], dtype=torch.int64, device="cpu")[which]
    size = next((t.element_size() for t in tensors if t is not None), 0)
    return torch.where(first == 0, 0, first + starts * size)


def _check_memory(grads: Sequence[Tensor | None], pointers: Sequence[int]) -> None:
    """Raises ValueError if the storage of one was freed: address 0 says that there is no gradient."""
    if all(pointers):
        return
    for grad, pointer in zip(grads, pointers, strict=False):  # a batch that is only packed has none
        if pointer == 0 and grad is not None and grad.numel() and grad.untyped_storage().nbytes() == 0:
            raise ValueError(f"a gradient of shape {tuple(grad.shape)} must have memory, but its storage is freed")


class LayoutTable:
    """A batch's layout table on the host, kept up to date with the gradients, which may move between two calls."""

    def __init__(self, batch: Batch):
        if batch.runs is not None:
            self.table = _run_rows(batch, batch.runs)
            self._pointers: list[int] = []  # so that the first refresh describes the gradients
            self._contiguous = True
            return
        rows = [layout_row(batch, i) for i in range(len(batch.shards))]
        self.table = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, Layout.columns())
        # Of the gradients that the rows describe. Where there is none, the row has its parameter's strides.
        described = [p if g is None else g for p, g in zip(batch.params, batch.grads, strict=False)]
        self._strides = [t.stride() for t in described]
        self._contiguous = all([t.is_contiguous() for t in described])
        self._pointers = self.table[:, Layout.GRAD].tolist()
        _check_memory(batch.grads, self._pointers)

    def refresh(self, batch: Batch) -> bool:
        """Describe the gradients of now. Returns whether anything changed. Raises ValueError if one has no memory."""
        changed = False
        pointers = [0 if g is None else g.data_ptr() for g in batch.grads]
        if batch.grads and pointers != self._pointers:
            _check_memory(batch.grads, pointers)
            self._pointers, changed = pointers, True
            if batch.runs is not None:
                self.table[:, Layout.GRAD] = _addresses(batch.grads, batch.runs.tensors, batch.runs.starts)
                return True
            column = torch.frombuffer(array("q", pointers), dtype=torch.int64)
            self.table[:, Layout.GRAD] = column
            if batch.params is batch.grads:
                self.table[:, Layout.PARAM] = column
        # two contiguous tensors of one shape have the same strides, and asking for strides costs more
        if not (self._contiguous and all([g is None or g.is_contiguous() for g in batch.grads])):
            changed |= self._refresh_strides(batch)
        return changed

    def _refresh_strides(self, batch: Batch) -> bool:
        changed = False
        for i, grad in enumerate(batch.grads):
            if grad is not None and grad.stride() != self._strides[i]:
                self._strides[i] = grad.stride()
                self.table[i] = torch.tensor(layout_row(batch, i), dtype=torch.int64, device="cpu")
                changed = True
        # an absent gradient's row still holds the strides of one that may have been another way round
        self._contiguous = all([g is not None and g.is_contiguous() for g in batch.grads])
        return changed
