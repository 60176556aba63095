"""Hugging Face's Trainer and Accelerate's own loop, on a tiny random model: no weights, no network."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader

from graddrop_fused import GradDrop, GradDropAdamW, GradDropEpoch, GradFreeze, LayerGradDrop, LinearAnneal
from graddrop_fused.layers import param_groups
from graddrop_fused.skip import unwrap
from graddrop_fused.trainer import GradDropCallback, graddrop_optimizer

CONFIG = hf.XLMRobertaConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    vocab_size=40,
    max_position_embeddings=20,
    pad_token_id=1,
)
BATCH = 4
POLICIES = [
    GradDrop(p=0.3),
    GradDrop(anneal=LinearAnneal(start=0.9, epochs=3)),
    GradDropEpoch(p=0.6),
    GradDropEpoch(p=0.6, toggle=True),
    GradDropEpoch(p=0.6, replacement=True),
    LayerGradDrop(p=0.5),
    LayerGradDrop(p=0.5, per="epoch"),
    GradFreeze("top-down"),
]


def name_of(policy):
    return f"{type(policy).__name__}-{POLICIES.index(policy)}"


def examples(count=24):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 40, (count, 8), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.sum() % 2} for row in ids]


def build_model(**options):
    torch.manual_seed(0)
    return hf.XLMRobertaForSequenceClassification(hf.XLMRobertaConfig(**{**CONFIG.to_dict(), **options}))


def some_masks(opt):
    """Of every fifth parameter: some of each layer."""
    return [opt.keep_mask(p) for p in [p for group in opt.param_groups for p in group["params"]][::5]]


class Interrupted(Exception):
    pass


class Watch(hf.TrainerCallback):
    """Records the masks of every step, and interrupts after the step ``until``."""

    def __init__(self, until=None):
        self.until = until
        self.masks = {}
        self.epochs = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **_):
        opt = unwrap(optimizer)
        self.masks[state.global_step] = some_masks(opt)
        self.epochs[state.global_step] = opt.epoch

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.until:
            raise Interrupted


def arguments(folder, kind=hf.TrainingArguments, **options):
    defaults = {
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_steps": 6,
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return kind(output_dir=str(folder), **{**defaults, **options})


def build_trainer(args, drop, watch=None, count=24, **options):
    return hf.Trainer(
        build_model(),
        args,
        train_dataset=examples(count),
        optimizer_cls_and_kwargs=graddrop_optimizer(args, drop=drop, seed=7, backend="reference", **options),
        callbacks=[GradDropCallback(), *([watch] if watch else [])],
    )


def assert_same_masks(a, b):
    assert a.keys() == b.keys()
    for step in a:
        assert all(map(torch.equal, a[step], b[step])), f"masks differ at step {step}"


@pytest.mark.parametrize("policy", POLICIES, ids=name_of)
def test_trainer_resumes_in_the_middle_of_an_epoch(policy, tmp_path):
    """Three epochs of 4 steps; a checkpoint at step 6, the second of epoch 1; an interruption a step later."""
    whole = Watch()
    uninterrupted = build_trainer(arguments(tmp_path / "whole"), policy, whole, count=16)
    uninterrupted.train()
    assert list(whole.epochs.values()) == [0] * 4 + [1] * 4 + [2] * 4

    first = Watch(until=7)
    with pytest.raises(Interrupted):
        build_trainer(arguments(tmp_path / "cut"), policy, first, count=16).train()
    second = Watch()
    resumed = build_trainer(arguments(tmp_path / "cut"), policy, second, count=16)
    resumed.train(resume_from_checkpoint=True)

    assert min(second.masks) == 6
    assert_same_masks({**first.masks, **second.masks}, whole.masks)
    assert second.epochs == {step: whole.epochs[step] for step in second.epochs}
    for (name, p), q in zip(uninterrupted.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_resumes_on_the_border_of_an_epoch_with_accumulation(tmp_path):
    options = {"gradient_accumulation_steps": 4, "save_strategy": "epoch"}  # 6 batches: updates of 4 and of 2
    policy = GradDropEpoch(p=0.6, toggle=True)
    whole = Watch()
    uninterrupted = build_trainer(arguments(tmp_path / "whole", **options), policy, whole)
    uninterrupted.train()
    assert list(whole.epochs.values()) == [0, 0, 1, 1, 2, 2]
    with pytest.raises(Interrupted):
        build_trainer(arguments(tmp_path / "cut", **options), policy, Watch(until=3)).train()
    second = Watch()
    resumed = build_trainer(arguments(tmp_path / "cut", **options), policy, second)
    resumed.train(resume_from_checkpoint=True)
    assert_same_masks(second.masks, {step: whole.masks[step] for step in range(2, 6)})
    for p, q in zip(uninterrupted.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_epochs_that_a_callback_cuts_short_count(tmp_path):
    class CutShort(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_epoch_stop = state.global_step in (2, 4)

    watch = Watch()
    trainer = build_trainer(arguments(tmp_path, save_strategy="no"), GradDropEpoch(p=0.6), watch)
    trainer.add_callback(CutShort())
    trainer.train()
    assert list(watch.epochs.values()) == [0, 0, 1, 1] + [2] * 6


def test_plain_class_and_keywords(tmp_path):
    """The Trainer's own groups serve element masks; streams are positions then."""
    args = arguments(tmp_path, save_strategy="no", num_train_epochs=1)
    options = {"lr": 1e-2, "drop": GradDropEpoch(p=0.5), "backend": "reference"}
    watch = Watch()
    trainer = hf.Trainer(
        build_model(),
        args,
        train_dataset=examples(),
        optimizer_cls_and_kwargs=(GradDropAdamW, options),
        callbacks=[GradDropCallback(), watch],
    )
    trainer.train()
    assert [g["weight_decay"] for g in trainer.optimizer.param_groups] == [0.1, 0.0]
    kept = torch.cat([mask.flatten() for mask in watch.masks[0]]).float().mean()
    assert 0.45 < kept < 0.55


def test_a_trainer_that_is_given_the_class_later(tmp_path):
    options = {"save_strategy": "no", "num_train_epochs": 1}
    args = arguments(tmp_path, kind=hf.Seq2SeqTrainingArguments, **options)
    trainer = hf.Seq2SeqTrainer(build_model(), args, train_dataset=examples(), callbacks=[GradDropCallback()])
    trainer.optimizer_cls_and_kwargs = graddrop_optimizer(args, drop=GradDropEpoch(p=0.6))
    trainer.train()
    assert (unwrap(trainer.optimizer).draw, unwrap(trainer.optimizer).epoch) == (6, 0)


def test_arguments_reach_the_optimizer(tmp_path):
    args = arguments(tmp_path, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    policy = LayerGradDrop(p=0.5)
    opt = build_trainer(args, policy, targets="attention", effect="freeze").create_optimizer()
    for group in opt.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-2, (0.8, 0.95), 1e-6)
        assert group["effect"] == "freeze"
        assert group["weight_decay"] == (0.1 if group["params"][0].dim() >= 2 else 0.0)
        assert (group["drop"] is policy) == all(
            ".attention." in n and "LayerNorm" not in n and "query" not in n for n in group["param_names"]
        )
    assert list(dict.fromkeys(g["layer"] for g in opt.param_groups)) == ["embeddings", "layer.0", "layer.1", "head"]
    assert unwrap(opt).seed == 7


def test_a_model_made_anew_gets_groups_of_its_own(tmp_path):
    args = arguments(tmp_path, save_strategy="no", num_train_epochs=1)
    trainer = hf.Trainer(
        model_init=lambda: build_model(),
        args=args,
        train_dataset=examples(),
        optimizer_cls_and_kwargs=graddrop_optimizer(args, drop=GradDrop(p=0.3), backend="reference"),
        callbacks=[GradDropCallback()],
    )
    for _ in range(2):
        trainer.train()
        held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in trainer.model.parameters()}


def test_masks_have_the_training_s_seed(tmp_path):
    args = arguments(tmp_path, seed=3)
    factory, keywords = graddrop_optimizer(args, drop=GradDrop(p=0.3))
    assert factory()(build_model(), **keywords).seed == 3
    factory, keywords = graddrop_optimizer(args, drop=GradDrop(p=0.3), seed=5)
    assert factory()(build_model(), **keywords).seed == 5


def test_skipping_in_the_trainer_changes_nothing(tmp_path):
    """max_grad_norm=0: a norm of all gradients would miss the skipped ones."""

    class Count(hf.TrainerCallback):
        absent = 0

        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            self.absent += sum(p.grad is None for p in model.parameters())

    models = []
    for skip in (False, True):
        args = arguments(tmp_path, save_strategy="no", num_train_epochs=2, max_grad_norm=0.0)
        trainer = build_trainer(args, LayerGradDrop(p=0.5))
        trainer.remove_callback(GradDropCallback)
        trainer.add_callback(GradDropCallback(skip_dropped_layers=skip))
        count = Count()
        trainer.add_callback(count)
        trainer.train()
        models.append(trainer.model)
        assert bool(count.absent) == skip
        assert all(p.requires_grad for p in trainer.model.parameters())
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


class Inherits(GradDropCallback):
    def on_train_begin(self, *args, **kwargs):
        super().on_train_begin(*args, **kwargs)


class Contains(hf.TrainerCallback):
    def __init__(self, **options):
        self.inner = GradDropCallback(**options)

    def on_train_begin(self, *args, **kwargs):
        self.inner.on_train_begin(*args, **kwargs)

    def on_epoch_begin(self, *args, **kwargs):
        self.inner.on_epoch_begin(*args, **kwargs)


@pytest.mark.parametrize("kind", [Inherits, Contains])
@pytest.mark.parametrize("option", ["skip_dropped_layers", "release_gradients"])
def test_a_callback_that_calls_ours(option, kind, tmp_path):
    """What runs between the Trainer's handler and ours is not the training loop."""
    missing = []

    class Count(hf.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **_):
            missing.append(sum(p.grad is None for p in model.parameters()))
            assert unwrap(optimizer).epoch == state.global_step // 6

    args = arguments(tmp_path, save_strategy="no", num_train_epochs=2, max_grad_norm=0)
    trainer = build_trainer(args, GradFreeze("top-down"))
    trainer.remove_callback(GradDropCallback)
    trainer.add_callback(kind(**{option: True}))
    trainer.add_callback(Count())
    trainer.train()
    assert all(missing)


@pytest.mark.parametrize("max_grad_norm", [1.0, 1e-3])
def test_skipping_refuses_to_clip(max_grad_norm, tmp_path):
    args = arguments(tmp_path, save_strategy="no", max_grad_norm=max_grad_norm)
    trainer = build_trainer(args, LayerGradDrop(p=0.5))
    trainer.remove_callback(GradDropCallback)
    trainer.add_callback(GradDropCallback(skip_dropped_layers=True))
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match=rf"max_grad_norm must be 0 with .*, got {max_grad_norm}: "):
        trainer.train()
    assert unwrap(trainer.optimizer).draw == 0 and not unwrap(trainer.optimizer).state
    for name, p in trainer.model.named_parameters():
        assert p.requires_grad and torch.equal(p, before[name]), name


def test_callback_wants_our_optimizer():
    plain = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    with pytest.raises(TypeError, match="optimizer must be a masked optimizer .*, got AdamW"):
        GradDropCallback().on_train_begin(None, SimpleNamespace(epoch=None), None, optimizer=plain)


# Accelerate's own loop


def accelerate_loop(policy, folder, stop_after=None, resume_at=None):
    """Two epochs of 6 batches, an update every 2; saves after update 4, in the middle of epoch 1."""
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=2, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True)
    )
    # No dropout: its generator is restored before the resumed loader draws a seed from it
    model = build_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    opt = GradDropAdamW(param_groups(model, drop=policy), lr=1e-2, seed=7, backend="reference")
    torch.manual_seed(5)
    loader = DataLoader(examples(), batch_size=BATCH, shuffle=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
    model, wrapped, loader, scheduler = accelerator.prepare(model, opt, loader, scheduler)
    assert wrapped.optimizer is opt  # so set_epoch on the one that we made reaches it
    if resume_at is not None:
        accelerator.load_state(str(folder))
    masks, update = {}, resume_at or 0
    for epoch in range(update // 3, 2):
        opt.set_epoch(epoch)
        loader.set_epoch(epoch)
        skip = 2 * (update - 3 * epoch)
        for batch in accelerator.skip_first_batches(loader, skip) if skip else loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    masks[update] = some_masks(opt)
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    update += 1
                wrapped.step()
                scheduler.step()
                wrapped.zero_grad()
            if accelerator.sync_gradients and update == stop_after:
                accelerator.save_state(str(folder))
                return accelerator.unwrap_model(model), masks
    return accelerator.unwrap_model(model), masks


@pytest.mark.parametrize("policy", [POLICIES[0], POLICIES[3], POLICIES[5]], ids=name_of)
def test_accelerate_resumes_in_the_middle_of_an_epoch(policy, tmp_path):
    whole, masks = accelerate_loop(policy, tmp_path)
    assert list(masks) == list(range(6))
    _, first = accelerate_loop(policy, tmp_path, stop_after=4)
    resumed, second = accelerate_loop(policy, tmp_path, resume_at=4)
    assert list(second) == [4, 5]
    assert_same_masks({**first, **second}, masks)
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_package_imports_without_transformers():
    code = "import sys, graddrop_fused.masked, graddrop_fused.skip; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Interruptions


class Raises(hf.TrainerCallback):
    """At one moment of the second step, wherever that is."""

    def __init__(self, error, moment):
        self.error, self.moment, self.step = error, moment, 0

    def on_step_begin(self, args, state, control, **_):
        self.step = state.global_step

    def at(self, moment):
        if self.step == 1 and moment == self.moment:
            raise self.error

    def on_pre_optimizer_step(self, *_, **__):
        self.at("after backward")

    def on_step_end(self, *_, **__):
        self.at("after the step")


class InterruptedTrainer(hf.Trainer):
    raises = None

    def compute_loss(self, model, inputs, *args, **kwargs):
        with model.classifier.register_forward_hook(lambda *_: self.raises.at("in forward")):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.raises.at("behind forward")
        loss.register_hook(lambda _: self.raises.at("in backward"))
        return loss


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", ["in forward", "behind forward", "in backward", "after backward", "after the step"])
def test_an_interrupted_trainer_leaves_the_model_as_it_was(moment, error, tmp_path):
    """Whatever trains the model next trains all of it: here a Trainer that knows nothing of us."""
    args = arguments(tmp_path, save_strategy="no", num_train_epochs=1, max_grad_norm=0.0)
    options = {"train_dataset": examples()}
    raises = Raises(error, moment)
    trainer = InterruptedTrainer(
        build_model(),
        args,
        optimizer_cls_and_kwargs=graddrop_optimizer(args, drop=GradFreeze("top-down"), backend="reference"),
        callbacks=[GradDropCallback(skip_dropped_layers=True), raises],
        **options,
    )
    trainer.raises = raises
    with pytest.raises(error):
        trainer.train()
    assert all(p.requires_grad for p in trainer.model.parameters())

    apart = copy.deepcopy(trainer.model)  # which knows nothing of the interrupted training
    for model in (trainer.model, apart):
        hf.Trainer(model, args, **options).train()
    for (name, p), q in zip(apart.named_parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(p, q), name


# Search, text, logs, several processes


def test_every_trial_of_a_search_has_its_own_arguments(tmp_path):
    """What the arguments are when the optimizer is made counts."""
    seen = []

    class Look(hf.TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **_):
            groups = unwrap(optimizer).param_groups
            seen.append((groups[0]["lr"], groups[0]["weight_decay"], groups[0]["betas"][0], groups[0]["eps"]))

    args = arguments(tmp_path, save_strategy="no", max_steps=1, lr_scheduler_type="constant")
    trainer = hf.Trainer(
        model_init=lambda: build_model(),
        args=args,
        train_dataset=examples(),
        optimizer_cls_and_kwargs=graddrop_optimizer(args, drop="graddrop:p=0.3", backend="reference", eps=1e-5),
        callbacks=[GradDropCallback(), Look()],
    )
    for lr, decay, beta in ((1e-2, 0.1, 0.9), (1e-3, 0.2, 0.8)):
        # what hyperparameter_search does for a trial
        trainer.args.learning_rate, trainer.args.weight_decay, trainer.args.adam_beta1 = lr, decay, beta
        trainer.train()
    assert seen == [(1e-2, 0.1, 0.9, 1e-5), (1e-3, 0.2, 0.8, 1e-5)]


def test_a_search_by_optuna(tmp_path):
    pytest.importorskip("optuna", reason="optuna is not installed")
    seen = []

    class Look(hf.TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **_):
            seen.append((args.learning_rate, unwrap(optimizer).param_groups[0]["lr"]))

    args = arguments(tmp_path, save_strategy="no", max_steps=1, lr_scheduler_type="constant")
    trainer = hf.Trainer(
        model_init=lambda: build_model(),
        args=args,
        train_dataset=examples(),
        eval_dataset=examples(4),
        optimizer_cls_and_kwargs=graddrop_optimizer(args, drop="graddrop:p=0.3", backend="reference"),
        callbacks=[GradDropCallback(), Look()],
    )
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-1)},
        n_trials=3,
        backend="optuna",
    )
    assert all(argument == made for argument, made in seen) and len(set(seen)) == 3


def test_a_policy_by_its_text(tmp_path):
    trainer = build_trainer(arguments(tmp_path), "graddrop-epoch:p=0.6,toggle")
    assert {g["drop"] for g in trainer.create_optimizer().param_groups} == {GradDropEpoch(p=0.6, toggle=True)}
    with pytest.raises(ValueError, match="the policy must be one of .*, got 'dropout'"):
        build_trainer(arguments(tmp_path), "dropout:p=0.6")


class Reporter(hf.TrainerCallback):
    """Stands where TensorBoard's or Weights & Biases' callback does: before the user's."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append(dict(logs))


@pytest.mark.parametrize(
    "policy, expected",
    [
        (GradDrop(p=0.25), {"graddrop_p": [0.25] * 3, "graddrop_active": [0.75] * 3}),
        (
            GradDrop(anneal=LinearAnneal(start=0.5, epochs=3)),
            {"graddrop_p": [0.5, 0.25, 0.0], "graddrop_active": [0.5, 0.75, 1.0]},
        ),
        (GradDropEpoch(p=0.75), {"graddrop_active": [0.25, 0.5, 0.75]}),
        (GradFreeze("top-down"), {"graddrop_layers_dropped": [3, 2, 1]}),  # of 4 with the head, which has no policy
    ],
    ids=["p", "annealed", "by epoch", "by layer"],
)
def test_what_is_logged(policy, expected, tmp_path):
    reporter = Reporter()
    args = arguments(tmp_path, save_strategy="no", logging_strategy="epoch")
    trainer = hf.Trainer(
        build_model(),
        args,
        train_dataset=examples(),
        optimizer_cls_and_kwargs=graddrop_optimizer(args, drop=policy, backend="reference"),
        callbacks=[reporter, GradDropCallback()],
    )
    trainer.train()
    logs = [entry for entry in reporter.logs if "loss" in entry]
    for name, values in {**expected, "graddrop_epoch": [0, 1, 2], "graddrop_draw": [6, 12, 18]}.items():
        assert [entry[name] for entry in logs] == pytest.approx(values, abs=1e-4)
        assert [entry[name] for entry in trainer.state.log_history if "loss" in entry] == pytest.approx(
            values, abs=1e-4
        )
    assert not any(name.startswith("graddrop") for entry in reporter.logs if "loss" not in entry for name in entry)


ROWS = GradDropEpoch(p=0.75, toggle=True, block="row")


def rows_trainer(args, drop=ROWS, watch=None, effect=None, **skipping):
    return hf.Trainer(
        build_model().double(),
        args,
        train_dataset=examples(),
        optimizer_cls_and_kwargs=graddrop_optimizer(args, drop=drop, effect=effect, seed=7, backend="reference"),
        callbacks=[GradDropCallback(**skipping), *([watch] if watch else [])],
    )


class Gradients(hf.TrainerCallback):
    """Counts the rows of one matrix whose gradients are not zero, and interrupts after the step ``until``."""

    def __init__(self, until=None):
        self.until, self.rows = until, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        grad = model.roberta.encoder.layer[1].intermediate.dense.weight.grad
        self.rows.append(None if grad is None else int(grad.any(1).sum()))
        if state.global_step == self.until:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("skipping", "effect", "accumulation"),
    [
        ({"skip_dropped_rows": True}, None, 1),
        ({"skip_dropped_rows": True}, None, 2),
        ({"skip_dropped_rows": True, "release_gradients": True}, "freeze", 1),
    ],
    ids=["rows", "accumulated", "released"],
)
def test_dropped_rows_are_skipped(skipping, effect, accumulation, tmp_path):
    options = {"max_grad_norm": 0, "save_strategy": "no", "gradient_accumulation_steps": accumulation}
    runs, counts = [], []
    for number, chosen in enumerate(({}, skipping)):
        counts.append(Gradients())
        runs.append(rows_trainer(arguments(tmp_path / str(number), **options), ROWS, counts[-1], effect, **chosen))
        runs[-1].train()
    for (name, p), q in zip(runs[0].model.named_parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9, msg=name)
    assert set(counts[0].rows) == {24}
    kept = {0, *range(3, 10)} if effect is None else {None}  # of 24 rows, 6 on average
    assert set(counts[1].rows) <= kept and len(counts[1].rows) == 18 // accumulation


def test_an_interrupted_trainer_skips_no_rows_afterwards(tmp_path):
    trainer = rows_trainer(
        arguments(tmp_path, max_grad_norm=0, save_strategy="no"), watch=Gradients(until=2), skip_dropped_rows=True
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    model, other = trainer.model, torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    model.eval()  # no dropout
    other.step()  # what the interruption left
    other.zero_grad()
    batch = {name: value[None] for name, value in examples(1)[0].items()}
    model(**batch).loss.backward()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    twin(**batch).loss.backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    other.step()


@pytest.mark.parametrize(
    ("options", "drop", "problem"),
    [
        ({}, ROWS, "max_grad_norm must be 0 with GradDropCallback(skip_dropped_rows=True), got 1.0"),
        ({"max_grad_norm": 0}, GradDrop(p=0.5), "must have a policy with block='row'"),
    ],
    ids=["clipping", "no rows"],
)
def test_rows_that_cannot_be_skipped(options, drop, problem, tmp_path):
    trainer = rows_trainer(arguments(tmp_path, save_strategy="no", **options), drop, skip_dropped_rows=True)
    with pytest.raises(ValueError) as raised:
        trainer.train()
    assert problem in str(raised.value)


@pytest.mark.slow
def test_the_trainer_on_two_ranks(tmp_path):
    """Every way of running it: the masks of one process, and its parameters up to the order of sums."""
    root = Path(__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "ACCELERATE_USE_CPU": "true"}
    script = "tests/helpers/trainer_loop.py"
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]):
        command = [sys.executable, *launcher, script, str(tmp_path), "2" if launcher else "1"]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
    alone = torch.load(tmp_path / "1-0.pt")
    first, second = (torch.load(tmp_path / f"2-{rank}.pt") for rank in range(2))
    assert alone.keys() == first.keys()
    for way, (draw, epoch, masks, parameters) in alone.items():
        for its_draw, its_epoch, its_masks, its_parameters in (first[way], second[way]):
            assert (its_draw, its_epoch) == (draw, epoch) and draw > 0, way
            assert all(map(torch.equal, its_masks, masks)), way
            assert all(map(torch.equal, its_parameters, first[way][3])), way
        torch.testing.assert_close(first[way][3], parameters, rtol=0, atol=1e-11, msg=way)
