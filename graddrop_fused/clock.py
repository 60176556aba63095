"""When: the seed, the step and the epoch that a mask belongs to."""

from collections.abc import Mapping
from typing import Any

from .checks import check_int
from .mask_stream import WORD
from .policies import Policy

ENTRIES = ("seed", "draw", "epoch", "steps_per_epoch")  # of a saved param group


class Clock:
    """Seed, draw and epoch: all that a mask depends on besides the policy, the stream id and the element.

    ``draw`` counts the steps taken. Steps draw with 1, 2, ...; epochs count from 0.
    """

    def __init__(self, seed: int, steps_per_epoch: int | None):
        check_int("seed", seed, 0, 2**64 - 1)
        if steps_per_epoch is not None:
            check_int("steps_per_epoch", steps_per_epoch, 1, WORD)
        self.seed = int(seed)  # numpy's too
        self.steps_per_epoch = None if steps_per_epoch is None else int(steps_per_epoch)
        self.draw = 0
        self.epoch: int | None = None  # as told by set_epoch

    def set_epoch(self, epoch: int) -> None:
        """Raises RuntimeError if steps_per_epoch already says which epoch it is."""
        if self.steps_per_epoch is not None:
            raise RuntimeError(
                f"set_epoch({epoch!r}) was called, but steps_per_epoch={self.steps_per_epoch} already says which epoch "
                "a step belongs to; use one of the two (the Trainer's GradDropCallback calls set_epoch)"
            )
        check_int("epoch", epoch, 0, WORD)
        self.epoch = int(epoch)

    def next_draw(self) -> int:
        """The coming step's draw. Raises OverflowError where 32 bits cannot hold it."""
        if self.draw >= WORD:
            raise OverflowError(f"draw must stay below 2**32, and {self.draw} steps were taken: masks would repeat")
        return self.draw + 1

    def epoch_at(self, draw: int) -> int | None:
        """The epoch that step ``draw`` belongs to; None if nobody told."""
        return self.epoch if self.steps_per_epoch is None else (draw - 1) // self.steps_per_epoch

    def check_epoch_known(self, policy: Policy | None) -> None:
        """Raises RuntimeError if ``policy`` follows epochs that nobody told."""
        if self.steps_per_epoch is None and self.epoch is None and policy is not None and policy.needs_epoch:
            raise RuntimeError(
                f"{policy!r} follows epochs, but the epoch is not known: call set_epoch(0) before the first step (and "
                "set_epoch(k) as epochs begin), or construct with steps_per_epoch=<optimizer steps in an epoch>. Under "
                "the Trainer, callbacks=[GradDropCallback()] calls it"
            )

    def state(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {"seed": self.seed, "draw": self.draw, "epoch": self.epoch, "steps_per_epoch": self.steps_per_epoch}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], steps_per_epoch: int | None = None) -> "Clock":
        """Raises TypeError or ValueError, naming the entry, on values that no clock can have.

        ``steps_per_epoch``: the constructor's, which stays where the state has none.
        """
        saved = state["steps_per_epoch"]
        clock = cls(state["seed"], steps_per_epoch if saved is None else saved)
        check_int("draw", state["draw"], 0, WORD)
        clock.draw = int(state["draw"])
        if state["epoch"] is not None:
            check_int("epoch", state["epoch"], 0, WORD)
            clock.epoch = int(state["epoch"])
        return clock
