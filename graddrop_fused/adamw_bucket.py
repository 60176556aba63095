"""A bucket with AdamW's state: made once, then asked before every step if its tensors still stand as they did."""

import operator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from . import validate
from .contract import Real
from .plan import Bucket, runs
from .shards import like, local, local_gradient

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def moment_dtype(param: Tensor, state_dtype: torch.dtype | None) -> torch.dtype:
    """The moments' dtype: the parameter's unless told otherwise, but float32 for float16, whose squares underflow."""
    if param.dtype == torch.float64:
        return torch.float64
    return state_dtype or (torch.float32 if param.dtype == torch.float16 else param.dtype)


class AdamWBucket(Bucket):
    """What one backend call updates. ``dtypes`` are (gradient's dtype, amsgrad, moments' dtype)."""

    @classmethod
    def of(cls, bucket: Bucket, state: dict[Tensor, dict[str, Any]]) -> "AdamWBucket":
        """Give the bucket's parameters their state, where they have none yet, and gather it."""
        self = cls(**{f.name: getattr(bucket, f.name) for f in fields(Bucket)})
        self.grad_dtype, amsgrad, dtype = self.dtypes
        self.params = [m.param for m in self.members]
        self.shapes = [param.shape for param in self.params]
        self.absent: list[int] = []  # tensors without a gradient in the coming step
        names = MOMENTS if amsgrad else MOMENTS[:2]
        for param in self.params:
            _complete(state[param], param, names, dtype)
        self.states = [state[param] for param in self.params]

        # One buffer of step counts, of which every state["step"] is a view: one addition counts them all.
        device = self.batch.integers.device
        self.steps = torch.stack([s["step"].to(device, torch.float32).reshape(()) for s in self.states])
        for entry, step in zip(self.states, self.steps.unbind(), strict=True):
            entry["step"] = step
        self.gathered = [tuple(entry[name] for entry in self.states) for name in ("step", *names)]
        self.names = ("step", *names)
        # Views, and functions in place of operators below: for a few tensors Python is what a step costs.
        columns = self.batch.reals.unbind(1)
        self.columns = [columns[c] for c in (Real.BETA1, Real.BETA2, Real.STEP_SIZE, Real.BIAS_CORRECTION2_SQRT)]

        exp_avgs, exp_avg_sqs, *maxima = ([local(entry[name]) for entry in self.states] for name in names)
        self.batch.exp_avgs, self.batch.exp_avg_sqs = exp_avgs, exp_avg_sqs
        self.batch.max_exp_avg_sqs = maxima[0] if maxima else [None] * len(self.states)
        self.sharded = [(t, local(t)) for t in self._tensors() if local(t) is not t]
        self.locals = [local(t) for t in self._tensors()]
        self.addresses = [t.data_ptr() for t in self.locals]
        return self

    def _tensors(self) -> list[Tensor]:
        return [*self.params, *(tensor for tensors in self.gathered[1:] for tensor in tensors)]

    @property
    def device(self) -> torch.device:
        return self.batch.params[0].device

    def take(self, grads: list[Tensor | None], switched_off: set[int]) -> bool:
        """Adopt the gradients of the coming step. False if the bucket no longer fits: make a new one.

        Raises ValueError on a gradient that cannot serve.
        """
        # Runs before every step over every tensor: plain loops over plain lists, or small tensors wait for Python.
        for name, tensors in zip(self.names, self.gathered, strict=True):
            if not all(map(operator.is_, [entry.get(name) for entry in self.states], tensors)):
                return False
        if not all(tensor._local_tensor is part for tensor, part in self.sharded):
            return False
        if [t.data_ptr() for t in self.locals] != self.addresses:
            return False
        absent, dtype, device, shapes = [], self.grad_dtype, self.device, self.shapes
        for i, (member, grad) in enumerate(zip(self.members, grads, strict=True)):
            if grad is None:
                if id(member.param) not in switched_off:
                    absent.append(i)
                continue
            if (
                grad.dtype is dtype
                and grad.layout is torch.strided
                and grad.shape == shapes[i]
                and grad.device == device
            ):
                continue
            validate.gradient(member, grad)
            return False  # it serves, but in another bucket
        if self.sharded:
            grads = [None if g is None else local_gradient(p, g) for p, g in zip(self.params, grads, strict=True)]
        self.absent, self.batch.grads = absent, grads
        return True

    def advance(self, integers: Tensor, reals: Tensor, found_inf: Tensor | None) -> None:
        """Count the step (unless found_inf) and fill in the tables from the groups' rows."""
        counted = 1.0 if found_inf is None else (found_inf == 0).to(self.steps).reshape(())
        if self.absent:
            present = torch.ones_like(self.steps)
            for run in runs(self.absent):
                present[run] = 0.0
            counted = counted * present
        self.steps += counted
        self.fill(integers, reals)
        t = self.steps.double()
        beta1, beta2, step_size, bias_correction2_sqrt = self.columns
        step_size.div_(torch.sub(1, torch.pow(beta1, t)))
        bias_correction2_sqrt.copy_(torch.sub(1, torch.pow(beta2, t)).sqrt_())

    def skip_absent(self) -> None:
        if self.absent:
            self.skip(self.absent)


def restore_state(param: Tensor, saved: dict[str, Any], state_dtype: torch.dtype | None) -> dict[str, Any]:
    """A parameter's state from a checkpoint, in the parameter's layout and the moments' own dtype.

    torch casts moments to the parameter's dtype as it loads them, which would lose bits under another state_dtype.
    """
    state: dict[str, Any] = {"step": torch.as_tensor(saved["step"]).to(torch.float32, copy=True)}
    for name in MOMENTS:
        if name in saved:
            state[name] = like(param, moment_dtype(param, state_dtype)).copy_(saved[name])
    return state


def _complete(entry: dict[str, Any], param: Tensor, names: tuple[str, ...], dtype: torch.dtype) -> None:
    entry["step"] = torch.as_tensor(entry.get("step", 0.0))
    for name in names:
        if name not in entry:
            entry[name] = like(param, dtype).zero_()
        elif entry[name].dtype != dtype or local(entry[name]).stride() != local(param).stride():
            entry[name] = like(param, dtype).copy_(entry[name])
