"""Param groups as masks see them: members and their stream ids, layers, policies and effects, the user's own masks."""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import shown
from .contract import Effect, Shard
from .names import canonical_name, check_distinct, stream_id
from .policies import EFFECTS, Policy, StaticMask
from .shards import shard_of, whole_shape

Group = dict[str, Any]


@dataclass(frozen=True)
class Member:
    """One parameter as the groups know it."""

    param: Tensor
    group: int
    index: int  # in its group
    given_name: str | None  # as the user gave it
    stream_id: int

    @property
    def name(self) -> str | None:
        return None if self.given_name is None else canonical_name(self.given_name)

    @property
    def called(self) -> str:
        """What errors call it: its name, or (group, index)."""
        return repr(self.given_name or (self.group, self.index))

    def shard(self) -> Shard:
        """Where its local part lies. Raises ValueError if that cannot be known."""
        try:
            return shard_of(self.param)
        except ValueError as error:
            raise ValueError(f"parameter {self.called} {error}") from None


def members(groups: Sequence[Mapping[str, Any]], only: Container[int] | None = None) -> list[Member]:
    """All parameters in order over all groups. Raises ValueError on names with colliding stream ids, and where they
    are not as many as the parameters.

    ``only``: ids of those that are asked for, of groups whose names are known to be distinct.
    """
    found: list[Member] = []
    before = 0
    for g, group in enumerate(groups):
        names = group.get("param_names", [None] * len(group["params"]))
        if len(names) != len(group["params"]):  # changed by hand
            raise ValueError(
                f"param_names of group {g} must have a name for each of its {len(group['params'])} parameters, got "
                f"{len(names)}: change both lists together, or add a group by add_param_group()"
            )
        for index, (param, name) in enumerate(zip(group["params"], names, strict=True)):
            if only is None or id(param) in only:
                number = before + index if name is None else stream_id(name)
                found.append(Member(param, g, index, name, number))
        before += len(group["params"])
    if only is None:
        check_distinct("parameters", ((m.given_name or f"number {i}", m.stream_id) for i, m in enumerate(found)))
    return found


@dataclass(frozen=True)
class Layers:
    """The layers of all groups, in order of first appearance. A group without ``group["layer"]`` is one by itself."""

    of_group: tuple[int, ...]  # each group's layer number
    stream_ids: tuple[int, ...]  # each layer's: of its name, or its group's position

    @property
    def count(self) -> int:
        return len(self.stream_ids)

    @classmethod
    def of(cls, groups: Sequence[Mapping[str, Any]]) -> "Layers":
        keys = [position if g.get("layer") is None else g["layer"] for position, g in enumerate(groups)]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        ids = [key if isinstance(key, int) else stream_id(key) for key in numbers]
        check_distinct("layers", zip(map(str, numbers), ids, strict=True))
        return cls(tuple(numbers[key] for key in keys), tuple(ids))


def policy_of(group: Mapping[str, Any]) -> Policy | None:
    """Raises TypeError if what stands there, which may have been set just now, is none."""
    policy = group.get("drop")
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(
            "drop must be None or a policy such as GradDrop(p=0.1), or policy('graddrop:p=0.1') made from a text, got "
            f"{shown(policy)}"
        )
    return policy


def shown_policies(groups: Sequence[Mapping[str, Any]]) -> str:
    """The policies that occur, for an error's text."""
    return ", ".join(dict.fromkeys(repr(policy_of(group)) for group in groups))


def effect_of(group: Mapping[str, Any]) -> Effect:
    """The group's effect; None is its policy's default. Raises TypeError or ValueError if either cannot be."""
    effect, policy = group.get("effect"), policy_of(group)
    if effect is not None and (not isinstance(effect, str) or effect not in EFFECTS):
        raise ValueError(f"effect must be None or one of {', '.join(map(repr, EFFECTS))}, got {shown(effect)}")
    if effect is None:
        effect = "gradient" if policy is None else policy.default_effect
    return Effect[effect.upper()]


def rounds_stochastically(group: Mapping[str, Any]) -> bool:
    return group.get("rounding") == "stochastic"


def is_layerwise(group: Mapping[str, Any]) -> bool:
    policy = policy_of(group)
    return policy is not None and policy.layerwise


def block_of(group: Mapping[str, Any], param: Tensor) -> int:
    """Elements of ``param`` that share a decision; 1: each has its own."""
    policy = policy_of(group)
    if policy is None:
        return 1
    if policy.block != "row":
        return int(policy.block)
    shape = whole_shape(param)
    return max(1, math.prod(shape[1:])) if len(shape) > 1 else 1


def blocks_of(group: Mapping[str, Any], param: Tensor) -> int:
    """How many blocks the whole of ``param`` has that count their own steps; 0: they step alike, or it has none."""
    block = block_of(group, param)
    if block == 1 or effect_of(group) != Effect.FREEZE:
        return 0
    return -(-math.prod(whole_shape(param)) // block)


def static_mask(group: Mapping[str, Any], member: Member) -> Tensor | None:
    """The user's mask of a whole parameter under StaticMask. A parameter that is left out keeps everything."""
    policy = policy_of(group)
    if not isinstance(policy, StaticMask):
        return None
    mask = policy.mask_of(member.name, member.index, len(group["params"]))
    shape = whole_shape(member.param)
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device="cpu")
    if mask.shape != shape:
        raise ValueError(
            f"StaticMask's mask of parameter {member.called} must have its whole shape {shape}, got {tuple(mask.shape)}"
        )
    return mask


def own_rescale_of(group: Mapping[str, Any], mask: Tensor | None) -> float:
    """1/q of a StaticMask with rescale=True: q is the share that its parameter keeps."""
    policy = policy_of(group)
    if mask is None or not isinstance(policy, StaticMask) or not policy.rescale or not mask.any():
        return 1.0
    return mask.numel() / int(mask.sum())
