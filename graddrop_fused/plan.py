"""From param groups to backend calls: buckets of tensors that one call serves, and the numbers each call reads.

What is static between steps (tensors, shards, streams, layers) is gathered once; what changes with every step is a
few numbers per group, spread over a bucket's tensors by one index_select.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import mask_stream
from .clock import Clock, row_at
from .contract import Batch, Effect, Integer, Mask, Real, Shard
from .names import canonical_name, check_distinct, stream_id
from .policies import KEEP, Policy, Row, StaticMask
from .shards import local, shard_of, whole_shape

Group = dict[str, Any]


@dataclass(frozen=True)
class Member:
    """One parameter as the groups know it."""

    param: Tensor
    group: int
    index: int  # in its group
    name: str | None  # canonical
    stream: int  # counter word 3 of its element masks

    @property
    def called(self) -> str:
        """What errors call it: its name, or (group, index)."""
        return repr(self.name or (self.group, self.index))

    def shard(self) -> Shard:
        """Where its local part lies. Raises ValueError if that cannot be known."""
        try:
            return shard_of(self.param)
        except ValueError as error:
            raise ValueError(f"parameter {self.called} {error}") from None


def members(groups: Sequence[Group]) -> list[Member]:
    """All parameters in order over all groups. Raises ValueError on names with colliding stream ids."""
    found: list[Member] = []
    for g, group in enumerate(groups):
        names = group.get("param_names", [None] * len(group["params"]))
        for index, (param, name) in enumerate(zip(group["params"], names, strict=True)):
            stream = len(found) if name is None else stream_id(name)
            found.append(Member(param, g, index, name and canonical_name(name), stream))
    check_distinct("parameters", ((m.name or f"number {i}", m.stream) for i, m in enumerate(found)))
    return found


@dataclass(frozen=True)
class Layers:
    """The layers of all groups, in order of first appearance. A group without ``group["layer"]`` is one by itself."""

    of_group: tuple[int, ...]  # each group's layer number
    streams: tuple[int, ...]  # each layer's id: CRC-32 of its name, or its group's position

    @property
    def count(self) -> int:
        return len(self.streams)

    @classmethod
    def of(cls, groups: Sequence[Group]) -> "Layers":
        keys = [position if g.get("layer") is None else g["layer"] for position, g in enumerate(groups)]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        streams = [key if isinstance(key, int) else stream_id(key) for key in numbers]
        check_distinct("layers", zip(map(str, numbers), streams, strict=True))
        return cls(tuple(numbers[key] for key in keys), tuple(streams))


@dataclass
class Bucket:
    """The tensors of one backend call: one device, one backend, one combination of dtypes."""

    backend: ModuleType
    batch: Batch
    members: list[Member]
    positions: list[int]  # each member's, in the flat list of all parameters
    group_of: Tensor  # (tensors,), int64
    streams: Tensor  # (tensors,), int64: of the layer under a layerwise policy, else of the parameter
    own_rescale: Tensor | None  # (tensors,), float64: a StaticMask's
    dtypes: tuple  # those that make_buckets was asked to keep apart
    packed_with: dict[int, tuple] = field(default_factory=dict)  # group -> what its packed words were drawn with

    def __post_init__(self):
        self.by_group: dict[int, list[int]] = {}  # the tensors of each group
        for i, member in enumerate(self.members):
            self.by_group.setdefault(member.group, []).append(i)
        self.stream_column = self.batch.integers[:, Integer.STREAM]

    def fill(self, integers: Tensor, reals: Tensor) -> None:
        """Spread rows per group, (groups, 7) and (groups, 9), over the tensors."""
        torch.index_select(integers, 0, self.group_of, out=self.batch.integers)
        torch.index_select(reals, 0, self.group_of, out=self.batch.reals)
        self.stream_column.copy_(self.streams)
        if self.own_rescale is not None:
            self.batch.reals[:, Real.RESCALE] *= self.own_rescale

    def use_packed(self, drawn_with: dict[int, tuple], seed: int) -> None:
        """Read the masks of these groups from packed words; draw the words first where they are out of date.

        ``drawn_with`` maps a group to all that its masks depend on besides the seed and the stream.
        """
        here = [g for g in drawn_with if g in self.by_group]
        if not here:
            return
        stale = [g for g in here if self.packed_with.get(g) != (seed, drawn_with[g])]
        index = [i for g in stale for i in self.by_group[g]]
        if index:
            for i in index:
                if self.batch.packed[i] is None:
                    words = (self.batch.shards[i].numel + 31) // 32
                    self.batch.packed[i] = torch.empty(words, dtype=torch.int32, device=self.batch.params[i].device)
            self.batch.cache.clear()  # tensors were added
            part = Batch(
                params=[self.batch.params[i] for i in index],
                shards=[self.batch.shards[i] for i in index],
                integers=self.batch.integers[index],
                reals=self.batch.reals[index],
                packed=[self.batch.packed[i] for i in index],
            )
            self.backend.pack(part, seed=seed)
            self.packed_with.update({g: (seed, drawn_with[g]) for g in stale})
        readers = [i for g in here for i in self.by_group[g]]
        self.batch.integers[readers, Integer.MASK] = int(Mask.PACKED)

    def skip(self, absent: list[int]) -> None:
        """Leave these tensors of the batch as they are in the coming call."""
        for run in runs(absent):
            self.batch.integers[run, Integer.MASK] = int(Mask.DROP)
            self.batch.integers[run, Integer.EFFECT] = int(Effect.FREEZE)


def runs(indices: Sequence[int]) -> list[slice]:
    """Ascending ``indices`` as slices. (A device's table indexed by a list would copy the list there.)"""
    found: list[slice] = []
    for i in indices:
        if found and found[-1].stop == i:
            found[-1] = slice(found[-1].start, i + 1)
        else:
            found.append(slice(i, i + 1))
    return found


def make_buckets(
    groups: Sequence[Group],
    all_members: Sequence[Member],
    positions: Sequence[int],
    dtypes_of: Callable[[int], tuple],
    choose: Callable[[Tensor], ModuleType],
    on_device: bool = False,
) -> list[Bucket]:
    """Sort the parameters at ``positions`` into buckets.

    Args:
        dtypes_of: position -> the dtypes besides the parameter's own that must agree within a call.
        choose: parameter -> backend.
        on_device: put the tables where the parameters are (capturable), not on the host.
    """
    layers = Layers.of(groups)
    sorted_positions: dict[tuple, list[int]] = {}
    for i in positions:
        param = all_members[i].param
        key = choose(param), param.device, param.dtype, *dtypes_of(i)
        sorted_positions.setdefault(key, []).append(i)

    buckets = []
    for (backend, device, _, *dtypes), here in sorted_positions.items():
        tables = device if on_device else torch.device("cpu")
        chosen = [all_members[i] for i in here]
        static = [static_mask(groups[m.group], m) for m in chosen]
        streams = [
            layers.streams[layers.of_group[m.group]] if is_layerwise(groups[m.group]) else m.stream for m in chosen
        ]
        own_rescale = [own_rescale_of(groups[m.group], mask) for m, mask in zip(chosen, static, strict=True)]
        shards = [m.shard() for m in chosen]
        buckets.append(
            Bucket(
                backend=backend,
                batch=Batch(
                    params=[local(m.param) for m in chosen],
                    shards=shards,
                    integers=torch.zeros(len(here), len(Integer), dtype=torch.int64, device=tables),
                    reals=torch.zeros(len(here), len(Real), dtype=torch.float64, device=tables),
                    packed=[
                        None if mask is None else _pack_local(mask, shard, device)
                        for mask, shard in zip(static, shards, strict=True)
                    ],
                ),
                members=chosen,
                positions=here,
                group_of=torch.tensor([m.group for m in chosen], device=tables),
                streams=torch.tensor(streams, device=tables),
                own_rescale=torch.tensor(own_rescale, dtype=torch.float64, device=tables)
                if any(r != 1.0 for r in own_rescale)
                else None,
                dtypes=tuple(dtypes),
            )
        )
    return buckets


def rows_at(groups: Sequence[Group], layers: Layers, clock: Clock, draw: int) -> list[tuple[Row, int]]:
    """Each group's policy row and counter word 2 for step ``draw``. Raises RuntimeError if an epoch is not known."""
    for group in groups:
        clock.check_epoch_known(policy_of(group))
    epoch = clock.epoch_at(draw)
    return [
        (KEEP, 0) if policy_of(group) is None else row_at(policy_of(group), layer, layers.count, draw, epoch)
        for group, layer in zip(groups, layers.of_group, strict=True)
    ]


def integer_row(group: Group, row: Row, word: int) -> list[int]:
    """A group's row of Batch.integers; the stream is filled in per tensor."""
    block = 1 if policy_of(group) is None else policy_of(group).block
    return [row.mask, Effect[group.get("effect", "gradient").upper()], word, 0, row.lo, row.span, block]


def real_row(group: Group, row: Row, lr: float) -> list[float]:
    """A group's row of Batch.reals. STEP_SIZE is still lr; bias corrections are each tensor's own."""
    beta1, beta2 = group["betas"]
    sign = -1.0 if group["maximize"] else 1.0
    return [sign, row.rescale, row.noise_std, 1 - lr * group["weight_decay"], lr, beta1, beta2, group["eps"], 1.0]


def host_tables(groups: Sequence[Group], rows: Sequence[tuple[Row, int]]) -> tuple[Tensor, Tensor]:
    """The groups' rows as (groups, 7) int64 and (groups, 9) float64 tensors, for :meth:`Bucket.fill`."""
    integers = [integer_row(group, *row) for group, row in zip(groups, rows, strict=True)]
    reals = [real_row(group, row, float(group["lr"])) for group, (row, _) in zip(groups, rows, strict=True)]
    return torch.tensor(integers, dtype=torch.int64), torch.tensor(reals, dtype=torch.float64)


def packed_groups(groups: Sequence[Group], rows: Sequence[tuple[Row, int]]) -> dict[int, tuple]:
    """The groups whose masks are kept as packed words at present, for :meth:`Bucket.use_packed`."""
    return {
        g: (word, row.lo, row.span)
        for g, (group, (row, word)) in enumerate(zip(groups, rows, strict=True))
        if row.mask == Mask.ELEMENT and policy_of(group).packed
    }


def policy_of(group: Group) -> Policy | None:
    return group.get("drop")


def is_layerwise(group: Group) -> bool:
    return policy_of(group) is not None and policy_of(group).layerwise


def static_mask(group: Group, member: Member) -> Tensor | None:
    """The user's mask of a whole parameter under StaticMask. A parameter that is left out keeps everything."""
    policy = policy_of(group)
    if not isinstance(policy, StaticMask):
        return None
    mask = policy.mask_of(member.name, member.index, len(group["params"]))
    shape = whole_shape(member.param)
    if mask is None:
        return torch.ones(shape, dtype=torch.bool)
    if mask.shape != shape:
        raise ValueError(
            f"StaticMask's mask of parameter {member.name or member.index!r} must have its whole shape {shape}, "
            f"got {tuple(mask.shape)}"
        )
    return mask


def own_rescale_of(group: Group, mask: Tensor | None) -> float:
    """1/q of a StaticMask with rescale=True: q is the share that its parameter keeps."""
    if mask is None or not policy_of(group).rescale or not mask.any():
        return 1.0
    return mask.numel() / int(mask.sum())


def _pack_local(mask: Tensor, shard: Shard, device: torch.device) -> Tensor:
    whole = mask.detach().to(device).reshape(-1)
    return mask_stream.pack_mask(whole[shard.elements(0, shard.numel, device)])
