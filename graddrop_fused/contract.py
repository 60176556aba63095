"""The one contract between Python and the kernels. kernels/README.md says what each backend must do with it.

A step is one call per (backend, device, dtypes), and a call is a :class:`Batch`: the tensors, where each lies in
its whole parameter, and two small tables of numbers, one row per tensor. Policies end where the tables begin;
kernels know nothing else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

CONTRACT_VERSION = 1  # a changed column, enum or meaning is a new version; compiled backends are checked against it
MAX_DIMS = 6  # after collapsing; a dense tensor needs one dimension, a permuted one as many as it has


class Mask(IntEnum):
    """How a tensor's mask comes about (Integer.MASK)."""

    KEEP = 0  # every element is kept
    DROP = 1  # every element is dropped
    ELEMENT = 2  # drawn for each element
    BLOCK = 3  # drawn for each block of Integer.BLOCK consecutive elements
    LAYER = 4  # drawn once for the tensor; Integer.STREAM is the layer's id
    PACKED = 5  # read from packed words, in the local tensor's row-major order
    GAUSSIAN = 6  # no mask: the gradient is multiplied by 1 + Real.NOISE_STD * N(0, 1)


class Effect(IntEnum):
    """What a dropped element means (Integer.EFFECT)."""

    GRADIENT = 0  # its gradient is zero; momentum and decay still move it
    FREEZE = 1  # parameter and state stay untouched, bit for bit (but for a NaN's payload in 2-byte dtypes)
    UPDATE = 2  # state takes the unmasked gradient; the step, decay included, is dropped (kept ones are rescaled)


class Integer(IntEnum):
    """Columns of Batch.integers: int64, shape (tensors, 7)."""

    MASK = 0
    EFFECT = 1
    DRAW = 2  # Philox counter word 2
    STREAM = 3  # Philox counter word 3
    LO = 4  # kept iff (word - lo) mod 2**32 <= span
    SPAN = 5
    BLOCK = 6


class Real(IntEnum):
    """Columns of Batch.reals: float64, shape (tensors, 9)."""

    SIGN = 0  # -1 to maximize, else 1
    RESCALE = 1
    NOISE_STD = 2
    DECAY = 3  # 1 - lr * weight_decay
    STEP_SIZE = 4  # lr / bias_correction1
    BETA1 = 5
    BETA2 = 6
    EPS = 7
    BIAS_CORRECTION2_SQRT = 8


class Layout(IntEnum):
    """Columns of the layout table that compiled backends read: int64, shape (tensors, 33). Pointers are 0 if absent."""

    PARAM = 0
    GRAD = 1
    EXP_AVG = 2
    EXP_AVG_SQ = 3
    MAX_EXP_AVG_SQ = 4
    PACKED = 5
    NUMEL = 6
    OFFSET = 7  # global index of the local element 0
    NDIM = 8  # collapsed dimensions; NDIM <= 1 with unit strides is the linear case
    SIZE = 9
    PARAM_STRIDE = SIZE + MAX_DIMS  # of the parameter and all its state, in elements
    GRAD_STRIDE = PARAM_STRIDE + MAX_DIMS
    GLOBAL_STRIDE = GRAD_STRIDE + MAX_DIMS  # steps of the global element index

    @classmethod
    def columns(cls) -> int:
        return cls.GLOBAL_STRIDE + MAX_DIMS


@dataclass(frozen=True)
class Shard:
    """Where a local tensor lies in its whole parameter: element (i, j, ...) has the global row-major index
    ``offset + i * strides[0] + j * strides[1] + ...``. ``shape`` is the local one."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Shard":
        return cls.box(shape, shape, (0,) * len(shape))

    @classmethod
    def box(cls, local: Sequence[int], whole: Sequence[int], start: Sequence[int]) -> "Shard":
        """The box of shape ``local`` that begins at index ``start`` of a parameter of shape ``whole``."""
        strides = tuple(math.prod(whole[d + 1 :]) for d in range(len(whole)))
        return cls(tuple(local), strides, sum(i * s for i, s in zip(start, strides, strict=True)))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def elements(self, start: int, stop: int, device=None) -> Tensor:
        """Global indices (int64, 1-D) of the local elements start..stop-1 in local row-major order."""
        local = torch.arange(start, stop, device=device)
        index = torch.full_like(local, self.offset)
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            index += (local % max(size, 1)) * stride
            local //= max(size, 1)
        return index


@dataclass
class Batch:
    """All tensors of one backend call. Lists run parallel; tensors are local (never DTensors) and on one device. No two
    elements of a parameter share memory.

    ``grads[i]`` None is a gradient of zeros. State has its parameter's strides. A backend keeps what it derives
    from the tensors in ``cache``; whoever replaces any tensor but a gradient makes a new Batch.
    """

    params: list[Tensor]
    shards: list[Shard]
    integers: Tensor  # (tensors, 7), int64, on the host unless capturable
    reals: Tensor  # (tensors, 9), float64, likewise
    grads: list[Tensor | None] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    max_exp_avg_sqs: list[Tensor | None] = field(default_factory=list)  # None: not amsgrad
    packed: list[Tensor | None] = field(default_factory=list)  # int32 words; None: not needed
    pairs: frozenset[tuple[Mask, Effect]] | None = None  # that may occur; None: those in `integers` (on the host)
    cache: dict = field(default_factory=dict)


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
    """Tensor i's row of the layout table. Its gradient's pointer and strides are those of now."""
    tensors = batch.params, batch.grads, batch.exp_avgs, batch.exp_avg_sqs, batch.max_exp_avg_sqs, batch.packed
    pointers = [t[i].data_ptr() if t and t[i] is not None else 0 for t in tensors]
    shard, param = batch.shards[i], batch.params[i]
    grad = batch.grads[i] if batch.grads else None
    sizes, global_strides, param_strides, grad_strides = collapse(
        shard, param.stride(), param.stride() if grad is None else grad.stride()
    )

    if len(sizes) > MAX_DIMS:
        raise ValueError(
            f"a tensor of shape {tuple(shard.shape)} must collapse to at most {MAX_DIMS} dimensions for compiled "
            f"backends, got {len(sizes)} (strides {param.stride()}); backend='reference' takes any"
        )

    def pad(values):
        return list(values) + [0] * (MAX_DIMS - len(values))

    return [
        *pointers,
        shard.numel,
        shard.offset,
        len(sizes),
        *pad(sizes),
        *pad(param_strides),
        *pad(grad_strides),
        *pad(global_strides),
    ]
