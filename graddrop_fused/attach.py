"""Masks for any other optimizer: equation 2 of the paper, as a step pre-hook."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from . import dispatch, preview, validate
from .capture import capturing
from .checkpoint import CLOCK
from .clock import Clock
from .plan import Bucket, Group, Layers, host_tables, make_buckets, members, packed_groups, policy_of, rows_at
from .policies import Policy, policy_from_state
from .shards import local, local_gradient, placed_like

_NO_ARITHMETIC = {
    "lr": 0.0,
    "betas": (0.0, 0.0),
    "eps": 1.0,
    "weight_decay": 0.0,
    "maximize": False,
    "effect": "gradient",
}


def attach(
    optimizer: Optimizer,
    drop: Policy | None = None,
    *,
    seed: int = 0,
    steps_per_epoch: int | None = None,
    backend: str = "auto",
) -> "MaskHandle":
    """Mask the gradients of ``optimizer`` in place, in one fused pass before each of its steps.

    Args:
        optimizer: any torch optimizer (SGD, Muon, Lion, an 8-bit Adam). A group's own ``group["drop"]`` wins over
            ``drop``; ``group["layer"]`` names its layer.
        drop, seed, steps_per_epoch, backend: as in GradDropAdamW.

    Returns:
        A handle with set_epoch, keep_mask, state_dict, load_state_dict and remove.
    """
    return MaskHandle(optimizer, drop, seed, steps_per_epoch, backend)


class MaskHandle:
    """What :func:`attach` returns. It counts its own draws, 1 first; steps that AMP skips do not count."""

    def __init__(self, optimizer: Optimizer, drop: Policy | None, seed: int, steps_per_epoch: int | None, backend: str):
        dispatch.check_name(backend)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer)}")
        validate.policy(drop, "gradient")
        self._optimizer, self._drop, self._backend = optimizer, drop, backend
        self._loaded: list[Policy | None] = []  # policies from a checkpoint, by group
        self._clock = Clock(seed, steps_per_epoch)
        for group in self._groups():
            validate.policy(policy_of(group), "gradient")
        validate.groups(self._groups())
        self._key: list = []
        self._buckets: list[Bucket] = []
        self._hook = optimizer.register_step_pre_hook(self._mask)

    @property
    def seed(self) -> int:
        return self._clock.seed

    @property
    def draw(self) -> int:
        """Steps taken; those that AMP skipped do not count."""
        return self._clock.draw

    def set_epoch(self, epoch: int) -> None:
        """As GradDropAdamW.set_epoch."""
        self._clock.set_epoch(epoch)

    def keep_mask(self, param: Tensor) -> Tensor:
        """As GradDropAdamW.keep_mask."""
        return preview.keep_mask(self._groups(), self._clock, param)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings: seed, draw, epoch, steps_per_epoch and each group's policy."""
        policies = [policy_of(group) for group in self._groups()]
        return {**self._clock.state(), "policies": [policy and policy.to_state() for policy in policies]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError, changing nothing, on a state with missing or extra entries."""
        groups, expected = self._groups(), {*CLOCK, "policies"}
        if set(state) != expected or len(state["policies"]) != len(groups):
            raise ValueError(
                f"state must have {', '.join(sorted(expected))}, with {len(groups)} policies, got {sorted(state)}"
            )
        current = [policy_of(group) for group in groups]
        loaded = [policy_from_state(saved, now) for saved, now in zip(state["policies"], current, strict=True)]
        for policy in loaded:
            validate.policy(policy, "gradient")
        validate.groups([{**group, "drop": policy} for group, policy in zip(groups, loaded, strict=True)])
        self._clock = Clock.from_state({name: state[name] for name in CLOCK})
        self._loaded = loaded

    def remove(self) -> None:
        """Leave the optimizer as it was before attach()."""
        self._hook.remove()

    def _groups(self) -> list[Group]:
        """The optimizer's groups, with what a mask needs and nothing of the optimizer's own arithmetic."""
        return [
            {
                **{name: group[name] for name in ("params", "param_names", "layer") if name in group},
                **_NO_ARITHMETIC,
                "drop": self._loaded[g] if g < len(self._loaded) else group.get("drop", self._drop),
            }
            for g, group in enumerate(self._optimizer.param_groups)
        ]

    @torch.no_grad()
    def _mask(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if capturing():
            raise RuntimeError(
                "attach() must not mask under CUDA graph capture: every replay would draw the same mask. Use "
                "GradDropAdamW(capturable=True), or leave the optimizer's step out of the graph"
            )
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return
        groups = self._groups()
        rows = rows_at(groups, Layers.of(groups), self._clock, self._clock.draw + 1)
        tables, packed = host_tables(groups, rows), packed_groups(groups, rows)
        buckets = self._gather(groups)
        self._clock.draw += 1
        for bucket in buckets:
            bucket.fill(*tables)
            bucket.use_packed(packed, self.seed)
            bucket.backend.mask_grads(bucket.batch, seed=self.seed)
            bucket.batch.grads = []  # else zero_grad() would free nothing

    def _gather(self, groups: list[Group]) -> list[Bucket]:
        every = members(groups)
        grads = [m.param.grad for m in every]
        for member, grad in zip(every, grads, strict=True):
            validate.gradient(member, grad)
        wanted = [
            i for i, grad in enumerate(grads) if grad is not None and policy_of(groups[every[i].group]) is not None
        ]
        key = [(i, id(every[i].param), grads[i].dtype, policy_of(groups[every[i].group])) for i in wanted]
        if key != self._key:
            self._buckets = make_buckets(
                groups,
                every,
                wanted,
                lambda i: (grads[i].dtype,),
                lambda p: dispatch.choose(self._backend, p.device, p.dtype, p.dim()),
            )
            self._key = key
        for bucket in self._buckets:
            owners = [every[i].param for i in bucket.positions]
            bucket.batch.grads = [local_gradient(param, _in_place(param)) for param in owners]
        return self._buckets


def _in_place(param: Tensor) -> Tensor:
    """The gradient of ``param``, where masks reach it: of its own memory (an expanded one is copied), and lying like
    its parameter (a DTensor that does not is put there first, as the optimizer would)."""
    grad = placed_like(param, param.grad)
    if validate.expanded(local(grad)):
        grad = grad.clone(memory_format=torch.contiguous_format)
    if grad is not param.grad:
        param.grad = grad
    return grad
