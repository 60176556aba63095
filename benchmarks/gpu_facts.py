"""What a step costs beside the time of its kernels: launches, the host's time, the first step's compiling.

    python -m benchmarks.gpu_facts launches|host|compile [--device cuda] [--elements 67e6]

Each prints JSON. `python -m benchmarks.gpu_run` calls them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import cases, harness, ours, populations
from benchmarks.contestant import describe
from benchmarks.ours import DRAWN, FROZEN_BLOCKS, NO_MASK, PACKED
from benchmarks.peers import BASE
from benchmarks.tensors import Tensors

CONTESTANTS = [BASE, "torch foreach", *cases.GPU_PEERS, DRAWN, PACKED, NO_MASK, FROZEN_BLOCKS]
POPULATIONS = {"xlmr-large": None, "small": 1_000_000}  # elements where --elements does not say
CALLS = 30
FIRST_STEPS = [(DRAWN, "float32"), (DRAWN, "bfloat16"), (PACKED, "float32"), (FROZEN_BLOCKS, "float32")]


def tensors_of(population: str, elements: int, device: str, dtype: torch.dtype = torch.float32) -> Tensors:
    return Tensors.random(populations.shapes(population, elements), dtype, device=device)


def steps(tensors: Tensors) -> dict[str, Callable[[], object] | str]:
    """Each contestant's step, or why it cannot take part."""
    found: dict[str, Callable[[], object] | str] = {}
    for name in CONTESTANTS:
        contestant = cases.CONTESTANTS[name]
        if tensors.device.type not in contestant.devices:
            continue
        reason = contestant.missing()
        try:
            found[name] = reason or contestant.build(tensors)
        except Exception as error:
            found[name] = _fails(error)
    return found


def count(events: Iterable) -> dict[str, int]:
    """Kernels and copies among a profile's events. Every optimizer's step is there once more, as an annotation."""
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    copies = sum(e.name.startswith(("Memcpy", "Memset")) for e in on_device)
    return {"kernels": len(on_device) - copies, "copies": copies}


def launches(step: Callable[[], object], device: str) -> dict[str, int]:
    """Of one call, after one that compiles and builds tables."""
    step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device != "cpu")
    wait(device)
    with profile(activities=activities, acc_events=True) as prof:
        step()
        wait(device)
    return count(prof.events())


def host(step: Callable[[], object], device: str) -> dict[str, float]:
    """Microseconds until a call returns while the device has nothing else to do: median and quartiles of CALLS."""
    step()
    times = []
    for _ in range(CALLS):
        wait(device)
        start = time.perf_counter()
        step()
        times.append(1e6 * (time.perf_counter() - start))
    wait(device)
    middle, low, high = harness.quartiles(times)
    return {"median": middle, "low": low, "high": high}


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def over_steps(measure: Callable, device: str, elements: int) -> dict:
    """{population: {contestant: what ``measure`` found, or why it took no part}}."""
    found: dict = {}
    for population, own in POPULATIONS.items():
        tensors = tensors_of(population, min(own or elements, elements), device)
        found[population] = {}
        for name, step in steps(tensors).items():
            print(f"{population}: {name}", file=sys.stderr, flush=True)
            found[population][name] = step if isinstance(step, str) else _tried(measure, step, device)
    return found


def _tried(measure: Callable, step: Callable[[], object], device: str) -> dict | str:
    try:
        return measure(step, device)
    except Exception as error:
        return _fails(error)


def _fails(error: Exception) -> str:
    """A peer that fails must not keep the others from being measured."""
    return f"does not run ({describe(error)})"


def first_step(name: str, dtype: str, device: str) -> dict[str, float]:
    """Seconds of this process's first and second step."""
    tensors = tensors_of("small", 100_000, device, getattr(torch, dtype))
    step = cases.CONTESTANTS[name].build(tensors)
    seconds = []
    for _ in range(2):
        wait(device)
        start = time.perf_counter()
        step()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return {"first": seconds[0], "second": seconds[1]}


def compiles(device: str, kinds: int | None = None) -> list[dict]:
    """Seconds of the first step in new processes: with Triton's cache empty, and once more with what that left.

    kinds: how many of FIRST_STEPS; all if not given.
    """
    found = []
    for name, dtype in FIRST_STEPS[:kinds]:
        print(f"first step: {name}, {dtype}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.gpu_facts", "first-step", "--device", device]
            command += ["--contestant", name, "--dtype", dtype]
            environment = os.environ | {"TRITON_CACHE_DIR": folder}
            runs = [subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True) for _ in range(2)]
            empty, filled = (json.loads(run.stdout) for run in runs)
        found.append({"step": name, "dtype": dtype, "empty cache": empty, "filled cache": filled})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["launches", "host", "compile", "first-step"])
    parser.add_argument("--device", choices=ours.BACKENDS, default="cuda")
    parser.add_argument("--elements", type=float, default=67e6)
    parser.add_argument("--kinds", type=int, help="of first steps; default: all")
    parser.add_argument("--contestant", default=DRAWN)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    if reason := ours.unavailable(options.device):
        parser.exit(1, f"nothing to measure: {reason}\n")
    if options.what == "first-step":
        found = first_step(options.contestant, options.dtype, options.device)
    elif options.what == "compile":
        found = compiles(options.device, options.kinds)
    else:
        measure = launches if options.what == "launches" else host
        found = over_steps(measure, options.device, int(options.elements))
    print(json.dumps(found))
    if options.what in ("launches", "host") and any(map(_lacks_ours, found.values())):
        parser.exit(1)


def _lacks_ours(found: dict) -> bool:
    """Whether what needs no other package did not run."""
    return any(isinstance(fact, str) and cases.CONTESTANTS[name].module is None for name, fact in found.items())


if __name__ == "__main__":
    main()
