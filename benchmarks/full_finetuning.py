"""Peak memory and time of a training step of all parameters: ours beside what users would take instead.

    python -m benchmarks.full_finetuning                                    # 12 layers 384 wide, a small vocabulary
    python -m benchmarks.full_finetuning --width 768 --vocab 250002         # XLM-R Base
    python -m benchmarks.full_finetuning --only time --epoch 100            # times without a change of epoch
    python -m benchmarks.full_finetuning --only time --batch 1 8 --runs all # and what a change of epoch takes
    python -m benchmarks.full_finetuning --p 0.5 0.75 0.9 0.95 --runs AdamW all --plots docs/memory

Every run has an equal model and equal data. Ours, with effect "freeze" and masks over rows:

    masked            GradDrop(p, block="row")
    released          the same with release_gradients
    rows              the same with skip_dropped_rows
    rows, released    the same with both
    active            GradDropEpoch(p, toggle=True, block="row") with active_state
    all               the same with release_gradients and skip_dropped_rows
    all, bfloat16     the same on bfloat16 parameters, with rounding="stochastic"

Others: torch.optim.AdamW(fused=True), also on bfloat16 parameters and with a step inside backward for each parameter;
torch.optim.Adafactor; LoRA of rank 16 on all linear layers (peft); BAdam (badam: one layer at a time); LISA as its
paper has it, two layers at a time beside embeddings and head; GaLore and APOLLO of rank width / 4 (galore-torch,
apollo-torch); 8-bit AdamW (bitsandbytes). What is not installed is said and left out: pip install -r
benchmarks/requirements-peers.txt.

Runs take turns at every step; times are medians, ratios are taken within a turn and stand with their quartiles. Where a
run updates inside backward, its update is part of that time: the whole step is what to compare. Peak memory is what a
process of its own grew by over four steps, the model's parameters included; with its default batch of 1 x 8 tokens
activations are next to nothing. A change of epoch (of layers) falls within these steps. Before anything
is measured, ours must train as they would without these savings.
"""

import argparse
import importlib.util
import json
import random
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks import layer_skipping
from benchmarks.crosslingual import reports
from benchmarks.crosslingual.methods import adapted
from benchmarks.harness import Timing, assert_close, machine
from graddrop_fused import (
    GradDrop,
    GradDropAdamW,
    GradDropEpoch,
    param_groups,
    release_gradients,
    skip_dropped_rows,
)

BASE = "AdamW"
LR = 1e-5
BEGIN, END = "<!-- what training steps take: begin -->", "<!-- what training steps take: end -->"


# Ours


def _masked(model: nn.Module, p: float, epoch: int, *, released: bool = False, rows: bool = False):
    groups = param_groups(model, drop=GradDrop(p=p, block="row"))
    return _saving(model, GradDropAdamW(groups, lr=LR, effect="freeze"), released, rows)


def _active(model: nn.Module, p: float, epoch: int, *, savings: bool, rounding: str = "nearest"):
    groups = param_groups(model, drop=GradDropEpoch(p=p, toggle=True, block="row"))
    optimizer = GradDropAdamW(
        groups, lr=LR, effect="freeze", active_state=True, steps_per_epoch=epoch, rounding=rounding
    )
    return _saving(model, optimizer, released=savings, rows=savings)


def _saving(model: nn.Module, optimizer: GradDropAdamW, released: bool, rows: bool) -> GradDropAdamW:
    if rows:
        skip_dropped_rows(model, optimizer)
    if released:
        release_gradients(model, optimizer)
    return optimizer


# Others


def _adamw(model: nn.Module, p: float, epoch: int):
    return torch.optim.AdamW(model.parameters(), lr=LR, fused=True)


class _InBackward:
    """As in torch's tutorial on the optimizer step in backward."""

    def __init__(self, model: nn.Module, p: float, epoch: int):
        self.optimizers = {p: torch.optim.AdamW([p], lr=LR, fused=True) for p in model.parameters()}
        for param in self.optimizers:
            param.register_post_accumulate_grad_hook(self._step_and_free)

    def _step_and_free(self, param: torch.Tensor) -> None:
        self.optimizers[param].step()
        self.optimizers[param].zero_grad()

    def step(self) -> None:
        pass

    def zero_grad(self) -> None:
        pass


def _adafactor(model: nn.Module, p: float, epoch: int):
    return torch.optim.Adafactor(model.parameters(), lr=LR)


def _lora(model: nn.Module, p: float, epoch: int):
    adapted(model)  # in place
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=LR, fused=True)


def _badam(model: nn.Module, p: float, epoch: int):
    import badam

    return badam.BlockOptimizer(
        base_optimizer=torch.optim.AdamW(model.parameters(), lr=LR, fused=True),
        named_parameters_list=list(model.named_parameters()),
        block_prefix_list=[[f".encoder.layer.{i}."] for i in range(model.config.num_hidden_layers)],
        active_modules=["classifier."],
        switch_block_every=epoch,
        verbose=0,
    )


class _LISA:
    """Pan et al. 2024, "LISA: Layerwise Importance Sampling" (arXiv 2403.17919): layers drawn every few steps, with
    embeddings and head always on; what is switched off loses its moments."""

    def __init__(self, model: nn.Module, p: float, epoch: int, layers: int = 2):
        self.blocks, self.layers, self.steps, self.random = model.base_model.encoder.layer, layers, 0, random.Random(0)
        self.params, self.epoch = list(model.parameters()), epoch
        self._draw()

    def _draw(self) -> None:
        on = self.random.sample(range(len(self.blocks)), min(self.layers, len(self.blocks)))
        for i, block in enumerate(self.blocks):
            block.requires_grad_(i in on)
        self.optimizer = torch.optim.AdamW([p for p in self.params if p.requires_grad], lr=LR, fused=True)

    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        if self.steps % self.epoch == 0:
            self._draw()


def _low_rank(package: str, optimizer: str, **options) -> Callable:
    def build(model: nn.Module, p: float, epoch: int):
        matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
        chosen = {id(matrix) for matrix in matrices}
        rest = [param for param in model.parameters() if id(param) not in chosen]
        rank = max(model.config.hidden_size // 4, 1)
        low_rank = {"params": matrices, "rank": rank, "update_proj_gap": 200, "proj_type": "std", **options}
        return getattr(importlib.import_module(package), optimizer)([{"params": rest}, low_rank], lr=LR)

    return build


def _eight_bit(model: nn.Module, p: float, epoch: int):
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(model.parameters(), lr=LR)


@dataclass(frozen=True)
class Contestant:
    """``build(model, p, epoch)`` returns what has step() and zero_grad(); ``package`` must be installed for it."""

    build: Callable
    package: str | None = None
    dtype: torch.dtype = torch.float32
    ours: bool = False


CONTESTANTS = {
    BASE: Contestant(_adamw),
    "AdamW in backward": Contestant(_InBackward),
    "masked": Contestant(_masked, ours=True),
    "released": Contestant(lambda model, p, epoch: _masked(model, p, epoch, released=True), ours=True),
    "rows": Contestant(lambda model, p, epoch: _masked(model, p, epoch, rows=True), ours=True),
    "rows, released": Contestant(lambda model, p, epoch: _masked(model, p, epoch, released=True, rows=True), ours=True),
    "active": Contestant(lambda model, p, epoch: _active(model, p, epoch, savings=False), ours=True),
    "all": Contestant(lambda model, p, epoch: _active(model, p, epoch, savings=True), ours=True),
    "AdamW, bfloat16": Contestant(_adamw, dtype=torch.bfloat16),
    "all, bfloat16": Contestant(
        lambda model, p, epoch: _active(model, p, epoch, savings=True, rounding="stochastic"),
        dtype=torch.bfloat16,
        ours=True,
    ),
    "Adafactor": Contestant(_adafactor),
    "LoRA": Contestant(_lora, "peft"),
    "BAdam, bfloat16": Contestant(_badam, "badam", dtype=torch.bfloat16),  # it keeps float32 copies of what is active
    "LISA": Contestant(_LISA),
    "GaLore": Contestant(_low_rank("galore_torch", "GaLoreAdamW", scale=0.25), "galore_torch"),
    "APOLLO": Contestant(
        _low_rank("apollo_torch", "APOLLOAdamW", proj="random", scale_type="channel", scale=1), "apollo_torch"
    ),
    "8-bit AdamW": Contestant(_eight_bit, "bitsandbytes"),
}


def installed(name: str) -> bool:
    package = CONTESTANTS[name].package
    return package is None or importlib.util.find_spec(package) is not None


class Run(layer_skipping.Run):
    def prepare(self, name: str, p: float, options: argparse.Namespace) -> None:
        self.model.to(CONTESTANTS[name].dtype)
        self.optimizer = CONTESTANTS[name].build(self.model, p, options.epoch)


# The gate


def gate(options: argparse.Namespace) -> None:
    """Raises AssertionError where a run of ours does not train as the same masks do without its savings."""
    small = argparse.Namespace(**{**vars(options), "layers": 2, "width": 64, "batch": [2, 8], "vocab": 1000})

    def trained(build: Callable, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = layer_skipping.model(small).to(dtype).train()
        optimizer = build(model, 0.5, 2)
        for step in range(2):
            ids = layer_skipping.batch(step, small)
            model(input_ids=ids, labels=ids[:, 0] % 2).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return list(model.parameters())

    def all_but_savings(model: nn.Module, p: float, epoch: int) -> GradDropAdamW:
        groups = param_groups(model, drop=GradDropEpoch(p=p, toggle=True, block="row"))
        return GradDropAdamW(groups, lr=LR, effect="freeze", steps_per_epoch=epoch)

    truths = {"AdamW in backward": _adamw, "released": _masked, "rows": _masked, "rows, released": _masked}
    truths |= {"active": all_but_savings, "all": all_but_savings, "all, bfloat16": all_but_savings}
    for name, truth in truths.items():
        # Adam's first steps are lr long whatever the gradient: where rounding decides its sign, they go either way
        dtype = CONTESTANTS[name].dtype
        rtol, atol = (2**-7, 1e-3) if dtype == torch.bfloat16 else (0, 4 * LR)
        assert_close(name, trained(CONTESTANTS[name].build, dtype), trained(truth), rtol, atol)


# Measuring and telling


@dataclass
class Result:
    """Of one run at one p."""

    run: str
    p: float
    bytes_per_parameter: float | None
    step: tuple[float, float, float] | None  # / AdamW's: median, lower and upper quartile
    update: tuple[float, float, float] | None


def measure(p: float, names: list[str], options: argparse.Namespace) -> list[Result]:
    whole = update = None
    if options.only != "memory":
        options.runs = names
        _, update, whole = layer_skipping.measure_time(p, options, Run)
        print_changes(whole, update, options.epoch)
    results = []
    for name in names:
        peak = None
        if options.only != "time":
            small = argparse.Namespace(**{**vars(options), "batch": options.memory_batch})
            peak = layer_skipping.measure_memory(name, p, small, Run) / parameters(small)
        results.append(Result(name, p, peak, ratio(whole, name), ratio(update, name)))
    return results


def print_changes(whole: Timing, update: Timing, epoch: int) -> None:
    """What steps that begin an epoch take longer than others, where its masks come with other state."""
    for name in {"active", "all", "all, bfloat16"} & whole.seconds.keys():
        steps = list(enumerate(whole.seconds[name], 1))  # the first step came before
        first, others = [t for k, t in steps if k % epoch == 0], [t for k, t in steps if k % epoch]
        if first and others:
            updates = (statistics.median(first) - statistics.median(others)) / update.median(BASE)
            print(f"{name}: a change of epoch takes {updates:.1f} times AdamW's update")


def ratio(timing: Timing | None, name: str) -> tuple[float, float, float] | None:
    return timing.ratio(name, to=BASE) if timing else None


def parameters(options: argparse.Namespace) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in layer_skipping.model(options).parameters())


def joined(results: list[Result], files: list[Path]) -> list[Result]:
    """``results``, and what earlier commands wrote by --out of the same runs and of others."""
    found = {(r.run, r.p): r for r in results}
    for earlier in (Result(**entry) for file in files for entry in json.loads(file.read_text())):
        r = found.setdefault((earlier.run, earlier.p), earlier)
        r.bytes_per_parameter = r.bytes_per_parameter or earlier.bytes_per_parameter
        r.step, r.update = r.step or earlier.step, r.update or earlier.update
    return list(found.values())


def table(results: list[Result]) -> str:
    lines = [
        "| p | run | peak memory, bytes a parameter | training step / AdamW | update / AdamW |",
        "|---|---|---|---|---|",
    ]
    for r in results:
        peak = "" if r.bytes_per_parameter is None else f"{r.bytes_per_parameter:.1f}"
        times = ["" if t is None else "{:.2f} ({:.2f} to {:.2f})".format(*t) for t in (r.step, r.update)]
        lines.append(f"| {r.p} | {r.run} | {peak} | {times[0]} | {times[1]} |")
    return "\n".join(lines)


def plots(results: list[Result], folder: Path) -> list[Path]:
    """memory-time.png: all runs at the p that most have; growth.png: "all" over p. Returns what it wrote."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    complete = [r for r in results if r.bytes_per_parameter is not None and r.step is not None]
    most = statistics.mode(sorted((r.p for r in complete), reverse=True))
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for r in (r for r in complete if r.p == most):
        middle, low, high = r.step
        colour = "tab:blue" if CONTESTANTS[r.run].ours else "grey"
        axes.errorbar(
            r.bytes_per_parameter, middle, yerr=[[middle - low], [high - middle]], marker="o", color=colour, capsize=2
        )
        axes.annotate(
            r.run, (r.bytes_per_parameter, middle), xytext=(5, 4), textcoords="offset points", fontsize="small"
        )
    axes.set_xlabel("peak memory beside activations, bytes a parameter")
    axes.set_ylabel("time of a training step / AdamW's, median and quartiles")
    axes.set_title(f"Training steps, p = {most} (ours blue)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    figure.savefig(folder / "memory-time.png", dpi=110)
    plt.close(figure)

    over_p = sorted((r for r in complete if r.run == "all"), key=lambda r: r.p)
    if len(over_p) < 2:
        return [folder / "memory-time.png"]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot([r.p for r in over_p], [r.bytes_per_parameter / 16 for r in over_p], "o-", label="peak memory / 16 bytes")
    axes.plot([r.p for r in over_p], [r.step[0] for r in over_p], "s-", label="training step / AdamW's")
    axes.set_xlabel("p, the share of rows that an epoch leaves out")
    axes.set_ylim(0, 1.1)
    axes.legend()
    figure.savefig(folder / "growth.png", dpi=110)
    plt.close(figure)
    return [folder / "memory-time.png", folder / "growth.png"]


def parser() -> argparse.ArgumentParser:
    p = layer_skipping.parser()
    p.description = __doc__
    p.set_defaults(runs=tuple(CONTESTANTS), p=[0.9])
    next(action for action in p._actions if action.dest == "runs").choices = tuple(CONTESTANTS)
    p.add_argument("--epoch", type=int, default=2, help="steps between two changes of what is trained")
    p.add_argument("--memory-batch", type=int, nargs=2, default=[1, 8], metavar=("SEQUENCES", "TOKENS"))
    p.add_argument("--plots", type=Path, metavar="FOLDER", help="write memory-time.png and growth.png")
    p.add_argument("--add", type=Path, nargs="+", default=[], metavar="FILE", help="of --out, for the plots as well")
    p.add_argument("--report", type=Path, metavar="FILE", help="Markdown file that takes tables and plots")
    p.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    return p


def _check_files(options: argparse.Namespace) -> None:
    """Exits where what was measured could not be written in the end."""
    lacking = {"time": "bytes_per_parameter", "memory": "step"}.get(options.only)
    try:
        added = joined([], options.add)
        if options.plots and lacking and all(getattr(r, lacking) is None for r in added):
            raise ValueError(f"--plots takes times and memory, of which --only {options.only} is one: --add the other")
        if options.report:
            reports.around(options.report, BEGIN, END)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, TypeError) as error:
        parser().error(str(error))


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    _check_files(options)
    gate(options)
    names = [name for name in dict.fromkeys((BASE, *options.runs)) if installed(name)]
    for name in options.runs:
        if not installed(name):
            print(f"{name}: {CONTESTANTS[name].package} is not installed")
    print(f"{machine()}, {parameters(options):,} parameters\n", flush=True)
    results, tables = [], []
    for p in options.p:
        found = measure(p, names, options)
        results += found
        tables.append(table(found))
        print(tables[-1], "\n", flush=True)
    if options.out:
        options.out.write_text(json.dumps([vars(r) for r in results], indent=1) + "\n")
    written = plots(joined(results, options.add), options.plots) if options.plots else []
    if options.report:
        state = f"{machine()}, {parameters(options):,} parameters, {options.steps} steps. By"
        command = f"`python -m benchmarks.full_finetuning {shlex.join(sys.argv[1:] if argv is None else argv)}`:"
        pictures = [reports.link(path, options.report, path.stem) for path in written]
        reports.write_between(options.report, BEGIN, END, "\n\n".join([f"{state}\n{command}", *tables, *pictures]))


if __name__ == "__main__":
    main()
