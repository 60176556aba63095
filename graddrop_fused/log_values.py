"""What a training log should hold of the masks: a few numbers by name, for any tool that writes logs."""

from .contract import Mask
from .groups import Layers, policy_of
from .mask_stream import HALF
from .masked import MaskedOptimizer
from .numbers import rows_at
from .policies import Policy, StaticMask


def log_values(optimizer: MaskedOptimizer) -> dict[str, float]:
    """Of the coming step, over the parameters that have a policy. {} if none has, or the epoch is not known yet.

    Returns:
        graddrop_active: the share of elements that is kept, as it is expected of the policy's numbers.
        graddrop_p: the drop probability, for policies that have one; with an annealed one, that of now.
        graddrop_layers_dropped: how many layers are dropped as a whole, for policies that decide by layer.
        graddrop_draw: steps taken. graddrop_epoch: the epoch, if anybody told it.
    """
    groups, clock = optimizer.param_groups, optimizer._clock
    clock.draw = optimizer.draw
    masked = [g for g in groups if policy_of(g) is not None]
    if not masked or any(policy_of(g).needs_epoch for g in masked) and optimizer.epoch is None:
        return {}
    layers = Layers.of(groups)
    rows = rows_at(groups, layers, clock, clock.next_draw())
    off = {id(p) for p in optimizer.dropped_layers()}
    kept, weighted_p, with_p, total = 0.0, 0.0, 0, 0
    dropped_layers = set()
    for group, layer, (row, _) in zip(groups, layers.of_group, rows, strict=True):
        policy = policy_of(group)
        if policy is None:
            continue
        numel = sum(p.numel() for p in group["params"])
        total += numel
        if policy.layerwise:
            is_off = any(id(p) in off for p in group["params"])
            kept += 0 if is_off else numel
            dropped_layers |= {layer} if is_off else set()
        else:
            kept += _kept(policy, group, row.span if row.mask in (Mask.ELEMENT, Mask.BLOCK) else HALF)
        p = _p_now(policy, clock.draw, optimizer.epoch)
        if p is not None:
            with_p, weighted_p = with_p + numel, weighted_p + p * numel
    values = {"graddrop_active": kept / max(total, 1), "graddrop_draw": optimizer.draw}
    if with_p:
        values["graddrop_p"] = weighted_p / with_p
    if any(policy_of(g).layerwise for g in masked):
        values["graddrop_layers_dropped"] = len(dropped_layers)
    if optimizer.epoch is not None:
        values["graddrop_epoch"] = optimizer.epoch
    return values


def _kept(policy: Policy, group: dict, span: int) -> float:
    """Elements of ``group`` that are kept, expected where they are drawn."""
    if not isinstance(policy, StaticMask):
        return (span + 1) / (HALF + 1) * sum(p.numel() for p in group["params"])
    names = group.get("param_names", [None] * len(group["params"]))
    masks = [policy.mask_of(name, i, len(names)) for i, name in enumerate(names)]
    return sum(p.numel() if m is None else int(m.sum()) for m, p in zip(masks, group["params"], strict=True))


def _p_now(policy: Policy, draw: int, epoch: int | None) -> float | None:
    anneal = getattr(policy, "anneal", None)
    if anneal is None:
        return getattr(policy, "p", None)
    return anneal.p(draw if anneal.by == "step" else epoch)
