"""What skip_dropped_layers saves: time and peak memory of a training step.

    python -m benchmarks.layer_skipping --p 0.9 --steps 12

Four runs have equal models, data and dropped layers:

    fine-tuning   torch.optim.AdamW(fused=True); nothing is dropped
    masked        GradDropAdamW with LayerGradDrop(p); every gradient is computed
    skipped       the same with skip_dropped_layers
    frozen        the same, but the layers are switched off by hand, with requires_grad_(False) before the step

They take turns at every step, and times are medians over the turns; ratios are taken within a turn, and stand with
their quartiles. The frozen run's optimizer leaves dropped layers alone, where "gradient", the default effect, still
moves them by momentum and decay; with --effect freeze both do the same. Peak memory is measured over four steps of a
run that has a process to itself: what the process grew by (on Linux), or what torch allocated on a GPU.
"""

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import transformers as hf

from benchmarks.harness import Timing, machine
from graddrop_fused import GradDropAdamW, LayerGradDrop, param_groups
from graddrop_fused.skip import skip_dropped_layers

RUNS = ("fine-tuning", "masked", "skipped", "frozen")
RATIOS = (("masked", "fine-tuning"), ("skipped", "fine-tuning"), ("frozen", "fine-tuning"), ("skipped", "frozen"))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--p", type=float, nargs="+", default=[0.5, 0.9])
    p.add_argument("--effect", default="gradient", choices=("gradient", "freeze"))
    p.add_argument("--layers", type=int, default=12)
    p.add_argument("--width", type=int, default=384)
    p.add_argument("--vocab", type=int, default=1000, help="rows of the embedding; XLM-R's has 250002")
    p.add_argument("--batch", type=int, nargs=2, default=[16, 64], metavar=("SEQUENCES", "TOKENS"))
    p.add_argument("--steps", type=int, default=12)
    p.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS, help="default: all")
    p.add_argument("--only", choices=("time", "memory"), help="default: both")
    p.add_argument("--cpu-time", action="store_true", help="of all threads, for a machine that others use as well")
    p.add_argument("--device", type=torch.device, default="cpu")
    return p


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    print(f"{machine()}, {options.device}, effect {options.effect}\n")
    for p in options.p:
        if options.only != "memory":
            print_times(p, *measure_time(p, options))
        if options.only != "time":
            print_memory(p, {run: measure_memory(run, p, options) for run in options.runs})


def print_times(p: float, forward: Timing, update: Timing, whole: Timing, ratios=RATIOS) -> None:
    parts = (forward, update, whole)
    print("| p | run | forward + backward, ms | update, ms | whole step, ms |\n|---|---|---|---|---|")
    for run in whole.seconds:
        print(f"| {p} | {run} | {' | '.join(f'{1e3 * timing.median(run):.1f}' for timing in parts)} |")
    print("\n| p | ratio | forward + backward | whole step |\n|---|---|---|---|")
    for run, base in ratios:
        if {run, base} <= whole.seconds.keys():
            cells = ("{:.3f} ({:.3f} to {:.3f})".format(*timing.ratio(run, to=base)) for timing in (forward, whole))
            print(f"| {p} | {run} / {base} | {' | '.join(cells)} |")
    print(flush=True)


def print_memory(p: float, peaks: dict[str, int]) -> None:
    print("| p | run | peak memory, MiB |\n|---|---|---|")
    for run, peak in peaks.items():
        print(f"| {p} | {run} | {peak / 2**20:.0f} |")
    print(flush=True)


def model(options: argparse.Namespace) -> hf.XLMRobertaForSequenceClassification:
    config = hf.XLMRobertaConfig(
        vocab_size=options.vocab,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=12 if options.width % 12 == 0 else options.width // 32,
        intermediate_size=4 * options.width,
        max_position_embeddings=options.batch[1] + 2,
    )
    return hf.XLMRobertaForSequenceClassification(config)


class Run:
    """One contestant: a model, an optimizer, and how its dropped layers are switched off."""

    def __init__(self, name: str, p: float, options: argparse.Namespace):
        torch.manual_seed(0)
        self.device = options.device
        self.clock = time.process_time if options.cpu_time else time.perf_counter
        self.model = model(options).to(self.device).train()
        self.by_hand = False
        self.prepare(name, p, options)
        self.step(batch(0, options))  # makes the state of all layers, and shows which parameters get a gradient
        self.by_hand = name == "frozen"

    def prepare(self, name: str, p: float, options: argparse.Namespace) -> None:
        """Make the optimizer."""
        if name == "fine-tuning":
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        else:
            groups = param_groups(self.model, drop=LayerGradDrop(p=p))
            self.optimizer = GradDropAdamW(groups, lr=1e-5, effect=options.effect)
        if name == "skipped":
            skip_dropped_layers(self.model, self.optimizer)

    def step(self, ids: torch.Tensor) -> tuple[float, float, float]:
        """Seconds of forward and backward, of the update, and of both."""
        frozen = self.optimizer.dropped_layers() if self.by_hand else []
        for param in frozen:
            param.requires_grad_(False)
        begin = self._now()
        self.model(input_ids=ids, labels=ids[:, 0] % 2).loss.backward()
        middle = self._now()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = self._now()
        for param in frozen:
            param.requires_grad_(True)
        return middle - begin, end - middle, end - begin

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return self.clock()


def batch(step: int, options: argparse.Namespace) -> torch.Tensor:
    """Token ids, the same for every run; seeds dropout, too."""
    torch.manual_seed(step)
    return torch.randint(2, 1000, options.batch).to(options.device)


def measure_time(p: float, options: argparse.Namespace, run_class: type[Run] = Run) -> list[Timing]:
    """Of forward and backward, of the update, and of both."""
    runs = {name: run_class(name, p, options) for name in options.runs}
    timings = [Timing({name: [] for name in runs}) for _ in range(3)]
    for step in range(1, options.steps + 1):
        shift = step % len(runs)
        for name in [*runs][shift:] + [*runs][:shift]:
            for timing, seconds in zip(timings, runs[name].step(batch(step, options)), strict=True):
                timing.seconds[name].append(seconds)
    return timings


def measure_memory(name: str, p: float, options: argparse.Namespace, run_class: type[Run] = Run) -> int:
    """Peak bytes of a run, in a process of its own."""
    # With a fixed threshold glibc gives freed tensors back at once, so that the peak is that of live memory.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(_peak, name, p, options, run_class).result()


def _peak(name: str, p: float, options: argparse.Namespace, run_class: type[Run]) -> int:
    small = argparse.Namespace(**{**vars(options), "layers": 1, "width": 32, "batch": [1, 4]})
    run_class(name, p, small)  # loads what a first step loads
    before = _resident("VmRSS")
    run = run_class(name, p, options)
    on_gpu = options.device.type != "cpu"
    if on_gpu:
        torch.accelerator.reset_peak_memory_stats(options.device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    for step in range(1, 5):
        run.step(batch(step, options))
    return torch.accelerator.max_memory_allocated(options.device) if on_gpu else _resident("VmHWM") - before


def _resident(kind: str) -> int:
    """Bytes of memory that this process holds (VmRSS), or held at its peak (VmHWM)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[kind].split()[0])


if __name__ == "__main__":
    main()
