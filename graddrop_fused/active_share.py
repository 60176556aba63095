"""The share of a group's elements that a step keeps, by its policy's numbers: no mask is drawn for it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import mask_stream
from .contract import Mask
from .names import canonical_name
from .policies import Policy, Row, StaticMask

Group = Mapping[str, Any]


def active_share(group: Group, policy: Policy, row: Row, dropped: set[int] | None) -> float:
    """The share of ``group``'s elements that ``row`` of its policy keeps: exact, or the probability where it is drawn.

    ``dropped``: ids of the parameters of dropped layers; None if no layers are drawn yet.
    """
    if row.mask == Mask.DROP:
        return 0.0
    if row.mask == Mask.PACKED and isinstance(policy, StaticMask):
        return _static_share(group, policy)
    if row.mask == Mask.LAYER and dropped is not None:
        return float(not any(id(p) in dropped for p in tensors(group)))
    if row.mask in (Mask.KEEP, Mask.GAUSSIAN):
        return 1.0
    return 1 / mask_stream.rescale(row.span)


def tensors(group: Group) -> list[Tensor]:
    """The parameters of a group, whether it is an optimizer's or lists (name, parameter) pairs."""
    return [p[1] if isinstance(p, tuple) else p for p in group["params"]]


def _static_share(group: Group, policy: StaticMask) -> float:
    params, kept = tensors(group), 0
    for index, (param, name) in enumerate(zip(params, _names(group), strict=True)):
        mask = policy.mask_of(name, index, len(params))
        kept += param.numel() if mask is None else int(mask.sum())
    return kept / max(1, sum(p.numel() for p in params))


def _names(group: Group) -> list[str | None]:
    given = group.get("param_names") or [p[0] if isinstance(p, tuple) else None for p in group["params"]]
    return [None if name is None else canonical_name(name) for name in given]
