"""The state that a rule keeps per parameter: made, adopted from what stands in optimizer.state, restored."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import block_steps, validate
from .checks import shown
from .groups import Member
from .rules import Rule
from .shards import is_dtensor, like, local, place_problem

Entry = dict[str, Any]


def dtype_of(param: Tensor, state_dtype: torch.dtype | None) -> torch.dtype:
    """The state's dtype: the parameter's unless told otherwise, but float32 for float16, whose squares underflow."""
    if param.dtype == torch.float64:
        return torch.float64
    return state_dtype or (torch.float32 if param.dtype == torch.float16 else param.dtype)


def check(called: str, entry: Mapping[str, Any], param: Tensor, rule: Rule) -> None:
    """Raises TypeError or ValueError, naming the tensor, on state that cannot be ``param``'s. Missing is all right."""
    if "step" in entry:
        check_step(f"state 'step' of parameter {called}", entry["step"])
    if block_steps.NAME in entry:
        check_block_steps(f"state {block_steps.NAME!r} of parameter {called}", entry[block_steps.NAME], param)
    for name in rule.states:
        if name in entry:
            check_tensor(f"state {name!r} of parameter {called}", entry[name], param)
            if entry[name].device != param.device:
                raise ValueError(
                    f"state {name!r} of parameter {called} must be on its parameter's device {param.device}, got "
                    f"{entry[name].device}"
                )


def check_tensor(what: str, value: Any, param: Tensor) -> None:
    """A tensor of real floating-point numbers of the parameter's shape, a DTensor where the parameter is one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(value)}")
    if not value.dtype.is_floating_point or value.layout is not torch.strided:
        raise ValueError(f"{what} must be a dense floating-point tensor, got {value.dtype} in layout {value.layout}")
    if value.is_meta and not param.is_meta:
        raise ValueError(f"{what} must have elements, got a meta tensor")
    if value.shape != param.shape:
        raise ValueError(f"{what} must have its parameter's shape {tuple(param.shape)}, got {tuple(value.shape)}")
    problem = place_problem(param, value)
    if problem is not None:
        raise ValueError(f"{what} {problem}")
    validate.whole_memory(what, value)


def check_step(what: str, step: Any) -> None:
    """A count of steps: one whole number of at least 0."""
    if isinstance(step, Tensor):
        unusual = step.layout is not torch.strided or step.is_meta
        if unusual or step.numel() != 1 or step.dtype.is_complex or step.dtype == torch.bool:
            raise ValueError(f"{what} must be one number, got {step.dtype} of shape {tuple(step.shape)}")
        validate.whole_memory(what, step)
        step = step.item()
    if isinstance(step, bool) or not isinstance(step, int | float):
        raise TypeError(f"{what} must be a number, got {shown(step)}")
    if not 0 <= step < math.inf or step != int(step) or step >= 2**53:
        raise ValueError(f"{what} must be a whole number of at least 0, got {shown(step)}")


def check_block_steps(what: str, counts: Any, param: Tensor) -> None:
    """Counts of steps in one dimension, on any device. How many there must be depends on the policy."""
    if not isinstance(counts, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(counts)}")
    if counts.dtype not in (torch.int32, torch.int64) or counts.layout is not torch.strided or counts.dim() != 1:
        raise ValueError(f"{what} must be integers in one dimension, got {counts.dtype} of shape {tuple(counts.shape)}")
    if is_dtensor(counts) or (counts.is_meta and not param.is_meta):
        raise ValueError(f"{what} must be a plain tensor with elements, got {type(counts).__name__} on {counts.device}")
    validate.whole_memory(what, counts)
    if counts.numel() and not counts.is_meta and not 0 <= int(counts.min()) <= int(counts.max()) < 2**31:
        raise ValueError(
            f"{what} must be of at least 0 and below 2**31, got {int(counts.min())} to {int(counts.max())}"
        )


def complete(entry: Mapping[str, Any], param: Tensor, rule: Rule, dtype: torch.dtype, blocks: int = 0) -> Entry:
    """What ``entry`` lacks to be the state of ``param``, and what of it must be cast or laid out anew.

    ``blocks``: how many have a count of their own. Where the entry has another number of counts, all begin at its step.
    """
    found: Entry = {}
    if "step" not in entry or begins(entry, rule):
        found["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
    counts = entry.get(block_steps.NAME)
    if blocks and (counts is None or len(counts) != blocks):
        found[block_steps.NAME] = block_steps.initial({**entry, **found}["step"], blocks, local(param).device)
    for name in rule.states:
        old = entry.get(name)
        if old is None:
            found[name] = like(param, dtype).zero_()
        elif old.dtype != dtype or local(old).stride() != local(param).stride() or unfit(old, param):
            found[name] = like(param, dtype).copy_(old)
    return found


def begins(entry: Mapping[str, Any], rule: Rule) -> bool:
    """Does the rule keep state, and the entry have none of it, as where SGD gets a momentum in the middle of training?

    It then begins at step 0, as torch's begins with the first gradient.
    """
    return bool(rule.states) and not any(name in entry for name in rule.states)


def unfit(state: Tensor, param: Tensor) -> bool:
    """Is it a DTensor placed otherwise, or are its elements not what stands at its address (a wrapper subclass, a lazy
    sign), or is it an inference tensor outside of inference mode?"""
    if state.is_inference() and not torch.is_inference_mode_enabled():
        return True
    if is_dtensor(param) and not (is_dtensor(state) and state.placements == param.placements):
        return True
    state, param = local(state), local(param)
    return state.is_neg() or (type(param) in validate.ORDINARY and not validate.has_memory(state))


def missing(
    members: Sequence[Member], state: Mapping[Tensor, Entry], rule: Rule, dtype: torch.dtype, blocks: Sequence[int]
) -> list[Entry]:
    """What each member's entry of ``state`` lacks, made before anything changes, since memory may run out.

    ``blocks``: how many of each member have a count of their own.
    """
    return [
        complete(state.get(m.param, {}), m.param, rule, dtype, count) for m, count in zip(members, blocks, strict=True)
    ]


def adopt(
    members: Sequence[Member], state: dict[Tensor, Entry], missing: Sequence[Entry], blocks: Sequence[int]
) -> list[Entry]:
    """Each member's entry of ``state``, completed. ``missing``, ``blocks``: as of :func:`missing`."""
    entries = [state[m.param] for m in members]
    for entry, lacked, count in zip(entries, missing, blocks, strict=True):
        entry.update(lacked)
        if not count:  # counts that stood still meanwhile would be wrong later
            entry.pop(block_steps.NAME, None)
    return entries


def restored(param: Tensor, saved: Mapping[str, Any], rule: Rule, dtype: torch.dtype) -> Entry:
    """A parameter's state from a checkpoint, in the parameter's layout and the state's own dtype.

    torch casts state to the parameter's dtype as it loads it, which would lose bits under another state_dtype. Copies:
    what a checkpoint shares with another optimizer or process stays theirs.
    """
    entry: Entry = {"step": torch.as_tensor(saved["step"], device="cpu").to(torch.float32, copy=True).reshape(())}
    for name in rule.all_states:
        if name in saved:
            entry[name] = like(param, dtype).copy_(saved[name])
    if block_steps.NAME in saved:
        counts = saved[block_steps.NAME]
        entry[block_steps.NAME] = counts.to(local(param).device, block_steps.DTYPE, copy=True)
    return entry
