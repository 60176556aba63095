"""Mask policies: which share of the gradient survives, and when its mask is drawn again. Names follow the paper.

A policy is a schedule of :class:`Row` numbers and nothing else: which row is in force (:class:`Index`), when a new mask
is drawn (:class:`Draw`), and a function from index to row. numbers.py evaluates it on the host and on devices.

To add one: subclass :class:`Policy` with a frozen dataclass, check its fields in ``__post_init__``, and give ``row``
(and ``index``, ``draw`` and the class attributes where they differ). It is saved and loaded by its class's name.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from . import mask_stream
from .checks import (
    check_bool,
    check_choice,
    check_int,
    check_nonnegative,
    check_p,
    is_int,
    make_plain,
    plain,
    saved_fields,
    shown,
)
from .contract import Effect, Mask
from .names import canonical_name
from .schedules import Schedule

EFFECTS = tuple(effect.name.lower() for effect in Effect)
MAX_BLOCK = 2**43  # elements that the mask stream has
_MASKS = tuple(Mask)  # made once: an enum takes long to go through


class Row(NamedTuple):
    """What the mask stream needs to know at one moment, besides seed, draw and stream id."""

    mask: Mask
    lo: int = 0
    span: int = mask_stream.HALF
    rescale: float = 1.0
    noise_std: float = 0.0


KEEP = Row(Mask.KEEP)
DROP = Row(Mask.DROP)


class Index(NamedTuple):
    """What moves a policy from row to row: ``by`` counts steps or epochs from 0, row 0 first. After the last of
    ``length`` rows it begins again (``wraps``), or stays there."""

    by: Literal["step", "epoch"] = "step"
    length: int = 1
    wraps: bool = False


class Draw(NamedTuple):
    """What moves a policy's draw (Philox counter word 2), and for how many ticks of it a mask holds.

    By "step" draws count from 1, by "epoch" from 0; by "never" the draw is always 0.
    """

    by: Literal["step", "epoch", "never"] = "step"
    holds: int = 1


class Policy:
    """Base of all policies. The defaults describe a mask that is drawn anew in every step, from one row."""

    registry: ClassVar[dict[str, type["Policy"]]] = {}
    layerwise: ClassVar[bool] = False  # one decision per layer: its stream id is the layer's, not the parameter's
    rows_differ_by_layer: ClassVar[bool] = True  # False: one table on a device for all layers; stands beside `row`
    default_effect: ClassVar[str] = "gradient"
    block: int | str = 1  # elements that share a decision; "row": those of one index of the first dimension
    packed: bool = False  # keep the mask as packed words until it changes

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        Policy.registry[cls.__name__] = cls
        says = next(base for base in cls.__mro__ if not {"row", "rows_differ_by_layer"}.isdisjoint(vars(base)))
        if "rows_differ_by_layer" not in vars(says):  # other rows than those of a base, which may not have differed
            cls.rows_differ_by_layer = True

    def index(self, layers: int) -> Index:
        """Which row is in force, for a model of ``layers`` layers."""
        return Index()

    def draw(self, layers: int) -> Draw:
        """When a new mask is drawn."""
        return Draw()

    def row(self, index: int, layer: int, layers: int) -> Row:
        """The numbers at row ``index`` for layer number ``layer`` of ``layers``."""
        raise NotImplementedError

    def check_effect(self, effect: str) -> None:
        """Raises ValueError if the policy does not go with ``effect``."""

    @property
    def needs_epoch(self) -> bool:
        return "epoch" in (self.index(2).by, self.draw(2).by)

    def to_state(self) -> dict[str, Any]:
        """Plain numbers and strings, for a checkpoint. Raises TypeError on others, and if it is no frozen dataclass."""
        name = type(self).__name__
        state: dict[str, Any] = {"policy": name}
        for f in saved_fields(self):
            value = getattr(self, f.name)
            is_schedule = isinstance(value, Schedule)
            state[f.name] = value.to_state() if is_schedule else plain(f"{name}.{f.name}", value)
        return state

    @classmethod
    def from_options(cls, options: dict[str, Any], current: "Policy | None") -> "Policy":
        """A policy from the fields that :meth:`to_state` saved; ``current`` is the one of the constructor."""
        return cls(
            **{
                name: Schedule.from_state(value) if isinstance(value, dict) and "schedule" in value else value
                for name, value in options.items()
            }
        )


def check_policy(policy: Policy) -> None:
    """Raises TypeError or ValueError, naming it, on what no policy can be: what it counts, its block and its effect."""
    name, index, draw = type(policy).__name__, policy.index(2), policy.draw(2)
    check_choice(f"{name}.index().by", index.by, ("step", "epoch"))
    check_int(f"{name}.index().length", index.length, 1)
    check_choice(f"{name}.draw().by", draw.by, ("step", "epoch", "never"))
    check_int(f"{name}.draw().holds", draw.holds, 1)
    if policy.block != "row":
        check_int(f"{name}.block, where it is not 'row',", policy.block, 1, MAX_BLOCK)
    check_choice(f"{name}.default_effect", policy.default_effect, EFFECTS)


def row_of(policy: Policy, index: int, layer: int, layers: int) -> Row:
    """``policy.row``. Raises TypeError or ValueError, naming it, on numbers that backends take for other masks."""
    row = policy.row(index, layer, layers)
    if _is_ours(policy):  # right by construction, and asked for in every step of a schedule
        return row
    called = f"{type(policy).__name__}.row({index})"
    if not isinstance(row, Row):
        raise TypeError(f"{called} must be a Row, got {shown(row)}")
    if row.mask not in _MASKS:
        raise ValueError(f"{called}.mask must be of contract.Mask, {list(Mask)}, got {shown(row.mask)}")
    if row.mask == Mask.LAYER and not policy.layerwise:
        raise ValueError(f"{called}.mask must not be Mask.LAYER of a policy without layerwise = True, got {row}")
    if row.mask == Mask.PACKED and not isinstance(policy, StaticMask):
        raise ValueError(f"{called}.mask must not be Mask.PACKED but of a StaticMask, which has masks, got {row}")
    check_int(f"{called}.lo", row.lo, 0, mask_stream.HALF)
    check_int(f"{called}.span", row.span, 0, mask_stream.HALF)
    check_nonnegative(f"{called}.rescale", row.rescale)
    check_nonnegative(f"{called}.noise_std", row.noise_std)
    return row


def policy_from_state(state: Any, current: Policy | None) -> Policy | None:
    """Inverse of :meth:`Policy.to_state`. Raises TypeError or ValueError on what no policy saves."""
    if state is None or isinstance(state, Policy):
        return state
    options = dict(state) if isinstance(state, Mapping) else {}
    name = options.pop("policy", None)
    cls = Policy.registry.get(name) if isinstance(name, str) else None
    if cls is None:
        raise ValueError(
            f"the checkpoint's policy must be one of {', '.join(sorted(Policy.registry))} (import the module that "
            f"defines yours before loading), got {shown(state)}"
        )
    return cls.from_options(options, current)


@dataclass(frozen=True)
class GradDrop(Policy):
    """Drops each gradient element with probability p, with a new mask every step.

    Args:
        p: drop probability in [0, 1), rounded to a multiple of 2**-16. anneal: a schedule in place of p.
        rescale: None or True multiplies kept elements by 1/q, q the exact keep probability; False by 1.
        block: 1 decides per element; B, a multiple of 128, per block of B consecutive elements; "row" per index of the
            first dimension, an output feature of a Linear, and per element where there are fewer than two dimensions
            (our extensions).
        distribution: "bernoulli", or "gaussian": no mask, but noise N(1, p / (1 - p)) on every element.
        hold: steps that a mask holds.
    """

    p: float | None = None
    anneal: Schedule | None = None
    rescale: bool | None = None
    block: int | Literal["row"] = 1
    distribution: Literal["bernoulli", "gaussian"] = "bernoulli"
    hold: int = 1

    rows_differ_by_layer: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_p_or_anneal(self)
        _check_rescale(self.rescale)
        _check_block(self.block)
        check_int("hold", self.hold, 1, mask_stream.WORD)
        check_choice("distribution", self.distribution, ("bernoulli", "gaussian"))
        if self.distribution == "gaussian" and self.block != 1:
            raise ValueError(f"block must be 1 with distribution='gaussian', got {self.block!r}")
        if self.distribution == "gaussian" and self.rescale:
            raise ValueError("rescale must be None or False with distribution='gaussian': its noise has mean 1 already")
        make_plain(self, "p", "block", "hold")

    def index(self, layers: int) -> Index:
        return _index_of(self.anneal)

    def draw(self, layers: int) -> Draw:
        return Draw("step", self.hold)

    def row(self, index: int, layer: int, layers: int) -> Row:
        p = _p_at(self, index)
        if self.distribution == "gaussian":
            return Row(Mask.GAUSSIAN, noise_std=(p / (1 - p)) ** 0.5) if p else KEEP
        return _window_row(_mask_of(self.block), mask_stream.bernoulli_window(p), self.rescale is not False)

    def check_effect(self, effect: str) -> None:
        if self.distribution == "gaussian" and effect != "gradient":
            raise ValueError(f"effect must be 'gradient' with distribution='gaussian', got {effect!r}")


@dataclass(frozen=True)
class GradDropEpoch(Policy):
    """Masks that hold for an epoch. Without replacement every element is activated exactly once per cycle.

    Args:
        p: drop probability in [0, 1), rounded to a multiple of 2**-16.
        toggle: False (the paper's GradDrop-Epoch): the active share grows by 1 - p an epoch until all is on.
            True (GradDrop-Epoch-Toggle): each epoch activates its own part and freezes the last one's again.
        replacement: a fresh Bernoulli mask every epoch instead.
        rescale: None or True multiplies kept elements by 1/q, q the share now active; False by 1.
        block: as in :class:`GradDrop`.
        storage: "packed" keeps one bit per element, rebuilt when the mask changes; "regenerate" draws it every step.
            Block masks are always regenerated: drawing them costs less than reading bits.
        anneal: a schedule in place of p, with replacement.
    """

    p: float | None = None
    toggle: bool = False
    replacement: bool = False
    rescale: bool | None = None
    block: int | Literal["row"] = 1
    storage: Literal["packed", "regenerate"] = "packed"
    anneal: Schedule | None = None
    _bounds: tuple[int, ...] = field(default=(), init=False, repr=False, compare=False)  # of a cycle's windows

    rows_differ_by_layer: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_p_or_anneal(self)
        _check_rescale(self.rescale)
        _check_block(self.block)
        check_bool("toggle", self.toggle)
        check_bool("replacement", self.replacement)
        if self.toggle and self.replacement:
            raise ValueError("toggle and replacement must not both be True: with replacement nothing is partitioned")
        if self.anneal is not None and not self.replacement:
            raise ValueError("anneal must go with replacement=True: without it the masks' sizes are what p makes them")
        check_choice("storage", self.storage, ("packed", "regenerate"))
        make_plain(self, "p", "block")
        bounds = () if self.replacement or self.p is None else tuple(mask_stream.epoch_bounds(self.p))
        object.__setattr__(self, "_bounds", bounds)

    @property
    def packed(self) -> bool:  # type: ignore[override]
        return self.storage == "packed" and self.block == 1

    def index(self, layers: int) -> Index:
        if self.replacement:
            return _index_of(self.anneal)
        return Index("epoch", len(self._bounds) - 1, wraps=self.toggle)

    def draw(self, layers: int) -> Draw:
        if self.replacement:
            return Draw("epoch")
        return Draw("epoch", holds=len(self._bounds) - 1) if self.toggle else Draw("never")

    @property
    def needs_epoch(self) -> bool:
        return True

    def row(self, index: int, layer: int, layers: int) -> Row:
        if self.replacement:
            window = mask_stream.bernoulli_window(_p_at(self, index))
        else:
            lo = self._bounds[index] if self.toggle else 0
            window = lo, self._bounds[index + 1] - 1 - lo
        return _window_row(_mask_of(self.block), window, self.rescale is not False)


@dataclass(frozen=True)
class LayerGradDrop(Policy):
    """Drops whole layers: one decision per layer (``group["layer"]``), shared by all its parameters.

    Args:
        p, anneal, hold: as in :class:`GradDrop`.
        per: "step" decides every step (or every ``hold`` steps), "epoch" every epoch.
        rescale: True multiplies kept layers by 1/q; None or False by 1 (the paper applies "a one matrix").
    """

    p: float | None = None
    anneal: Schedule | None = None
    per: Literal["step", "epoch"] = "step"
    rescale: bool | None = None
    hold: int = 1

    layerwise: ClassVar[bool] = True
    rows_differ_by_layer: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_p_or_anneal(self)
        _check_rescale(self.rescale)
        check_choice("per", self.per, ("step", "epoch"))
        check_int("hold", self.hold, 1, mask_stream.WORD)
        make_plain(self, "p", "hold")

    def index(self, layers: int) -> Index:
        return _index_of(self.anneal)

    def draw(self, layers: int) -> Draw:
        return Draw(self.per, self.hold)

    def row(self, index: int, layer: int, layers: int) -> Row:
        return _window_row(Mask.LAYER, mask_stream.bernoulli_window(_p_at(self, index)), bool(self.rescale))


@dataclass(frozen=True)
class GradFreeze(Policy):
    """Gradual unfreezing, layer by layer, deterministic: in epoch e the first (e + 1) * layers_per_epoch are active.

    Its effect is "freeze" unless told otherwise: weight decay would still move a frozen layer under "gradient".

    Args:
        direction: "top-down" begins with the last layer (the head alone), "bottom-up" with the first (embeddings).
        layers_per_epoch: layers that each epoch adds.
    """

    direction: Literal["top-down", "bottom-up"] = "top-down"
    layers_per_epoch: int = 1

    layerwise: ClassVar[bool] = True
    default_effect: ClassVar[str] = "freeze"

    def __post_init__(self) -> None:
        check_choice("direction", self.direction, ("top-down", "bottom-up"))
        check_int("layers_per_epoch", self.layers_per_epoch, 1, mask_stream.WORD)
        make_plain(self, "layers_per_epoch")

    def index(self, layers: int) -> Index:
        return Index("epoch", max(1, -(-layers // self.layers_per_epoch)))

    def draw(self, layers: int) -> Draw:
        return Draw("never")

    def row(self, index: int, layer: int, layers: int) -> Row:
        rank = layers - 1 - layer if self.direction == "top-down" else layer
        return KEEP if rank < (index + 1) * self.layers_per_epoch else DROP


@dataclass(frozen=True, eq=False)
class StaticMask(Policy):
    """The user's own masks (a Fisher mask, say), never redrawn. They are copied: a later change of yours has no effect.

    Args:
        masks: {parameter name: bool mask} with named parameters (a name left out keeps everything), or a sequence of
            masks in the group's order. Each has its whole parameter's shape. A checkpoint does not hold them.
        rescale: True multiplies kept elements by numel / number kept of their parameter; None or False by 1.
    """

    masks: Mapping[str, Tensor] | Sequence[Tensor]
    rescale: bool | None = None

    rows_differ_by_layer: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_rescale(self.rescale)
        if not isinstance(self.masks, Mapping | Sequence) or isinstance(self.masks, str):
            raise TypeError(f"masks must be a dict {{name: mask}} or a sequence of masks, got {type(self.masks)}")
        for key, mask in self.items():
            if not isinstance(mask, Tensor):
                raise TypeError(f"masks[{key!r}] must be a bool tensor, got {type(mask)}")
            if mask.dtype != torch.bool:
                raise TypeError(f"masks[{key!r}] must be a bool tensor, got {mask.dtype}")
        if isinstance(self.masks, Mapping):
            copies: Any = {key: mask.detach().clone() for key, mask in self.masks.items()}
        else:
            copies = [mask.detach().clone() for mask in self.masks]
        object.__setattr__(self, "masks", copies)

    def items(self) -> Iterable[tuple[str | int, Tensor]]:
        return self.masks.items() if isinstance(self.masks, Mapping) else enumerate(self.masks)

    def mask_of(self, name: str | None, index: int, count: int) -> Tensor | None:
        """The mask of the parameter called ``name``, number ``index`` of a group of ``count``; None if left out."""
        if isinstance(self.masks, Mapping):
            if name is None:
                raise ValueError(
                    "StaticMask({name: mask}) needs an optimizer with named parameters (model.named_parameters()); "
                    "without names give a sequence of masks in the group's order"
                )
            return next((mask for key, mask in self.masks.items() if canonical_name(key) == name), None)
        if len(self.masks) != count:
            raise ValueError(
                f"StaticMask needs one mask for each of its group's {count} parameters, got {len(self.masks)}"
            )
        return self.masks[index]

    def draw(self, layers: int) -> Draw:
        return Draw("never")

    def row(self, index: int, layer: int, layers: int) -> Row:
        return Row(Mask.PACKED)

    def to_state(self) -> dict[str, Any]:
        return {"policy": "StaticMask", "rescale": self.rescale}

    @classmethod
    def from_options(cls, options: dict[str, Any], current: Policy | None) -> "StaticMask":
        if not isinstance(current, StaticMask):
            raise ValueError(
                "the checkpoint's policy is a StaticMask, whose masks are not in the checkpoint: construct the "
                f"optimizer with drop=StaticMask(...) before loading, got drop={current!r}"
            )
        return cls(current.masks, **options)


def _is_ours(thing: Policy | Schedule) -> bool:
    """Is its class one of this package, and not one of the user's own?"""
    return type(thing).__module__ in (__name__, Schedule.__module__)


def _mask_of(block: int | str) -> Mask:
    return Mask.ELEMENT if block == 1 else Mask.BLOCK


def _window_row(mask: Mask, window: tuple[int, int], rescale: bool) -> Row:
    lo, span = window
    if span == mask_stream.HALF:
        return KEEP
    return Row(mask, lo, span, mask_stream.rescale(span) if rescale else 1.0)


def _p_at(policy: Any, index: int) -> float:
    if policy.anneal is None:
        return policy.p
    p = policy.anneal.p(index)
    if not _is_ours(policy.anneal):
        check_p(f"{type(policy.anneal).__name__}.p({index})", p)
    return float(p)


def _index_of(anneal: Schedule | None) -> Index:
    return Index() if anneal is None else Index(anneal.by, anneal.length)


def _check_p_or_anneal(policy: Any) -> None:
    p, anneal = policy.p, policy.anneal
    if (p is None) == (anneal is None):
        raise ValueError(
            f"{type(policy).__name__} takes exactly one of p and anneal, got p={shown(p)} and anneal={shown(anneal)}"
        )
    if anneal is None:
        check_p("p", p)
    elif not isinstance(anneal, Schedule):
        raise TypeError(f"anneal must be a schedule such as LinearAnneal, got {shown(anneal)}")
    else:
        check_choice(f"{type(anneal).__name__}.by", anneal.by, ("step", "epoch"))
        check_int(f"{type(anneal).__name__}.length", anneal.length, 1)


def _check_rescale(rescale: Any) -> None:
    if rescale is not None and not isinstance(rescale, bool):
        raise TypeError(f"rescale must be True, False or None, got {shown(rescale)}")


def _check_block(block: Any) -> None:
    if isinstance(block, str) and block == "row":
        return
    if not is_int(block) or (block != 1 and (not 1 <= block <= MAX_BLOCK or block % mask_stream.TILE)):
        raise ValueError(f"block must be 1, a multiple of {mask_stream.TILE} up to 2**43 or 'row', got {shown(block)}")
