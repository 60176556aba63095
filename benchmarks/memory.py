"""What one step allocates, from torch's own allocator events."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Memory:
    """peak: bytes above what was held before the call. allocated: bytes over all allocations of the call."""

    peak: int
    allocated: int
    allocations: int


def measure(step: Callable[[], object], device: str = "cpu") -> Memory:
    """Of one call. Memory that a kernel takes without torch's allocator is not seen."""
    if device != "cpu":
        return _on_gpu(step)
    # acc_events: without it some versions of torch warn that events of earlier cycles, which there are none of, go
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        step()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    for size in sizes:
        held += size
        peak = max(peak, held)
    return Memory(peak, sum(s for s in sizes if s > 0), sum(s > 0 for s in sizes))


def _on_gpu(step: Callable[[], object]) -> Memory:
    def counts() -> tuple[int, int]:
        stats = torch.cuda.memory_stats()
        return stats["allocated_bytes.all.allocated"], stats["allocation.all.allocated"]

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held, before = torch.cuda.memory_allocated(), counts()
    step()
    torch.cuda.synchronize()
    after = counts()
    return Memory(torch.cuda.max_memory_allocated() - held, after[0] - before[0], after[1] - before[1])
