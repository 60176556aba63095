"""GradDropLion: Lion with masks drawn inside the update."""

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .masked import MaskedOptimizer
from .policies import Policy
from .rules import Lion


class GradDropLion(MaskedOptimizer):
    """Lion whose kernel draws the gradient's mask, rescales by 1/q and updates in one pass over memory.

    The step is a sign, so under effect="gradient" an element whose gradient is dropped still moves by lr, along its
    momentum; "freeze" and "update" leave it where it is.

    Args:
        lr: float or a tensor of one element. betas: of the direction and of the momentum. weight_decay: decoupled.
        maximize, capturable, drop, seed, steps_per_epoch, effect, state_dtype, rounding, backend, active_state: as in
        GradDropAdamW.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675); docs/semantics.md.
    """

    rule_class = Lion

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        capturable: bool = False,
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
            {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize, "fused": fused},
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
