"""Timing that survives shared machines: contestants take turns in one process, and only ratios are reported."""

import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile)."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return middle, low, high


@dataclass(frozen=True)
class Timing:
    """Seconds per call of each contestant, turn by turn."""

    seconds: dict[str, list[float]]

    def ratio(self, name: str, to: str) -> tuple[float, float, float]:
        """(median, lower quartile, upper quartile) over turns of name's time divided by ``to``'s in the same turn."""
        return quartiles([a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True)])

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])


def take_turns(
    contestants: dict[str, Callable[[], object]],
    turns: int,
    warmup: int = 2,
    tidy: dict[str, Callable[[], object]] | None = None,
    synchronize: Callable[[], object] | None = None,
) -> Timing:
    """Call every contestant once per turn, in an order of its own for each turn.

    Args:
        tidy: what to call after a contestant, untimed.
        synchronize: waits for the device, before and after each call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    shuffle = random.Random(0).shuffle  # in one fixed order the same contestant would always follow another
    for turn in range(-warmup, turns):
        shuffle(names)
        for name in names:
            if synchronize:
                synchronize()
            start = time.perf_counter()
            contestants[name]()
            if synchronize:
                synchronize()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
            if tidy and name in tidy:
                tidy[name]()
    return Timing(seconds)


def machine(threads: int | None = None) -> str:
    """The processor, its threads in use (torch's if not given) and torch's version, in one line."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = f"{models[0]} ({len(models)} cores)" if models else name
    capability = torch.backends.cpu.get_cpu_capability()
    threads = threads or torch.get_num_threads()
    threads = "one thread" if threads == 1 else f"{threads} threads"
    return f"{name}, {threads}, torch {torch.__version__} ({capability})"


def assert_close(name: str, actual: list[torch.Tensor], expected: list[torch.Tensor], rtol: float, atol: float) -> None:
    """The gate before any timing. Raises AssertionError naming the contestant that computes something else."""
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        a, b = a.double(), b.double()
        if not torch.allclose(a, b, rtol=rtol, atol=atol):
            worst = (a - b).abs().max().item()
            raise AssertionError(f"{name}: tensor {i} differs by up to {worst}; no timing is reported")
