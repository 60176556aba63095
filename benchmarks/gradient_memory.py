"""What release_gradients, skip_dropped_rows and active_state save: time and peak memory of a training step.

    python -m benchmarks.gradient_memory --p 0.9 --steps 12

Runs have equal models and data:

    fine-tuning          torch.optim.AdamW(fused=True)
    torch in backward    the same, one optimizer a parameter, each stepping in its parameter's hook
    masked               GradDropAdamW with GradDrop(p, block="row"), effect "freeze" unless told otherwise
    released             the same with release_gradients
    rows                 the same with skip_dropped_rows
    rows, released       the same with both
    active               active_state=True, with GradDropEpoch(p, block="row", toggle=True) and epochs of 2 steps
    all                  the same with both

They take turns at every step; medians, quartiles and peak memory are those of benchmarks.layer_skipping. Where a run
updates inside backward, its update is part of that time: the whole step is what to compare.
"""

import argparse

import torch

from benchmarks import layer_skipping
from benchmarks.harness import machine
from graddrop_fused import GradDrop, GradDropAdamW, GradDropEpoch, param_groups, release_gradients, skip_dropped_rows

RUNS = ("fine-tuning", "torch in backward", "masked", "released", "rows", "rows, released", "active", "all")
RATIOS = [(run, "fine-tuning") for run in RUNS[1:]] + [("released", "masked"), ("rows", "masked")]


def parser() -> argparse.ArgumentParser:
    p = layer_skipping.parser()
    p.description = __doc__
    p.set_defaults(effect="freeze", runs=RUNS)
    next(action for action in p._actions if action.dest == "runs").choices = RUNS
    return p


class Run(layer_skipping.Run):
    def prepare(self, name: str, p: float, options: argparse.Namespace) -> None:
        if name == "fine-tuning":
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        elif name == "torch in backward":
            self.optimizer = _InBackward(self.model)
        else:
            active = name in ("active", "all")
            drop = GradDropEpoch(p=p, block="row", toggle=True) if active else GradDrop(p=p, block="row")
            self.optimizer = GradDropAdamW(
                param_groups(self.model, drop=drop),
                lr=1e-5,
                effect=options.effect,
                active_state=active,
                steps_per_epoch=2 if active else None,
            )
        if "rows" in name or name == "all":
            skip_dropped_rows(self.model, self.optimizer)
        if "released" in name or name == "all":
            release_gradients(self.model, self.optimizer)


class _InBackward:
    """As in torch's tutorial on the optimizer step in backward."""

    def __init__(self, model: torch.nn.Module):
        self.optimizers = {p: torch.optim.AdamW([p], lr=1e-5, fused=True) for p in model.parameters()}
        for param in self.optimizers:
            param.register_post_accumulate_grad_hook(self._step_and_free)

    def _step_and_free(self, param: torch.Tensor) -> None:
        self.optimizers[param].step()
        self.optimizers[param].zero_grad()

    def step(self) -> None:
        pass

    def zero_grad(self) -> None:
        pass


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    print(f"{machine()}, {options.device}, effect {options.effect}\n")
    for p in options.p:
        if options.only != "memory":
            layer_skipping.print_times(p, *layer_skipping.measure_time(p, options, Run), ratios=RATIOS)
        if options.only != "time":
            peaks = {run: layer_skipping.measure_memory(run, p, options, Run) for run in options.runs}
            layer_skipping.print_memory(p, peaks)


if __name__ == "__main__":
    main()
