"""Dropped layers cost nothing: no weight gradients for the layers that the coming step drops."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .contract import Effect
from .groups import effect_of
from .masked import MaskedOptimizer


def skip_dropped_layers(model: nn.Module, optimizer: Optimizer) -> "SkippedLayers":
    """Turn ``requires_grad`` off for exactly the layers that the coming step drops, from forward to step.

    Autograd then neither stores activations for their weight gradients nor computes them, and the optimizer takes the
    missing gradient for the zero that its mask would make of it: the trajectory is the same, bit for bit, as without.
    The layers are those of LayerGradDrop and GradFreeze; every other policy needs its gradients, and so does
    effect="update", whose moments take the unmasked gradient.

    The decision holds for all micro-batches of a step. What the user froze stays frozen. If every trainable parameter
    would be switched off, the last layer stays on, since a loss without a graph has no backward.

    The trajectory is not the same where something looks at all gradients before the step: the norm of
    clip_grad_norm_ (unless it stays below max_norm both ways) and GradScaler's search for infinities see kept
    gradients only. DDP needs ``find_unused_parameters=True``. torch.compile recompiles for every new set of dropped
    layers.

    Args:
        model: the model, or what wraps it. Its training forward passes decide.
        optimizer: a masked optimizer such as GradDropAdamW, or an Accelerate wrapper around one.

    Returns:
        a handle; ``remove()`` ends it and gives back every ``requires_grad``. It is a context manager, too.

    Raises:
        TypeError: on another optimizer. ValueError: if it has none of the model's parameters, or the model uses
            reentrant activation checkpointing, which loses all gradients behind a switched-off layer.
    """
    return SkippedLayers(model, unwrap(optimizer))


def unwrap(optimizer: Optimizer) -> MaskedOptimizer:
    """The masked optimizer inside Accelerate's wrappers. Raises TypeError if there is none."""
    inner = optimizer
    while not isinstance(inner, MaskedOptimizer):
        if not isinstance(getattr(inner, "optimizer", None), Optimizer):
            raise TypeError(
                "optimizer must be a masked optimizer such as GradDropAdamW, or a wrapper around one, got "
                f"{type(optimizer).__name__}"
            )
        inner = inner.optimizer
    return inner


class SkippedLayers:
    """What :func:`skip_dropped_layers` returns."""

    def __init__(self, model: nn.Module, optimizer: MaskedOptimizer):
        _check_checkpointing(model)
        self._params = set(model.parameters())
        if not any(p in self._params for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                f"optimizer must hold parameters of the model, got one with none of {type(model).__name__}'s"
            )
        self._optimizer = optimizer
        self._off: set[Tensor] = set()
        self._hooks = [
            # traced into a compiled model, it would switch once and for all
            model.register_forward_pre_hook(torch.compiler.disable(self._before_forward)),
            optimizer.register_step_post_hook(lambda *_: self._switch(set())),
        ]

    def remove(self) -> None:
        """Stop skipping. Calling it again does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._switch(set())

    def __enter__(self) -> "SkippedLayers":
        return self

    def __exit__(self, *_) -> None:
        self.remove()

    def _before_forward(self, module: nn.Module, _) -> None:
        if module.training and torch.is_grad_enabled():
            self._switch(self._skippable())

    def _switch(self, off: set[Tensor]) -> None:
        """Make ``off`` the parameters that are switched off; only those that require a gradient ever are."""
        for param in self._off - off:
            param.requires_grad_(True)
        self._off = {p for p in off if p in self._off or p.requires_grad}
        for param in self._off:
            param.requires_grad_(False)
        known = self._optimizer._switched_off
        known -= {id(p) for p in self._params}
        known |= {id(p) for p in self._off}

    def _skippable(self) -> set[Tensor]:
        groups = self._optimizer.param_groups
        needed = {p for group in groups if effect_of(group) == Effect.UPDATE for p in group["params"]}
        off = self._params.intersection(self._optimizer.dropped_layers()) - needed
        if not any(p.requires_grad or p in self._off for p in self._params - off):
            off -= _last_layer(groups, off)
        return off


def _last_layer(groups: list[dict], params: set[Tensor]) -> set[Tensor]:
    """Those parameters of the last layer, in the order of groups, that has any of ``params``."""
    having = [g for g in groups if not params.isdisjoint(g["params"])]
    if not having:
        return set()
    layer = having[-1].get("layer")
    return {
        p for g in having if g is having[-1] or (layer is not None and g.get("layer") == layer) for p in g["params"]
    }


def _check_checkpointing(model: nn.Module) -> None:
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)  # transformers'
        if getattr(module, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "model must not use reentrant activation checkpointing with skip_dropped_layers: behind a switched-off "
                "layer it loses all gradients. Set use_reentrant=False in its checkpointing kwargs"
            )
