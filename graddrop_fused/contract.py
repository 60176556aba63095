"""The one contract between Python and the kernels. kernels/README.md says what each backend must do with it.

A step is one call per (backend, device, dtypes, rule), and a call is a :class:`Batch`: the tensors, where each lies in
its whole parameter, and two small tables of numbers, one row per tensor. Policies end where the tables begin;
kernels know nothing else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

CONTRACT_VERSION = 4  # a changed column, enum or meaning is a new version; compiled backends are checked against it
MAX_DIMS = 6  # after collapsing; a dense tensor needs one dimension, a permuted one as many as it has
MAX_STATES = 3  # tensors of state that an update rule may keep per parameter
MAX_FACTORS = 6  # numbers that an update rule may take per tensor


class Mask(IntEnum):
    """How a tensor's mask comes about (Integer.MASK)."""

    KEEP = 0  # every element is kept
    DROP = 1  # every element is dropped
    ELEMENT = 2  # drawn for each element
    BLOCK = 3  # drawn for each block of Integer.BLOCK consecutive elements
    LAYER = 4  # drawn once for the tensor; Integer.STREAM_ID is the layer's
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
    STREAM_ID = 3  # 52 bits: counter word 3 and the upper 20 bits of counter word 1
    LO = 4  # kept iff (random - lo) mod 2**16 <= span
    SPAN = 5
    BLOCK = 6  # elements, at least 1


class Real(IntEnum):
    """Columns of Batch.reals: float64, shape (tensors, 8). rules.py fills them; kernels round them once."""

    GRAD_FACTOR = 0  # multiplies a gradient that is taken: -1 to maximize, times the rescale unless Effect.UPDATE
    NOISE_STD = 1
    FACTOR = 2  # the first of the update rule's own, MAX_FACTORS of them

    @classmethod
    def columns(cls) -> int:
        return cls.FACTOR + MAX_FACTORS


class Rounding(IntEnum):
    """Columns of Batch.rounding: int64, shape (tensors, 2). Whose random numbers round a tensor's bfloat16 values."""

    DRAW = 0  # Philox counter word 2: the step
    STREAM_ID = 1  # the parameter's, also where Integer.STREAM_ID is a layer's


class Layout(IntEnum):
    """Columns of the layout table that compiled backends read: int64, shape (tensors, 34). Pointers are 0 if absent."""

    PARAM = 0
    GRAD = 1
    STATE = 2  # the first of MAX_STATES
    PACKED = STATE + MAX_STATES
    BLOCK_FACTORS = 6
    NUMEL = 7
    OFFSET = 8  # global index of the local element 0
    NDIM = 9  # collapsed dimensions; NDIM <= 1 with unit strides is the linear case
    SIZE = 10
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

    def elements(self, start: int, stop: int, device: torch.device | str | None = None) -> Tensor:
        """Global indices (int64, 1-D) of the local elements start..stop-1 in local row-major order."""
        return self.at(torch.arange(start, stop, device=device))

    def at(self, local: Tensor) -> Tensor:
        """Global indices of local ones (int64)."""
        index = torch.full_like(local, self.offset)
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            index += (local % max(size, 1)) * stride
            local = local // max(size, 1)
        return index


@dataclass(frozen=True, eq=False)
class Scattered(Shard):
    """Elements taken out of a parameter one by one, by their global indices."""

    indices: Tensor = field(kw_only=True)

    def at(self, local: Tensor) -> Tensor:
        return self.indices[local]


def elements(starts: Tensor, lengths: Tensor) -> Tensor:
    """All elements of some runs, int64."""
    run = torch.repeat_interleave(lengths)
    return (starts - (lengths.cumsum(0) - lengths))[run] + torch.arange(len(run), device=lengths.device)


@dataclass(frozen=True)
class Runs:
    """What a call visits in place of whole tensors: each row of its tables is a run of consecutive elements.

    They are consecutive in their tensor's row-major order (compiled backends take it for the order of memory) and in
    the whole parameter. State holds the elements of runs only, packed close. All columns are int64 of shape (runs,) on
    the host, in ascending order of tensors and of starts.
    """

    tensors: Tensor  # which of the batch's tensors
    starts: Tensor  # first element, in the local tensor
    lengths: Tensor
    offsets: Tensor  # global index of the first element
    state_starts: Tensor  # where it lies in the tensor's state

    def of_tensor(self, i: int) -> slice:
        """The rows of tensor i."""
        first, last = torch.searchsorted(self.tensors, torch.tensor([i, i + 1], device="cpu")).tolist()
        return slice(first, last)


@dataclass
class Batch:
    """All tensors of one backend call. Lists run parallel; tensors are local (never DTensors) and on one device. No two
    elements of a parameter share memory.

    ``grads[i]`` None is a gradient of zeros. State has its parameter's strides, or with ``runs`` is as they say. Under
    the rule "mask", which writes the masked gradient itself, ``params`` is the list ``grads``.

    ``block_factors[i]`` (blocks, MAX_FACTORS), in the arithmetic's dtype, stands in for the rule's factors in ``reals``
    where tensor i has Mask.BLOCK and Effect.FREEZE. Its row b is that of the whole parameter's block
    ``shards[i].offset // Integer.BLOCK + b``, and up to date where that is kept.

    A backend keeps what it derives from the tensors in ``cache``; whoever replaces any tensor but a gradient makes a
    new Batch.
    """

    params: list[Tensor]
    shards: list[Shard]
    integers: Tensor  # (tensors, 7), int64, on the host unless capturable
    reals: Tensor  # (tensors, 8), float64, likewise
    grads: list[Tensor | None] = field(default_factory=list)
    states: list[list[Tensor]] = field(default_factory=list)  # states[k][i]: the rule's k-th state of tensor i
    packed: list[Tensor | None] = field(default_factory=list)  # int32 words; None: not needed
    block_factors: list[Tensor | None] = field(default_factory=list)  # None, or an empty list: those in `reals`
    runs: Runs | None = None  # None: a row of the tables is a whole tensor
    pairs: frozenset[tuple[Mask, Effect]] | None = None  # that may occur; None: those in `integers` (on the host)
    rounding: Tensor | None = None  # (tensors, 2), int64, where `integers` is: bfloat16 stochastically
    done: int = 0  # tensors that a launch has updated, the first ones; all of them, unless it was broken off
    cache: dict = field(default_factory=dict)
