"""GradDropSGD: torch.optim.SGD with masks drawn inside the update; without momentum, the paper's equation 2 itself."""

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .masked import MaskedOptimizer
from .policies import Policy
from .rules import SGD


class GradDropSGD(MaskedOptimizer):
    """SGD whose kernel draws the gradient's mask, rescales by 1/q and updates in one pass over memory.

    Takes what torch.optim.SGD takes, in the same order and with the same defaults, and keeps its momentum_buffer and a
    count of steps. Weight decay is added to the masked gradient, so it still moves a dropped element under
    effect="gradient".

    Args:
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        capturable, drop, seed, steps_per_epoch, effect, state_dtype, rounding, backend, active_state: as in
        GradDropAdamW.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: "Gradient Sparsification for Masked Fine-Tuning of Transformers", equation 2; docs/semantics.md.
    """

    rule_class = SGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        drop: Policy | None = None,
        seed: int = 0,
        steps_per_epoch: int | None = None,
        effect: str | None = None,
        state_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        backend: str = "auto",
        active_state: bool = False,
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "maximize": maximize,
                "foreach": foreach,
                "differentiable": differentiable,
                "fused": fused,
            },
            capturable=capturable,
            drop=drop,
            seed=seed,
            steps_per_epoch=steps_per_epoch,
            effect=effect,
            state_dtype=state_dtype,
            rounding=rounding,
            backend=backend,
            active_state=active_state,
        )
