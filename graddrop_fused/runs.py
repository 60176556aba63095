"""Which elements of a tensor a mask of blocks keeps, as runs of consecutive elements, and what they take along.

A table of active runs is int64 of shape (runs, 3) on the host, in ascending order: the first element in the local
tensor's row-major order, the length, and which of the parameter's step counts is the run's.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, mask_stream
from .contract import Batch, Effect, Integer, Mask, Real, Shard, elements
from .layout import collapse
from .policies import Row

HOST = torch.device("cpu")
_EVERY = Row(Mask.BLOCK)
_WHOLE = 2**62  # a block that has every tensor in it
_ZERO = torch.zeros(1, dtype=torch.int64, device=HOST)


class Carried(NamedTuple):
    """What a change of the active runs comes to."""

    active: Tensor  # (runs, 3)
    counts: Tensor  # float32, distinct
    copies: Tensor  # (copies, 3), int64: from and to where in the state, and how many elements


def no_runs() -> Tensor:
    return torch.zeros(0, 3, dtype=torch.int64, device=HOST)


def no_counts() -> Tensor:
    return torch.zeros(0, dtype=torch.float32, device=HOST)


class Asked(NamedTuple):
    """A tensor, and the mask whose runs are asked for."""

    shard: Shard
    block: int
    row: Row
    word: int
    stream_id: int


class _Drawn(NamedTuple):
    """The blocks of a tensor that a mask is drawn for: how many, from number ``first`` on."""

    asked: Asked
    block: int
    first: int
    blocks: int


def kept_runs(asked: Sequence[Asked], *, seed: int) -> list[Tensor]:
    """Of each tensor the longest runs that its row keeps, (runs, 2): first local element and length.

    The elements of a run are consecutive in the whole parameter, too. Cost and memory go with the number of blocks.
    """
    here = [i for i, a in enumerate(asked) if a.row.mask != Mask.DROP and a.shard.numel]
    found = [no_runs()[:, :2]] * len(asked)
    if not here:
        return found
    starts, places, drawn, lines = [], [], [], []
    for i in here:
        begin, place, size = _lines(asked[i].shard)
        per_block = _block(asked[i])
        lowest = int(place.min()) // per_block
        highest = (int(place.max()) + size - 1) // per_block
        drawn.append(_Drawn(asked[i], per_block, lowest, highest + 1 - lowest))
        starts.append(begin)
        places.append(place)
        lines.append((len(begin), size, per_block, lowest))
    how_many, length, block, first = torch.tensor(lines, dtype=torch.int64, device=HOST).unbind(1)
    kept, begin_of = _kept_blocks(drawn, seed)
    runs, of_line = _runs_of_lines(
        torch.cat(starts), torch.cat(places), how_many, length, block, kept, begin_of - first
    )
    for i, part in zip(here, runs.split(torch.bincount(of_line, minlength=len(here)).tolist()), strict=True):
        found[i] = part.clone()
    return found


def _runs_of_lines(
    starts: Tensor, places: Tensor, how_many: Tensor, length: Tensor, block: Tensor, kept: Tensor, begin_of: Tensor
) -> tuple[Tensor, Tensor]:
    """(runs, 2), and the tensor of each. Columns: ``starts`` and ``places`` of lines, from ``how_many`` on of tensors.

    ``begin_of``: where in ``kept`` a tensor's block 0 would stand.
    """
    tensor = torch.repeat_interleave(how_many)
    length, block = length[tensor], block[tensor]
    begins, ends = places // block, (places + length - 1) // block + 1
    counts = ends - begins
    line, number = torch.repeat_interleave(counts), elements(begins, counts)
    chosen = kept[begin_of[tensor][line] + number]
    line, number = line[chosen], number[chosen]
    tensor, length, block, places = tensor[line], length[line], block[line], places[line]
    from_ = torch.maximum(number * block, places)
    ends = torch.minimum(number * block + block, places + length)
    starts, lengths = starts[line] + from_ - places, ends - from_
    first = _begins(tensor, lengths, starts, from_)
    return torch.stack([starts[first], _sums(lengths, first)], 1), tensor[first]


def _block(asked: Asked) -> int:
    """Elements that share a decision."""
    if asked.row.mask == Mask.KEEP:
        return _WHOLE
    return asked.block if asked.row.mask == Mask.BLOCK else 1


def _lines(shard: Shard) -> tuple[Tensor, Tensor, int]:
    """Stretches in which local and global index go in step: where they begin, locally and globally, and how long."""
    sizes, strides, _ = collapse(shard, Shard.whole(shard.shape).strides)
    length = sizes[-1] if sizes and strides[-1] == 1 else 1
    if length == shard.numel:
        return _ZERO, torch.tensor([shard.offset], dtype=torch.int64, device=HOST), length
    starts = torch.arange(0, shard.numel, length, device=HOST)
    return starts, shard.at(starts), length


def _kept_blocks(drawn: Sequence[_Drawn], seed: int) -> tuple[Tensor, Tensor]:
    """Decisions, bool, and where each tensor's begin. A block is drawn as its first element is."""
    integers = []
    for asked, block, _, _ in drawn:
        row, block = (_EVERY, 1) if asked.row.mask == Mask.KEEP else (asked.row, block)
        mask = Mask.BLOCK if row.mask == Mask.BLOCK and block > 1 else Mask.ELEMENT
        integers.append([mask, Effect.FREEZE, asked.word, asked.stream_id, row.lo, row.span, block])
    sizes = [(d.blocks + 31) // 32 for d in drawn]
    words = torch.empty(sum(sizes), dtype=torch.int32, device=HOST)
    batch = Batch(
        params=[],
        shards=[Shard((d.blocks,), (d.block,), d.first * d.block) for d in drawn],
        integers=torch.tensor(integers, dtype=torch.int64, device=HOST).reshape(-1, len(Integer)),
        reals=torch.zeros(len(drawn), Real.columns(), dtype=torch.float64, device=HOST),
        packed=list(words.split(sizes)),
    )
    dispatch.choose("auto", HOST, torch.float32).pack(batch, seed=seed)
    begin_of = torch.tensor([0, *accumulate(sizes)][:-1], dtype=torch.int64, device=HOST) * 32
    return mask_stream.unpack_mask(words, (32 * len(words),)), begin_of


def carry(
    old: Sequence[Tensor], old_counts: Sequence[Tensor], new: Sequence[Tensor], sizes: Sequence[int]
) -> list[Carried]:
    """Of each tensor, from ``old``, (runs, 3), with their step counts, to the runs ``new``, (runs, 2): what is in both
    goes on. What is in ``new`` only begins with count 0.

    ``sizes``: how many elements each tensor has.
    """
    # one after another, with a gap that no run bridges
    base = torch.tensor([0, *accumulate(size + 1 for size in sizes)], dtype=torch.int64, device=HOST)
    before, after = _Joined.of(old, base), _Joined.of(new, base)
    cuts = torch.cat([before.starts, after.starts, before.ends, after.ends]).unique()
    starts, lengths = cuts[:-1], cuts.diff()
    of_new, in_new = _run_of(after, starts)
    starts, lengths, of_new = starts[in_new], lengths[in_new], of_new[in_new]
    of_old, in_old = _run_of(before, starts)
    tensor = after.tensor[of_new]

    counts = torch.zeros(len(starts), dtype=torch.float32, device=HOST)
    first_count = torch.tensor([0, *accumulate(map(len, old_counts))], dtype=torch.int64, device=HOST)
    run = of_old[in_old]
    counts[in_old] = torch.cat(list(old_counts))[before.kinds[run] + first_count[before.tensor[run]]]
    # of each tensor those that differ: floats of at least 0 are in the order of their bits
    distinct, kind = ((tensor << 32) + counts.view(torch.int32)).unique(return_inverse=True)
    per_tensor = torch.bincount(distinct >> 32, minlength=len(sizes))
    begins = _changes(of_new) | _changes(kind)
    kinds = kind[begins] - _before(per_tensor)[tensor[begins]]
    active = torch.stack([starts[begins] - base[tensor[begins]], _sums(lengths, begins), kinds], 1)
    counts = (distinct & (2**32 - 1)).to(torch.int32).view(torch.float32)

    to = (after.packed - after.starts)[of_new[in_old]] + starts[in_old]
    from_ = (before.packed - before.starts)[run] + starts[in_old]
    lengths, moved = lengths[in_old], tensor[in_old]
    first = _begins(moved, lengths, to, from_)
    copies = torch.stack([from_[first], to[first], _sums(lengths, first)], 1)

    def parts(table: Tensor, of: Tensor) -> list[Tensor]:
        return [part.clone() for part in table.split(torch.bincount(of, minlength=len(sizes)).tolist())]

    tables = parts(active, tensor[begins]), parts(counts, distinct >> 32), parts(copies, moved[first])
    return [Carried(*of_tensor) for of_tensor in zip(*tables, strict=True)]


class _Joined(NamedTuple):
    """The runs of several tensors in one row."""

    starts: Tensor
    ends: Tensor
    kinds: Tensor  # the last column of tables that have three
    tensor: Tensor
    packed: Tensor  # where each begins in its tensor's state

    @classmethod
    def of(cls, tables: Sequence[Tensor], base: Tensor) -> "_Joined":
        how_many = torch.tensor([len(runs) for runs in tables], dtype=torch.int64, device=HOST)
        runs, tensor = torch.cat(list(tables)), torch.repeat_interleave(how_many)
        starts, lengths = runs[:, 0] + base[tensor], runs[:, 1]
        packed = torch.cat([_ZERO, lengths.cumsum(0)])
        packed = packed[:-1] - packed[_before(how_many)][tensor]
        return cls(starts, starts + lengths, runs[:, -1], tensor, packed)


def _changes(column: Tensor) -> Tensor:
    """Where a column's entries differ from the one before, and the first."""
    found = torch.ones(len(column), dtype=torch.bool, device=HOST)
    found[1:] = column[1:] != column[:-1]
    return found


def _begins(tensor: Tensor, lengths: Tensor, *places: Tensor) -> Tensor:
    """Where a stretch does not go on with the one before: in another tensor, or not behind it in one of ``places``."""
    found = _changes(tensor)
    for starts in places:
        found[1:] |= starts[1:] != (starts + lengths)[:-1]
    return found


def copy_runs(to: Tensor, to_starts: Tensor, from_: Tensor, from_starts: Tensor, lengths: Tensor) -> None:
    """Copy runs between two 1-D tensors. Starts ascend, and runs do not overlap."""
    if len(lengths):
        torch._foreach_copy_(_views(to, to_starts, lengths), _views(from_, from_starts, lengths))


def _views(tensor: Tensor, starts: Tensor, lengths: Tensor) -> list[Tensor]:
    gaps = starts.clone()
    gaps[1:] -= (starts + lengths)[:-1]
    sizes = torch.stack([gaps, lengths], 1).reshape(-1).tolist()
    return list(tensor[: sum(sizes)].split_with_sizes(sizes)[1::2])


def runs_of(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of filling a step count into each element: ((runs, 3), distinct counts) of what is above 0."""
    starts = _changes(counts).nonzero().reshape(-1)
    lengths = torch.diff(starts, append=torch.tensor([len(counts)], device=HOST))
    counts = counts[starts]
    active = counts > 0
    distinct, kind = counts[active].float().unique(return_inverse=True)
    return torch.stack([starts[active], lengths[active], kind], 1), distinct


def _run_of(runs: _Joined, starts: Tensor) -> tuple[Tensor, Tensor]:
    """The run that each element stands in, and whether there is one."""
    run = torch.searchsorted(runs.starts, starts, right=True) - 1
    inside = run >= 0
    inside &= starts < runs.ends[run.clamp(min=0)] if len(runs.starts) else False
    return run, inside


def _before(lengths: Tensor) -> Tensor:
    """The sum of all lengths before each."""
    return lengths.cumsum(0) - lengths


def _sums(lengths: Tensor, begins: Tensor) -> Tensor:
    """Sums of ``lengths`` from each true ``begins`` up to the next."""
    before = _before(lengths)[begins]
    return torch.diff(before, append=lengths.sum()[None])
