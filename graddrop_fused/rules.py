"""Update rules: what becomes of a parameter once its gradient is masked. Add one here, and beside it in kernels/.

A rule names the state that it keeps and says three things: which numbers it reads from a param group, how these and
the step count t combine to the factors that kernels take (the only place where that is written), and the update of one
element. reference.py runs ``update`` on tensors; the kernels do the same in the same order.

A rule never sees the mask. Of an element whose gradient is dropped it is given a zero (or, under effect="update", the
gradient itself, and its step is not written); an element that is frozen it is never given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from .checks import check_bool, check_nonnegative, is_number, shown

Number = float | Tensor  # a Python float, or a float64 tensor with one number per tensor of a batch


class Rule:
    """Base of all rules. A rule is a frozen dataclass whose fields decide which state it keeps."""

    name: ClassVar[str]  # of the kernels' function
    factor_names: ClassVar[tuple[str, ...]] = ()  # of what `factors` returns, at most contract.MAX_FACTORS
    steps_may_be_unknown: ClassVar[bool] = False  # others' optimizers of this rule keep no count of steps
    all_states: ClassVar[tuple[str, ...]] = ()  # of any settings: what is turned off leaves its state behind

    @property
    def states(self) -> tuple[str, ...]:
        """Names of its state in optimizer.state, in the kernels' order."""
        return self.all_states

    @property
    def counts(self) -> bool:
        """Do the factors depend on the count of steps?"""
        return False

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "Rule":
        """The rule of a param group."""
        return _same(cls)  # type: ignore[arg-type]  # a class is hashable, whatever its instances are

    @staticmethod
    def check(group: Mapping[str, Any]) -> None:
        """Raises TypeError or ValueError on hyperparameters that the rule cannot take; lr is checked already."""

    def numbers(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """What :meth:`factors` needs from a param group besides its lr."""
        return ()

    def factors(self, lr: Number, numbers: Sequence[Number], scale: Number, t: Number) -> tuple[Number, ...]:
        """The factors of :meth:`update`, combined in float64; kernels round each of them once.

        Args:
            lr: the learning rate. numbers: of :meth:`numbers`.
            scale: multiplies the whole step, decay included: 1, or under effect="update" the mask's rescale.
            t: steps taken, this one included; at least 1.
        """
        return ()

    def update(
        self, p: Tensor, g: Tensor, states: Sequence[Tensor], factors: Sequence[float]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The new parameter and the new state, from the old ones and the masked gradient."""
        raise NotImplementedError


@cache
def _same(rule_class: type[Rule], *fields: bool) -> Rule:
    """One object for equal rules, since every step asks whether groups still have theirs."""
    return rule_class(*fields)


@dataclass(frozen=True)
class AdamW(Rule):
    """Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization"; torch.optim.AdamW.

    With b = sqrt(bias_correction2), m / (sqrt(v) / b + eps) = b * m / (sqrt(v) + b * eps): no division by b.
    """

    amsgrad: bool = False
    name: ClassVar[str] = "adamw"
    factor_names: ClassVar[tuple[str, ...]] = ("decay", "step", "one_minus_beta1", "beta2", "one_minus_beta2", "eps")
    all_states: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    @property
    def states(self) -> tuple[str, ...]:
        return self.all_states[: 3 if self.amsgrad else 2]

    @property
    def counts(self) -> bool:
        return True

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "Rule":
        amsgrad = group["amsgrad"]
        return _same(cls, amsgrad) if type(amsgrad) is bool else cls(amsgrad)  # type: ignore[arg-type]

    @staticmethod
    def check(group: Mapping[str, Any]) -> None:
        _check_betas(group["betas"])
        check_nonnegative("eps", group["eps"])
        check_nonnegative("weight_decay", group["weight_decay"])
        check_bool("amsgrad", group["amsgrad"])

    def numbers(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return float(group["weight_decay"]), float(beta1), float(beta2), float(group["eps"])

    def factors(self, lr: Number, numbers: Sequence[Number], scale: Number, t: Number) -> tuple[Number, ...]:
        weight_decay, beta1, beta2, eps = numbers
        bias_correction1 = 1 - beta1**t
        bias_correction2_sqrt = (1 - beta2**t) ** 0.5
        decay = 1 - scale * lr * weight_decay
        step = scale * lr / bias_correction1 * bias_correction2_sqrt
        return decay, step, 1 - beta1, beta2, 1 - beta2, eps * bias_correction2_sqrt

    def update(
        self, p: Tensor, g: Tensor, states: Sequence[Tensor], factors: Sequence[float]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        decay, step, one_minus_beta1, beta2, one_minus_beta2, eps = factors
        m, v, *vmax = states
        m = m + one_minus_beta1 * (g - m)
        v = beta2 * v + one_minus_beta2 * g * g
        vmax = [torch.maximum(old, v) for old in vmax]
        p = p * decay - step * m / ((vmax[0] if vmax else v).sqrt() + eps)
        return p, (m, v, *vmax)


@dataclass(frozen=True)
class SGD(Rule):
    """torch.optim.SGD. Without momentum, dampening and decay it is equation 2 of the paper itself."""

    momentum: bool = False
    damped: bool = field(default=False, repr=False)  # the buffer's first gradient is taken otherwise than the rest
    name: ClassVar[str] = "sgd"
    steps_may_be_unknown: ClassVar[bool] = True
    factor_names: ClassVar[tuple[str, ...]] = ("weight_decay", "momentum", "taken", "grad_step", "buffer_step")
    all_states: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    @property
    def states(self) -> tuple[str, ...]:
        return self.all_states if self.momentum else ()

    @property
    def counts(self) -> bool:
        return self.damped

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "Rule":
        momentum = bool(group["momentum"] != 0)
        return cls(momentum, damped=momentum and bool(group["dampening"] != 0))

    @staticmethod
    def check(group: Mapping[str, Any]) -> None:
        for name in ("momentum", "dampening", "weight_decay"):
            check_nonnegative(name, group[name])
        check_bool("nesterov", group["nesterov"])
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                "nesterov must be False without a momentum or with dampening, got nesterov=True with momentum="
                f"{group['momentum']!r} and dampening={group['dampening']!r}"
            )

    def numbers(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        # without momentum the gradient itself is the step, as the look-ahead of a momentum of 0 is
        nesterov = group["nesterov"] or not self.momentum
        return float(group["weight_decay"]), float(group["momentum"]), float(group["dampening"]), float(nesterov)

    def factors(self, lr: Number, numbers: Sequence[Number], scale: Number, t: Number) -> tuple[Number, ...]:
        weight_decay, momentum, dampening, nesterov = numbers
        # the buffer begins as the first gradient, undamped: 0**0 is 1 and 0**(t - 1) else 0
        taken = 1 - dampening * (1 - 0.0 ** (t - 1))
        return weight_decay, momentum, taken, scale * lr * nesterov, scale * lr * (1 - nesterov * (1 - momentum))

    def update(
        self, p: Tensor, g: Tensor, states: Sequence[Tensor], factors: Sequence[float]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        weight_decay, momentum, taken, grad_step, buffer_step = factors
        g = g + _term(weight_decay, p)
        if not states:
            return p - grad_step * g, ()
        m = momentum * states[0] + taken * g
        return p - (_term(grad_step, g) + buffer_step * m), (m,)


@dataclass(frozen=True)
class Lion(Rule):
    """Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675)."""

    name: ClassVar[str] = "lion"
    steps_may_be_unknown: ClassVar[bool] = True
    factor_names: ClassVar[tuple[str, ...]] = ("decay", "step", "one_minus_beta1", "one_minus_beta2")
    all_states: ClassVar[tuple[str, ...]] = ("exp_avg",)

    @staticmethod
    def check(group: Mapping[str, Any]) -> None:
        _check_betas(group["betas"])
        check_nonnegative("weight_decay", group["weight_decay"])

    def numbers(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return float(group["weight_decay"]), float(beta1), float(beta2)

    def factors(self, lr: Number, numbers: Sequence[Number], scale: Number, t: Number) -> tuple[Number, ...]:
        weight_decay, beta1, beta2 = numbers
        return 1 - scale * lr * weight_decay, scale * lr, 1 - beta1, 1 - beta2

    def update(
        self, p: Tensor, g: Tensor, states: Sequence[Tensor], factors: Sequence[float]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        decay, step, one_minus_beta1, one_minus_beta2 = factors
        (m,) = states
        direction = (m + one_minus_beta1 * (g - m)).sign()
        return p * decay - step * direction, (m + one_minus_beta2 * (g - m),)


@dataclass(frozen=True)
class MaskOnly(Rule):
    """Equation 2 alone, for attach(): the gradient stands in the parameter's place and becomes the masked one."""

    name: ClassVar[str] = "mask"

    def update(
        self, p: Tensor, g: Tensor, states: Sequence[Tensor], factors: Sequence[float]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return g, ()


def _term(factor: float | Tensor, x: Tensor) -> Tensor | float:
    """factor * x, or 0 where the factor is 0: torch leaves such terms out, and 0 times infinity is NaN."""
    if isinstance(factor, Tensor):
        return torch.where(factor != 0, factor * x, 0.0)
    return factor * x if factor else 0.0


def _check_betas(betas: Any) -> None:
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers in [0, 1), got {shown(betas)}")
    for index, beta in enumerate(betas):
        if not is_number(beta) or not 0.0 <= beta < 1.0:
            raise ValueError(f"betas[{index}] must be a number in [0, 1), got {shown(beta)}")
