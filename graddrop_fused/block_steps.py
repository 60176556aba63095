"""Blocks that effect "freeze" leaves alone do not count the step: the counts of blocks, and the factors that follow.

To the optimizer a block is then a parameter of its own. A parameter's counts are state beside its step, one for each
block of the whole parameter and the same on every rank, since masks are: no sharding, and no change of one, has to know
of them.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from .contract import MAX_FACTORS, Batch, Effect, Integer, Mask, Real, Shard
from .cuda_graph import to_device
from .mask_stream import HALF
from .rules import Rule

NAME = "block_steps"  # of a parameter's counts in optimizer.state
DTYPE = torch.int32
_WORD = 32  # blocks whose decisions are one word
_DRAWN = frozenset({(Mask.BLOCK, Effect.FREEZE)})  # what the draws' kernel is compiled for, besides DROP


def initial(step: Any, blocks: int, device: torch.device) -> Tensor:
    """The counts of blocks that have all taken ``step`` steps."""
    count = min(int(step), torch.iinfo(DTYPE).max // 2)  # with room to go on counting
    return torch.full((blocks,), count, dtype=DTYPE, device=device)


class BlockSteps:
    """Those tensors of a batch whose blocks have counts of their own.

    Every entry's counts are a view of one buffer, in which each tensor begins at a whole word of decisions.
    """

    def __init__(
        self,
        batch: Batch,
        rule: Rule,
        backend: ModuleType,
        tensors: Sequence[int],
        blocks: Sequence[int],
        block_sizes: Sequence[int],
        groups: Sequence[int],
        entries: Sequence[dict[str, Any]],
    ):
        """Args run parallel from ``tensors`` on, which are places in ``batch``. ``blocks``: how many each has."""
        device = batch.params[tensors[0]].device
        self.batch, self.rule, self.backend, self.tensors = batch, rule, backend, list(tensors)
        words = [-(-count // _WORD) for count in blocks]
        self.words = torch.zeros(sum(words), dtype=torch.int32, device=device)
        self.lanes = torch.arange(_WORD, dtype=torch.int32, device=device)
        self.counts = torch.zeros(sum(words) * _WORD, dtype=DTYPE, device=device)
        self.coming = self.counts
        per_tensor = self.counts.split([w * _WORD for w in words])
        self.views = [counts[:count] for counts, count in zip(per_tensor, blocks, strict=True)]
        for entry, view in zip(entries, self.views, strict=True):
            view.copy_(entry[NAME])
            entry[NAME] = view
        self.room = [count * _WORD for count in words]
        where = batch.integers.device
        self.draws = Batch(
            params=[],
            shards=[Shard.whole((count,)) for count in blocks],
            integers=torch.zeros(len(blocks), len(Integer), dtype=torch.int64, device=where),
            reals=torch.zeros(len(blocks), Real.columns(), dtype=torch.float64, device=where),
            packed=list(self.words.split(words)),
            pairs=_DRAWN,
        )
        self.index = to_device(torch.tensor(self.tensors, device="cpu"), where)
        self._make_table(blocks, block_sizes, groups, device)

    def _make_table(
        self, blocks: Sequence[int], block_sizes: Sequence[int], groups: Sequence[int], device: torch.device
    ) -> None:
        """The factors of the blocks that this rank has a part of, in the order of ``counts``."""
        room = self.room
        here = [_here(self.batch.shards[i], size) for i, size in zip(self.tensors, block_sizes, strict=True)]
        lengths = room
        # where the count of each of the table's rows stands; None: at the row's own place
        self.places = None
        if [len(h) for h in here] != list(blocks):
            lengths = [len(h) for h in here]
            starts = [sum(room[:k]) for k in range(len(room))]
            places = [torch.arange(s + h.start, s + h.stop, device="cpu") for s, h in zip(starts, here, strict=True)]
            self.places = to_device(torch.cat(places), device)
        # which group's numbers each row follows
        group_of = torch.tensor(groups, device="cpu").repeat_interleave(torch.tensor(lengths, device="cpu"))
        self.group_of = to_device(group_of, device)
        dtype = torch.float64 if self.batch.params[self.tensors[0]].dtype == torch.float64 else torch.float32
        self.table = torch.zeros(sum(lengths), MAX_FACTORS, dtype=dtype, device=device)
        self.batch.block_factors = [None] * len(self.batch.params)
        for i, part in zip(self.tensors, self.table.split(lengths), strict=True):
            self.batch.block_factors[i] = part

    def stand(self, entries: Sequence[Mapping[str, Any]]) -> bool:
        """Do ``entries``, of these tensors, still hold the counts that a step goes by?"""
        return all(entry.get(NAME) is view for entry, view in zip(entries, self.views, strict=True))

    def prepare(self, numbers: Tensor, seed: int, found_inf: Tensor | None = None) -> None:
        """Draw which blocks the coming step keeps, and bring their factors up to date; it counts with :meth:`commit`.

        Args:
            numbers: (groups, 1 + the rule's), float64: each group's lr and numbers, where the counts are.
        """
        integers = torch.index_select(self.batch.integers, 0, self.index)
        mask = integers[:, Integer.MASK]
        drawn, dropped = mask == Mask.BLOCK, mask == Mask.DROP
        self.draws.integers.copy_(integers)
        # in a step whose mask is of another kind all blocks count
        self.draws.integers[:, Integer.MASK] = torch.where(dropped, int(Mask.DROP), int(Mask.BLOCK))
        self.draws.integers[:, Integer.LO] *= drawn
        self.draws.integers[:, Integer.SPAN].masked_fill_(~drawn, HALF)
        self.draws.integers[:, Integer.BLOCK] = 1  # of these tensors an element is a block
        self.backend.pack(self.draws, seed=seed)
        kept = ((self.words.unsqueeze(1) >> self.lanes) & 1).reshape(-1)
        if found_inf is not None:
            kept = kept * (found_inf == 0).to(kept).reshape(())
        self.coming = self.counts + kept
        self._fill_table(numbers, kept)

    def _fill_table(self, numbers: Tensor, kept: Tensor) -> None:
        t, group_of, rows = self.coming, self.group_of, None
        if self.places is not None:
            t, kept = t.index_select(0, self.places), kept.index_select(0, self.places)
        if self.table.device.type == "cpu":  # elsewhere only the device knows how many are kept
            rows = kept.nonzero().squeeze(1)
            t, group_of = t.index_select(0, rows), group_of.index_select(0, rows)
        t = t.double().clamp_min(1.0)
        lr, *rest = numbers.t().index_select(1, group_of).unbind()
        factors = torch.stack([cast(Tensor, factor).expand_as(t) for factor in self.rule.factors(lr, rest, 1.0, t)], 1)
        factors = factors.to(self.table.dtype)
        here = self.table[:, : factors.shape[1]]
        here.copy_(factors) if rows is None else here.index_copy_(0, rows, factors)

    def commit(self, done: int) -> None:
        """Count the step for those of the batch's first ``done`` tensors that stand here."""
        room = sum(count for i, count in zip(self.tensors, self.room, strict=True) if i < done)
        self.counts[:room] = self.coming[:room]


def _here(shard: Shard, block: int) -> range:
    """The blocks of the whole parameter that a shard has a part of, and those between them."""
    if shard.numel == 0:
        return range(0)
    last = shard.offset + sum((size - 1) * stride for size, stride in zip(shard.shape, shard.strides, strict=True))
    return range(shard.offset // block, last // block + 1)
