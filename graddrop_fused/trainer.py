"""GradDropAdamW in Hugging Face's Trainer. Needs transformers 5 or newer, which nothing else in the package imports."""

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from .adamw import GradDropAdamW
from .layers import param_groups
from .log_values import log_values
from .policies import Policy
from .policy_text import policy
from .release import ReleasedGradients
from .rows import SkippedRows
from .skip import SkippedLayers, unwrap


def graddrop_optimizer(
    args: TrainingArguments,
    *,
    drop: Policy | str | Mapping[str, Any] | None,
    targets: str = "all",
    exclude: str | None = None,
    include_head: bool | None = None,
    stack: str | None = None,
    **options: Any,
) -> tuple[type, dict[str, Any]]:
    """What the Trainer's ``optimizer_cls_and_kwargs`` takes: GradDropAdamW over the layers of the Trainer's model.

        Trainer(model, args, ..., optimizer_cls_and_kwargs=graddrop_optimizer(args, drop=LayerGradDrop(p=0.5)),
                callbacks=[GradDropCallback()])

    The Trainer's own groups have neither names nor layers, and it does not pass learning_rate on to a class of the
    user's; here all of these come with it.

    Args:
        args: learning_rate, adam_beta1, adam_beta2, adam_epsilon, weight_decay and seed are taken from it whenever the
            Trainer makes an optimizer, so that every trial of hyperparameter_search has its own.
        drop: a policy, or its text, such as "graddrop-epoch:p=0.9,toggle"; see :func:`graddrop_fused.policy`.
        targets, exclude, include_head, stack: see :func:`graddrop_fused.layers.param_groups`.
        options: further arguments of GradDropAdamW, such as seed or effect; they win over ``args``.
    """
    groups = {
        "drop": policy(drop),
        "targets": targets,
        "exclude": exclude,
        "include_head": include_head,
        "stack": stack,
    }
    return _OnLayers, {"args": args, "groups": groups, "options": options}


class _OnLayers:
    """A factory in the Trainer's sense: made without arguments, called with the model and the keywords."""

    def __call__(
        self, model: nn.Module, *, args: TrainingArguments, groups: dict[str, Any], options: dict[str, Any]
    ) -> GradDropAdamW:
        chosen = {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "weight_decay": args.weight_decay,
            "seed": args.seed,
            **options,
        }
        return GradDropAdamW(param_groups(model, weight_decay=chosen.pop("weight_decay"), **groups), **chosen)


class GradDropCallback(TrainerCallback):
    """Tells the optimizer which epoch it is, also when training resumes in the middle of one, and logs its masks.

    Without it, policies that follow epochs (GradDropEpoch, GradFreeze, ...) raise an error at the first step; others
    don't need it.

    Args:
        skip_dropped_layers: compute no gradients for layers that the coming step drops; see
            :func:`graddrop_fused.skip.skip_dropped_layers`. The Trainer clips gradients before the step, by a norm
            that would lack the skipped ones: needs ``TrainingArguments(max_grad_norm=0)``, where 1.0 is the default.
            It ends with the training, also when that is interrupted.
        release_gradients: update inside backward and free the gradients; see
            :func:`graddrop_fused.release.release_gradients`. Needs ``max_grad_norm=0`` and
            ``gradient_accumulation_steps=1``. It ends likewise.
        skip_dropped_rows: compute weight gradients of kept rows only, under a policy with ``block="row"``; see
            :func:`graddrop_fused.rows.skip_dropped_rows`. Needs ``max_grad_norm=0``. It ends likewise.
        log: add graddrop_active, graddrop_p and the like to what the Trainer logs, wherever it reports to; see
            :func:`graddrop_fused.log_values.log_values`.

    Raises:
        TypeError: as training begins, if the optimizer is no GradDropAdamW. ValueError: if it skips or releases and
            clips, releases and accumulates, skips under DataParallel, releases under DistributedDataParallel, or skips
            rows where no policy has ``block="row"``.
    """

    def __init__(
        self,
        skip_dropped_layers: bool = False,
        log: bool = True,
        release_gradients: bool = False,
        skip_dropped_rows: bool = False,
    ):
        self.skip_dropped_layers = skip_dropped_layers
        self.skip_dropped_rows = skip_dropped_rows
        self.release_gradients = release_gradients
        self.log = log
        self._skipped: list[SkippedLayers | SkippedRows] = []
        self._released: ReleasedGradients | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **_: Any,
    ) -> None:
        self._stop()
        assert optimizer is not None  # the Trainer gives it, and the model
        self._optimizer = unwrap(optimizer)
        assert model is not None
        for option in ("skip_dropped_layers", "skip_dropped_rows"):
            if getattr(self, option):
                _check_skipping(args, option)
        if self.release_gradients:
            _check_releasing(args)
        # Counted from here on: after an epoch that a callback cut short, state.epoch is not a whole number
        self._epoch = int(state.epoch or 0)
        handler, loop = _caller()
        if handler is not None and self in handler.callbacks[1:]:
            # What we add to the logs must be there before others report them
            handler.callbacks = [self, *(callback for callback in handler.callbacks if callback is not self)]
        if self.skip_dropped_layers:
            self._skipped.append(SkippedLayers(model, self._optimizer, within=loop))
        if self.skip_dropped_rows:
            self._skipped.append(SkippedRows(model, self._optimizer, within=loop))
        if self.release_gradients:
            self._released = ReleasedGradients(model, optimizer, within=loop)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._optimizer.set_epoch(self._epoch)
        self._epoch += 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self.log and logs is not None and "loss" in logs:
            values = log_values(self._optimizer)
            logs.update(values)
            if state.log_history:
                state.log_history[-1].update(values)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        while self._skipped:
            self._skipped.pop().remove()
        if self._released is not None:
            self._released.abandon()
            self._released = None


def _check_skipping(args: TrainingArguments, option: str) -> None:
    skipped = option.removeprefix("skip_").replace("_", " ")
    _check_not_clipping(
        args,
        option,
        f"the norm that the Trainer clips by would lack the gradients of {skipped}, and training would differ from the "
        "same run without skipping. Set TrainingArguments(max_grad_norm=0), or call "
        f"graddrop_fused.{option} yourself if that is what you want",
    )
    if args.n_gpu > 1:
        raise ValueError(
            f"n_gpu must be at most 1 with GradDropCallback({option}=True), got {args.n_gpu!r}: the Trainer "
            "would use DataParallel, whose replicas hide the model's modules. Start one process a GPU by torchrun"
        )


def _check_releasing(args: TrainingArguments) -> None:
    _check_not_clipping(
        args,
        "release_gradients",
        "when the Trainer clips, the gradients have been used and freed. Set TrainingArguments(max_grad_norm=0)",
    )
    if args.gradient_accumulation_steps > 1:
        raise ValueError(
            "gradient_accumulation_steps must be 1 with GradDropCallback(release_gradients=True), got "
            f"{args.gradient_accumulation_steps!r}: each backward pass is a step. Set a larger "
            "per_device_train_batch_size"
        )


def _check_not_clipping(args: TrainingArguments, option: str, why: str) -> None:
    if args.max_grad_norm:
        raise ValueError(
            f"max_grad_norm must be 0 with GradDropCallback({option}=True), got {args.max_grad_norm!r}: {why}"
        )


def _caller() -> tuple[CallbackHandler | None, FrameType | None]:
    """Who called a callback's method: the Trainer's handler, and the frame of the training loop behind it.

    No event tells a callback that its loop was interrupted, and none hands it the handler; Python's stack has both.
    """
    caller = sys._getframe(2)
    handler: CallbackHandler | None = None
    frame: FrameType | None = caller
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back  # of a subclass's method, or of a callback that has this one
    while frame is not None and isinstance(frame.f_locals.get("self"), CallbackHandler):
        handler, frame = frame.f_locals["self"], frame.f_back
    return handler, frame or caller
