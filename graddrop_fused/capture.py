"""The groups' rows on a device, for capturable=True: no host value changes between replays of a captured graph."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .clock import Clock
from .contract import Effect, Integer, Mask, Real
from .plan import Layers, integer_row, policy_of, real_row
from .policies import KEEP

_NO_EPOCH = 0  # stands in where no policy follows epochs
_ROW_INTEGERS = [Integer.MASK, Integer.LO, Integer.SPAN]
_ROW_REALS = [Real.RESCALE, Real.NOISE_STD]


class DeviceRows:
    """Draw, epoch and every row a policy can have, as device tensors: clock.row_at in tensor arithmetic."""

    def __init__(self, groups: Sequence[dict[str, Any]], layers: Layers, clock: Clock, device: torch.device):
        def tensor(values, dtype=torch.int64):
            return to_device(torch.tensor(values, dtype=dtype), device)

        self.draw = tensor(clock.draw)
        self.epoch = tensor(_NO_EPOCH if clock.epoch is None else clock.epoch)
        self.steps_per_epoch = clock.steps_per_epoch
        policies = [policy_of(group) for group in groups]
        lengths = [1 if p is None else p.length(layers.count) for p in policies]
        by_group = [
            [KEEP if policy is None else policy.row(index, layer, layers.count) for index in range(length)]
            for policy, layer, length in zip(policies, layers.of_group, lengths, strict=True)
        ]
        rows = [row for of_group in by_group for row in of_group]
        effects = [Effect[group["effect"].upper()] for group in groups]
        self.pairs = [
            {(Mask(row.mask), effect) for row in of_group} for of_group, effect in zip(by_group, effects, strict=True)
        ]
        self.rows_integers = tensor([[row.mask, row.lo, row.span] for row in rows])
        self.rows_reals = tensor([[row.rescale, row.noise_std] for row in rows], torch.float64)
        self.lengths = tensor(lengths)
        self.first = self.lengths.cumsum(0) - self.lengths
        self.wraps = tensor([p is not None and p.wraps for p in policies], torch.bool)
        self.by_epoch = tensor([p is not None and p.clock == "epoch" for p in policies], torch.bool)
        redraws = ["cycle" if p is None else p.redraw for p in policies]
        self.redraw_step = tensor([r == "step" for r in redraws], torch.bool)
        self.redraw_epoch = tensor([r == "epoch" for r in redraws], torch.bool)
        self.static: list | None = None  # the host's hyperparameters that `integers` and `reals` were made from

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def advance(self, groups: Sequence[dict[str, Any]], found_inf: Tensor | None) -> tuple[Tensor, Tensor]:
        """Count a step (unless found_inf) and give the groups' rows for it: (groups, 7) int64, (groups, 9) float64."""
        self._refresh(groups)
        self.draw += 1 if found_inf is None else (found_inf == 0).to(torch.int64).reshape(())
        epoch = self.epoch if self.steps_per_epoch is None else (self.draw - 1).clamp_min(0) // self.steps_per_epoch
        tick = torch.where(self.by_epoch, epoch, (self.draw - 1).clamp_min(0))
        index = self.first + torch.where(self.wraps, tick % self.lengths, torch.minimum(tick, self.lengths - 1))
        cycle = torch.where(self.wraps, epoch // self.lengths, 0)

        integers, reals = self.integers.clone(), self.reals.clone()
        # a column at a time: indexing by a list copies it to the device, which a capture forbids
        for column, values in zip(_ROW_INTEGERS, self.rows_integers[index].unbind(1), strict=True):
            integers[:, column] = values
        for column, values in zip(_ROW_REALS, self.rows_reals[index].unbind(1), strict=True):
            reals[:, column] = values
        integers[:, Integer.DRAW] = torch.where(
            self.redraw_step, self.draw, torch.where(self.redraw_epoch, epoch, cycle)
        )
        for g, group in enumerate(groups):
            if self._on_device(group["lr"]):
                lr = group["lr"].to(reals).reshape(())
                reals[g, Real.STEP_SIZE], reals[g, Real.DECAY] = lr, 1 - lr * group["weight_decay"]
        return integers, reals

    def _on_device(self, lr: float | Tensor) -> bool:
        return isinstance(lr, Tensor) and (lr.device.type != "cpu" or self.draw.device.type == "cpu")

    def _refresh(self, groups: Sequence[dict[str, Any]]) -> None:
        # host to device only when a hyperparameter changed: never during capture
        static = [
            (
                integer_row(group, KEEP, 0),
                real_row(group, KEEP, 0.0 if self._on_device(group["lr"]) else float(group["lr"])),
            )
            for group in groups
        ]
        if static != self.static:
            device = self.draw.device
            integers = to_device(torch.tensor([integers for integers, _ in static]), device)
            reals = to_device(torch.tensor([reals for _, reals in static], dtype=torch.float64), device)
            if self.static is None:
                self.integers, self.reals = integers, reals
            else:  # in place: captured graphs read them
                self.integers.copy_(integers)
                self.reals.copy_(reals)
            self.static = static


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """``host`` on ``device``, by a copy that nothing waits for. Raises RuntimeError during CUDA graph capture."""
    if device.type == "cpu":
        return host
    check_not_capturing()
    # the allocator keeps the pinned block until the copy is done
    return host.pin_memory().to(device, non_blocking=True)


def capturing() -> bool:
    """Is a CUDA graph being captured on the current stream?"""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def check_not_capturing() -> None:
    """Raises RuntimeError where a CUDA graph is being captured: its replays would read stale memory of the host."""
    if capturing():
        raise RuntimeError(
            "a step under CUDA graph capture needs its tables on the device already: make the optimizer with "
            "capturable=True, and take a step outside of capture first and after every change of groups, "
            "hyperparameters or gradients' dtypes"
        )
