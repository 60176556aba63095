"""From param groups to backend calls: buckets of tensors that one call serves, and the plan that holds them.

A plan is made once and asked before every step whether it still fits: :meth:`Plan.fits` compares all that kernels rely
on. Whatever no longer fits is planned anew, with every check that a first step makes.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import mask_stream, reference, validate
from .block_steps import BlockSteps
from .contract import Batch, Effect, Integer, Mask, Real, Rounding, Shard
from .cuda_graph import to_device
from .groups import Layers, Member, block_of, blocks_of, is_layerwise, own_rescale_of, static_mask
from .numbers import HostNumbers
from .rules import Rule
from .shards import is_dtensor, local, local_gradient
from .tables import DeviceColumns, DeviceTables, GroupStep, HostTables, Kind, runs

HOST = torch.device("cpu")


class Facts:
    """What kernels rely on of some tensors: addresses, lengths, strides and dtypes, as they were once.

    Equal addresses mean equal devices, since host and devices share one address space. Of a contiguous tensor the
    shape does not matter to them, and asking for it takes longer than all the rest.
    """

    # Compared before every step, for every tensor: each line is one call per tensor and no loop in Python.

    def __init__(self, tensors: Sequence[Tensor]):
        self.addresses = addresses(tensors)
        self.lengths = [t.numel() for t in tensors]
        self.dtypes = [t.dtype for t in tensors]
        self.contiguous = [t.is_contiguous() for t in tensors]
        self.strides = [None if c else t.stride() for t, c in zip(tensors, self.contiguous, strict=True)]
        self.all_contiguous = all(self.contiguous)

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        return (
            addresses(tensors) == self.addresses
            and list(map(Tensor.numel, tensors)) == self.lengths
            and [t.dtype for t in tensors] == self.dtypes
            and list(map(Tensor.is_contiguous, tensors)) == self.contiguous
            and (self.all_contiguous or self._strides_hold(tensors))
        )

    def _strides_hold(self, tensors: Sequence[Tensor]) -> bool:
        return all(s is None or t.stride() == s for t, s in zip(tensors, self.strides, strict=True))


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Of the first elements; 0 for a tensor that has no memory of its own."""
    try:
        return list(map(Tensor.data_ptr, tensors))
    except RuntimeError:  # some subclasses raise
        return [t.data_ptr() if type(t) in validate.ORDINARY else 0 for t in tensors]


@dataclass
class Bucket:
    """The tensors of one backend call: one device, one backend, one rule, one combination of dtypes."""

    backend: ModuleType
    rule: Rule
    batch: Batch
    tables: HostTables | DeviceTables
    members: list[Member]
    kinds: list[Kind]
    positions: list[int]  # each member's, in the flat list of all parameters
    grad_dtype: torch.dtype | None
    absent: list[int] = field(default_factory=list)  # tensors without a gradient in the coming step
    packed_with: dict[int, tuple] = field(default_factory=dict)  # group -> what its packed words were drawn with

    def __post_init__(self) -> None:
        self.params = [m.param for m in self.members]
        self.device = self.params[0].device
        self.shapes = [p.shape for p in self.params]
        self.sharded = any(map(is_dtensor, self.params))
        self.by_group: dict[int, list[int]] = {}
        for i, member in enumerate(self.members):
            self.by_group.setdefault(member.group, []).append(i)

    def take(self, grads: Sequence[Tensor | None], switched_off: set[int]) -> bool:
        """Adopt the gradients of the coming step. False if one of them belongs into another bucket, or if its
        parameter has got another shape.

        Raises TypeError or ValueError on a gradient that cannot serve.
        """
        absent, dtype, device, sharded = [], self.grad_dtype, self.device, self.sharded
        unusual = False
        for i, grad in enumerate(grads):
            if grad is None:
                if id(self.params[i]) not in switched_off:
                    absent.append(i)
            elif (
                (type(grad) is Tensor or sharded)
                and grad.dtype is dtype
                and grad.shape == self.shapes[i]
                and grad.device == device
                and grad.layout is torch.strided
            ):
                unusual = unusual or sharded or grad.is_neg()
            else:
                validate.gradient(self.members[i], grad)
                if grad.dtype is not dtype or self.params[i].shape != self.shapes[i]:
                    return False
                unusual = True
        if unusual:
            grads = [None if g is None else local_gradient(p, g) for p, g in zip(self.params, grads, strict=True)]
        self.absent, self.batch.grads = absent, list(grads)
        return True

    def fill(self, steps: Mapping[int, GroupStep], t: Sequence[float]) -> None:
        """Fill the tables, which are on the host. ``t``: step counts of the tensors, this step included."""
        assert isinstance(self.tables, HostTables)
        self.tables.fill(steps, t, self.absent)

    def pack(self, drawn_with: Mapping[int, tuple[int, int, int]], seed: int) -> None:
        """Bring the packed words of these groups' masks up to date.

        ``drawn_with`` maps a group to (Philox counter word 2, lo, span): all that its masks depend on besides the seed
        and the stream ids.
        """
        stale = [g for g in drawn_with if g in self.by_group and self.packed_with.get(g) != (seed, drawn_with[g])]
        index = [i for g in stale for i in self.by_group[g]]
        if not index:
            return
        shards, batch = [self.batch.shards[i] for i in index], self.batch
        words = [
            torch.empty((shard.numel + 31) // 32, dtype=torch.int32, device=self.device)
            if batch.packed[i] is None
            else batch.packed[i]
            for i, shard in zip(index, shards, strict=True)
        ]
        rows = []
        for i in index:
            word, lo, span = drawn_with[self.members[i].group]
            rows.append([Mask.ELEMENT, Effect.GRADIENT, word, int(self.tables.stream_ids[i]), lo, span, 1])
        integers = torch.tensor(rows, dtype=torch.int64, device=HOST)
        part = Batch([], shards, integers, batch.reals[index], packed=words)
        for g in stale:  # what is broken off here leaves words of neither draw
            self.packed_with.pop(g, None)
        self.backend.pack(part, seed=seed)
        if any(batch.packed[i] is None for i in index):
            batch.cache.clear()  # tensors are added
        for i, tensor in zip(index, words, strict=True):
            batch.packed[i] = tensor
        self.packed_with.update({g: (seed, drawn_with[g]) for g in stale})


B = TypeVar("B", bound=Bucket)


def make_buckets(
    groups: Sequence[Mapping[str, Any]],
    all_members: Sequence[Member],
    positions: Sequence[int],
    key_of: Callable[[int], tuple[Rule, torch.dtype | None, Any]],
    choose: Callable[[Tensor], ModuleType],
    bucket_class: type[B],
    on_device: bool = False,
) -> list[B]:
    """Sort the parameters at ``positions`` into buckets.

    Args:
        key_of: position -> (rule, gradient's dtype, whatever else must agree within a call).
        choose: parameter -> backend.
        on_device: put the tables where the parameters are (capturable), not on the host.
        bucket_class: Bucket, or UpdateBucket for buckets that state can be given to.
    """
    layers = Layers.of(groups)
    sorted_positions: dict[tuple, list[int]] = {}
    for i in positions:
        param = all_members[i].param
        key = choose(param), param.device, param.dtype, key_of(i)
        sorted_positions.setdefault(key, []).append(i)
    return [
        bucket_class(backend, rule, *_gather(groups, layers, here, all_members, rule, on_device), here, grad_dtype)
        for (backend, _, _, (rule, grad_dtype, _)), here in sorted_positions.items()
    ]


def _gather(
    groups: Sequence[Mapping[str, Any]],
    layers: Layers,
    positions: Sequence[int],
    all_members: Sequence[Member],
    rule: Rule,
    on_device: bool,
) -> tuple[Batch, HostTables | DeviceTables, list[Member], list[Kind]]:
    members = [all_members[i] for i in positions]
    device = members[0].param.device
    where = device if on_device else HOST
    static = [static_mask(groups[m.group], m) for m in members]
    shards = [m.shard() for m in members]
    batch = Batch(
        params=[local(m.param) for m in members],
        shards=shards,
        integers=torch.zeros(len(members), len(Integer), dtype=torch.int64, device=where),
        reals=torch.zeros(len(members), Real.columns(), dtype=torch.float64, device=where),
        packed=[
            None if mask is None else _pack_local(mask, shard, device)
            for mask, shard in zip(static, shards, strict=True)
        ],
    )
    kinds = [
        Kind(
            m.group,
            block_of(groups[m.group], m.param),
            own_rescale_of(groups[m.group], mask),
            blocks_of(groups[m.group], m.param) if rule.counts else 0,
        )
        for m, mask in zip(members, static, strict=True)
    ]
    stream_ids = [
        layers.stream_ids[layers.of_group[m.group]] if is_layerwise(groups[m.group]) else m.stream_id for m in members
    ]
    tables = (DeviceTables.of if on_device else HostTables)(batch, rule, kinds, stream_ids)
    return batch, tables, members, kinds


def _pack_local(mask: Tensor, shard: Shard, device: torch.device) -> Tensor:
    whole = mask.detach().to(device).reshape(-1)
    return mask_stream.pack_mask(whole[shard.elements(0, shard.numel, device)])


class UpdateBucket(Bucket):
    """A bucket with its rule's state. Every ``state["step"]`` is a view of one buffer: one addition counts them all."""

    def give_state(self, entries: list[dict[str, Any]]) -> None:
        self.entries = entries
        self.names = self.rule.states
        where = self.batch.integers.device
        steps = [torch.as_tensor(entry["step"], dtype=torch.float32, device=where) for entry in entries]
        self.steps = torch.stack([step.reshape(()) for step in steps])
        self.views = list(self.steps.unbind())
        for entry, step in zip(entries, self.views, strict=True):
            entry["step"] = step
        self.block_steps = self._block_steps(entries)
        self.states = [[entry[name] for entry in entries] for name in self.names]
        self.batch.states = [[local(t) for t in tensors] for tensors in self.states]
        self._rely_on_state()

    def _rely_on_state(self) -> None:
        """Remember what ``states`` and the parameters are, for :meth:`fits`."""
        states = [t for tensors in self.states for t in tensors]
        self.held, self.whole = self.views + states, self.params + states
        self.facts = Facts(self._locals())
        self.written = self.whole + self._locals() if self.sharded else self.whole

    def counts_of_first(self, tensors: int) -> int:
        """How many of the step counts are the first tensors'."""
        return tensors

    def let_go(self) -> None:
        """Keep no state alive."""
        self.entries, self.views, self.states, self.batch.states = [], [], [], []
        self.held, self.whole, self.written = [], [], []
        self.block_steps, self.batch.block_factors = None, []
        self.counting.clear()
        self.batch.cache.clear()

    def _block_steps(self, entries: list[dict[str, Any]]) -> BlockSteps | None:
        here = [i for i, kind in enumerate(self.kinds) if kind.blocks]
        self.counting: list[dict[str, Any]] = [entries[i] for i in here]
        if not here:
            return None
        kinds = [self.kinds[i] for i in here]
        return BlockSteps(
            self.batch,
            self.rule,
            self.backend,
            here,
            blocks=[kind.blocks for kind in kinds],
            block_sizes=[kind.block for kind in kinds],
            groups=[kind.group for kind in kinds],
            entries=self.counting,
        )

    def _locals(self) -> list[Tensor]:
        return [local(t) for t in self.whole] if self.sharded else self.whole

    def fits(self) -> bool:
        """Do the parameters and their state still stand as they did?"""
        entries = self.entries
        found = [entry.get(name) for name in ("step", *self.names) for entry in entries]
        return (
            all(map(operator.is_, found, self.held))
            and (self.block_steps is None or self.block_steps.stand(self.counting))
            and self.facts.hold(self._locals() if self.sharded else self.whole)
        )

    def round_stochastically(self) -> None:
        """From now on, bfloat16 is rounded by the parameters' own random numbers of a step."""
        table = torch.zeros(len(self.members), len(Rounding), dtype=torch.int64, device=HOST)
        table[:, Rounding.STREAM_ID] = torch.tensor([m.stream_id for m in self.members], dtype=torch.int64, device=HOST)
        self.batch.rounding = table.to(self.batch.integers.device)

    def prepare_on_host(self, steps: Mapping[int, GroupStep], draw: int, seed: int) -> None:
        """Fill in the tables for the coming step, number ``draw``, which :meth:`run` counts."""
        t, out = self.steps.tolist(), set(self.absent)
        self.left_alone = out
        for group, tensors in self.by_group.items():
            if steps[group].frozen:
                out.update(tensors)
        if out:
            counted = [0.0 if i in out else 1.0 for i in range(len(t))]
            t = [count + more for count, more in zip(t, counted, strict=True)]
            self.counted = torch.tensor(counted, dtype=torch.float32, device=HOST)
        else:
            t, self.counted = [count + 1.0 for count in t], _ONE
        self.fill(steps, t)
        self._fill_draw(draw)
        if self.block_steps is not None:
            columns = 1 + len(next(iter(steps.values())).numbers)
            numbers = torch.zeros(max(steps) + 1, columns, dtype=torch.float64, device=HOST)
            for group, step in steps.items():
                numbers[group] = torch.tensor([step.lr, *step.numbers], dtype=torch.float64, device=HOST)
            self.block_steps.prepare(to_device(numbers, self.device), seed)

    def prepare_on_device(
        self,
        groups: Sequence[Mapping[str, Any]],
        numbers: DeviceColumns,
        draw: Tensor,
        found_inf: Tensor | None,
        seed: int,
    ) -> None:
        """The same from a device's numbers."""
        assert isinstance(self.tables, DeviceTables)
        self.left_alone = set(self.absent)  # as far as the host knows
        counted = torch.where(self.tables.frozen(numbers, groups), 0.0, torch.ones_like(self.steps))
        for run in runs(self.absent):
            counted[run] = 0.0
        if found_inf is not None:
            counted = counted * (found_inf == 0).to(counted).reshape(())
        self.counted = counted
        self.tables.fill(groups, numbers, (self.steps + counted).double(), self.absent)
        self._fill_draw(draw)
        if self.block_steps is not None:
            self.block_steps.prepare(self.tables.rule_numbers(groups), seed, found_inf)

    def _fill_draw(self, draw: int | Tensor) -> None:
        if self.batch.rounding is not None:
            self.batch.rounding[:, Rounding.DRAW] = draw

    def run(self, launch: Callable[[], None]) -> None:
        """Update, and count the step; if it is broken off between two tensors, for those that are updated."""
        try:
            launch()
        except BaseException:
            done = self.counts_of_first(self.batch.done)
            self.steps[:done] += self.counted[:done] if self.counted.dim() else self.counted
            if self.block_steps is not None:
                self.block_steps.commit(self.batch.done)
            raise
        self.batch.done = len(self.members)
        self.steps += self.counted
        if self.block_steps is not None:
            self.block_steps.commit(len(self.members))
        if self.backend is not reference:  # whose operations tell autograd themselves
            written, out = self.written, self.left_alone
            if out:  # they may be needed by a backward pass that is yet to come
                written = [t for k, t in enumerate(written) if k % len(self.members) not in out]
            torch.autograd.graph.increment_version(written)


_ONE = torch.tensor(1.0, device=HOST)


@dataclass(frozen=True)
class Plan:
    """What the steps of an optimizer rely on, as long as it fits."""

    key: tuple  # of the groups: what buckets were made from
    params: list[Tensor]
    state: list[Any]  # of optimizer.state: parameters, and behind them their entries
    layers: Layers
    numbers: HostNumbers
    buckets: list[UpdateBucket]
    stateless: list[int]  # positions of parameters that no bucket serves: they never had a gradient

    def fits(
        self,
        key: tuple,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        state: Mapping[Tensor, dict[str, Any]],
        switched_off: set[int],
    ) -> bool:
        """Whether the coming step may go by this plan; if so, its buckets have taken the gradients.

        Raises TypeError or ValueError on a gradient that cannot serve.
        """
        if key != self.key or len(params) != len(self.params) or not all(map(operator.is_, params, self.params)):
            return False
        # in order, since hashing every parameter costs more than the rest: a replaced entry is another object
        held = [*state, *state.values()]
        if len(held) != len(self.state) or not all(map(operator.is_, held, self.state)):
            return False
        if self.stateless and any(grads[i] is not None or id(params[i]) in switched_off for i in self.stateless):
            return False
        taken = False
        try:
            for bucket in self.buckets:
                if not (bucket.fits() and bucket.take([grads[i] for i in bucket.positions], switched_off)):
                    return False
            taken = True
        finally:
            if not taken:
                self.release_gradients()
        return True

    def let_go(self) -> None:
        """The plan is done with: keep no state alive."""
        self.state.clear()
        for bucket in self.buckets:
            bucket.let_go()

    def updated(self) -> set[int]:
        """ids of the parameters that the last launches have updated: all, unless they were broken off."""
        return {id(p) for bucket in self.buckets for p in bucket.params[: bucket.batch.done]}

    def release_gradients(self) -> None:
        """Let go of what a step has taken: else zero_grad() would free nothing."""
        for bucket in self.buckets:
            bucket.batch.grads = []
