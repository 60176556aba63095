"""Which elements of a tensor a mask of blocks keeps, as runs of consecutive elements, and what they take along.

A table of active runs is int64 of shape (runs, 3) on the host, in ascending order: the first element in the local
tensor's row-major order, the length, and which of the parameter's step counts is the run's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, mask_stream
from .contract import Batch, Effect, Integer, Mask, Real, Shard, elements
from .layout import collapse
from .policies import Row

HOST = torch.device("cpu")


class Carried(NamedTuple):
    """What a change of the active runs comes to."""

    active: Tensor  # (runs, 3)
    counts: Tensor  # float32, distinct
    copies: Tensor  # (copies, 3), int64: from and to where in the state, and how many elements


def no_runs() -> Tensor:
    return torch.zeros(0, 3, dtype=torch.int64, device=HOST)


def kept_runs(shard: Shard, block: int, row: Row, word: int, *, seed: int, stream_id: int) -> Tensor:
    """The longest runs that ``row`` keeps, (runs, 2): first local element and length.

    The elements of a run are consecutive in the whole parameter, too. Cost and memory go with the number of blocks.
    """
    if row.mask == Mask.DROP or not shard.numel:
        return no_runs()[:, :2]
    starts, length = _lines(shard)
    places = shard.at(starts)
    if row.mask != Mask.KEEP:
        block = block if row.mask == Mask.BLOCK else 1
        begins, ends = places // block, (places + length - 1) // block + 1
        first, stop = int(begins.min()), int(ends.max())
        kept = _kept_blocks(first, stop - first, block, row, word, seed, stream_id)
        counts = ends - begins
        line, number = torch.repeat_interleave(counts), elements(begins, counts)
        chosen = kept[number - first]
        line, number = line[chosen], number[chosen]
        from_ = torch.maximum(number * block, places[line])
        lengths = torch.minimum((number + 1) * block, places[line] + length) - from_
        starts, places = starts[line] + from_ - places[line], from_
    else:
        lengths = torch.full_like(starts, length)
    begins_run = torch.ones(len(starts), dtype=torch.bool, device=HOST)
    begins_run[1:] = (starts[1:] != (starts + lengths)[:-1]) | (places[1:] != (places + lengths)[:-1])
    return torch.stack([starts[begins_run], _sums(lengths, begins_run)], 1)


def _lines(shard: Shard) -> tuple[Tensor, int]:
    """Where in the local tensor stretches begin in which local and global index go in step, and their length."""
    sizes, strides, _ = collapse(shard, Shard.whole(shard.shape).strides)
    length = sizes[-1] if sizes and strides[-1] == 1 else 1
    return torch.arange(0, shard.numel, length, device=HOST), length


def _kept_blocks(first: int, count: int, block: int, row: Row, word: int, seed: int, stream_id: int) -> Tensor:
    """Decisions of ``count`` blocks from number ``first``: bool. A block is drawn as its first element is."""
    mask = Mask.BLOCK if row.mask == Mask.BLOCK and block > 1 else Mask.ELEMENT
    numbers = [mask, Effect.FREEZE, word, stream_id, row.lo, row.span, block]
    words = torch.empty((count + 31) // 32, dtype=torch.int32, device=HOST)
    batch = Batch(
        params=[],
        shards=[Shard((count,), (block,), first * block)],
        integers=torch.tensor([numbers], dtype=torch.int64, device=HOST).reshape(1, len(Integer)),
        reals=torch.zeros(1, Real.columns(), dtype=torch.float64, device=HOST),
        packed=[words],
    )
    dispatch.choose("auto", HOST, torch.float32).pack(batch, seed=seed)
    return mask_stream.unpack_mask(words, (count,))


def carry(old: Tensor, old_counts: Tensor, new: Tensor) -> Carried:
    """From ``old``, (runs, 3), with their step counts, to the runs ``new``, (runs, 2): what is in both goes on.

    What is in ``new`` only begins with count 0.
    """
    ends = torch.cat([runs[:, 0] + runs[:, 1] for runs in (old, new)])
    cuts = torch.cat([old[:, 0], new[:, 0], ends]).unique()
    starts, lengths = cuts[:-1], cuts.diff()
    of_new, in_new = _run_of(new, starts)
    starts, lengths, of_new = starts[in_new], lengths[in_new], of_new[in_new]
    of_old, in_old = _run_of(old, starts)
    counts = torch.zeros(len(starts), dtype=torch.float32, device=HOST)
    counts[in_old] = old_counts[old[of_old[in_old], 2]]
    distinct, kind = counts.unique(return_inverse=True)

    begins = torch.ones(len(starts), dtype=torch.bool, device=HOST)
    begins[1:] = (of_new[1:] != of_new[:-1]) | (kind[1:] != kind[:-1])
    active = torch.stack([starts[begins], _sums(lengths, begins), kind[begins]], 1)

    to = _before(lengths)
    begin, run = _before(old[:, 1]), of_old[in_old]
    from_ = begin[run] + starts[in_old] - old[run, 0]
    to, lengths = to[in_old], lengths[in_old]
    begins = torch.ones(len(to), dtype=torch.bool, device=HOST)
    begins[1:] = (to[1:] != (to + lengths)[:-1]) | (from_[1:] != (from_ + lengths)[:-1])
    copies = torch.stack([from_[begins], to[begins], _sums(lengths, begins)], 1)
    return Carried(active, distinct, copies)


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
    changes = torch.ones(len(counts), dtype=torch.bool, device=HOST)
    changes[1:] = counts[1:] != counts[:-1]
    starts = changes.nonzero().reshape(-1)
    lengths = torch.diff(starts, append=torch.tensor([len(counts)], device=HOST))
    counts = counts[starts]
    active = counts > 0
    distinct, kind = counts[active].float().unique(return_inverse=True)
    return torch.stack([starts[active], lengths[active], kind], 1), distinct


def _run_of(runs: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """The run that each element stands in, and whether there is one."""
    run = torch.searchsorted(runs[:, 0].contiguous(), starts, right=True) - 1
    inside = run >= 0
    inside &= starts < (runs[:, 0] + runs[:, 1])[run.clamp(min=0)] if len(runs) else False
    return run, inside


def _before(lengths: Tensor) -> Tensor:
    """The sum of all lengths before each."""
    return lengths.cumsum(0) - lengths


def _sums(lengths: Tensor, begins: Tensor) -> Tensor:
    """Sums of ``lengths`` from each true ``begins`` up to the next."""
    before = _before(lengths)[begins]
    return torch.diff(before, append=lengths.sum()[None])
