"""One case: build the tensors, gate every contestant, measure memory, then let them take turns."""

import gc
import time
from dataclasses import dataclass, field

import torch

from benchmarks import harness, memory
from benchmarks.cases import Case, Size
from benchmarks.contestant import LR, describe
from benchmarks.gate import Red, Sample
from benchmarks.memory import Memory


@dataclass
class Result:
    """What a case gave. A contestant is in ``timing``, in ``red`` (why) or in ``missing`` (why)."""

    elements: int = 0
    tensors: int = 0
    threads: int = 0
    timing: harness.Timing | None = None
    red: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    memory: dict[str, Memory] = field(default_factory=dict)
    traffic: dict[str, float] = field(default_factory=dict)


def run(case: Case, size: Size, device: str = "cpu", turns: int | None = None) -> Result:
    """Raises RuntimeError if the contestants' tensors cannot be made."""
    threads = torch.get_num_threads()
    if case.threads:
        torch.set_num_threads(case.threads)
    try:
        return _run(case, size, device, turns)
    finally:
        torch.set_num_threads(threads)
        gc.collect()


def _run(case: Case, size: Size, device: str, turns: int | None) -> Result:
    shared = case.tensors(size, device)
    own = shared.with_moments_like_params() if any(c.own_moments for c in case.contestants) else shared
    samples = {tensors.state_dtype: Sample(tensors) for tensors in (shared, own)}
    result = Result(shared.elements, len(shared.params), torch.get_num_threads())
    tidy, steps = {}, {}
    if any(c.spoils_gradients for c in case.contestants):
        shared.save_gradients()
    for contestant in case.contestants:
        name, tensors = contestant.name, own if contestant.own_moments else shared
        if reason := contestant.missing():
            result.missing[name] = reason
            continue
        try:
            step = contestant.build(tensors)
            contestant.claim.check(name, step, samples[tensors.state_dtype], LR)
        except Red as error:
            result.red[name] = str(error)
            continue
        except Exception as error:
            if contestant.module is None:
                raise
            # a peer that compiles itself when first used may fail here; the others are timed still
            result.missing[name] = f"does not run ({describe(error)}): {contestant.install}"
            continue
        steps[name] = step
        if contestant.spoils_gradients:
            tidy[name] = shared.restore_gradients
            shared.restore_gradients()
        if case.memory:
            result.memory[name] = memory.measure(step, device)
        if contestant.traffic:
            result.traffic[name] = contestant.traffic(tensors)
    if steps:
        synchronize = torch.cuda.synchronize if device != "cpu" else None
        if turns is None:
            start = time.perf_counter()
            harness.take_turns(steps, 1, 0, tidy, synchronize)
            turns = size.turns(time.perf_counter() - start)
        result.timing = harness.take_turns(steps, turns, 1, tidy, synchronize)
    if not all(torch.isfinite(p.detach()).all() for p in shared.params):
        raise RuntimeError(f"{case.name}: parameters are not finite after timing")
    return result
