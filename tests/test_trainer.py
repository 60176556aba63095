"""Hugging Face's Trainer and Accelerate's own loop, on a tiny random model: no weights, no network."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from accelerate import Accelerator, DataLoaderConfiguration
from graddrop_fused import GradDropAdamW
from torch.utils.data import DataLoader

from graddrop_fused.layers import param_groups
from graddrop_fused.policies import GradDrop, GradDropEpoch, GradFreeze, LayerGradDrop, LinearAnneal
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


def arguments(folder, **options):
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
    return hf.TrainingArguments(output_dir=str(folder), **{**defaults, **options})


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


def test_skipping_in_the_trainer_changes_nothing(tmp_path):
    """max_grad_norm=0: a norm of all gradients would miss the skipped ones."""
    models = []
    for skip in (False, True):
        args = arguments(tmp_path, save_strategy="no", num_train_epochs=2, max_grad_norm=0.0)
        trainer = build_trainer(args, LayerGradDrop(p=0.5))
        trainer.remove_callback(GradDropCallback)
        trainer.add_callback(GradDropCallback(skip_dropped_layers=skip))
        trainer.train()
        models.append(trainer.model)
        assert all(p.requires_grad for p in trainer.model.parameters())
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


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
    with pytest.raises(TypeError, match="optimizer must be a GradDropAdamW or a wrapper around one, got AdamW"):
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
