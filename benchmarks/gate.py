"""The parity gate: before a contestant is timed, one step of it must compute what it claims to compute.

It runs on the tensors that are timed. A sample of every tensor is put back to known values, the contestant steps, and
the sample is compared with torch.optim.AdamW in float64. Contestants draw masks from different generators, so the mask
is read off the result (a dropped gradient leaves a zero first moment zero) and must then explain everything else: its
share, its blocks, the parameter and both moments.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.tensors import STEP, Tensors
from graddrop_fused import keep_mask, unpack_mask

SAMPLE = 1 << 18  # elements over all tensors
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Red(AssertionError):
    """A contestant computes something else than it claims."""


@dataclass
class Values:
    """All sampled elements, one after another, in float64."""

    p: Tensor
    g: Tensor
    m: Tensor
    v: Tensor


class Sample:
    """The first and the last elements of every tensor, and how to put them back."""

    def __init__(self, tensors: Tensors):
        self.tensors = tensors
        half = max(1, SAMPLE // len(tensors.params) // 2)
        heads: list[list[Tensor]] = []
        tails: list[list[Tensor]] = []
        for param, m, v in zip(tensors.params, tensors.exp_avgs, tensors.exp_avg_sqs, strict=True):
            every = [t.detach().view(-1) for t in (param, param.grad, m, v)]
            if param.numel() <= 2 * half:
                heads.append(every)
            else:
                heads.append([t[:half] for t in every])
                tails.append([t[-half:] for t in every])
        self.views = list(zip(*heads, *tails, strict=True))  # of p, of g, of m, of v
        self.sizes = [view.numel() for view in self.views[0]]
        self.heads = len(heads)  # these begin with an element 0
        self.saved = [[view.clone() for view in views] for views in self.views]

    def restore(self) -> None:
        """Known values; the first moment is zero, outside the sample too: Magma's step depends on all of it."""
        for views, saved in zip(self.views, self.saved, strict=True):
            torch._foreach_copy_(views, saved)
        torch._foreach_zero_(self.tensors.exp_avgs)

    def read(self) -> Values:
        return Values(*(torch.cat(views).to("cpu", torch.float64) for views in self.views))


@dataclass(frozen=True)
class Claim:
    """What one step computes, and how it is told.

    p: drop probability; None: the mask's share is not checked.
    rescale: of what is kept; None: 1 / (1 - p).
    effect: of dropping an element: "gradient", "freeze" or "update", as docs/semantics.md defines them.
    unit: consecutive elements that share a decision; None: the whole tensor.
    gaussian: multiplicative N(1, p / (1 - p)) noise in place of a mask.
    own_state: the contestant starts from zero moments of its own, of any precision; only parameters are compared.
    """

    p: float | None = 0.0
    rescale: float | None = None
    effect: str = "gradient"
    unit: int | None = 1
    gaussian: bool = False
    own_state: bool = False

    def check(self, name: str, step: Callable, sample: Sample, lr: float) -> None:
        """Raises Red naming what differs."""
        sample.restore()
        before = sample.read()
        step()
        after = sample.read()
        sample.restore()
        try:
            self._compare(name, before, after, sample, lr)
        except AssertionError as error:
            raise Red(str(error)) from None

    def _compare(self, name: str, old: Values, new: Values, sample: Sample, lr: float) -> None:
        scale = self.rescale if self.rescale is not None else 1 / (1 - (self.p or 0.0))
        kept = None
        if self.own_state:
            zeros = torch.zeros_like(old.m)
            expected = _adamw(Values(old.p, old.g, zeros, zeros), old.g, lr, step=0)
        elif self.gaussian:
            noise = new.m / (0.1 * old.g)
            self._check_noise(name, noise)
            expected = _adamw(old, noise * old.g, lr)
        elif self.effect == "update":
            kept = new.p != old.p
            if self.unit is None:  # decay and step may cancel in an element that is kept
                pieces = kept.split(sample.sizes)
                kept = torch.cat([(mask.double().mean() > 0.5).expand_as(mask) for mask in pieces])
            expected = _adamw(old, old.g, lr)
            expected.p = torch.where(kept, old.p + scale * (expected.p - old.p), old.p)
        elif self.p == 0.0:
            expected = _adamw(old, old.g, lr)
        else:
            # a zero gradient leaves no trace in the first moment; whether its element was frozen, others show
            kept = new.m != 0 if self.effect == "gradient" else (new.m != 0) | (new.p != old.p) | (new.v != old.v)
            expected = _adamw(old, torch.where(kept, scale * old.g, 0.0), lr)
            if self.effect == "freeze":
                for field in ("p", "m", "v"):
                    setattr(expected, field, torch.where(kept, getattr(expected, field), getattr(old, field)))
        if kept is not None:
            self._check_mask(name, kept, old.g != 0 if self.effect != "update" else torch.ones_like(kept), sample)
        rounding = 0.05 * lr / 0.02 if self.own_state else ROUNDING[sample.tensors.dtype]
        compared = {"parameter": ("p", rounding, 0.02 * rounding)}
        if not self.own_state:
            state = max(1e-5, ROUNDING[sample.tensors.state_dtype])
            compared |= {"first moment": ("m", state, 1e-9), "second moment": ("v", state, 1e-14)}
        for what, (field, rtol, atol) in compared.items():
            harness.assert_close(f"{name}, {what}", [getattr(new, field)], [getattr(expected, field)], rtol, atol)

    def _check_mask(self, name: str, kept: Tensor, told: Tensor, sample: Sample) -> None:
        """``told``: where ``kept`` tells the mask. Some versions of torch draw zeros among bfloat16 gradients, and
        those are the same kept or dropped."""
        pieces = list(zip(kept.split(sample.sizes), told.split(sample.sizes), strict=True))
        if self.unit is None:
            assert not any(_in_part(*piece, piece[0].numel()) for piece in pieces), (
                f"{name}: a tensor is dropped in part"
            )
            units = float(sample.heads)
        else:
            units = kept.numel() / self.unit
            in_part = self.unit > 1 and any(_in_part(*piece, self.unit) for piece in pieces[: sample.heads])
            assert not in_part, f"{name}: a block of {self.unit} elements is dropped in part"
        if self.p is not None:
            _check_share(name, kept[told].double().mean().item(), self.p, units)

    def _check_noise(self, name: str, noise: Tensor) -> None:
        std = (self.p / (1 - self.p)) ** 0.5
        off = max(abs(noise.mean().item() - 1), abs(noise.std().item() - std))
        assert off < 6 * std / noise.numel() ** 0.5, f"{name}: noise of mean {noise.mean():.4f}, std {noise.std():.4f}"


@dataclass(frozen=True)
class MaskClaim:
    """The contestant returns its masks: bool, 0 and 1 of any dtype, or packed int32 words.

    reference: the first tensor's mask must equal the mask stream's (seed 0, draw 1, stream 0).
    """

    p: float
    reference: bool = False

    def check(self, name: str, step: Callable, sample: Sample, lr: float) -> None:
        masks, params = step(), sample.tensors.params
        for mask, param in zip(masks, params, strict=True):
            kept = unpack_mask(mask, param.shape) if mask.dtype == torch.int32 else mask
            try:
                _check_share(name, kept.double().mean().item(), self.p, param.numel())
            except AssertionError as error:
                raise Red(str(error)) from None
            if self.reference and param is params[0] and not torch.equal(kept, keep_mask(param.shape, self.p)):
                raise Red(f"{name}: the mask is not the mask stream's")


@dataclass(frozen=True)
class NoClaim:
    """Not an optimizer's step: a floor, or forward and backward."""

    def check(self, name: str, step: Callable, sample: Sample, lr: float) -> None:
        step()


def _in_part(kept: Tensor, told: Tensor, unit: int) -> bool:
    """Whether any whole unit has elements that are told to be kept and others that are told to be dropped."""
    if not kept.numel():
        return False
    whole = kept.numel() // unit * unit
    kept, told = (mask[:whole].view(-1, unit) for mask in (kept, told))
    return bool(((kept & told).any(1) & (~kept & told).any(1)).any())


def _check_share(name: str, share: float, p: float, units: float) -> None:
    allowed = 6 * (p * (1 - p) / units) ** 0.5
    assert abs(share - (1 - p)) <= allowed, f"{name}: keeps {share:.4f}, not {1 - p:.4f} within {allowed:.4f}"


def _adamw(old: Values, grad: Tensor, lr: float, step: int = STEP) -> Values:
    """torch.optim.AdamW's own for-loop step in float64."""
    param = old.p.clone().requires_grad_()
    param.grad = grad
    optimizer = torch.optim.AdamW([param], lr=lr, foreach=False, fused=False)
    state = {"step": torch.tensor(float(step)), "exp_avg": old.m.clone(), "exp_avg_sq": old.v.clone()}
    optimizer.state[param] = state
    optimizer.step()
    return Values(param.detach(), grad, state["exp_avg"], state["exp_avg_sq"])
