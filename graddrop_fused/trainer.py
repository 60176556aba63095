"""GradDropAdamW in Hugging Face's Trainer. Needs transformers 5 or newer, which nothing else in the package imports."""

from torch import nn
from transformers import TrainerCallback, TrainingArguments

from .adamw import GradDropAdamW
from .layers import param_groups
from .policies import Policy
from .skip import skip_dropped_layers, unwrap


def graddrop_optimizer(
    args: TrainingArguments,
    *,
    drop: Policy | None,
    targets: str = "all",
    exclude: str | None = None,
    include_head: bool = False,
    stack: str | None = None,
    **options,
) -> tuple[type, dict]:
    """What the Trainer's ``optimizer_cls_and_kwargs`` takes: GradDropAdamW over the layers of the Trainer's model.

        Trainer(model, args, ..., optimizer_cls_and_kwargs=graddrop_optimizer(args, drop=LayerGradDrop(p=0.5)),
                callbacks=[GradDropCallback()])

    The Trainer's own groups have neither names nor layers, and it does not pass learning_rate on to a class of the
    user's; here all of these come with it.

    Args:
        args: learning_rate, adam_beta1, adam_beta2, adam_epsilon and weight_decay are taken from it.
        drop, targets, exclude, include_head, stack: see :func:`graddrop_fused.layers.param_groups`.
        options: further arguments of GradDropAdamW, such as seed or effect; they win over ``args``.
    """
    return _OnLayers, {
        "groups": {
            "weight_decay": options.pop("weight_decay", args.weight_decay),
            "drop": drop,
            "targets": targets,
            "exclude": exclude,
            "include_head": include_head,
            "stack": stack,
        },
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        **options,
    }


class _OnLayers:
    """A factory in the Trainer's sense: made without arguments, called with the model and the keywords."""

    def __call__(self, model: nn.Module, *, groups: dict, **options) -> GradDropAdamW:
        return GradDropAdamW(param_groups(model, **groups), **options)


class GradDropCallback(TrainerCallback):
    """Tells the optimizer which epoch it is, also when training resumes in the middle of one.

    Without it, policies that follow epochs (GradDropEpoch, GradFreeze, ...) raise an error at the first step; others
    don't need it.

    Args:
        skip_dropped_layers: compute no gradients for layers that the coming step drops; see
            :func:`graddrop_fused.skip.skip_dropped_layers`. The Trainer clips gradients before the step, by a norm
            that would lack the skipped ones: needs ``TrainingArguments(max_grad_norm=0)``, where 1.0 is the default.

    Raises:
        TypeError: as training begins, if the optimizer is no GradDropAdamW. ValueError: if it skips and clips.
    """

    def __init__(self, skip_dropped_layers: bool = False):
        self.skip_dropped_layers = skip_dropped_layers
        self._skipped = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **_):
        self._optimizer = unwrap(optimizer)
        if self.skip_dropped_layers and args.max_grad_norm:
            raise ValueError(
                "max_grad_norm must be 0 with GradDropCallback(skip_dropped_layers=True), got "
                f"{args.max_grad_norm!r}: the norm that the Trainer clips by would lack the gradients of skipped "
                "layers, and training would differ from the same run without skipping. Set "
                "TrainingArguments(max_grad_norm=0), or call graddrop_fused.skip.skip_dropped_layers yourself if that "
                "is what you want"
            )
        # Counted from here on: after an epoch that a callback cut short, state.epoch is not a whole number
        self._epoch = int(state.epoch or 0)
        self._stop_skipping()
        if self.skip_dropped_layers:
            self._skipped = skip_dropped_layers(model, self._optimizer)

    def on_epoch_begin(self, args, state, control, **_):
        self._optimizer.set_epoch(self._epoch)
        self._epoch += 1

    def on_train_end(self, args, state, control, **_):
        self._stop_skipping()

    def _stop_skipping(self):
        if self._skipped is not None:
            self._skipped.remove()
            self._skipped = None
