"""Methods: what the paper compares, by the paper's names, each as an optimizer over a model's layers."""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import graddrop_fused
from graddrop_fused import (
    GradDrop,
    GradDropEpoch,
    GradFreeze,
    LayerGradDrop,
    LinearAnneal,
    Policy,
    StaticMask,
    param_groups,
)

P = 0.2  # drop probability per step or layer, where a method has a constant one
LORA_RANK = 16  # about as much memory as SAVING takes at p = 0.9, on the embedded model
SAVING = {"active_state": True}  # options of our optimizer
CHILD = 0.3  # share of elements in the child network of Child-Tuning
HEAD = "head"
# Readings of the paper's theta beside those of param_groups ("attention": key, value and output projections). Its
# equation 1 names the weights {K, V, U} of softmax((QK)(QV)^T / sqrt(dl)) QU, where Q is the input: that makes them the
# query, the key, and the value and output projections. Names are those of BERT, RoBERTa and XLM-R.
TARGETS = {"equation-1": r"attention\.(self\.(query|key|value)|output\.dense)\."}
OPTIMIZERS = {"adamw": ("AdamW", "GradDropAdamW"), "sgd": ("SGD", "GradDropSGD")}  # torch's name, ours


@dataclass(frozen=True)
class Schedule:
    """What a method may depend on."""

    epochs: int
    layers: int  # of the model, embeddings and head included


@dataclass(frozen=True)
class Method:
    """``policy`` makes the drop policy from a schedule and p; None is torch's own optimizer, without masks."""

    name: str
    policy: Callable[[Schedule, float], Policy] | None = None
    p: Callable[[Schedule], float] | float = P  # the default of --p
    effect: str | None = None
    by_layer: bool = False  # decides whole layers, so dropped layers can be skipped
    fisher: bool = False  # masks come from the Fisher information of the training data
    unfreezes: str | None = None  # gradual unfreezing with requires_grad, "top-down" or "bottom-up"
    options: dict[str, Any] = field(default_factory=dict)  # of our optimizer
    saves: bool = False  # gradients are released in backward, those of dropped rows never computed
    adapters: bool = False  # LoRA on all linear layers; the head trains as a whole

    @property
    def masks(self) -> bool:
        return self.policy is not None or self.fisher

    def drop(self, schedule: Schedule, p: float | None) -> Policy:
        default = self.p(schedule) if callable(self.p) else self.p
        return self.policy(schedule, default if p is None else p)

    def optimizer(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        lr: float,
        weight_decay: float,
        seed: int,
        p: float | None = None,
        effect: str | None = None,
        targets: str = "all",
        mask_head: bool = False,
        backend: str = "auto",
        kind: str = "adamw",
        fisher: dict[str, torch.Tensor] | None = None,
    ) -> torch.optim.Optimizer:
        """A new optimizer for ``model``.

        Args:
            p, effect: in place of the method's own.
            targets: which parameters the policy drops, as for graddrop_fused.param_groups, or a key of TARGETS.
            mask_head: whether the policy drops the new head, too. By default no method does.
            kind: a key of OPTIMIZERS.
            fisher: each parameter's mean squared gradient, for ``fisher`` methods.
        """
        plain, masked = optimizer_classes(kind)
        fused = {"fused": True} if kind == "adamw" else {}
        if not self.masks:
            groups = param_groups(model, weight_decay=weight_decay)
            return plain([{**g, "params": [q for _, q in g["params"]]} for g in groups], lr=lr, **fused)
        if self.fisher:
            in_blocks = [n for g in param_groups(model) if g["layer"].startswith("layer.") for n, _ in g["params"]]
            drop = StaticMask(largest({name: fisher[name] for name in in_blocks}, CHILD))
        else:
            drop = self.drop(schedule, p)
        groups = param_groups(
            model, weight_decay=weight_decay, drop=drop, targets=TARGETS.get(targets, targets), include_head=True
        )
        if not mask_head:
            groups = [{**g, "drop": None} if g["layer"] == HEAD else g for g in groups]
        if effect or self.effect:
            groups = [{**g, "effect": effect or self.effect} for g in groups]
        return masked(groups, lr=lr, seed=seed, backend=backend, **self.options)


def adapted(model: nn.Module) -> nn.Module:
    """``model`` with LoRA adapters in place of its own training, but for the head."""
    import peft

    config = peft.LoraConfig(
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        target_modules="all-linear",
        modules_to_save=["pooler", "classifier", "qa_outputs"],  # of the head, which is new: the pooler, too
        task_type="SEQ_CLS",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a name of transformers' that peft still reads
        return peft.get_peft_model(model, config)


def optimizer_classes(kind: str) -> tuple[type, type | None]:
    """torch's class and ours. Raises ValueError if there is no such ``kind`` in this version of graddrop_fused."""
    if kind not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {kind!r}")
    plain, masked = OPTIMIZERS[kind]
    if not hasattr(graddrop_fused, masked):
        raise ValueError(
            f"optimizer {kind!r} needs graddrop_fused.{masked}, which version {graddrop_fused.__version__} lacks; "
            "choose adamw"
        )
    return getattr(torch.optim, plain), getattr(graddrop_fused, masked)


def check(
    names: Iterable[str],
    *,
    epochs: int,
    p: float | None = None,
    kind: str = "adamw",
    clip: float = 0.0,
    accumulation: int = 1,
) -> None:
    """Raises ValueError before anything runs, if a method cannot run with these settings."""
    optimizer_classes(kind)
    for name in names:
        method = METHODS[name]
        if method.saves and (clip or accumulation > 1):
            raise ValueError(
                f"method {name} cannot run with clip={clip:g} and accumulation={accumulation}: each gradient is used "
                "and freed within backward, so clip must be 0 and accumulation 1"
            )
        if method.policy is None:
            continue
        try:
            method.drop(Schedule(epochs, layers=14), p)
        except (TypeError, ValueError) as error:
            raise ValueError(f"method {name} cannot run with epochs={epochs} and p={p}: {error}") from None


def _part_per_epoch(schedule: Schedule) -> float:
    """The last epoch is the first with all elements active, or, toggling, the one with the last part."""
    return 1 - 1 / schedule.epochs


def _freeze(direction: str) -> Callable:
    """All layers train by the last epoch, however few epochs there are."""
    return lambda schedule, p: GradFreeze(direction, layers_per_epoch(schedule))


def layers_per_epoch(schedule: Schedule) -> int:
    return math.ceil(schedule.layers / schedule.epochs)


def _anneal(schedule: Schedule) -> LinearAnneal:
    return LinearAnneal(epochs=schedule.epochs)


METHODS = {
    method.name: method
    for method in (
        Method("fine-tuning"),
        Method("gradfreeze-top-down", _freeze("top-down"), by_layer=True),
        Method("gradfreeze-bottom-up", _freeze("bottom-up"), by_layer=True),
        Method("graddrop", lambda schedule, p: GradDrop(p)),
        Method("anneal-graddrop", lambda schedule, p: GradDrop(anneal=_anneal(schedule))),
        Method("layer-graddrop", lambda schedule, p: LayerGradDrop(p), by_layer=True),
        Method("anneal-layer-graddrop", lambda schedule, p: LayerGradDrop(anneal=_anneal(schedule)), by_layer=True),
        Method("graddrop-epoch", lambda schedule, p: GradDropEpoch(p), p=_part_per_epoch),
        Method("graddrop-epoch-toggle", lambda schedule, p: GradDropEpoch(p, toggle=True), p=_part_per_epoch),
        Method("graddrop-epoch-redrawn", lambda schedule, p: GradDropEpoch(p, replacement=True)),
        Method(
            "anneal-graddrop-epoch",
            lambda schedule, p: GradDropEpoch(replacement=True, anneal=_anneal(schedule)),
        ),
        Method("child-tuning-f", lambda schedule, p: GradDrop(p), p=1 - CHILD),
        Method("child-tuning-d", fisher=True),
        Method("skip-update", lambda schedule, p: GradDrop(p), effect="update"),
        # SkipUpdate as its paper has it (arXiv 2602.15322): blocks, and half of them in every step
        Method("skip-update-blocks", lambda schedule, p: GradDrop(p, block=128), p=0.5, effect="update"),
        Method(
            "all-savings",
            lambda schedule, p: GradDropEpoch(p, toggle=True, block="row"),
            p=0.9,
            effect="freeze",
            options=SAVING,
            saves=True,
        ),
        Method("lora", adapters=True),
        Method("unfreezing-top-down", unfreezes="top-down"),
        Method("unfreezing-bottom-up", unfreezes="bottom-up"),
    )
}

# What --methods all stands for. The others save memory, and need learning rates of their own: study/savings.py
COMPARED = tuple(name for name, method in METHODS.items() if not method.saves and not method.adapters)


def count_layers(model: nn.Module) -> int:
    """Embeddings, blocks, head."""
    return len({group["layer"] for group in param_groups(model)})


def largest(fisher: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """Masks that keep the ``share`` of all elements with the largest values, over all tensors together.

    Source: Xu et al. 2021, "Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning".
    """
    values = torch.cat([value.flatten() for value in fisher.values()])
    threshold = values.kthvalue(max(1, round((1 - share) * values.numel()))).values
    return {name: value > threshold for name, value in fisher.items()}
