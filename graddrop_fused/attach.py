"""Masks for any other optimizer: equation 2 of the paper, on the gradients before each of its steps."""

import operator
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from . import dispatch, preview, validate
from .buckets import Bucket, Facts, addresses, make_buckets
from .checks import check_choice, shown
from .clock import ENTRIES, Clock
from .cuda_graph import capturing
from .fakes import check_no_fake_mode
from .groups import Group, Layers, members, policy_of
from .masked import MaskedOptimizer
from .numbers import HostNumbers
from .policies import Policy, policy_from_state
from .rules import MaskOnly
from .shards import local, local_gradient, placed_like
from .step_hooks import once_gradients_are_there
from .tables import group_step

_HANDLE = "_graddrop_handle"
_STEP = Optimizer.profile_hook_step(lambda *_: None).__code__  # type: ignore[attr-defined]  # around every step()
_OF_MASKS = ("drop", "layer")  # of a group's entries, those that are the handle's


def attach(
    optimizer: Optimizer,
    drop: Policy | None = None,
    *,
    seed: int = 0,
    steps_per_epoch: int | None = None,
    backend: str = "auto",
) -> "MaskHandle":
    """Mask the gradients of ``optimizer`` in place, in one fused pass before each of its steps.

    Gradients that a closure makes inside step() are masked as they are made, with one mask for all calls of a step.

    Args:
        optimizer: any torch optimizer (Muon, Adafactor, an 8-bit Adam), or Accelerate's wrapper of one. A group's own
            ``group["drop"]`` wins over ``drop``; ``group["layer"]`` names its layer. Both move into the handle, so that
            the optimizer's own checkpoints stay plain and do not change masks when they are loaded. Set later, they
            hold from the next step on. A copy of the optimizer has no masks, since torch copies no hooks.
        drop, seed, steps_per_epoch, backend: as in GradDropAdamW.

    Returns:
        A handle with set_epoch, keep_mask, dropped_layers, state_dict, load_state_dict and remove.

    Raises:
        TypeError, ValueError: naming the argument; nothing has changed then.
    """
    return MaskHandle(optimizer, drop, seed, steps_per_epoch, backend)


@dataclass(frozen=True, eq=False)
class _Own:
    """What a handle has taken over from one of the optimizer's groups."""

    group: Group
    drop: Policy | None = None
    layer: str | None = None
    given: tuple[str, ...] = ()  # those that stood in the group itself

    def with_entries(self) -> "_Own":
        """This, with what stands in the group; itself if that is nothing."""
        found = {name: self.group[name] for name in _OF_MASKS if name in self.group}
        return replace(self, **found, given=tuple({*self.given, *found})) if found else self


class MaskHandle:
    """What :func:`attach` returns. It counts its own draws, 1 first; steps that AMP skips do not count."""

    def __init__(self, optimizer: Optimizer, drop: Policy | None, seed: int, steps_per_epoch: int | None, backend: str):
        check_choice("backend", backend, ("auto", *dispatch.NAMES))
        optimizer = _innermost(optimizer)
        validate.policy(drop, "gradient")
        self._optimizer, self._drop, self._backend = optimizer, drop, backend
        self._own: list[_Own] = []
        self._clock = Clock(seed, steps_per_epoch)
        groups = [self._group(of.with_entries()) for of in self._of_groups()]
        _check(groups)
        validate.policy_is_used(drop, groups)
        validate.warn_of_groups_as_layers(groups)
        self._take_over()
        self._key: list = []
        self._facts: Facts | None = None
        self._buckets: list[Bucket] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        setattr(optimizer, _HANDLE, self)

    @property
    def seed(self) -> int:
        return self._clock.seed

    @property
    def draw(self) -> int:
        """Steps taken; those that AMP skipped do not count."""
        return self._clock.draw

    @property
    def epoch(self) -> int | None:
        """The epoch that the coming step belongs to; None if nobody told."""
        return self._clock.epoch_at(self._clock.draw + 1)

    def set_epoch(self, epoch: int) -> None:
        """As GradDropAdamW.set_epoch."""
        self._clock.set_epoch(epoch)

    def keep_mask(self, param: Tensor) -> Tensor:
        """As GradDropAdamW.keep_mask."""
        return preview.keep_mask(self.groups, self._clock, param)

    def dropped_layers(self) -> list[Tensor]:
        """As GradDropAdamW.dropped_layers."""
        return preview.dropped_layers(self.groups, self._clock)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings: seed, draw, epoch, steps_per_epoch and each group's policy."""
        policies = [policy_of(group) for group in self.groups]
        return {**self._clock.state(), "policies": [policy and policy.to_state() for policy in policies]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises TypeError or ValueError, changing nothing, on a state with missing or extra entries, or bad values."""
        groups, expected = self.groups, {*ENTRIES, "policies"}
        if not isinstance(state, Mapping) or not isinstance(state.get("policies", []), Sequence):
            raise TypeError(f"state must be a dict as state_dict() makes it, got {shown(state)}")
        if set(state) != expected or len(state["policies"]) != len(groups):
            raise ValueError(
                f"state must have {', '.join(sorted(expected))}, with {len(groups)} policies, got {sorted(state)}"
            )
        loaded = [policy_from_state(saved, policy_of(g)) for saved, g in zip(state["policies"], groups, strict=True)]
        _check([{**group, "drop": policy} for group, policy in zip(groups, loaded, strict=True)])
        self._clock = Clock.from_state(state, self._clock.steps_per_epoch)
        self._own = [replace(of, drop=policy) for of, policy in zip(self._own, loaded, strict=True)]

    def remove(self) -> None:
        """Leave the optimizer as it was before attach(). Calling it again does nothing."""
        if getattr(self._optimizer, _HANDLE, None) is not self:
            return
        for hook in self._hooks:
            hook.remove()
        delattr(self._optimizer, _HANDLE)
        for of in self._of_groups():
            of.group.update({name: getattr(of, name) for name in of.given if name not in of.group})

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a handle of attach() is neither copied nor pickled: attach() to the copy of its optimizer, and give that "
            "handle this one's state_dict()"
        )

    # Groups

    @property
    def groups(self) -> list[Group]:
        """The optimizer's groups, with what a mask needs and nothing of the optimizer's own arithmetic."""
        self._take_over()
        return [self._group(of) for of in self._own]

    def _take_over(self) -> None:
        """Move groups' drop and layer into the handle: of groups that were added since, and entries set since, too.

        Raises TypeError or ValueError, changing nothing, on what masks cannot take.
        """
        own = [of.with_entries() for of in self._of_groups()]
        if len(own) == len(self._own) and all(map(operator.is_, own, self._own)):
            return
        _check([self._group(of) for of in own])
        for of in own:
            for name in _OF_MASKS:
                of.group.pop(name, None)
        self._own = own

    def _of_groups(self) -> "list[_Own]":
        """What is known of each of the optimizer's groups. A group is its dict."""
        known = {id(of.group): of for of in self._own}
        return [known.get(id(group)) or _Own(group, self._drop) for group in self._optimizer.param_groups]

    def _after_load(self, optimizer: Optimizer) -> None:
        """A checkpoint brings new dicts, in the places of the old ones; what stands in them is not what masks go by."""
        for group in optimizer.param_groups:
            for name in _OF_MASKS:
                group.pop(name, None)
        self._own = [replace(of, group=group) for of, group in zip(self._own, optimizer.param_groups, strict=False)]

    @staticmethod
    def _group(of: "_Own") -> Group:
        kept: Group = {name: of.group[name] for name in ("params", "param_names") if name in of.group}
        return {**kept, "drop": of.drop, "layer": of.layer, "effect": "gradient"}

    # A step

    @torch.compiler.disable
    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if capturing():
            raise RuntimeError(
                "attach() must not mask under CUDA graph capture: every replay would draw the same mask. Use "
                "GradDropAdamW(capturable=True), or leave the optimizer's step out of the graph"
            )
        if _within_its_step(optimizer, sys._getframe()):
            return None
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return None
        return once_gradients_are_there(args, kwargs, partial(self._mask, self._clock.next_draw()))

    @torch.no_grad()
    def _mask(self, draw: int) -> None:
        check_no_fake_mode()
        groups = self.groups
        numbers = HostNumbers(groups, Layers.of(groups))
        _, rows, packed = numbers.of_step(self._clock, draw)
        buckets = self._gather(groups)
        try:
            for bucket in buckets:
                bucket.pack(packed, self.seed)
                steps = {g: group_step(groups[g], bucket.rule, *rows[g]) for g in bucket.by_group}
                bucket.fill(steps, [1.0] * len(bucket.members))
            launches = [b.backend.prepare(b.batch, b.rule, seed=self.seed) for b in buckets]
            for bucket, launch in zip(buckets, launches, strict=True):
                launch()
                absent = set(bucket.absent)
                written = [grad for i, grad in enumerate(bucket.batch.params) if i not in absent]
                torch.autograd.graph.increment_version(written)
            self._clock.draw = draw
        finally:
            for bucket in buckets:
                bucket.batch.params, bucket.batch.grads = [], []  # else zero_grad() would free nothing

    def _gather(self, groups: list[Group]) -> list[Bucket]:
        """Buckets that hold the gradients of now. A gradient that is missing keeps its place."""
        every = [m for m in members(groups)]
        wanted = [i for i, m in enumerate(every) if policy_of(groups[m.group]) is not None]
        for i in wanted:
            validate.gradient(every[i], every[i].param.grad)
        key: list = [
            (i, id(m.param), m.param.shape, m.stream_id, policy_of(groups[m.group]), groups[m.group]["layer"])
            for i, m in ((i, every[i]) for i in wanted)
        ]
        key.append(torch.is_inference_mode_enabled())  # what is made in it must not be updated outside
        params = [local(every[i].param) for i in wanted]
        grads = [every[i].param.grad for i in wanted]
        dtypes = {i: every[i].param.dtype if g is None else g.dtype for i, g in zip(wanted, grads, strict=True)}
        fits = key == self._key and self._facts is not None and self._facts.hold(params)
        fits = fits and all(
            grad is None or grad.dtype == bucket.grad_dtype
            for bucket in self._buckets
            for grad in (every[i].param.grad for i in bucket.positions)
        )
        if not fits:
            rule = MaskOnly()
            self._buckets = make_buckets(
                groups,
                every,
                wanted,
                lambda i: (rule, dtypes[i], None),
                lambda p: dispatch.choose_for(self._backend, p),
                Bucket,
            )
            self._key, self._facts = key, Facts(params)
        taken: set[int] = set()
        for bucket in self._buckets:
            found = [_in_place(every[i].param, taken) for i in bucket.positions]
            bucket.absent = [k for k, grad in enumerate(found) if grad is None]
            described = [
                _in_its_place(p, bucket.grad_dtype) if g is None else g
                for p, g in zip(bucket.params, found, strict=True)
            ]
            bucket.batch.params = described
            bucket.batch.grads = cast(list[Tensor | None], described)  # one list: the rule "mask" writes gradients
        return self._buckets


def _innermost(optimizer: Any) -> Optimizer:
    """The torch optimizer inside wrappers such as Accelerate's, if masks can be attached to it."""
    optimizer = inside_wrappers(optimizer)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer)}")
    if isinstance(optimizer, MaskedOptimizer):
        raise TypeError(f"optimizer must not be a {type(optimizer).__name__}, which masks by itself: give it drop=")
    if hasattr(optimizer, _HANDLE):
        raise ValueError(
            "optimizer must not have masks attached already (gradients would be masked and scaled twice): call its "
            "handle's remove() first"
        )
    return optimizer


def inside_wrappers(source: Any) -> Any:
    """What stands inside wrappers of optimizers such as Accelerate's; ``source`` itself if it is none."""
    while isinstance(inner := getattr(source, "optimizer", None), Optimizer):
        if isinstance(source, MaskedOptimizer) and not isinstance(inner, MaskedOptimizer):
            break  # it has another one as its own; Lightning's wrapper of a masked optimizer is of its class, too
        source = inner
    return source


def handle_of(optimizer: Optimizer) -> MaskHandle | None:
    """What :func:`attach` returned for this optimizer, if its masks are on."""
    return getattr(optimizer, _HANDLE, None)


def _within_its_step(optimizer: Optimizer, frame: FrameType | None) -> bool:
    """Is this the step of a base class, called by the optimizer's own? torch calls hooks around both, or not, as other
    optimizers of the base class were made before; a step is masked once."""
    steps = 0
    while frame is not None:
        steps += frame.f_code is _STEP and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return steps > 1


def _check(groups: list[Group]) -> None:
    for group in groups:
        validate.policy(policy_of(group), "gradient")
        validate.layer(group["layer"])
    validate.listed_once([(None, p) for group in groups for p in group["params"]], [])
    validate.all_groups(groups)
    for member in members(groups):
        masked = policy_of(groups[member.group]) is not None and member.param.requires_grad
        if masked and member.param.dtype not in validate.PARAM_DTYPES:
            raise ValueError(
                f"parameter {member.called} must be float32, bfloat16, float16 or float64 to be masked, got "
                f"{member.param.dtype}; give it a group with drop=None"
            )


def _in_its_place(param: Tensor, dtype: torch.dtype | None) -> Tensor:
    """What stands for a missing gradient of ``param``: backends describe it, and leave it alone."""
    part = local(param).detach()
    return part if part.dtype == dtype else torch.empty_like(part, dtype=dtype)


def _in_place(param: Tensor, taken: set[int]) -> Tensor | None:
    """The gradient of ``param``, where masks reach it: of its own memory (one that is expanded, lazy, or another
    parameter's as well is copied), and lying like its parameter (a DTensor that does not is put there first)."""
    if param.grad is None:
        return None
    grad = placed_like(param, param.grad)
    part = local(grad)
    place = addresses([part])[0] if part.numel() else 0
    lazy = part.is_neg() or part.is_conj() or not validate.has_memory(part)
    if lazy or validate.overlaps_itself(part) or validate.expanded(part) or place in taken:
        grad = grad.clone(memory_format=torch.contiguous_format)
    if grad is not param.grad:
        param.grad = grad
    if place:
        taken.add(place)
    return local_gradient(param, grad)
