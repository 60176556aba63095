"""A policy's numbers at a step: on the host, and the same in tensor arithmetic on a device.

``row_at`` says what a schedule means; :class:`DeviceNumbers` is its twin for capturable=True, where no value may come
from the host once a CUDA graph is captured. Whoever changes one changes the other: they stand side by side for that.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import mask_stream
from .clock import Clock
from .contract import Effect, Mask
from .cuda_graph import to_device
from .groups import Layers, effect_of, is_layerwise, policy_of
from .policies import DROP, KEEP, Draw, Index, Policy, Row, row_of

MAX_ROWS = 1 << 20  # of a policy's table on a device
_NO_EPOCH = 0  # stands in where no policy follows epochs
_UNMOVED = Index(), Draw("never")  # of a group without a policy


def row_at(policy: Policy, layer: int, layers: int, draw: int, epoch: int | None) -> tuple[Row, int]:
    """A policy's row for step ``draw`` in ``epoch``, and its counter word 2."""
    index, word = _place(policy.index(layers), policy.draw(layers), draw, epoch)
    return row_of(policy, index, layer, layers), word


def _place(index: Index, drawn: Draw, draw: int, epoch: int | None) -> tuple[int, int]:
    """(row's index, counter word 2). ``epoch`` may be None where nothing follows it."""
    epoch = _NO_EPOCH if epoch is None else epoch
    (by, length, wraps), (drawn_by, holds) = index, drawn
    tick = epoch if by == "epoch" else draw - 1
    at = tick % length if wraps else min(tick, length - 1)
    word = (draw - 1) // holds + 1 if drawn_by == "step" else epoch // holds if drawn_by == "epoch" else 0
    return at, word


class HostNumbers:
    """The groups' policies on the host, asked before every step: what does not change between steps is kept."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], layers: Layers):
        self.layers = layers
        self.policies = [policy_of(group) for group in groups]
        self.effects = [effect_of(group) for group in groups]
        self._packing = [g for g, policy in enumerate(self.policies) if policy is not None and policy.packed]
        self.followers = [policy for policy in self.policies if policy is not None and policy.needs_epoch]
        self._moves = [_UNMOVED if p is None else (p.index(layers.count), p.draw(layers.count)) for p in self.policies]
        self._rows = [(-1, KEEP) for _ in groups]  # the last index and its row: a schedule of steps has millions
        self._freezes = _freeze_layers(groups, self.effects)

    def at(self, clock: Clock, draw: int) -> list[tuple[Row, int]]:
        """Each group's policy row and counter word 2 for step ``draw``. Raises RuntimeError if an epoch is not known.

        A layer that is frozen as a whole is decided here, since it does not count the step: its row is KEEP or DROP.
        """
        for follower in self.followers:
            clock.check_epoch_known(follower)
        epoch, found = clock.epoch_at(draw), []
        for g, policy in enumerate(self.policies):
            if policy is None:
                found.append((KEEP, 0))
                continue
            index, word = _place(*self._moves[g], draw, epoch)
            last, row = self._rows[g]
            if index != last:
                row = row_of(policy, index, self.layers.of_group[g], self.layers.count)
                self._rows[g] = index, row
            if self._freezes[g] and row.mask == Mask.LAYER:
                row = decided(row, word, clock.seed, self.layers.stream_ids[self.layers.of_group[g]])
            found.append((row, word))
        return found

    def of_step(self, clock: Clock, draw: int) -> "StepNumbers":
        """The numbers of step ``draw``. Raises RuntimeError if an epoch is not known."""
        rows = self.at(clock, draw)
        packed = {}
        for g in self._packing:
            row, word = rows[g]
            if row.mask == Mask.ELEMENT:
                packed[g] = word, row.lo, row.span
                rows[g] = Row(Mask.PACKED, *row[1:]), word
        return StepNumbers(draw, rows, packed)


class StepNumbers(NamedTuple):
    """What all updates of a step have in common, on the host."""

    draw: int
    rows: list[tuple[Row, int]]  # by group, with counter word 2
    packed: dict[int, tuple[int, int, int]]  # groups whose masks are packed words, drawn by (word 2, lo, span)


def rows_at(groups: Sequence[Mapping[str, Any]], layers: Layers, clock: Clock, draw: int) -> list[tuple[Row, int]]:
    """:meth:`HostNumbers.at`, once."""
    return HostNumbers(groups, layers).at(clock, draw)


def _freeze_layers(groups: Sequence[Mapping[str, Any]], effects: Sequence[Effect]) -> list[bool]:
    """Which groups freeze whole layers: whether one does in a step is decided before the step."""
    return [is_layerwise(group) and effect == Effect.FREEZE for group, effect in zip(groups, effects, strict=True)]


def decided(row: Row, word: int, seed: int, stream_id: int) -> Row:
    """A layer mask's row once its layer is drawn: kept, with its rescale, or dropped."""
    random = mask_stream.layer_random(seed=seed, draw=word, stream_id=stream_id)
    return KEEP._replace(rescale=row.rescale) if mask_stream.decide(random, row.lo, row.span) else DROP


class DeviceNumbers:
    """Draw, epoch and every row that the groups' policies can have, as tensors on one device.

    ``advance`` gives for each group (mask, word, lo, span), int64 of shape (groups,) each, and (rescale, noise_std),
    float64 of shape (groups,). The step counts once ``commit`` is called.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], layers: Layers, clock: Clock, device: torch.device):
        def tensor(values: Any, dtype: torch.dtype = torch.int64) -> Tensor:
            return to_device(torch.tensor(values, dtype=dtype, device="cpu"), device)

        self.draw = tensor(clock.draw)
        self.epoch = tensor(_NO_EPOCH if clock.epoch is None else clock.epoch)
        self.next_draw = self.draw
        self.seed, self.steps_per_epoch = clock.seed, clock.steps_per_epoch
        policies = [policy_of(group) for group in groups]
        moves = [_UNMOVED if p is None else (p.index(layers.count), p.draw(layers.count)) for p in policies]
        rows, first = _table(policies, layers)
        effects = [effect_of(group) for group in groups]
        self.rows_integers = tensor([[row.mask, row.lo, row.span] for row in rows])
        self.rows_reals = tensor([[row.rescale, row.noise_std] for row in rows], torch.float64)
        self.first = tensor(first)
        self.lengths = tensor([index.length for index, _ in moves])
        self.wraps = tensor([index.wraps for index, _ in moves], torch.bool)
        self.by_epoch = tensor([index.by == "epoch" for index, _ in moves], torch.bool)
        self.holds = tensor([draw.holds for _, draw in moves])
        self.drawn_by_step = tensor([draw.by == "step" for _, draw in moves], torch.bool)
        self.drawn_by_epoch = tensor([draw.by == "epoch" for _, draw in moves], torch.bool)
        frozen = _freeze_layers(groups, effects)
        self.decide = tensor(frozen, torch.bool) if any(frozen) else None
        self.layer_ids = tensor([layers.stream_ids[layer] for layer in layers.of_group])
        reach = [_reach(p, rows[f : f + i.length]) for p, f, (i, _) in zip(policies, first, moves, strict=True)]
        # where blocks have counts of their own, "kept" is a block mask too
        reach = [
            masks | {Mask.BLOCK} if policy is not None and policy.block != 1 and effect == Effect.FREEZE else masks
            for masks, policy, effect in zip(reach, policies, effects, strict=True)
        ]
        reach = [{Mask.KEEP, Mask.DROP} if freezes else masks for masks, freezes in zip(reach, frozen, strict=True)]
        self.pairs = [{(mask, effect) for mask in masks} for masks, effect in zip(reach, effects, strict=True)]

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def advance(self, found_inf: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The groups' numbers for the coming step, which is none where found_inf is nonzero."""
        self.next_draw = self.draw + (1 if found_inf is None else (found_inf == 0).to(torch.int64).reshape(()))
        step = (self.next_draw - 1).clamp_min(0)
        epoch = self.epoch if self.steps_per_epoch is None else step // self.steps_per_epoch
        tick = torch.where(self.by_epoch, epoch, step)
        index = self.first + torch.where(self.wraps, tick % self.lengths, torch.minimum(tick, self.lengths - 1))
        by_step, by_epoch = step // self.holds + 1, epoch // self.holds
        word = torch.where(self.drawn_by_step, by_step, torch.where(self.drawn_by_epoch, by_epoch, 0))
        mask, lo, span = self.rows_integers[index].unbind(1)
        if self.decide is not None:
            random = mask_stream.layer_random(seed=self.seed, draw=word, stream_id=self.layer_ids)
            kept = torch.where(mask_stream.decide(random, lo, span), int(Mask.KEEP), int(Mask.DROP))
            mask = torch.where(self.decide & (mask == Mask.LAYER), kept, mask)
        return (mask, word, lo, span), tuple(self.rows_reals[index].unbind(1))

    def commit(self) -> None:
        self.draw.copy_(self.next_draw)


def _table(policies: Sequence[Policy | None], layers: Layers) -> tuple[list[Row], list[int]]:
    """All rows of all policies, each distinct policy's once (per layer where they differ), and each group's first."""
    rows: list[Row] = []
    begins: list[tuple[Policy | None, int, int]] = []
    first = []
    for policy, layer in zip(policies, layers.of_group, strict=True):
        at_layer = layer if policy is not None and policy.rows_differ_by_layer else 0
        begin = next((b for p, at, b in begins if at == at_layer and (p is policy or p == policy)), None)
        if begin is None:
            begin = len(rows)
            begins.append((policy, at_layer, begin))
            length = 1 if policy is None else policy.index(layers.count).length
            if begin + length > MAX_ROWS:
                raise ValueError(
                    f"capturable must be False with {policy!r}: its schedule of {length} rows, behind {begin} of other "
                    f"groups, is longer than the table of {MAX_ROWS} that a device keeps. Layers share their rows if "
                    "the policy's class says rows_differ_by_layer = False beside its row()"
                )
            rows += [KEEP if policy is None else row_of(policy, i, layer, layers.count) for i in range(length)]
        first.append(begin)
    return rows, first


def _reach(policy: Policy | None, rows: Sequence[Row]) -> set[Mask]:
    """The masks that a group can come to: with block="row" also element masks, of its vectors."""
    masks = {row.mask for row in rows}
    if policy is not None and policy.block == "row" and Mask.BLOCK in masks:
        masks.add(Mask.ELEMENT)
    return masks
