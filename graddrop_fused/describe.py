"""What a policy does to each layer now: a table for people."""

import dataclasses
import html
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch.optim import Optimizer

from .active_share import active_share, tensors
from .attach import handle_of, inside_wrappers
from .groups import effect_of, policy_of
from .masked import MaskedOptimizer
from .numbers import row_at
from .policies import Policy, StaticMask

Group = Mapping[str, Any]

HEADER = ("layer", "parameters", "policy", "effect", "active now")


class LayerRow(NamedTuple):
    """One line: the parameters of a layer that share policy and effect."""

    layer: str
    parameters: int  # elements
    policy: str  # "none" where everything is kept
    effect: str
    active: float | None  # share of the elements that the coming step keeps; None if it depends on an unknown epoch


class Description:
    """What :func:`describe` returns: ``rows`` in the order of the groups, and their ``total``."""

    def __init__(self, rows: Sequence[LayerRow]):
        self.rows = list(rows)
        known = [row for row in self.rows if row.active is not None]
        elements = sum(row.parameters for row in self.rows)
        active = sum(row.parameters * (row.active or 0.0) for row in known) / max(1, elements)
        self.total = LayerRow("all", elements, "", "", active if len(known) == len(self.rows) else None)

    def __str__(self) -> str:
        table = [HEADER, *map(_cells, [*self.rows, self.total])]
        widths = [max(len(line[column]) for line in table) for column in range(len(HEADER))]
        numbers = ("parameters", "active now")
        return "\n".join(
            "  ".join(
                cell.rjust(width) if name in numbers else cell.ljust(width)
                for name, cell, width in zip(HEADER, line, widths, strict=True)
            ).rstrip()
            for line in table
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(line(_cells(row), "td") for row in self.rows)
        return (
            f"<table><thead>{line(HEADER, 'th')}</thead><tbody>{body}</tbody>"
            f"<tfoot>{line(_cells(self.total), 'th')}</tfoot></table>"
        )


def describe(source: Optimizer | Sequence[Group] | Any) -> Description:
    """Print and return a table: layer, parameters, policy, effect, and the share that the coming step keeps.

    No mask is drawn, so it costs nothing on a large model: shares are the policies' exact keep probabilities. Where
    LayerGradDrop has an optimizer's draw to go by, a layer is shown as kept (100 %) or dropped (0 %).

    Args:
        source: a GradDropAdamW (or its kin), what attach() returned or the optimizer that it was given, Accelerate's
            wrapper of either, or groups as param_groups() makes them. Groups alone are shown at their first step, in
            epoch 0.

    Returns:
        a :class:`Description`. Where people type, at Python's prompt or in a notebook, it is not printed as well: they
        are shown what an expression returns, a notebook's as a table.

    Raises:
        TypeError: if ``source`` has no groups, or is an optimizer without masks.
    """
    source = _innermost(source)
    description = Description(_merged(_rows(source)))
    if not hasattr(sys, "ps1") and "ipykernel" not in sys.modules:  # else the prompt shows it
        print(description)
    return description


def _innermost(source: Any) -> Any:
    """The masked optimizer, or the handle of attach(), inside wrappers such as Accelerate's."""
    inner = inside_wrappers(source)
    if not isinstance(inner, Optimizer) or isinstance(inner, MaskedOptimizer):
        return inner
    handle = handle_of(inner)
    if handle is None:
        raise TypeError(
            "source must be a masked optimizer such as GradDropAdamW, or one that attach() was given, got "
            f"{type(inner).__name__} without masks"
        )
    return handle


def _groups_of(source: Any) -> list[Group]:
    groups = source
    if not isinstance(source, Sequence):
        groups = getattr(source, "param_groups", None) or getattr(source, "groups", None)
    if not isinstance(groups, Sequence) or not all(isinstance(g, Mapping) and "params" in g for g in groups):
        raise TypeError(
            f"source must be an optimizer, a handle of attach(), or a list of parameter groups, got {source!r:.100}"
        )
    return list(groups)


def _rows(source: Any) -> Iterator[LayerRow]:
    """One row a group."""
    groups = _groups_of(source)
    alone = source is groups or isinstance(source, Sequence)
    draw, epoch = (1, 0) if alone else (source.draw + 1, source.epoch)
    layers = [f"group {i}" if g.get("layer") is None else str(g["layer"]) for i, g in enumerate(groups)]
    numbers = {layer: number for number, layer in enumerate(dict.fromkeys(layers))}
    dropped = {id(p) for p in source.dropped_layers()} if _knows_layers(source, groups, epoch) else None
    for group, layer in zip(groups, layers, strict=True):
        policy, effect = policy_of(group), effect_of(group).name.lower()
        share: float | None = 1.0
        if policy is not None and policy.needs_epoch and epoch is None:
            share = None
        elif policy is not None:
            row, _ = row_at(policy, numbers[layer], len(numbers), draw, epoch)
            share = active_share(group, policy, row, dropped)
        yield LayerRow(layer, sum(p.numel() for p in tensors(group)), _brief(policy), effect, share)


def _knows_layers(source: Any, groups: Sequence[Group], epoch: int | None) -> bool:
    """Whether ``source`` can say which layers the coming step drops: it refuses where any policy lacks its epoch."""
    policies = [policy for group in groups if (policy := policy_of(group)) is not None]
    known = epoch is not None or not any(policy.needs_epoch for policy in policies)
    return known and hasattr(source, "dropped_layers") and any(policy.layerwise for policy in policies)


def _merged(rows: Iterator[LayerRow]) -> list[LayerRow]:
    """Rows of one layer that differ in nothing but their elements, as one (weight decay splits groups, too)."""
    merged: dict[tuple, LayerRow] = {}
    for row in rows:
        key = (row.layer, row.policy, row.effect, row.active is None)
        if key in merged:
            other = merged[key]
            elements = row.parameters + other.parameters
            active = None
            if row.active is not None and other.active is not None:
                kept = row.parameters * row.active + other.parameters * other.active
                active = kept / max(1, elements)
            row = row._replace(parameters=elements, active=active)
        merged[key] = row
    return list(merged.values())


def _brief(policy: Policy | None) -> str:
    """A policy without what it leaves at its default."""
    if policy is None:
        return "none"
    if isinstance(policy, StaticMask):
        return f"StaticMask({len(policy.masks)} masks)"
    if not dataclasses.is_dataclass(policy):
        return repr(policy)
    given = [f for f in dataclasses.fields(policy) if f.init and getattr(policy, f.name) != f.default]
    return f"{type(policy).__name__}({', '.join(f'{f.name}={getattr(policy, f.name)!r}' for f in given)})"


def _cells(row: LayerRow) -> tuple[str, ...]:
    active = "epoch unknown" if row.active is None else f"{row.active:.1%}"
    return row.layer, f"{row.parameters:,}", row.policy, row.effect, active
