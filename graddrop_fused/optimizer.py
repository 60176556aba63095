"""GradDropAdamW: torch.optim.AdamW with masks drawn inside the update.

A step reads straight down: gather the gradients, count the draw, ask the policies for their numbers, one backend call
per bucket of tensors.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from . import checkpoint, dispatch, preview, validate
from .adamw_bucket import AdamWBucket, moment_dtype, restore_state
from .capture import DeviceRows, check_not_capturing
from .clock import Clock
from .plan import Group, Layers, host_tables, make_buckets, members, packed_groups, policy_of, rows_at
from .policies import Policy

HOST = torch.device("cpu")


class GradDropAdamW(Optimizer):
    """AdamW whose kernel draws the gradient's mask, rescales by 1/q and updates in one pass over memory.

    Takes what torch.optim.AdamW takes, in the same order and with the same defaults, and keeps the same state under
    the same names. ``foreach`` and ``fused`` are accepted (the step is always fused); ``differentiable`` is refused.

    Args:
        params: tensors, groups, or ``model.named_parameters()``. Names make masks independent of the order of
            parameters. A group may have its own ``drop``, ``effect`` and ``layer`` (its layer's name).
        lr: float or a tensor of one element. betas, eps, weight_decay, amsgrad, maximize: as in torch.optim.AdamW.
        capturable: keep step, draw and the mask's numbers on the device (and lr, if it is a tensor there), so that a
            captured graph draws new masks at every replay.
        drop: a mask policy, or None to keep everything.
        seed: 0 <= seed < 2**64. Equal seeds give equal masks, whatever the device or world size.
        steps_per_epoch: optimizer steps in an epoch, for policies that follow epochs; or call :meth:`set_epoch`.
        effect: what a dropped element means. "gradient" (the paper): its gradient is zero; "freeze": parameter and
            state stay untouched; "update": state takes the unmasked gradient, the step is dropped.
        state_dtype: torch.float32 or torch.bfloat16 for the moments; None is the parameter's own dtype, as in torch,
            but float32 for float16 parameters. float64 parameters always have float64 moments.
        backend: "auto", "triton", "cpu" or "reference".

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: "Gradient Sparsification for Masked Fine-Tuning of Transformers"; docs/semantics.md.
    """

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
        effect: str = "gradient",
        state_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ):
        dispatch.check_name(backend)
        validate.state_dtype(state_dtype)
        self.backend = backend
        self.state_dtype = state_dtype
        self._clock = Clock(seed, steps_per_epoch)
        self._device_rows: dict[torch.device, DeviceRows] = {}
        self._forget()
        self._switched_off: set[int] = set()  # id(param): its missing gradient is zero (skip_dropped_layers)
        self._constructed = False
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "drop": drop,
            "effect": effect,
        }
        validate.group_options(defaults)
        super().__init__(params, defaults)
        validate.groups(self.param_groups)
        if fused is True:  # as torch: GradScaler then hands over grad_scale and found_inf instead of unscaling
            self._step_supports_amp_scaling = True
        self._constructed = True

    @property
    def seed(self) -> int:
        return self._clock.seed

    @property
    def draw(self) -> int:
        """Steps taken; those that GradScaler skipped do not count. Synchronises under capturable."""
        for rows in self._device_rows.values():
            self._clock.draw = int(rows.draw)
        return self._clock.draw

    @property
    def epoch(self) -> int | None:
        """The epoch that the coming step belongs to; None if nobody told."""
        return self._clock.epoch_at(self.draw + 1)

    def set_epoch(self, epoch: int) -> None:
        """Tell which epoch the coming steps belong to, counted from 0. Telling it again changes nothing.

        Raises:
            RuntimeError: if steps_per_epoch was given. TypeError, ValueError: on what is no epoch.
        """
        self._clock.set_epoch(epoch)
        for rows in self._device_rows.values():
            rows.set_epoch(epoch)

    def keep_mask(self, param: Tensor) -> Tensor:
        """The mask that the coming step applies to ``param``: bool, of its shape (a DTensor for a DTensor).

        Drawn by the reference, whatever the backend.

        Raises:
            ValueError: if ``param`` is not in this optimizer. RuntimeError: if the epoch is not known.
        """
        self._clock.draw = self.draw
        return preview.keep_mask(self.param_groups, self._clock, param)

    def dropped_layers(self) -> list[Tensor]:
        """The parameters that the coming step drops as a whole, under LayerGradDrop and GradFreeze."""
        self._clock.draw = self.draw
        return preview.dropped_layers(self.param_groups, self._clock)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None):
        """One masked AdamW step over all parameters that have a gradient.

        Args:
            closure: re-evaluates the model and returns the loss.

        Raises:
            RuntimeError: if a policy follows epochs that nobody told. ValueError: on a gradient that cannot serve.
                Parameters and state are then as they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        capturable = self.param_groups[0]["capturable"]
        if not capturable:
            check_not_capturing()
        if found_inf is not None and not capturable:
            if found_inf.item():
                return loss
            found_inf = None

        buckets = self._gather()
        if capturable:
            tables = self._advance_on_devices({b.batch.integers.device for b in buckets}, found_inf)
            packed = {}  # drawn every step: what has changed is not known on the host
        else:
            rows = rows_at(self.param_groups, self._layers, self._clock, self._clock.draw + 1)
            tables = {HOST: host_tables(self.param_groups, rows)}
            packed = packed_groups(self.param_groups, rows)
            self._clock.draw += 1
        for bucket in buckets:
            integers, reals = tables[bucket.batch.integers.device]
            inf = _to(found_inf, bucket.device)
            bucket.advance(integers, reals, inf)
            bucket.use_packed(packed, self.seed)
            bucket.skip_absent()
            if capturable:
                pairs = self._device_rows[bucket.device].pairs
                bucket.batch.pairs = frozenset().union(*(pairs[group] for group in bucket.by_group))
            bucket.backend.adamw(bucket.batch, seed=self.seed, grad_scale=_to(grad_scale, bucket.device), found_inf=inf)
            bucket.batch.grads = []  # else zero_grad() would free nothing
        return loss

    def _advance_on_devices(self, devices: set[torch.device], found_inf: Tensor | None):
        for device in devices - self._device_rows.keys():
            self._clock.draw = self.draw  # synchronises, which a capture forbids: only for a device not met before
            self._device_rows[device] = DeviceRows(self.param_groups, self._layers, self._clock, device)
        if not self._device_rows:
            self._clock.draw += 1
        return {
            device: rows.advance(self.param_groups, _to(found_inf, device))
            for device, rows in self._device_rows.items()
        }

    def _gather(self) -> list[AdamWBucket]:
        """Buckets that hold the gradients of now: those of the last step, unless a tensor was replaced or moved."""
        key = [(g["drop"], g["effect"], g["amsgrad"], g.get("layer"), g["capturable"]) for g in self.param_groups]
        params = [p for group in self.param_groups for p in group["params"]]
        if key != self._key or len(params) != len(self._params) or not all(map(operator.is_, params, self._params)):
            check_not_capturing()
            self._forget()
        grads = [p.grad for p in params]
        if self._buckets is None or not self._take(params, grads):
            self._rebuild(params, grads)
            self._key, self._params = key, params
        return self._buckets

    def _take(self, params: list[Tensor], grads: list[Tensor | None]) -> bool:
        # by value, since hashing every parameter costs more than the rest: a replaced entry is another object
        if len(self.state) != len(self._entries) or not all(map(operator.is_, self.state.values(), self._entries)):
            return False
        for bucket in self._buckets:
            if not bucket.take([grads[i] for i in bucket.positions], self._switched_off):
                return False
        return not any(grads[i] is not None or id(params[i]) in self._switched_off for i in self._stateless)

    def _rebuild(self, params: list[Tensor], grads: list[Tensor | None]) -> None:
        check_not_capturing()
        every = members(self.param_groups)
        for group in self.param_groups:
            validate.policy(group["drop"], group["effect"])
            self._clock.check_epoch_known(policy_of(group))
        for member, grad in zip(every, grads, strict=True):
            validate.gradient(member, grad)
        wanted = [
            i
            for i, p in enumerate(params)
            if grads[i] is not None or id(p) in self._switched_off or (p in self.state and self.state[p])
        ]
        buckets = make_buckets(
            self.param_groups,
            every,
            wanted,
            lambda i: (
                params[i].dtype if grads[i] is None else grads[i].dtype,
                self.param_groups[every[i].group]["amsgrad"],
                moment_dtype(params[i], self.state_dtype),
            ),
            lambda p: dispatch.choose(self.backend, p.device, p.dtype, p.dim()),
            on_device=self.param_groups[0]["capturable"],
        )
        self._layers = Layers.of(self.param_groups)
        self._buckets = [AdamWBucket.of(bucket, self.state) for bucket in buckets]
        self._entries = list(self.state.values())
        self._stateless = sorted(set(range(len(params))).difference(wanted))
        if not self._take(params, grads):
            raise AssertionError("new buckets must fit the gradients that they were made for")

    def _forget(self) -> None:
        """Drop what is derived from groups and tensors; the next step gathers it again."""
        self._clock.draw = self.draw
        self._device_rows = {}
        self._buckets: list[AdamWBucket] | None = None
        self._key: list = []
        self._params: list[Tensor] = []
        self._entries: list[dict[str, Any]] = []
        self._stateless: list[int] = []  # positions of parameters that no bucket serves: they never had a gradient
        self._layers: Layers | None = None

    def add_param_group(self, param_group: Group) -> None:
        """As torch's, with ``drop``, ``effect`` and ``layer`` in the group. Raises before anything changes."""
        super().add_param_group(validate.new_group(param_group, self.defaults, self.param_groups))
        self._forget()
        self._hold_clock()
        if self._constructed:
            try:
                validate.groups(self.param_groups)
            except (TypeError, ValueError):
                self.param_groups.pop()
                raise

    def _hold_clock(self) -> None:
        # never read: from a flattened state dict torch loads the entries that groups have by then, and no others
        for group in self.param_groups:
            group.update(self._clock.state())

    def state_dict(self) -> dict[str, Any]:
        """As torch's. Groups carry policies as plain numbers and strings, and seed, draw, epoch, steps_per_epoch."""
        state = super().state_dict()
        self._clock.draw = self.draw
        for group in state["param_groups"]:
            group.update(self._clock.state(), drop=group["drop"] and group["drop"].to_state())
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a checkpoint of ours or of torch.optim.AdamW.

        The checkpoint's seed, draw, epoch and policies win over the constructor's; what it lacks stays.

        Raises:
            ValueError: naming the entry that is missing, extra or mis-shaped; nothing has changed then.
        """
        policies, clock, plain = checkpoint.check(state_dict, self.param_groups, self._clock)
        super().load_state_dict(plain)
        self._forget()
        self._clock = clock
        self._hold_clock()
        for group, policy, saved in zip(self.param_groups, policies, state_dict["param_groups"], strict=True):
            group["drop"] = policy
            for param, index in zip(group["params"], saved["params"], strict=True):
                if state_dict["state"].get(index):
                    self.state[param] = restore_state(param, state_dict["state"][index], self.state_dtype)

    def __getstate__(self) -> dict[str, Any]:
        self._clock.draw = self.draw
        mine = ("backend", "state_dtype", "_clock", "_constructed")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in mine}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_switched_off", set())
        self.__dict__.setdefault("_device_rows", {})
        self._forget()


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
