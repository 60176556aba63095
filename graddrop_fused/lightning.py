"""GradDropAdamW in Lightning. Needs lightning (or pytorch-lightning) 2, which nothing else in the package imports."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer
    except ModuleNotFoundError:
        from pytorch_lightning import Callback, LightningModule, Trainer

from .groups import is_layerwise
from .log_values import log_values
from .masked import MaskedOptimizer
from .skip import SkippedLayers


class GradDropCallback(Callback):
    """Tells the optimizer which epoch it is, also when training resumes in the middle of one, and logs its masks.

        class Classifier(LightningModule):
            def configure_optimizers(self):
                return GradDropAdamW(param_groups(self.model, drop=LayerGradDrop(p=0.5)), lr=1e-5)

        Trainer(max_epochs=3, callbacks=[GradDropCallback()]).fit(Classifier(...), loader)

    Serves every GradDropAdamW that configure_optimizers returns, in automatic and in manual optimisation.

    Args:
        skip_dropped_layers: compute no gradients for layers that the coming step drops, also where training_step
            calls parts of the model one by one; see :func:`graddrop_fused.skip.skip_dropped_layers`. Needs a Trainer
            without gradient_clip_val, whose norm would lack the skipped gradients. It ends with the training, also
            when that is interrupted.
        log: give graddrop_active, graddrop_p and the like to the Trainer's loggers, every ``log_every_n_steps``; see
            :func:`graddrop_fused.log_values.log_values`.

    Raises:
        TypeError: as training begins, if there is no GradDropAdamW. ValueError: if it skips and clips.
    """

    def __init__(self, skip_dropped_layers: bool = False, log: bool = True):
        self.skip_dropped_layers = skip_dropped_layers
        self.log_masks = log
        self._skipped: list[SkippedLayers] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_skipping()
        self._logged = 0
        self._optimizers = [opt for opt in trainer.optimizers if isinstance(opt, MaskedOptimizer)]
        if not self._optimizers:
            found = [type(opt).__name__ for opt in trainer.optimizers]
            raise TypeError(f"configure_optimizers must return a GradDropAdamW for GradDropCallback, got {found}")
        self._set_epoch(trainer)  # a fit that resumes in the middle of an epoch announces no beginning
        if self.skip_dropped_layers:
            if trainer.gradient_clip_val:
                raise ValueError(
                    "gradient_clip_val must be None with GradDropCallback(skip_dropped_layers=True), got "
                    f"{trainer.gradient_clip_val!r}: the norm would lack the gradients of skipped layers, and training "
                    "would differ from the same run without skipping"
                )
            by_layer = [opt for opt in self._optimizers if any(map(is_layerwise, opt.param_groups))]
            self._skipped = [SkippedLayers(pl_module, opt) for opt in by_layer or self._optimizers]  # none: it says so

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._set_epoch(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not self.log_masks or not trainer.loggers or step % every or step == self._logged:
            return
        self._logged = step
        for number, opt in enumerate(self._optimizers):
            suffix = f"/{number}" if len(self._optimizers) > 1 else ""
            values = {f"{name}{suffix}": value for name, value in log_values(opt).items()}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_skipping()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_skipping()

    def _set_epoch(self, trainer: Trainer) -> None:
        for opt in self._optimizers:
            opt.set_epoch(trainer.current_epoch)

    def _stop_skipping(self) -> None:
        for skipped in self._skipped:
            skipped.remove()
        self._skipped = []
