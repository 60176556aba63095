"""Lightning's Trainer: epochs, resuming, precision, clipping, manual optimisation, skipped layers, logs."""

import copy
import signal
import warnings

import pytest
import torch
import transformers as hf

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it imports deprecates this and that
    pytest.importorskip("lightning", reason="lightning is not installed")
    import lightning.pytorch as pl
    from lightning.fabric import Fabric
    from lightning.pytorch.loggers import Logger

from graddrop_fused import (
    GradDrop,
    GradDropAdamW,
    GradDropEpoch,
    GradFreeze,
    LayerGradDrop,
    param_groups,
    release_gradients,
    skip_dropped_layers,
    skip_dropped_rows,
)
from graddrop_fused.lightning import GradDropCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Lightning's advice: workers, loggers, the length of tiny epochs
    pytest.mark.filterwarnings("error::RuntimeWarning"),
]
CONFIG = hf.BertConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=40,
    max_position_embeddings=20,
)  # fmt: skip


class Classifier(pl.LightningModule):
    """training_step calls the model, as most do; its own forward is never called."""

    def __init__(self, drop, manual=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.model = hf.BertForSequenceClassification(CONFIG)
        self.drop, self.options = drop, options
        self.automatic_optimization = not manual
        self.seen = []

    def loss(self, batch):
        return self.model(input_ids=batch, labels=batch.sum(1) % 2).loss

    def training_step(self, batch, index):
        opt = self.trainer.optimizers[0]
        self.seen.append((opt.epoch, [opt.keep_mask(p) for p in list(self.model.parameters())[::9]]))
        loss = self.loss(batch)
        if not self.automatic_optimization:
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
        return loss

    def configure_optimizers(self):
        self.model.train()
        return GradDropAdamW(
            param_groups(self.model, drop=self.drop), lr=1e-2, seed=3, backend="reference", **self.options
        )


def loader(count=16):
    ids = torch.randint(2, 40, (count, 8), generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(ids, batch_size=4)


def fit(module, tmp_path, *, callback=None, ckpt_path=None, **options):
    defaults = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    callbacks = options.pop("callbacks", [])
    trainer = pl.Trainer(**{**defaults, **options}, callbacks=[callback or GradDropCallback(), *callbacks])
    torch.manual_seed(2)
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return trainer


def assert_same(a, b):
    for (name, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("drop", [GradDrop(p=0.3), GradDropEpoch(p=0.6, toggle=True), GradFreeze("top-down")], ids=repr)
def test_epochs_and_the_same_as_a_loop_of_ones_own(drop, tmp_path):
    module = Classifier(drop)
    fit(module, tmp_path)
    assert [epoch for epoch, _ in module.seen] == [0] * 4 + [1] * 4 + [2] * 4

    mine = Classifier(drop)
    opt = mine.configure_optimizers()
    torch.manual_seed(2)
    for epoch in range(3):
        opt.set_epoch(epoch)
        for batch in loader():
            mine.loss(batch).backward()
            opt.step()
            opt.zero_grad()
    assert_same(module, mine)


@pytest.mark.parametrize("drop", [GradDropEpoch(p=0.6, toggle=True), LayerGradDrop(p=0.5)], ids=repr)
def test_resumes_in_the_middle_of_an_epoch(drop, tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "six.ckpt")

    whole = Classifier(drop)
    fit(whole, tmp_path, callbacks=[Save()])
    resumed = Classifier(drop)
    fit(resumed, tmp_path, ckpt_path=tmp_path / "six.ckpt")
    assert len(resumed.seen) == 6
    for (epoch, masks), (true_epoch, true_masks) in zip(resumed.seen, whole.seen[6:], strict=True):
        assert epoch == true_epoch
        assert all(map(torch.equal, masks, true_masks))


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_precision_with_clipping(precision, fused, tmp_path):
    module = Classifier(GradDrop(p=0.3), fused=fused)
    before = copy.deepcopy(module.model)
    if precision == "16-mixed":  # Lightning makes its scaler for CUDA unless it is given one
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
        trainer = fit(module, tmp_path, plugins=[plugin], gradient_clip_val=0.1)
    else:
        trainer = fit(module, tmp_path, precision=precision, gradient_clip_val=0.1)
    assert trainer.optimizers[0].draw == 12
    for p, q in zip(module.model.parameters(), before.parameters(), strict=True):
        assert torch.isfinite(p).all() and not torch.equal(p, q.to(p.dtype))


def test_fused_unscales_by_itself_and_so_refuses_clipping_as_torch_does(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for clip in (None, 0.1):
        plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
        options = {"plugins": [plugin], "gradient_clip_val": clip, "max_epochs": 1}
        module = Classifier(GradDrop(p=0.3), fused=True)
        if clip is None:
            assert fit(module, tmp_path, **options).optimizers[0].draw == 4
        else:
            with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
                fit(module, tmp_path, **options)


def test_manual_optimisation(tmp_path):
    modules = [Classifier(GradDropEpoch(p=0.6), manual=manual) for manual in (False, True)]
    for module in modules:
        fit(module, tmp_path)
    assert_same(*modules)


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("drop", [LayerGradDrop(p=0.5), GradFreeze("top-down")], ids=repr)
def test_skipped_layers(drop, manual, tmp_path):
    class Count(pl.Callback):
        absent = 0

        def on_after_backward(self, trainer, module):
            self.absent += sum(p.grad is None for p in module.model.parameters())

    modules, counts = [Classifier(drop, manual) for _ in range(2)], [Count(), Count()]
    for skip, module, count in zip((False, True), modules, counts, strict=True):
        fit(module, tmp_path, callback=GradDropCallback(skip_dropped_layers=skip), callbacks=[count])
    assert_same(*modules)
    assert counts[1].absent > counts[0].absent == 0
    assert all(p.requires_grad for p in modules[1].parameters())


def test_the_function_itself_on_a_lightning_module():
    module = Classifier(GradFreeze("top-down"))
    opt = module.configure_optimizers()
    opt.set_epoch(0)
    with skip_dropped_layers(module, opt):
        module.loss(torch.randint(2, 40, (4, 8))).backward()
    assert sum(p.grad is None for p in module.parameters()) == len(opt.dropped_layers()) > 0


METHODS = [
    (skip_dropped_layers, LayerGradDrop(p=0.5)),
    (skip_dropped_rows, GradDrop(p=0.5, block="row")),
    (release_gradients, GradDrop(p=0.5)),
]


@pytest.mark.parametrize("tool", ["Fabric", "Lightning"])
@pytest.mark.parametrize(("method", "drop"), METHODS, ids=[method.__name__ for method, _ in METHODS])
def test_wrappers_of_optimizers_and_models(method, drop, tool, tmp_path):
    """Their optimizers are of the wrapped one's class, and Fabric's model hands what is set on to the one within."""

    class Manual(Classifier):
        def training_step(self, batch, index):
            wrapped = self.optimizers()
            if index == 0 and self.with_method:
                self.handle = method(self.model, wrapped)
            self.manual_backward(self.loss(batch))
            wrapped.optimizer.step()  # by the wrapper's own, Lightning gives every step a closure
            wrapped.zero_grad()

    ends = []
    for module in (Manual(drop, manual=True), Manual(drop, manual=True)):
        module.with_method = bool(ends)
        if tool == "Lightning":
            fit(module, tmp_path, max_epochs=1)
        else:
            model, opt = Fabric(accelerator="cpu", devices=1).setup(module.model, module.configure_optimizers())
            if module.with_method:
                method(model, opt)
            torch.manual_seed(2)
            for batch in loader():
                model(input_ids=batch, labels=batch.sum(1) % 2).loss.backward()
                opt.step()
                opt.zero_grad()
        ends.append(list(module.model.parameters()))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-5 if method is skip_dropped_rows else 0)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_fit_leaves_the_model_as_it_was(error, tmp_path, monkeypatch):
    class Raise(pl.Callback):
        def on_before_optimizer_step(self, trainer, *_):
            if trainer.global_step == 2:
                raise error

    module = Classifier(GradFreeze("top-down"))
    callback = GradDropCallback(skip_dropped_layers=True)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # Lightning would ignore SIGINT from here on
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        fit(module, tmp_path, callback=callback, callbacks=[Raise()])
    assert all(p.requires_grad for p in module.parameters())
    module.loss(next(iter(loader()))).backward()
    assert all(p.grad is not None for p in module.model.parameters())


def test_skipping_refuses_to_clip(tmp_path):
    callback = GradDropCallback(skip_dropped_layers=True)
    with pytest.raises(ValueError, match="gradient_clip_val must be None with .*, got 1.0"):
        fit(Classifier(LayerGradDrop(p=0.5)), tmp_path, callback=callback, gradient_clip_val=1.0)


def test_another_optimizer(tmp_path):
    class Plain(Classifier):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    with pytest.raises(TypeError, match=r"must return a GradDropAdamW for GradDropCallback, got \['AdamW'\]"):
        fit(Plain(None), tmp_path)


class Recorder(Logger):
    name, version = "recorder", 0

    def __init__(self):
        super().__init__()
        self.metrics = []

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))


def test_what_is_logged(tmp_path):
    recorder, callback = Recorder(), GradDropCallback()
    fit(Classifier(GradDropEpoch(p=0.75)), tmp_path, callback=callback, logger=recorder, log_every_n_steps=2)
    ours = [(step, m) for step, m in recorder.metrics if "graddrop_active" in m]
    assert [step for step, _ in ours] == [2, 4, 6, 8, 10, 12]
    assert [m["graddrop_epoch"] for _, m in ours] == [0, 0, 1, 1, 2, 2]
    assert [m["graddrop_active"] for _, m in ours] == pytest.approx([0.25, 0.25, 0.5, 0.5, 0.75, 0.75], abs=1e-4)

    again = Recorder()  # by the same callback, whose last fit logged the same step last
    fit(Classifier(GradDropEpoch(p=0.75)), tmp_path, callback=callback, logger=again, log_every_n_steps=12)
    assert [step for step, m in again.metrics if "graddrop_active" in m] == [12]
