"""`python -m graddrop_fused`: which backends run on this machine, why others do not, and a self-check of seconds.

`python -m graddrop_fused build` first builds the native CPU op, where the installation could not: it needs a C++
compiler, and goes into the user's cache ($GRADDROP_CACHE, else ~/.cache/graddrop_fused).
"""

import argparse
import platform
import struct
import subprocess
import sys
import time
import warnings
import zlib

import torch

from . import GradDrop, GradDropAdamW, __version__, build_op, cpu, dispatch, mask_stream
from .contract import Batch, Effect, Mask, Real, Shard
from .names import stream_id

# Random123's known answers for philox4x32-10: counter, key, output
_PHILOX = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
# CRC-32 of the packed mask (little-endian words) of 1,000 elements: p = 0.1 and the seed, draw and name of the worked
# example in docs/mask-stream.md
_SEED, _DRAW, _NAME = 0x0123456789ABCDEF, 7, "encoder.layer.0.attention.self.query.weight"
_PACKED_CRC = 0xAE552630
_SHAPE = (17, 23)


def main(arguments: list[str] | None = None) -> int:
    """Builds the op if asked to and there is none, and prints the report.

    Returns the process's exit status: 1 if the op does not build or a backend that can run here computes wrongly.
    """
    parser = argparse.ArgumentParser(
        prog="python -m graddrop_fused", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=["build"], help="build the native CPU op if there is none")
    if parser.parse_args(arguments).command == "build" and cpu.unavailable(torch.device("cpu")) is not None:
        # an op that does not fit may be loaded by now, so that a new process reports
        return subprocess.run([sys.executable, "-m", "graddrop_fused"]).returncode if _build() else 1
    return report()


def _build() -> bool:
    started = time.perf_counter()
    print("building the native CPU op", flush=True)
    try:
        path = build_op.build()
    except (RuntimeError, OSError) as error:
        print(f"the native CPU op does not build: {error}")
        return False
    print(f"built in {time.perf_counter() - started:.1f} s: {path}", flush=True)
    return True


def report() -> int:
    """Prints what runs here. Returns 1 if a backend that can run here computes wrongly."""
    started = time.perf_counter()
    print(
        f"graddrop_fused {__version__}, mask stream {mask_stream.VERSION}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    )
    wrong = 0
    for device in _devices():
        for name in dispatch.NAMES:
            try:
                dispatch.choose(name, device, torch.float32)
            except RuntimeError:
                print(f"  {device.type:5} {name:10} cannot run: {dispatch.load(name).unavailable(device)}")
                continue
            problem = self_check(name, device)
            wrong += problem is not None
            print(f"  {device.type:5} {name:10} {problem or 'ok' + _details(name)}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # why it is the reference is said above
            auto = dispatch.choose("auto", device, torch.float32)
        chosen = next(n for n in dispatch.NAMES if dispatch.load(n) is auto)
        print(f"  {device.type:5} auto       is {chosen}")
    print(f"self-check {'FAILED' if wrong else 'passed'} in {time.perf_counter() - started:.1f} s")
    return int(wrong > 0)


def self_check(name: str, device: torch.device) -> str | None:
    """What the backend ``name`` gets wrong on ``device``, or None."""
    for check in (_known_answers, _parity_step):
        try:
            problem = check(name, device)
        except Exception as error:  # whatever goes wrong here is what the user asked to hear
            problem = f"{type(error).__name__}: {error}"
        if problem is not None:
            return f"FAILED: {problem}"
    return None


def _known_answers(name: str, device: torch.device) -> str | None:
    for counter, key, output in _PHILOX:
        if mask_stream.philox4x32(torch.tensor(counter), torch.tensor(key)).tolist() != output:
            return "Philox4x32-10 misses its known answers"
    words = torch.empty(32, dtype=torch.int32, device=device)
    lo, span = mask_stream.bernoulli_window(0.1)
    batch = Batch(
        params=[torch.zeros(1000, device=device)],
        shards=[Shard.whole((1000,))],
        integers=torch.tensor([[Mask.ELEMENT, Effect.GRADIENT, _DRAW, stream_id(_NAME), lo, span, 1]]),
        reals=torch.ones(1, Real.columns(), dtype=torch.float64),
        packed=[words],
    )
    dispatch.load(name).pack(batch, seed=_SEED)
    found = zlib.crc32(struct.pack("<32i", *words.tolist()))
    return (
        None if found == _PACKED_CRC else f"a mask misses its known answer: CRC {found:#010x}, not {_PACKED_CRC:#010x}"
    )


def _parity_step(name: str, device: torch.device) -> str | None:
    """One step against torch.optim.AdamW in float64, whose gradient is masked beforehand."""
    draw = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(_SHAPE, generator=draw, dtype=torch.float64) for _ in range(2))
    ours = torch.nn.Parameter(start.to(device, torch.float32))
    truth = torch.nn.Parameter(ours.detach().cpu().double())
    optimizer = GradDropAdamW([("weight", ours)], lr=1e-2, drop=GradDrop(p=0.5), seed=_SEED, backend=name)
    kept = optimizer.keep_mask(ours).cpu()
    ours.grad = grad.to(device, torch.float32)
    truth.grad = torch.where(kept, 2.0 * ours.grad.cpu().double(), 0.0)
    optimizer.step()
    torch.optim.AdamW([truth], lr=1e-2).step()
    error = (ours.detach().cpu().double() - truth.detach()).abs().max().item()
    return None if error < 1e-6 else f"one step differs from torch.optim.AdamW by {error:.1e}"


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return devices if found is None else [*devices, found]


def _details(name: str) -> str:
    if name == "cpu":
        return f": instruction sets {', '.join(dispatch.load('cpu').levels())}"
    if name == "triton":
        import triton

        return f": triton {triton.__version__}"
    return ": plain PyTorch"


if __name__ == "__main__":
    sys.exit(main())
