"""Checkpoints: ours, and those of the torch optimizer of the same name. All is checked before anything is loaded."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import block_steps, compact, mask_stream, state, validate
from .checks import check_int, is_int, plain, shown
from .clock import ENTRIES, Clock
from .groups import policy_of
from .names import canonical_name
from .policies import policy_from_state
from .rules import Rule

STREAM = "mask_stream"  # the entry that tells by which version of the mask stream a checkpoint was made


class Loaded(NamedTuple):
    """What a checkpoint comes to, checked and copied."""

    groups: list[dict[str, Any]]  # without params
    entries: dict[Tensor, tuple[Mapping[str, Any], Rule]]  # parameter -> (saved state, its group's rule)
    clock: Clock


def of_clock(clock: Clock) -> dict[str, Any]:
    """What a group's masks depend on, in plain numbers."""
    return {**clock.state(), STREAM: mask_stream.VERSION}


def pack(groups: Sequence[Mapping[str, Any]], entries: Mapping[Any, Any], clock: Clock) -> dict[str, Any]:
    """The state dict: torch's form, in plain numbers and strings but for tensors."""
    index: dict[int, int] = {}
    packed_groups = []
    for group in groups:
        for param in group["params"]:
            index.setdefault(id(param), len(index))
        values = {name: _plain(name, value) for name, value in group.items() if name not in ("params", "drop")}
        policy = policy_of(group)
        drop = policy and policy.to_state()
        indices = [index[id(param)] for param in group["params"]]
        packed_groups.append({**values, **of_clock(clock), "drop": drop, "params": indices})
    packed = {index[id(key)] if isinstance(key, Tensor) else key: entry for key, entry in entries.items()}
    return {"state": packed, "param_groups": packed_groups}


def _plain(name: str, value: Any) -> Any:
    try:
        return value if isinstance(value, Tensor) else plain(name, value)
    except TypeError:
        return value  # what the user put into a group is the user's to save


def check(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    clock: Clock,
    rule_class: type[Rule],
    active_state: bool = False,
) -> Loaded:
    """Check a checkpoint against the groups it is to be loaded into. ``active_state``: as in the constructor.

    Raises:
        TypeError, ValueError: naming the entry that is missing, extra, of another shape or of a value that cannot be.
    """
    for name in ("state", "param_groups"):
        if name not in state_dict:
            raise ValueError(f"the checkpoint must have an entry {name!r}, got {shown(list(state_dict))}")
    saved_groups, saved_state = state_dict["param_groups"], state_dict["state"]
    _check_type("state", saved_state, Mapping)
    _check_type("param_groups", saved_groups, Sequence)
    if len(saved_groups) != len(groups):
        raise ValueError(
            f"the checkpoint must have {len(groups)} param groups like the optimizer, got {len(saved_groups)}"
        )
    loaded = [_group(g, saved, group) for g, (saved, group) in enumerate(zip(saved_groups, groups, strict=True))]
    _settle_names(saved_groups, groups, loaded)
    with_params = [{**values, "params": group["params"]} for values, group in zip(loaded, groups, strict=True)]
    for group in with_params:
        validate.group_options(group, rule_class)
        if active_state:
            compact.check_group(group)
    validate.all_groups(with_params)
    owners: dict[Any, tuple[Tensor, Rule]] = {}
    for saved, group in zip(saved_groups, with_params, strict=True):
        rule = rule_class.of(group)
        for index, param in zip(saved["params"], group["params"], strict=True):
            if index in owners:
                raise ValueError(f"the checkpoint's param groups must list parameter {shown(index)} once, got it twice")
            owners[index] = param, rule
    entries: dict[Tensor, tuple[Mapping[str, Any], Rule]] = {}
    for index, entry in saved_state.items():
        if index not in owners:
            raise ValueError(
                f"the checkpoint has state for parameter {shown(index)}, which none of its param groups lists"
            )
        param, rule = owners[index]
        entry = _entry(index, entry, param, rule, active_state)
        if entry:
            entries[param] = entry, rule
    return Loaded(loaded, entries, _clock(saved_groups, entries, clock))


def warn_of_other_policies(groups: Sequence[Mapping[str, Any]], loaded: Sequence[Mapping[str, Any]]) -> None:
    """Who constructs with another p before resuming may expect it to be used."""
    for mine, saved in zip(groups, loaded, strict=True):
        old, new = mine["drop"], saved["drop"]
        if (old and old.to_state()) != (new and new.to_state()):
            warnings.warn(
                f"the checkpoint's drop={new!r} replaces drop={old!r} of the constructor. To go on with another "
                "policy, set group['drop'] after loading",
                UserWarning,
                stacklevel=4,  # who calls load_state_dict, which torch wraps
            )
            return


def _check_type(name: str, value: Any, wanted: type) -> None:
    if not isinstance(value, wanted) or isinstance(value, str):
        raise TypeError(f"the checkpoint's {name} must be a {wanted.__name__.lower()}, got {type(value)}")


def _group(g: int, saved: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """The group as it will be: what the checkpoint lacks stays as it is."""
    _check_type(f"param group {g}", saved, Mapping)
    _check_type(f"params of group {g}", saved.get("params"), Sequence)
    count = len(group["params"])
    if len(saved["params"]) != count:
        raise ValueError(
            f"the checkpoint's param group {g} must have {count} parameters like the optimizer's, "
            f"got {len(saved['params'])}"
        )
    names = saved.get("param_names", [])
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"the checkpoint's param_names of group {g} must be a list of names, got {shown(names)}")
    _check_stream(g, saved)
    policy = policy_from_state(saved.get("drop", group["drop"]), group["drop"])
    # a StaticMask's masks are not to be copied, and the clock is kept elsewhere
    skipped = {"params", "drop", STREAM, *ENTRIES}
    for name, value in saved.items():
        _check_plain(g, str(name), value, name in group)
    values = {k: copy.deepcopy(v) for k, v in saved.items() if k not in skipped}
    kept = {k: v for k, v in group.items() if k not in skipped}
    return {**kept, **values, "drop": policy}


def _settle_names(
    saved_groups: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], loaded: Sequence[dict[str, Any]]
) -> None:
    """Let names stand with the parameters that they name, where a checkpoint has the optimizer's in another order.

    torch.distributed.checkpoint lists parameters by name and has put all but param_names into the optimizer's order
    and groups; of groups that were joined since it has one's names. Elsewhere state goes by position. Raises
    ValueError if it would go to other parameters than its own, and if a group has not a name for each parameter.
    """
    by_name = all(isinstance(param, str) for saved in saved_groups for param in saved["params"])
    own = [
        group.get("param_names", saved["params"] if by_name else [])
        for group, saved in zip(groups, saved_groups, strict=True)
    ]
    mine = [canonical_name(name) for names in own for name in names]
    theirs = [canonical_name(name) for values in loaded for name in values.get("param_names", [])]
    if by_name and theirs and (set(mine) <= set(theirs) or set(theirs) <= set(mine)):
        for values, names in zip(loaded, own, strict=True):
            values["param_names"] = list(names)
        return
    for g, (values, group) in enumerate(zip(loaded, groups, strict=True)):
        names, count = values.get("param_names"), len(group["params"])
        if names is not None and len(names) != count:
            raise ValueError(f"the checkpoint's param_names of group {g} must have {count} names, got {shown(names)}")
    if mine != theirs and sorted(mine) == sorted(theirs):
        first, second = next(pair for pair in zip(mine, theirs, strict=True) if pair[0] != pair[1])
        raise ValueError(
            "the checkpoint's param_names must be in the optimizer's order, since state goes by position, got "
            f"{second!r} in the place of {first!r}: construct with parameters in the checkpoint's order, or bring the "
            "checkpoint into this one by register_load_state_dict_pre_hook"
        )


def _check_stream(g: int, saved: Mapping[str, Any]) -> None:
    """A checkpoint of a masked optimizer must be of this version: its masks would silently be others."""
    if ("draw" in saved or STREAM in saved) and not _is_version(saved.get(STREAM)):
        raise ValueError(
            f"the checkpoint's {STREAM} of group {g} must be {mask_stream.VERSION}, the version that this package "
            f"draws masks by, got {shown(saved.get(STREAM))}: resumed under another version its masks would be others"
        )


def _is_version(value: Any) -> bool:
    return is_int(value) and value == mask_stream.VERSION


def _check_plain(g: int, name: str, value: Any, known: bool) -> None:
    """A tensor among a group's values is one number where the optimizer reads it, and holds its own elements: one of
    four bytes may stand for terabytes, which a copy would allocate."""
    if not isinstance(value, Tensor):
        return
    if value.layout is not torch.strided or value.is_meta or validate.expanded(value) or (known and value.numel() != 1):
        wanted = "one number" if known else "a dense tensor with memory of its own"
        raise ValueError(f"the checkpoint's {name} of group {g} must be {wanted}, got {shown(value)}")
    validate.whole_memory(f"the checkpoint's {name} of group {g}", value)


def _entry(index: Any, entry: Any, param: Tensor, rule: Rule, active_state: bool) -> dict[str, Any]:
    """One parameter's saved state, with torch's ways filled in. Empty: it never had a step."""
    _check_type(f"state of parameter {index!r}", entry, Mapping)
    entry = {name: value for name, value in entry.items() if value is not None}
    counts = entry.pop(block_steps.NAME, None)
    if isinstance(counts, Tensor) and counts.dtype.is_floating_point:
        counts = None  # a torch optimizer has cast them, and trained without counting
    if "step" not in entry and rule.steps_may_be_unknown:
        if entry:  # of an optimizer that keeps no count: this is not its first step
            entry["step"] = 1.0
    if not entry:
        return {}
    # momentum or amsgrad may have been set after the last step: what they add begins with the next one
    expected = {"step", *(name for name in rule.states if name in entry or name in type(rule)().states)}
    if compact.is_compact(entry):
        if not active_state:
            raise ValueError(
                f"the checkpoint's state of parameter {index!r} is of an optimizer with active_state=True, which has "
                "moments for active elements only: construct this one with active_state=True, got False"
            )
        expected.add(compact.ACTIVE)
    extra = set(entry) - expected - set(rule.all_states)
    for problem, names in (("lacks", expected - set(entry)), ("has an extra", extra)):
        if names:
            raise ValueError(
                f"the checkpoint's state of parameter {index!r} {problem} entry {sorted(map(str, names))[0]!r}; "
                f"under {rule} it must have {', '.join(sorted(expected))}"
            )
    if compact.is_compact(entry):
        compact.check_saved(lambda name: f"the checkpoint's {name} of parameter {index!r}", entry, param, rule)
        return entry
    state.check_step(f"the checkpoint's step of parameter {index!r}", entry["step"])
    for name in rule.all_states:
        if name in entry:
            state.check_tensor(f"the checkpoint's {name} of parameter {index!r}", entry[name], param)
    if counts is not None:
        state.check_block_steps(f"the checkpoint's {block_steps.NAME} of parameter {index!r}", counts, param)
        entry[block_steps.NAME] = counts
    return entry


def _clock(
    saved_groups: Sequence[Mapping[str, Any]], entries: Mapping[Tensor, tuple[Mapping[str, Any], Rule]], clock: Clock
) -> Clock:
    # torch.distributed.checkpoint leaves a group empty whose parameters were saved in that of others
    g, saved = next(((g, group) for g, group in enumerate(saved_groups) if "draw" in group), (0, {}))
    if saved:
        missing = [name for name in ENTRIES if name not in saved]
        if missing:
            raise ValueError(
                f"the checkpoint's param group {g} has a draw, but lacks {missing[0]!r}; it must have both"
            )
        return Clock.from_state(saved, clock.steps_per_epoch)
    steps = [torch.as_tensor(entry["step"], device="cpu").reshape(-1).tolist() for entry, _ in entries.values()]
    draw = max((int(step) for of_entry in steps for step in of_entry), default=0)
    check_int("the checkpoint's largest step, which stands in for the draw,", draw, 0, mask_stream.WORD)
    return Clock.from_state({**clock.state(), "draw": draw})
