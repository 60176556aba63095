"""The two number tables that a backend call reads, filled for a step: from the host, and on a device.

Both put a tensor's row together in the same way. Its integers are its group's mask numbers. Its reals are the factors
of its group's rule at its own step count. A tensor that the step leaves alone is dropped with effect "freeze".
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import validate
from .contract import Batch, Effect, Integer, Mask, Real
from .cuda_graph import to_device
from .groups import effect_of
from .policies import Row
from .rules import Rule
from .shards import local

HOST = torch.device("cpu")
_LEFT_ALONE = Row(Mask.DROP), Effect.FREEZE
_EVERY_BLOCK = Row(Mask.BLOCK)
_REALS = Real.columns()


DeviceColumns = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # of DeviceNumbers.advance


class Kind(NamedTuple):
    """What the tensors of a bucket differ in, besides stream ids and step counts."""

    group: int
    block: int = 1
    own_rescale: float = 1.0  # a StaticMask's
    blocks: int = 0  # of the whole parameter, where each counts its own steps


class GroupStep(NamedTuple):
    """One group's numbers for a step, on the host."""

    row: Row
    word: int  # Philox counter word 2
    effect: Effect
    sign: float
    lr: float
    numbers: tuple[float, ...]  # of its rule

    @property
    def frozen(self) -> bool:
        """Is all of the group left alone? Then it does not count the step."""
        return self.row.mask == Mask.DROP and self.effect == Effect.FREEZE


def group_step(group: Mapping[str, Any], rule: Rule, row: Row, word: int, effect: Effect | None = None) -> GroupStep:
    """``effect``: that of the group, where it is known already. Raises TypeError or ValueError, named, if the group has
    something that is no number where one belongs."""
    sign = -1.0 if group.get("maximize") else 1.0
    effect = effect_of(group) if effect is None else effect
    try:
        return GroupStep(row, word, effect, sign, float(group.get("lr", 0.0)), rule.numbers(group))
    except (TypeError, ValueError):  # set by hand in mid-training; what names it is too slow for every step
        validate.group_numbers(group, rule)
        raise


def runs(indices: Sequence[int]) -> list[slice]:
    """Ascending ``indices`` as slices. (A device's table indexed by a list would copy the list there.)"""
    found: list[slice] = []
    for i in indices:
        if found and found[-1].stop == i:
            found[-1] = slice(found[-1].start, i + 1)
        else:
            found.append(slice(i, i + 1))
    return found


class HostTables:
    """Fills a batch's tables, whose place it takes, on the host. Rows that tensors share are made once."""

    def __init__(
        self,
        batch: Batch,
        rule: Rule,
        kinds: Sequence[Kind],
        stream_ids: Sequence[int],
        spread: Tensor | None = None,  # (rows,), int64: rows that several runs share; `stream_ids` are then the rows'
    ):
        self.rule, self.spread = rule, spread
        self.kinds = list(dict.fromkeys(kinds))
        number = {kind: k for k, kind in enumerate(self.kinds)}
        self.kind_of = [number[kind] for kind in kinds]
        self.index = torch.tensor(self.kind_of, dtype=torch.int64, device=HOST)
        self.stream_ids = torch.tensor(list(stream_ids), dtype=torch.int64, device=HOST)
        self.shared_id = stream_ids[0] if len(set(stream_ids)) == 1 else None
        self.integers = _Table("q", *batch.integers.shape)
        self.reals = _Table("d", *batch.reals.shape)
        batch.integers, batch.reals = self.integers.tensor, self.reals.tensor
        self.stream_id_column = batch.integers[:, Integer.STREAM_ID]
        self.stream_id_column.copy_(self.stream_ids)

    def fill(self, steps: Mapping[int, GroupStep], t: Sequence[float], left_alone: Sequence[int]) -> None:
        """``t``: step counts of the tensors, this step included. ``left_alone``: tensors that it does not touch."""
        uniform = not left_alone and len(set(t)) == 1
        if uniform and len(self.kinds) == 1:
            (kind,) = self.kinds
            step = steps[kind.group]
            self.integers.fill_columns(_integers(kind, step, False, self.shared_id))
            self.reals.fill_columns(_reals(self.rule, kind, step, t[0]))
            return
        if uniform:
            rows, index = [(kind, t[0], False) for kind in self.kinds], self.index
        else:
            alone = set(left_alone)
            distinct: dict[tuple[int, float, bool], int] = {}
            keys = ((kind, count, i in alone) for i, (kind, count) in enumerate(zip(self.kind_of, t, strict=True)))
            numbers = [distinct.setdefault(key, len(distinct)) for key in keys]
            rows = [(self.kinds[kind], count, is_alone) for kind, count, is_alone in distinct]
            index = torch.tensor(numbers, dtype=torch.int64, device=HOST)
        if rows:
            index = index if self.spread is None else index[self.spread]
            self.integers.fill_rows([_integers(kind, steps[kind.group], alone) for kind, _, alone in rows], index)
            self.reals.fill_rows([_reals(self.rule, kind, steps[kind.group], count) for kind, count, _ in rows], index)
            self.stream_id_column.copy_(self.stream_ids)


class _Table:
    """A tensor of shape (rows, columns) whose memory Python writes itself: in a small step each operation of torch's,
    of which :meth:`fill_columns` needs none, takes longer than the arithmetic."""

    def __init__(self, typecode: str, rows: int, columns: int):
        self.typecode, self.rows, self.columns = typecode, rows, columns
        self.everywhere: Sequence[Any] = ()  # what all rows of each column hold, if that is known
        self.memory = array(typecode, bytes(8 * rows * columns))
        dtype = torch.int64 if typecode == "q" else torch.float64
        empty = torch.zeros(0, dtype=dtype, device=HOST)
        self.tensor = (torch.frombuffer(self.memory, dtype=dtype) if self.memory else empty).view(rows, columns)

    def fill_columns(self, values: Sequence[Any]) -> None:
        """One value for all rows of each column; None leaves a column as it is."""
        if self.rows == 1:
            self.memory[:] = array(self.typecode, values)
            return
        known, self.everywhere = self.everywhere or [None] * self.columns, ()  # until this has come to its end
        for column, (value, last) in enumerate(zip(values, known, strict=True)):
            if value != last and value is not None:
                self.memory[column :: self.columns] = array(self.typecode, (value,)) * self.rows
        self.everywhere = values

    def fill_rows(self, rows: Sequence[Sequence[Any]], index: Tensor) -> None:
        """Row i becomes ``rows[index[i]]``; None becomes 0."""
        self.everywhere = ()
        values = array(self.typecode, [value or 0 for row in rows for value in row])
        distinct = torch.frombuffer(values, dtype=self.tensor.dtype).view(-1, self.columns)
        torch.index_select(distinct, 0, index, out=self.tensor)


def _integers(kind: Kind, step: GroupStep, left_alone: bool, stream_id: int | None = None) -> list[int | None]:
    """``stream_id``: None where it is the tensor's own, which the table has already."""
    row, effect = _LEFT_ALONE if left_alone else (step.row, step.effect)
    # with block="row" a vector's elements decide each for itself
    mask = Mask.ELEMENT if row.mask == Mask.BLOCK and kind.block == 1 else row.mask
    if kind.blocks and mask == Mask.KEEP:  # the blocks have different counts all the same
        mask, row = Mask.BLOCK, _EVERY_BLOCK
    return [mask, effect, step.word, stream_id, row.lo, row.span, kind.block]


def _reals(rule: Rule, kind: Kind, step: GroupStep, t: float) -> list[Any]:
    rescale = step.row.rescale * kind.own_rescale
    grad_scale, scale = (1.0, rescale) if step.effect == Effect.UPDATE else (rescale, 1.0)
    reals = [step.sign * grad_scale, step.row.noise_std, *rule.factors(step.lr, step.numbers, scale, max(t, 1.0))]
    return reals + [0.0] * (_REALS - len(reals))


@dataclass
class DeviceTables:
    """Fills a batch's tables on a device, by tensor arithmetic on what is there already (capturable=True)."""

    batch: Batch
    rule: Rule
    group_of: Tensor  # (tensors,), int64
    stream_ids: Tensor  # likewise
    blocks: Tensor  # likewise
    own_rescale: Tensor  # (tensors,), float64
    by_rows: bool  # some block masks decide single elements
    counting: Tensor | None  # (tensors,), bool: those whose blocks have counts of their own; None: there are none
    _static: list | None = None  # the host's hyperparameters that `_table` was made from

    @classmethod
    def of(cls, batch: Batch, rule: Rule, kinds: Sequence[Kind], stream_ids: Sequence[int]) -> "DeviceTables":
        def tensor(values: Iterable[float], dtype: torch.dtype = torch.int64) -> Tensor:
            return to_device(torch.tensor(list(values), dtype=dtype, device=HOST), batch.integers.device)

        return cls(
            batch,
            rule,
            group_of=tensor(kind.group for kind in kinds),
            stream_ids=tensor(stream_ids),
            blocks=tensor(kind.block for kind in kinds),
            own_rescale=tensor((kind.own_rescale for kind in kinds), torch.float64),
            by_rows=any(kind.block == 1 for kind in kinds),
            counting=tensor((kind.blocks > 0 for kind in kinds), torch.bool) if any(k.blocks for k in kinds) else None,
        )

    def fill(
        self,
        groups: Sequence[Mapping[str, Any]],
        numbers: DeviceColumns,
        t: Tensor,
        left_alone: Sequence[int],
    ) -> None:
        """``numbers``: of DeviceNumbers.advance. ``t``: (tensors,), float64, this step included."""
        mask, word, lo, span = (column[self.group_of] for column in numbers[0])
        rescale, noise_std = (column[self.group_of] for column in numbers[1])
        integers, reals = self.batch.integers, self.batch.reals
        if self.by_rows:
            mask = torch.where((mask == Mask.BLOCK) & (self.blocks == 1), int(Mask.ELEMENT), mask)
        if self.counting is not None:
            every = self.counting & (mask == Mask.KEEP)
            mask, lo = torch.where(every, int(Mask.BLOCK), mask), torch.where(every, 0, lo)
            span = torch.where(every, _EVERY_BLOCK.span, span)
        effect, sign, lr, *rest = self._hyperparameters(groups)[self.group_of].unbind(1)
        update = effect == Effect.UPDATE
        rescale = rescale * self.own_rescale
        columns = {
            Integer.MASK: mask,
            Integer.EFFECT: effect.to(torch.int64),
            Integer.DRAW: word,
            Integer.STREAM_ID: self.stream_ids,
            Integer.LO: lo,
            Integer.SPAN: span,
            Integer.BLOCK: self.blocks,
        }
        for column, values in columns.items():
            integers[:, column] = values
        reals[:, Real.GRAD_FACTOR] = sign * torch.where(update, 1.0, rescale)
        reals[:, Real.NOISE_STD] = noise_std
        factors = self.rule.factors(lr, rest, torch.where(update, rescale, 1.0), t.clamp_min(1.0))
        for k, factor in enumerate(factors):
            reals[:, Real.FACTOR + k] = factor
        for run in runs(left_alone):
            integers[run, Integer.MASK] = int(Mask.DROP)
            integers[run, Integer.EFFECT] = int(Effect.FREEZE)

    def frozen(self, numbers: DeviceColumns, groups: Sequence[Mapping[str, Any]]) -> Tensor:
        """(tensors,), bool: those that the step leaves alone as a whole, by their group's mask."""
        effect = self._hyperparameters(groups)[:, 0]
        return ((numbers[0][0] == Mask.DROP) & (effect == Effect.FREEZE))[self.group_of]

    def rule_numbers(self, groups: Sequence[Mapping[str, Any]]) -> Tensor:
        """(groups, columns), float64: lr and the rule's numbers."""
        return self._hyperparameters(groups)[:, 2:]

    def _hyperparameters(self, groups: Sequence[Mapping[str, Any]]) -> Tensor:
        """(groups, columns), float64: effect, sign, lr and the rule's numbers."""
        device = self.batch.integers.device
        # host to device only when a hyperparameter changed: never during capture
        static = []
        for group in groups:
            step = group_step(
                {**group, "lr": 0.0 if _on_device(group["lr"], device) else group["lr"]}, self.rule, *_NO_MASK
            )
            static.append([float(step.effect), step.sign, step.lr, *step.numbers])
        if static != self._static:
            table = to_device(torch.tensor(static, dtype=torch.float64, device=HOST), device)
            if self._static is None:
                self._table = table
            else:
                self._table.copy_(table)  # in place: captured graphs read it
            self._static = static
        moving = {g: group["lr"] for g, group in enumerate(groups) if _on_device(group["lr"], device)}
        if not moving:
            return self._table
        table = self._table.clone()
        for g, lr in moving.items():
            table[g, 2] = local(lr).to(table).reshape(())  # of a DTensor, whose every rank holds it
        return table


_NO_MASK = Row(Mask.KEEP), 0


def _on_device(lr: float | Tensor, device: torch.device) -> bool:
    return isinstance(lr, Tensor) and (lr.device.type != "cpu" or device.type == "cpu")
