"""Schedules: how a drop probability changes over epochs or steps, in place of a policy's constant p.

To add one: subclass :class:`Schedule` with a frozen dataclass and give ``by``, ``length`` and ``p``. It is saved and
loaded by its class's name, wherever it is defined.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from .checks import check_int, check_p, make_plain, plain, saved_fields, shown
from .mask_stream import WORD


class Schedule:
    """Base of all schedules."""

    registry: ClassVar[dict[str, type["Schedule"]]] = {}

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        Schedule.registry[cls.__name__] = cls

    @property
    def by(self) -> Literal["epoch", "step"]:
        """What ``p`` counts."""
        raise NotImplementedError

    @property
    def length(self) -> int:
        """How many values it has; the last one holds for good."""
        raise NotImplementedError

    def p(self, index: int) -> float:
        """Drop probability at epoch or step ``index``, counted from 0."""
        raise NotImplementedError

    def to_state(self) -> dict[str, Any]:
        """Plain numbers and strings, for a checkpoint. Raises TypeError on others, and if it is no frozen dataclass."""
        name = type(self).__name__
        values = {f.name: plain(f"{name}.{f.name}", getattr(self, f.name)) for f in saved_fields(self)}
        return {"schedule": name, **values}

    @staticmethod
    def from_state(state: Any) -> "Schedule":
        """Inverse of :meth:`to_state`. Raises TypeError or ValueError on what no schedule saves."""
        options = dict(state) if isinstance(state, dict) else {}
        name = options.pop("schedule", None)
        cls = Schedule.registry.get(name) if isinstance(name, str) else None
        if cls is None:
            raise ValueError(
                f"the checkpoint's schedule must be one of {', '.join(sorted(Schedule.registry))} (import the module "
                f"that defines yours before loading), got {shown(state)}"
            )
        return cls(**options)


@dataclass(frozen=True)
class LinearAnneal(Schedule):
    """p falls linearly from ``start`` in the first epoch (or step) to 0 in the last: the paper's Anneal- variants.

    Args:
        start: drop probability of the first epoch or step, in [0, 1).
        epochs: T >= 2: p(e) = start * (1 - e / (T - 1)), and 0 from e = T - 1 on.
        total_steps: N >= 2: the same per step. Exactly one of ``epochs`` and ``total_steps`` must be given.
    """

    start: float = 0.9
    epochs: int | None = None
    total_steps: int | None = None

    def __post_init__(self) -> None:
        check_p("start", self.start)
        if (self.epochs is None) == (self.total_steps is None):
            raise ValueError(
                f"LinearAnneal takes exactly one of epochs and total_steps, "
                f"got epochs={shown(self.epochs)} and total_steps={shown(self.total_steps)}"
            )
        name = "epochs" if self.total_steps is None else "total_steps"
        check_int(name, getattr(self, name), 2, WORD)
        make_plain(self, "start", name)

    @property
    def by(self) -> Literal["epoch", "step"]:
        return "epoch" if self.total_steps is None else "step"

    @property
    def length(self) -> int:
        return self.epochs or self.total_steps or 1

    def p(self, index: int) -> float:
        last = self.length - 1
        return 0.0 if index >= last else self.start * (1 - index / last)
