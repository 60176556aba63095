"""Gradients live for a moment: the fused step runs inside backward, a layer at a time, and frees what it has read."""

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from . import validate
from .buckets import Plan
from .cuda_graph import check_not_capturing
from .fakes import check_no_fake_mode
from .groups import Layers, members
from .masked import MaskedOptimizer, UninterruptedByKeyboard
from .names import numbered_block
from .numbers import HostNumbers, StepNumbers
from .skip import unwrap
from .training_loop import TrainingLoop


def release_gradients(model: nn.Module, optimizer: Optimizer) -> "ReleasedGradients":
    """Update every layer inside backward, as soon as its gradients are there, and free them.

    The gradients of one layer are alive at a time. It is one optimizer with one clock: the masks, parameters and state
    are those of the run without it, bit for bit. ``optimizer.step()`` ends the step: it updates what is left
    (parameters that the model's backward did not reach, or that skip_dropped_layers switched off) and counts it.
    Learning rates and other hyperparameters are those that stand in the groups during backward.

    Layers are those that groups name (``group["layer"]``). Without names they are the model's numbered blocks, and
    each module outside them is one.

    A step is one backward pass: no accumulation (a second pass before ``step()`` raises RuntimeError from backward; to
    go on after a pass that failed, call ``step()``), no closures, no GradScaler, no clipping by the norm of all
    gradients. Nobody tells us that ``clip_grad_norm_`` was called: it would find no gradients and clip nothing. Under
    FSDP2 several passes without gradient synchronisation are one.

    Args:
        model: the model, or what wraps it.
        optimizer: a masked optimizer such as GradDropAdamW, or an Accelerate or Lightning wrapper around one.

    Returns:
        a handle; ``remove()`` ends it. It is a context manager, too.

    Raises:
        TypeError: on another optimizer. ValueError: if it has none of the model's parameters, is capturable, comes with
            a GradScaler, or gradients of its parameters are released already, to it or to another; if the model is in
            DistributedDataParallel, whose gradients are not reduced yet where the step would run. RuntimeError: from
            the step of another optimizer, if its parameters were updated here.
    """
    return ReleasedGradients(model, optimizer)


@dataclass
class _Part:
    """Parameters that are updated together, in the groups' order."""

    params: list[Tensor]
    expected: set[int]  # ids of those whose gradients it waits for: in the last step they came
    plan: Plan | None = None
    turned: bool = False  # without a plan: its state is that of the masks of now
    came: set[int] = field(default_factory=set)  # ids of those that have a gradient in this step


class ReleasedGradients:
    """What :func:`release_gradients` returns.

    Args:
        within: a frame of Python's stack that must be running, in any thread, where a backward pass begins; None
            always releases. Nobody tells a callback that its loop was interrupted.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, within: FrameType | None = None):
        self._optimizer = unwrap(optimizer)
        _check(model, optimizer, self._optimizer)
        self._model, self._loop = model, TrainingLoop(within)
        self._removed = False
        self._lock = threading.RLock()  # autograd has a thread for each device
        self._begun = False
        self._coming: StepNumbers | None = None  # of the step that has begun, once something was updated
        self._key: tuple = ()
        self.updated: set[int] = set()  # ids of what this step has updated, or the last one, until the next begins
        self._hooks: dict[Tensor, Any] = {}
        self._split()
        self._others = register_optimizer_step_pre_hook(self._before_any_step)
        self._forward = model.register_forward_pre_hook(_refuse_ddp) if _several_processes() else None
        self._optimizer._inside_backward = self

    def remove(self) -> None:
        """Let backward leave gradients again. A step that has begun must have ended. Calling it again does nothing.

        Raises:
            RuntimeError: between a backward pass and ``optimizer.step()``.
        """
        self.check_whole("remove()")
        self.abandon()

    def __enter__(self) -> "ReleasedGradients":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.remove() if kind is None else self.abandon()

    def abandon(self) -> None:
        """As remove(), in the middle of a step too: one that was interrupted is not taken up again."""
        if self._removed:
            return
        self._removed = True
        for hook in [*self._hooks.values(), self._others, *filter(None, [self._forward])]:
            hook.remove()
        self._forget()

    def _forget(self) -> None:
        if self._optimizer._inside_backward is self:
            self._optimizer._inside_backward = None

    # Called in backward

    @torch.compiler.disable
    @torch.no_grad()
    def _after_gradient(self, param: Tensor) -> None:
        """A gradient is there, reduced over ranks where FSDP2 does that."""
        with self._lock:
            if self._removed or not self._in_its_loop():
                return
            part = self._part_of.get(id(param)) if self._begun else self._begin().get(id(param))
            if part is None:  # its group was taken away meanwhile
                return
            if id(param) in part.came:
                if id(param) in self.updated:
                    param.grad = None  # as it was before this pass
                raise RuntimeError(
                    "release_gradients allows one backward pass before optimizer.step(), which ends a step: parameter "
                    f"{self._called(param)} got a second gradient. Accumulate in larger batches, or "
                    "end the releasing by its handle's remove(); after a pass that failed, call optimizer.step()"
                )
            part.came.add(id(param))
            if part.expected <= part.came:
                self._update(part, part.came - self.updated, set())

    def _in_its_loop(self) -> bool:
        running = self._loop.is_running()
        if not running:  # hooks stay, and do nothing: torch goes through them at this moment
            self._begun = False
            self._forget()
        return running

    def _begin(self) -> dict[int, _Part]:
        optimizer = self._optimizer
        check_no_fake_mode()
        optimizer._check_shown_clock()
        _check_not_capturable(optimizer)
        check_not_capturing()
        key = optimizer._plan_key()
        if not self._part_of or key != self._key or self._ids() != self._held:
            optimizer._clear()  # also of the plan and the draw that steps before the releasing have left
            self._split()
            self._key = key
        self.updated.clear()
        self._begun = True
        return self._part_of

    def _update(self, part: _Part, with_gradient: set[int], switched_off: set[int]) -> None:
        """Update those of ``part`` whose gradients are there, and those whose gradients are zero (ids)."""
        optimizer, params = self._optimizer, part.params
        if not with_gradient and not switched_off:
            return
        plan, grads = part.plan, [p.grad if id(p) in with_gradient else None for p in params]

        def state() -> dict[Tensor, dict[str, Any]]:
            return {p: optimizer.state[p] for p in params if p in optimizer.state}

        if plan is None or not plan.fits(self._key, params, grads, state(), switched_off):
            plan = part.plan = optimizer._replan(plan, self._key, params, grads, state, switched_off)
        try:
            coming = self._numbers(plan.numbers)
            optimizer._fill_on_host(plan, coming)
            with UninterruptedByKeyboard():
                self._coming = coming
                try:
                    optimizer._launch(plan, commit=lambda: None)
                    done = with_gradient | switched_off  # with active_state, what is frozen as a whole is in no plan
                except BaseException:
                    done = plan.updated() & (with_gradient | switched_off)
                    raise
                finally:
                    self.updated |= done
                    for param in params:
                        if id(param) in with_gradient & done:
                            param.grad = None
        finally:
            plan.release_gradients()

    def _numbers(self, numbers: HostNumbers) -> StepNumbers:
        clock = self._optimizer._clock
        return numbers.of_step(clock, clock.next_draw()) if self._coming is None else self._coming

    # Called by the optimizer

    @torch.inference_mode(False)  # what is made here is updated in later backward passes
    @torch.no_grad()
    def end_step(self, closure: Callable[[], Any] | None) -> None:
        """Update what is left, and count the step."""
        optimizer = self._optimizer
        if closure is not None:
            raise RuntimeError(
                f"closure must be None with release_gradients, got {closure!r}: a step is one backward pass. Call "
                "loss.backward() before step(), or end the releasing by its handle's remove()"
            )
        for name in ("grad_scale", "found_inf"):
            if getattr(optimizer, name, None) is not None:
                raise RuntimeError(
                    f"{name} must not be set with release_gradients: GradScaler would skip a step with infinite "
                    "gradients, which backward has taken already. Train in bfloat16 or float32 without a scaler"
                )
        if not self._begun:
            self._begin()
        for part in self._parts:
            for param in part.params:
                if param.grad is not None and id(param) in self.updated:
                    raise RuntimeError(
                        "release_gradients allows one gradient of a parameter in a step: "
                        f"{self._called(param)} was given another after it had been updated in backward"
                    )
        for part in list(self._parts):
            off = {id(p) for p in part.params if id(p) in optimizer._switched_off} - self.updated
            self._update(part, {id(p) for p in part.params if p.grad is not None}, off)
            if part.plan is None and not part.turned:
                optimizer._turn_over_idle(self._key, part.params)
                part.turned = True
        numbers = HostNumbers(optimizer.param_groups, Layers.of(optimizer.param_groups))
        optimizer._count(self._numbers(numbers))
        self._begun, self._coming = False, None
        for part in self._parts:
            part.expected, part.came = part.came or part.expected, set()

    def clear(self) -> None:
        """Groups or tensors have changed: the next step splits the groups anew."""
        self._part_of: dict[int, _Part] = {}
        self._begun, self._coming = False, None

    def check_whole(self, what: str) -> None:
        if self._begun and not self._removed:
            raise RuntimeError(
                f"{what} must not come between a backward pass and optimizer.step() with release_gradients: a part of "
                "the step is done already. Call step() first"
            )

    def before_epoch(self) -> None:
        """Raises RuntimeError in the middle of a step, but not of one whose loop was interrupted: another has begun."""
        if self._in_its_loop():
            self.check_whole("set_epoch()")

    def _ids(self) -> list[int]:
        return [id(p) for group in self._optimizer.param_groups for p in group["params"]]

    def _split(self) -> None:
        """Sort the optimizer's parameters into parts, and watch those of the model."""
        names = {p: name for name, p in self._model.named_parameters()}
        groups = self._optimizer.param_groups
        self._held = self._ids()
        sorted_params: dict[Hashable, list[Tensor]] = {}
        for group in groups:
            for param in group["params"]:
                layer = group.get("layer")
                key = ("layer", layer) if layer is not None else _block_of(names.get(param))
                sorted_params.setdefault(key, []).append(param)
                if param in names and param not in self._hooks:
                    self._hooks[param] = self._watch(param)
        watched = {id(p) for p in self._hooks}
        self._parts = [
            _Part(params, {id(p) for p in params if p.requires_grad and id(p) in watched})
            for params in sorted_params.values()
        ]
        self._part_of = {id(p): part for part in self._parts for p in part.params}

    def _called(self, param: Tensor) -> str:
        return next(m.called for m in members(self._optimizer.param_groups) if m.param is param)

    def _watch(self, param: Tensor) -> Any:
        needed = param.requires_grad
        param.requires_grad_(True)  # torch gives a hook to no other, and it may be unfrozen later
        try:
            return param.register_post_accumulate_grad_hook(self._after_gradient)
        finally:
            param.requires_grad_(needed)

    def _before_any_step(self, optimizer: Optimizer, *_: object) -> None:
        if optimizer is self._optimizer or not self._begun or self._removed:
            return
        if any(id(p) in self.updated for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() has parameters whose gradients were released by release_gradients "
                f"for a {type(self._optimizer).__name__}, which has updated them. End the releasing by its handle's "
                "remove() before another optimizer trains the model"
            )


def _block_of(name: str | None) -> Hashable:
    """Of a parameter in no named layer: the numbered block that it stands in, or else its module."""
    if name is None:
        return None
    return numbered_block(name) or name.rpartition(".")[0]


def _check(model: nn.Module, given: Any, optimizer: MaskedOptimizer) -> None:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    params = set(model.parameters())
    if not any(p in params for p in held):
        raise ValueError(f"optimizer must hold parameters of the model, got one with none of {type(model).__name__}'s")
    already = optimizer._inside_backward
    if isinstance(already, ReleasedGradients) and already._in_its_loop():
        raise ValueError("optimizer must not release gradients already: call the other handle's remove() first")
    for hook in (hook for p in held if p in params for hook in (p._post_accumulate_grad_hooks or {}).values()):
        other = getattr(hook, "__self__", None)
        if isinstance(other, ReleasedGradients) and not other._removed and other._in_its_loop():
            raise ValueError(
                "model must not release gradients to another optimizer already: keep the handle that "
                "release_gradients returned, and call its remove() first"
            )
    _check_not_capturable(optimizer)
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(_DDP)
    while given is not optimizer:  # Accelerate's wrapper
        if getattr(given, "scaler", None) is not None:
            raise ValueError(
                "optimizer must come without a GradScaler with release_gradients, which takes gradients before they "
                "are unscaled and searched for infinities. Train in bfloat16 or float32 without a scaler"
            )
        given = given.optimizer
    validate.no_shared_memory([m for m in members(optimizer.param_groups) if not nn.parameter.is_lazy(m.param)])


def _check_not_capturable(optimizer: MaskedOptimizer) -> None:
    if optimizer._capturable():
        raise ValueError(
            "capturable must be False with release_gradients, got True: which tensors a launch updates is decided on "
            "the host while backward runs"
        )


_DDP = (
    "model must not be in DistributedDataParallel with release_gradients: gradients are reduced over ranks only after "
    "backward has handed them out. Use FSDP2, torch.distributed.fsdp.fully_shard"
)


def _several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


@torch.compiler.disable
def _refuse_ddp(*_: object) -> None:
    """The wrapper does not show in the module that it wraps; only while it runs."""
    if DistributedDataParallel._get_active_ddp_module() is not None:
        raise ValueError(_DDP)
