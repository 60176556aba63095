"""GradDropAdamW: torch.optim.AdamW with masks drawn inside the update."""

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .masked import MaskedOptimizer
from .policies import Policy
from .rules import AdamW


class GradDropAdamW(MaskedOptimizer):
    """AdamW whose kernel draws the gradient's mask, rescales by 1/q and updates in one pass over memory.

    Takes what torch.optim.AdamW takes, in the same order and with the same defaults, and keeps the same state under
    the same names. ``foreach`` and ``fused`` are accepted (the step is always fused); ``differentiable`` is refused.

    Args:
        params: tensors, groups, or ``model.named_parameters()``. Names make masks independent of the order of
            parameters. A group may have its own ``drop``, ``effect`` and ``layer`` (its layer's name).
        lr: float or a tensor of one element. betas, eps, weight_decay, amsgrad, maximize: as in torch.optim.AdamW, but
            betas must be numbers.
        capturable: keep step, draw and the mask's numbers on the device (and lr, if it is a tensor there), so that a
            captured graph draws new masks at every replay.
        fused: True lets GradScaler hand over its scale and its infinities, as torch's fused optimizers do. Unlike with
            torch's, ``.grad`` is only read and stays scaled after the step.
        drop: a mask policy, or None to keep everything.
        seed: 0 <= seed < 2**64. Equal seeds give equal masks, whatever the device or world size.
        steps_per_epoch: optimizer steps in an epoch, for policies that follow epochs; or call :meth:`set_epoch`.
        effect: what a dropped element means. "gradient" (the paper): its gradient is zero; "freeze": parameter and
            state stay untouched; "update": state takes the unmasked gradient, the step is dropped. None is the
            policy's own default: "gradient", but "freeze" for GradFreeze.
        state_dtype: torch.float32 or torch.bfloat16 for the moments; None is the parameter's own dtype, as in torch,
            but float32 for float16 parameters. float64 parameters always have float64 moments.
        rounding: "nearest", or "stochastic" for bfloat16 parameters: they and their bfloat16 moments are rounded up or
            down by chance, right on average, so that small steps are not lost. Chance follows from seed, step and name.
            float32 moments stay as they are; parameters of other dtypes are refused. A group may have its own.
        backend: "auto", "triton", "cpu" or "reference".
        active_state: keep moments only for what the current epoch (or ``hold=K`` steps) trains: what becomes frozen
            loses them, what becomes active starts as a new parameter would. Needs effect "freeze" and masks that hold,
            of whole layers or of blocks (docs/memory.md).

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: "Gradient Sparsification for Masked Fine-Tuning of Transformers"; docs/semantics.md.
    """

    rule_class = AdamW

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
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
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
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
