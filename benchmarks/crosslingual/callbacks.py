"""What happens beside training: layers unfreezing, masks recorded for a figure, progress."""

import time

import torch
from transformers import TrainerCallback

from benchmarks import progress
from graddrop_fused import StaticMask

from .methods import HEAD

MASK_ELEMENTS = 64  # of each layer, recorded for the picture of masks
MEASURED = 2**17  # elements of a group whose masks tell the share of all of its elements, to 0.14 points


class Unfreezing(TrainerCallback):
    """Gradual unfreezing as everybody does it: a frozen parameter has requires_grad=False, and torch steps it not.

    In epoch e the first (e + 1) * ``per_epoch`` layers of the direction train, the head being the last of all; the
    head trains in any case unless ``mask_head``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, direction: str, per_epoch: int, mask_head: bool):
        layers = {}
        for group in optimizer.param_groups:
            layers.setdefault(group["layer"], []).extend(group["params"])
        self.order = list(layers.items())[:: -1 if direction == "top-down" else 1]
        self.per_epoch, self.mask_head = per_epoch, mask_head

    def on_train_begin(self, args, state, control, **_):
        self._epoch = int(state.epoch or 0)

    def on_epoch_begin(self, args, state, control, **_):
        self._epoch += 1
        for rank, (layer, params) in enumerate(self.order):
            trains = rank < self._epoch * self.per_epoch or (layer == HEAD and not self.mask_head)
            for param in params:
                param.requires_grad_(trains)

    def on_train_end(self, args, state, control, **_):
        for _, params in self.order:
            for param in params:
                param.requires_grad_(True)


class MaskRecord(TrainerCallback):
    """At the beginning of each epoch: which share of each layer the next step trains, and some elements' masks."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = getattr(optimizer, "optimizer", optimizer)

    def on_train_begin(self, args, state, control, **_):
        self._epoch = int(state.epoch or 0)

    def on_epoch_begin(self, args, state, control, **_):
        epoch, self._epoch = self._epoch, self._epoch + 1
        if any(entry.get("masks", {}).get("epoch") == epoch for entry in state.log_history):
            return  # resumed: this epoch is recorded
        layers = {}
        for group in self.optimizer.param_groups:
            layer = layers.setdefault(group["layer"], {"trained": 0.0, "numel": 0, "elements": ""})
            count = sum(param.numel() for param in group["params"])
            share, elements = self._of(group)
            layer["trained"] += share * count
            layer["numel"] += count
            layer["elements"] = max(layer["elements"], elements, key=len)
        for layer in layers.values():
            layer["trained"] = round(layer["trained"])
        state.log_history.append({"masks": {"epoch": epoch, "layers": layers}})

    def _of(self, group: dict) -> tuple[float, str]:
        """The share of the group's elements that the next step trains, and its first matrix's first elements."""
        params = sorted(group["params"], key=lambda param: param.dim() < 2)  # matrices first
        if group.get("drop") is None:
            trained = str(int(params[0].requires_grad))
            return float(trained), trained * min(MASK_ELEMENTS, params[0].numel())
        kept, measured, elements = 0, 0, None
        for param in params:
            # one probability serves a whole group, but a mask of the user's own says nothing of its neighbours
            if measured >= MEASURED and not isinstance(group["drop"], StaticMask):
                break
            mask = self.optimizer.keep_mask(param).flatten()
            kept += int(mask.sum())
            measured += mask.numel()
            if elements is None:
                elements = "".join(map(str, mask[:MASK_ELEMENTS].int().tolist()))
        return kept / measured, elements


class TrainingProgress(TrainerCallback):
    """A bar over the training steps, or a line per epoch where no terminal shows it."""

    def __init__(self, label: str):
        self.label = label

    def on_train_begin(self, args, state, control, **_):
        self.began = time.perf_counter()
        self.bar = progress.bar(state.max_steps, f"{self.label}: train", "step", state.global_step)

    def on_step_end(self, args, state, control, **_):
        self.bar.update()

    def on_epoch_end(self, args, state, control, **_):
        if not progress.on_terminal():
            seconds = time.perf_counter() - self.began
            progress.say(f"{self.label}: epoch {round(state.epoch)} of {args.num_train_epochs:g}, {seconds:.0f} s")

    def on_train_end(self, args, state, control, **_):
        self.bar.close()


class PredictionProgress(TrainerCallback):
    """A bar over the batches of one prediction."""

    def __init__(self, name: str):
        self.name, self.bar = name, None

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **_):
        if self.bar is None:
            total = len(eval_dataloader)
            self.bar = progress.bar(total, f"{self.name}, all languages", "batch")
        self.bar.update()

    def on_predict(self, args, state, control, metrics, **_):
        if self.bar is not None:
            self.bar.close()
