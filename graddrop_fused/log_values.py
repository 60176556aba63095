"""What a training log should hold of the masks: a few numbers by name, for any tool that writes logs."""

from .active_share import active_share
from .checks import is_number
from .groups import Layers, policy_of
from .masked import MaskedOptimizer
from .numbers import rows_at
from .policies import Policy
from .schedules import Schedule
from .skip import unwrap


def log_values(optimizer: MaskedOptimizer) -> dict[str, float]:
    """Of the coming step, over the parameters that have a policy. {} if none has, or the epoch is not known yet.

    Returns:
        graddrop_active: the share of elements that is kept, as it is expected of the policy's numbers.
        graddrop_p: the drop probability, for policies that have one; with an annealed one, that of now.
        graddrop_layers_dropped: how many layers are dropped as a whole, for policies that decide by layer.
        graddrop_draw: steps taken. graddrop_epoch: the epoch, if anybody told it.
    """
    optimizer = unwrap(optimizer)
    groups, clock = optimizer.param_groups, optimizer._clock
    clock.draw = optimizer.draw
    policies = [policy_of(group) for group in groups]
    given = [policy for policy in policies if policy is not None]
    if not given or any(policy.needs_epoch for policy in given) and optimizer.epoch is None:
        return {}
    layers = Layers.of(groups)
    dropped = {id(p) for p in optimizer.dropped_layers()}
    kept, weighted_p, with_p, total = 0.0, 0.0, 0, 0
    dropped_layers = set()
    rows = rows_at(groups, layers, clock, clock.next_draw())
    for group, policy, layer, (row, _) in zip(groups, policies, layers.of_group, rows, strict=True):
        if policy is None:
            continue
        numel = sum(p.numel() for p in group["params"])
        total += numel
        kept += numel * active_share(group, policy, row, dropped)
        if policy.layerwise and any(id(p) in dropped for p in group["params"]):
            dropped_layers.add(layer)
        p = _p_now(policy, clock.draw, optimizer.epoch)
        if p is not None:
            with_p, weighted_p = with_p + numel, weighted_p + p * numel
    values = {"graddrop_active": kept / max(total, 1), "graddrop_draw": optimizer.draw}
    if with_p:
        values["graddrop_p"] = weighted_p / with_p
    if any(policy.layerwise for policy in given):
        values["graddrop_layers_dropped"] = len(dropped_layers)
    if optimizer.epoch is not None:
        values["graddrop_epoch"] = optimizer.epoch
    return values


def _p_now(policy: Policy, draw: int, epoch: int | None) -> float | None:
    anneal, p = getattr(policy, "anneal", None), getattr(policy, "p", None)
    if not isinstance(anneal, Schedule):
        return p if is_number(p) else None  # a policy of the user's own may mean something else by it
    tick = draw if anneal.by == "step" else epoch
    return None if tick is None else float(anneal.p(min(tick, anneal.length - 1)))  # the last one holds for good
