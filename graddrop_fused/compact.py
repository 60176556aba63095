"""active_state=True: moments for what the coming step may train, and for nothing else.

A parameter whose policy decides whole layers has ordinary state while it is active, and none while it is frozen. Under
a policy of blocks its state is compact:

- ``active``: which elements have moments, a table of runs.py;
- ``step``: float32, the step counts that they have, one for all that became active together;
- the rule's states: 1-D, the elements of the runs, packed close.

When another mask comes, what is active before and after takes its moments and its count along. So the state says of
itself what it is for, whatever masks come next.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import block_steps, dispatch, state, validate
from .buckets import UpdateBucket
from .checks import shown
from .contract import Effect, Integer, Mask, Real, Runs, Shard
from .groups import Group, Member, block_of, effect_of, policy_of
from .policies import Row
from .rules import Rule
from .runs import HOST, Asked, Carried, carry, copy_runs, elements, kept_runs, no_counts, no_runs, runs_of
from .shards import is_dtensor, like, local, place_problem
from .state import Entry
from .tables import GroupStep, HostTables, Kind

ACTIVE = "active"  # the entry of compact state


# What it goes with


def check_group(group: Mapping[str, Any]) -> None:
    """Raises ValueError if the group's mask does not hold, or does not freeze whole layers or blocks."""
    policy = policy_of(group)
    if group.get("capturable"):
        raise ValueError(
            "capturable must be False with active_state=True, got True: which moments exist is decided on the host"
        )
    if policy is None:
        return
    if effect_of(group) != Effect.FREEZE:
        raise ValueError(
            f"effect must be 'freeze' with active_state=True, got {effect_of(group).name.lower()!r} with {policy!r}: "
            "what is dropped has no moments that could move it"
        )
    if not policy.layerwise and policy.block == 1:
        raise ValueError(
            "drop must decide whole layers or blocks with active_state=True (block=1024, say, or block='row'), got "
            f"{policy!r}"
        )
    index, draw = policy.index(2), policy.draw(2)
    if (draw.by == "step" and draw.holds == 1) or (index.by == "step" and index.length > 1):
        raise ValueError(
            "drop must have masks that hold, for an epoch or for hold=K steps, with active_state=True, got "
            f"{policy!r}: moments that live for one step are of no use"
        )


# From one mask to the next


def is_compact(entry: Mapping[str, Any]) -> bool:
    return ACTIVE in entry


def has_blocks(group: Mapping[str, Any]) -> bool:
    policy = policy_of(group)
    return policy is not None and not policy.layerwise


def turn_over(
    members: Sequence[Member],
    groups: Sequence[Group],
    entries: dict[Tensor, Entry],
    rows: Sequence[tuple[Row, int]],
    rules: Sequence[Rule],
    dtype_of: Callable[[Tensor], torch.dtype],
    seed: int,
) -> None:
    """Give parameters the state that their masks of the coming step want. Doing it again changes nothing.

    Ordinary entries of active parameters are left to state.adopt(). All but allocating new state comes before anything
    changes. Where memory runs out in between, every parameter has state that says of itself what it is for, and a step
    that is taken again goes on from there.

    Args:
        rows, rules: the groups' in the coming step. dtype_of: of a parameter's state.
    """
    packed: list[Member] = []
    whole: list[Member] = []
    for member in members:
        stays = is_compact(entries.get(member.param, {})) and rows[member.group][0].mask != Mask.DROP
        (packed if has_blocks(groups[member.group]) or stays else whole).append(member)
    changes = [change for part in _some(packed) for change in _changes(part, groups, entries, rows, seed)]
    for member in whole:
        param = member.param
        if rows[member.group][0].mask == Mask.DROP:
            _freeze(entries, param, rules[member.group], dtype_of(param))
        elif _is_frozen(entries.get(param, {})):
            del entries[param]
    changes.reverse()
    while changes:  # whose tables are let go one by one
        change = changes.pop()
        param, group = change.member.param, change.member.group
        if not len(change.carried.active) and not is_dtensor(param):
            entries.pop(param, None)
            continue
        _renew(entries, change, rules[group], dtype_of(param))
        # whether a DTensor's is whole may differ between ranks, and all of them must have state of one form
        if not has_blocks(groups[group]) and not is_dtensor(param):
            entries[param] = _ordinary(entries[param], param)


class _Change(NamedTuple):
    """What a parameter's state comes to."""

    member: Member
    carried: Carried
    states: Callable[[], Mapping[str, Tensor]]  # the rule's states until now, 1-D, of these runs; none if none goes on


def _some(members: Sequence[Member]) -> Iterator[Sequence[Member]]:
    """Parts of ``members`` whose tables are made at once: many small tensors, or one that is large."""
    part: list[Member] = []
    numel = 0
    for member in members:
        part.append(member)
        numel += local(member.param).numel()
        if numel > 1 << 24:
            yield part
            part, numel = [], 0
    if part:
        yield part


def _changes(
    members: Sequence[Member],
    groups: Sequence[Group],
    entries: Mapping[Tensor, Entry],
    rows: Sequence[tuple[Row, int]],
    seed: int,
) -> list[_Change]:
    asked = [
        Asked(m.shard(), block_of(groups[m.group], m.param), *rows[m.group], stream_id=m.stream_id) for m in members
    ]
    wanted = kept_runs(asked, seed=seed)
    now = [_runs_in(entries.get(m.param, {}), m.param, a.shard, a.block) for m, a in zip(members, asked, strict=True)]
    active, counts, states = zip(*now, strict=True)
    carried = carry(active, counts, wanted, [a.shard.numel for a in asked])
    of_old = [get if len(c.copies) else dict for get, c in zip(states, carried, strict=True)]  # else kept for nothing
    return [_Change(*change) for change in zip(members, carried, of_old, strict=True)]


def _renew(entries: dict[Tensor, Entry], change: _Change, rule: Rule, dtype: torch.dtype) -> None:
    """Put compact state over the runs of now into ``entries``, with what is carried along, unless it is that."""
    param, carried = change.member.param, change.carried
    entry = entries.get(param, {})
    if is_compact(entry) and torch.equal(carried.active[:, :2], entry[ACTIVE][:, :2]):
        if all([name in entry and _fits(entry[name], dtype, local(param)) for name in rule.states]):
            return
    new: Entry = {"step": carried.counts, ACTIVE: carried.active}
    device = local(param).device
    old = change.states()
    if not old:
        # What ends need not exist beside the new state. Its entry stays, so that all ranks have them in one order.
        empty = torch.empty(0, dtype=dtype, device=device)
        steps = no_counts()
        entries[param] = {"step": steps, ACTIVE: no_runs(), **{name: empty.clone() for name in rule.states}}
        entry = {}
    if state.begins(old, rule):
        new["step"] = torch.zeros_like(carried.counts)
    size = int(carried.active[:, 1].sum())
    from_, to, lengths = carried.copies.unbind(1)
    for name in rule.states:
        new[name] = torch.zeros(size, dtype=dtype, device=device)
        if old.get(name) is not None:
            copy_runs(new[name], to, old[name], from_, lengths)
    entries[param] = new


def _fits(packed: Tensor, dtype: torch.dtype, param: Tensor) -> bool:
    """May kernels use compact state where it lies, packed close?"""
    alike = packed.dtype == dtype and packed.device == param.device
    return alike and packed.is_contiguous() and not state.unfit(packed, param)


def _freeze(entries: dict[Tensor, Entry], param: Tensor, rule: Rule, dtype: torch.dtype) -> None:
    """A DTensor keeps the names of its state: torch.distributed.checkpoint asks for what it finds."""
    if not is_dtensor(param):
        entries.pop(param, None)
    elif not _is_frozen(entries.get(param, {})):
        empty = torch.empty(0, dtype=dtype, device=param.device)
        entries[param] = {"step": no_counts(), **{name: empty.clone() for name in rule.states}}


def _is_frozen(entry: Mapping[str, Any]) -> bool:
    return bool(entry) and not is_compact(entry) and isinstance(entry["step"], Tensor) and not entry["step"].numel()


def _runs_in(
    entry: Entry, param: Tensor, shard: Shard, block: int
) -> tuple[Tensor, Tensor, Callable[[], Mapping[str, Tensor]]]:
    """The active runs of any state, their step counts, and what gives the rule's states as 1-D tensors."""
    if not entry or _is_frozen(entry):
        return no_runs(), no_counts(), dict
    if is_compact(entry):
        return entry[ACTIVE], entry["step"], lambda: entry

    def flat() -> dict[str, Tensor]:
        return {name: local(t).reshape(-1) for name, t in entry.items() if name not in ("step", block_steps.NAME)}

    of_blocks = entry.get(block_steps.NAME)
    places = shard.at(torch.arange(shard.numel, device=HOST)) // block if of_blocks is not None else no_runs()
    if of_blocks is not None and (not len(places) or int(places.max()) < len(of_blocks)):
        active, counts = runs_of(of_blocks.to(HOST)[places])  # what never stepped has moments of zero

        def stepped() -> dict[str, Tensor]:
            where = elements(active[:, 0], active[:, 1]).to(local(param).device)
            return {name: t[where] for name, t in flat().items()}

        return active, counts, stepped
    whole = torch.tensor([[0, shard.numel, 0]], dtype=torch.int64, device=HOST) if shard.numel else no_runs()
    return whole, torch.as_tensor(entry["step"], device=HOST).float().reshape(1), flat


def _ordinary(entry: Entry, param: Tensor) -> Entry:
    """Compact state as an ordinary one, if all of the parameter is active and has one step count."""
    if int(entry[ACTIVE][:, 1].sum()) != local(param).numel() or len(entry["step"]) > 1:
        return entry
    whole: Entry = {"step": entry["step"].sum()}
    for name, packed in entry.items():
        if name not in ("step", ACTIVE):
            whole[name] = like(param, packed.dtype)
            local(whole[name]).copy_(packed.view(local(param).shape))
    return whole


# A step


def choose(requested: str, param: Tensor) -> ModuleType:
    """The backend that serves ``param``'s runs. Raises ValueError if compiled ones cannot, whose runs lie in memory."""
    if local(param).is_contiguous():
        return dispatch.choose_for(requested, param)
    if requested in ("auto", "reference"):
        return dispatch.load("reference")
    raise ValueError(
        f"backend must be 'auto' or 'reference' with active_state=True and blocks of a parameter that is not "
        f"contiguous, got {requested!r} for one of shape {tuple(param.shape)} with strides {param.stride()}"
    )


class CompactBucket(UpdateBucket):
    """The tensors of one call whose state is compact. Its tables have a row for each run.

    ``steps`` has the step counts of all tensors, of each those of its entry.
    """

    def give_state(self, entries: list[Entry]) -> None:
        self.entries, self.names = entries, self.rule.states
        self.block_steps, self.counting = None, []  # the entries have the counts
        sizes = [len(entry["step"]) for entry in entries]
        self.steps = torch.cat([entry["step"] for entry in entries])
        self.views = list(self.steps.split(sizes))
        for entry, step in zip(entries, self.views, strict=True):
            entry["step"] = step
        self.tables_of_runs = [entry[ACTIVE] for entry in entries]
        self.counts_of = [range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
        self.states = [[entry[name] for entry in entries] for name in self.names]
        self.batch.states = self.states
        self._make_tables()
        self._rely_on_state()

    def _make_tables(self) -> None:
        batch, active = self.batch, self.tables_of_runs
        first = [0]
        for entry in self.entries:
            first.append(first[-1] + len(entry["step"]))
        starts, lengths, _ = torch.cat(active).unbind(1)
        state_starts = [runs[:, 1].cumsum(0) - runs[:, 1] for runs in active]
        tensors = torch.repeat_interleave(torch.tensor([len(runs) for runs in active], device=HOST))
        offsets = [shard.at(runs[:, 0]) for shard, runs in zip(batch.shards, active, strict=True)]
        batch.runs = Runs(tensors, starts, lengths, torch.cat(offsets), torch.cat(state_starts))
        batch.integers = torch.zeros(len(tensors), len(Integer), dtype=torch.int64, device=HOST)
        batch.reals = torch.zeros(len(tensors), Real.columns(), dtype=torch.float64, device=HOST)
        batch.pairs = frozenset({(Mask.KEEP, Effect.FREEZE)})
        batch.cache.clear()
        spread = torch.cat([runs[:, 2] + begin for runs, begin in zip(active, first[:-1], strict=True)])
        kinds = [Kind(self.members[i].group) for i, counts in enumerate(self.counts_of) for _ in counts]
        stream_ids = torch.tensor([m.stream_id for m in self.members], dtype=torch.int64, device=HOST)[tensors].tolist()
        self.tables = HostTables(batch, self.rule, kinds, stream_ids, spread)

    def fits(self) -> bool:
        return super().fits() and all(
            entry.get(ACTIVE) is runs for entry, runs in zip(self.entries, self.tables_of_runs, strict=True)
        )

    def take(self, grads: Sequence[Tensor | None], switched_off: set[int]) -> bool:
        taken = super().take(grads, switched_off)
        grads = self.batch.grads
        if not all([g is None or g.is_contiguous() for g in grads]):
            self.batch.grads = [None if g is None else g.contiguous() for g in grads]
        return taken

    def counts_of_first(self, tensors: int) -> int:
        return self.counts_of[tensors - 1].stop if tensors else 0

    def round_stochastically(self) -> None:
        super().round_stochastically()
        assert self.batch.rounding is not None and self.batch.runs is not None
        self.batch.rounding = self.batch.rounding[self.batch.runs.tensors]

    def prepare_on_host(self, steps: Mapping[int, GroupStep], draw: int, seed: int) -> None:
        # the mask has decided which runs there are: they are kept, and an absent tensor's do not count
        left_alone = set(self.absent)
        self.absent = [count for i in self.absent for count in self.counts_of[i]]
        kept = {
            g: step._replace(row=step.row._replace(mask=Mask.KEEP), effect=Effect.FREEZE) for g, step in steps.items()
        }
        super().prepare_on_host(kept, draw, seed)
        self.left_alone = left_alone


# Checkpoints


def check(what: Callable[[str], str], entry: Mapping[str, Any], param: Tensor, rule: Rule) -> None:
    """Raises an error that names the tensor, by ``what(name)``, on compact state that cannot be ``param``'s."""
    active, steps, numel = entry[ACTIVE], entry["step"], local(param).numel()
    if not isinstance(active, Tensor) or active.dtype != torch.int64 or active.dim() != 2 or active.shape[1] != 3:
        raise ValueError(f"{what(ACTIVE)} must be an int64 tensor of shape (runs, 3), got {shown(active)}")
    if not isinstance(steps, Tensor) or steps.dim() != 1 or not steps.dtype.is_floating_point:
        raise ValueError(f"{what('step')} must be a 1-D floating-point tensor of step counts, got {shown(steps)}")
    for name in ("step", ACTIVE):
        validate.whole_memory(what(name), entry[name])
    for step in steps.unique().tolist():
        state.check_step(what("step"), step)
    starts, lengths, kinds = active.to(HOST).unbind(1)
    bounds = torch.stack([starts, starts + lengths], 1).reshape(-1)
    ordered = bool((lengths > 0).all() and (bounds.diff() >= 0).all())
    if len(active) and not (ordered and 0 <= bounds[0] and bounds[-1] <= numel):
        raise ValueError(f"{what(ACTIVE)} must have ascending runs within its parameter's {numel} elements")
    if len(active) and not 0 <= kinds.min() <= kinds.max() < len(steps):
        raise ValueError(f"{what(ACTIVE)} must refer to the {len(steps)} counts of its step")
    size = int(lengths.sum())
    for name in rule.all_states:
        value = entry.get(name)
        if name in entry and not (isinstance(value, Tensor) and value.shape == (size,) and _is_dense(value)):
            raise ValueError(
                f"{what(name)} must be a dense floating-point tensor of the {size} active elements, got {shown(value)}"
            )
        if value is not None:
            validate.whole_memory(what(name), value)


def _is_dense(value: Tensor) -> bool:
    return value.dtype.is_floating_point and value.layout is torch.strided and not value.is_meta


def check_state(called: str, entry: Mapping[str, Any], param: Tensor, rule: Rule) -> None:
    """As state.check, for any state that the optimizer may hold."""
    if is_compact(entry):
        check(lambda name: f"state {name!r} of parameter {called}", entry, param, rule)
    elif not _is_frozen(entry):
        state.check(called, entry, param, rule)


def is_expanded(entry: Mapping[str, Any], param: Tensor) -> bool:
    """Is it compact state as :func:`expanded` made it?"""
    active, step = entry.get(ACTIVE), entry.get("step")
    # a table of runs may have the parameter's shape, but counts more than one step
    return isinstance(active, Tensor) and active.shape == param.shape and not (isinstance(step, Tensor) and step.dim())


def check_saved(what: Callable[[str], str], entry: Mapping[str, Any], param: Tensor, rule: Rule) -> None:
    """Raises TypeError or ValueError on compact state in a checkpoint, of either form."""
    if not is_expanded(entry, param):
        if is_dtensor(param):
            raise ValueError(f"{what(ACTIVE)} must be a DTensor of its parameter's shape, got {shown(entry[ACTIVE])}")
        check(what, entry, param, rule)
        return
    state.check_step(what("step"), entry["step"])
    for name in rule.all_states:
        if name in entry:
            state.check_tensor(what(name), entry[name], param)
    counts = entry[ACTIVE]
    integers = counts.dtype in (torch.int32, torch.int64) and counts.layout is torch.strided and not counts.is_meta
    if integers:
        validate.whole_memory(what(ACTIVE), counts)
    if not integers or place_problem(param, counts) is not None or bool((local(counts) < 0).any()):
        raise ValueError(f"{what(ACTIVE)} must hold step counts of at least 0, int32, got {shown(counts)}")


def saved(entries: Mapping[Tensor, Entry], draw: int) -> Mapping[Tensor, Entry]:
    """State as a checkpoint has it."""
    return {param: expanded(entry, param, draw) if is_dtensor(param) else entry for param, entry in entries.items()}


def expanded(entry: Entry, param: Tensor, draw: int) -> Entry:
    """A DTensor's state in its parameter's shape, zeros where it is frozen, so that it can be cut otherwise.

    ``active`` then holds each element's step count. What is frozen as a whole has 0 steps.
    """
    if _is_frozen(entry):
        zeros = {name: like(param, t.dtype).zero_() for name, t in entry.items() if name != "step"}
        return {"step": torch.tensor(0.0, dtype=torch.float32, device=HOST), **zeros}
    if not is_compact(entry):
        return entry
    starts, lengths, kinds = entry[ACTIVE].unbind(1)
    found: Entry = {"step": torch.tensor(draw, dtype=torch.float32, device=HOST)}
    packed = {name: t for name, t in entry.items() if name not in ("step", ACTIVE)}
    counts = entry["step"].int()[kinds].repeat_interleave(lengths)
    for name, values in {ACTIVE: counts, **packed}.items():
        whole = like(param, values.dtype)
        part = local(whole)
        flat = torch.zeros(part.numel(), dtype=values.dtype, device=part.device)
        copy_runs(flat, starts, values.to(flat), lengths.cumsum(0) - lengths, lengths)
        part.copy_(flat.view(part.shape))
        found[name] = whole
    return found


def restored(param: Tensor, saved: Mapping[str, Any], rule: Rule, dtype: torch.dtype) -> Entry:
    """State from a checkpoint, of any form. Copies."""
    if not is_compact(saved):
        return state.restored(param, saved, rule, dtype)
    device, names = local(param).device, [name for name in rule.all_states if name in saved]
    if not is_expanded(saved, param):
        entry: Entry = {
            "step": saved["step"].to(HOST, torch.float32, copy=True),
            ACTIVE: saved[ACTIVE].to(HOST, copy=True),
        }
        return entry | {name: saved[name].to(device, dtype, copy=True) for name in names}
    active, counts = runs_of(_part(param, saved[ACTIVE]).to(HOST))
    places = elements(active[:, 0], active[:, 1]).to(device)
    packed = {name: _part(param, saved[name]).to(device)[places].to(dtype) for name in names}
    return {"step": counts, ACTIVE: active, **packed}


def _part(param: Tensor, saved: Tensor) -> Tensor:
    """What this rank holds of a tensor of the parameter's shape, 1-D."""
    if is_dtensor(param) and (not is_dtensor(saved) or saved.placements != param.placements):
        saved = like(param, saved.dtype).copy_(saved)
    return local(saved).reshape(-1)
