"""PEFT, TRL, sentence-transformers, swa_utils, torch_compile, Accelerate with FSDP2: each used as it is meant."""

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers as hf

from graddrop_fused import (
    GradDrop,
    GradDropAdamW,
    GradDropEpoch,
    GradFreeze,
    LayerGradDrop,
    param_groups,
    skip_dropped_layers,
)
from graddrop_fused.skip import unwrap
from graddrop_fused.trainer import GradDropCallback, graddrop_optimizer

ROOT = Path(__file__).parents[1]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]


def classifier(**options):
    torch.manual_seed(0)
    config = hf.BertConfig(**SIZES, vocab_size=40, max_position_embeddings=20, **options)
    return hf.BertForSequenceClassification(config).train()


def batches(count):
    return torch.randint(2, 40, (count, 4, 8), generator=torch.Generator().manual_seed(1))


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids.sum(1) % 2).loss


def imported(name):
    """The optional tool, or a skip with the reason. What it imports deprecates this and that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed")


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        eos_token="[SEP]", mask_token="[MASK]", model_max_length=16,
    )  # fmt: skip


def texts(count):
    letters = torch.randint(5, len(WORDS), (count, 6), generator=torch.Generator().manual_seed(1))
    return [" ".join(WORDS[i] for i in row) for row in letters.tolist()]


class Epochs(hf.TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
        self.seen.append(unwrap(optimizer).epoch)


# PEFT


def lora(**options):
    peft = imported("peft")
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        target_modules=["query", "value"],
        lora_dropout=0.0,
        init_lora_weights=False,
        **options,
    )
    return peft.get_peft_model(classifier(), config).train()


@pytest.mark.filterwarnings("ignore")
def test_policies_on_adapters_and_on_base_weights():
    """What stays as it was shows what was dropped: a share of the adapters, another one of a base matrix."""
    model = lora()
    for name, p in model.named_parameters():
        if "layer.1.output.dense" in name:
            p.requires_grad_(True)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    kinds = {"lora": lambda n: "lora_" in n, "base": lambda n: "output.dense" in n, "head": lambda n: "classifier" in n}
    groups = {kind: [(n, p) for n, p in trained if holds(n)] for kind, holds in kinds.items()}
    assert sum(map(len, groups.values())) == len(trained)
    opt = GradDropAdamW(
        [
            {"params": groups["lora"], "drop": GradDrop(p=0.5)},
            {"params": groups["base"], "drop": GradDrop(p=0.9)},
            {"params": groups["head"]},
        ],
        lr=1e-2, effect="freeze", seed=1, backend="reference",
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    masks = {n: opt.keep_mask(p) for n, p in trained}
    loss_of(model, batches(1)[0]).backward()
    opt.step()
    for n, p in model.named_parameters():
        moved = p.detach() != before[n]
        assert torch.equal(moved, masks[n] & (p.grad != 0)) if n in masks else not moved.any(), n
    for kind, share in (("lora", 0.5), ("base", 0.1), ("head", 1.0)):
        kept = torch.cat([masks[n].flatten() for n, _ in groups[kind]]).float().mean()
        assert kept == pytest.approx(share, abs=0.08), kind


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("drop", [LayerGradDrop(p=0.5), GradFreeze("top-down")], ids=repr)
def test_layers_of_adapters_are_skipped(drop):
    models = []
    for skip in (False, True):
        model = lora()
        opt = GradDropAdamW(param_groups(model, drop=drop), lr=1e-2, seed=1, backend="reference")
        assert len({g["layer"] for g in opt.param_groups if g["drop"]}) >= 2
        handle = skip_dropped_layers(model, opt) if skip else None
        torch.manual_seed(2)
        absent = 0
        for step, ids in enumerate(batches(6)):
            opt.set_epoch(step // 2)
            loss_of(model, ids).backward()
            absent += sum(p.grad is None for p in model.parameters() if p.requires_grad)
            opt.step()
            opt.zero_grad()
        if handle:
            handle.remove()
            assert absent
        models.append(model)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q) and p.requires_grad == q.requires_grad, name


# Trainers of others


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trl(tmp_path):
    trl, datasets = imported("trl"), imported("datasets")
    torch.manual_seed(0)
    config = hf.LlamaConfig(**SIZES, vocab_size=len(WORDS), max_position_embeddings=32, pad_token_id=0)
    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_length=16, per_device_train_batch_size=4, num_train_epochs=2, report_to="none",
        use_cpu=True, save_strategy="no", disable_tqdm=True, bf16=False, learning_rate=1e-3,
        logging_strategy="epoch",
    )  # fmt: skip
    epochs = Epochs()
    trainer = trl.SFTTrainer(
        hf.LlamaForCausalLM(config),
        args=args,
        train_dataset=datasets.Dataset.from_dict({"text": texts(16)}),
        processing_class=tokenizer(),
        optimizer_cls_and_kwargs=graddrop_optimizer(args, drop="graddrop-epoch:p=0.5", seed=1),
        callbacks=[GradDropCallback(), epochs],
    )
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert epochs.seen == [0] * 4 + [1] * 4
    assert any(not torch.equal(p, before[n]) for n, p in trainer.model.state_dict().items())
    logged = [entry["graddrop_active"] for entry in trainer.state.log_history if "graddrop_active" in entry]
    assert logged == pytest.approx([0.5, 1.0], abs=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_sentence_transformers(tmp_path):
    """Its losses call the model several times for one batch: skipping must not mind."""
    st, datasets = imported("sentence_transformers"), imported("datasets")
    losses = imported("sentence_transformers.losses")
    torch.manual_seed(0)
    config = hf.BertConfig(**SIZES, vocab_size=len(WORDS), max_position_embeddings=20)
    hf.BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    data = datasets.Dataset.from_dict({"anchor": texts(16), "positive": texts(32)[16:]})
    trained = []
    for skip in (False, True):
        model = st.SentenceTransformer(str(tmp_path / "bert"), device="cpu")
        args = st.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=2, report_to="none", use_cpu=True,
            save_strategy="no", disable_tqdm=True, learning_rate=1e-3, max_grad_norm=0.0,
        )  # fmt: skip
        opt = GradDropAdamW(param_groups(model, drop=LayerGradDrop(p=0.5)), lr=1e-3, seed=1, backend="reference")
        st.SentenceTransformerTrainer(
            model=model,
            args=args,
            train_dataset=data,
            loss=losses.MultipleNegativesRankingLoss(model),
            optimizers=(opt, None),
            callbacks=[GradDropCallback(skip_dropped_layers=skip)],
        ).train()
        assert opt.draw == 8
        trained.append(model)
    for p, q in zip(*(model.parameters() for model in trained), strict=True):
        assert torch.equal(p, q)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_trainer_compiles(tmp_path):
    """TrainingArguments(torch_compile=True): the same masks and, up to rounding, the same parameters."""
    torch._dynamo.reset()
    trained = []
    for compiled in (False, True):
        args = hf.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=2, report_to="none", use_cpu=True,
            save_strategy="no", disable_tqdm=True, learning_rate=1e-3, max_grad_norm=0.0, torch_compile=compiled,
            torch_compile_backend="aot_eager" if compiled else None, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = hf.Trainer(
            classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double(),
            args,
            train_dataset=[{"input_ids": row, "labels": row.sum() % 2} for row in batches(4).flatten(0, 1)],
            optimizer_cls_and_kwargs=graddrop_optimizer(args, drop=GradFreeze("top-down"), seed=1),
            callbacks=[GradDropCallback(skip_dropped_layers=True)],
        )
        trainer.train()
        trained.append(trainer)
    draws = [unwrap(trainer.optimizer).draw for trainer in trained]
    assert draws == [8, 8]
    for p, q in zip(*(trainer.model.parameters() for trainer in trained), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


# Averaged weights


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_averaged_weights(kind):
    """torch.optim.swa_utils beside our optimizer: the average of what its steps left."""
    from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

    model = classifier()
    opt = GradDropAdamW(param_groups(model, drop=GradDropEpoch(p=0.5)), lr=1e-2, seed=1, steps_per_epoch=2)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9) if kind == "ema" else None)
    schedule = SWALR(opt, swa_lr=1e-3, anneal_epochs=2)
    history = []
    for ids in batches(4):
        loss_of(model, ids).backward()
        opt.step()
        opt.zero_grad()
        schedule.step()
        averaged.update_parameters(model)
        history.append([p.detach().clone() for p in model.parameters()])
    assert opt.param_groups[0]["lr"] == pytest.approx(1e-3)
    for i, p in enumerate(averaged.module.parameters()):
        expected = history[0][i].clone()
        for n, step in enumerate(history[1:], 1):
            expected += (step[i] - expected) * (0.1 if kind == "ema" else 1 / (n + 1))
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-7)


# Accelerate's FSDP2


@pytest.mark.slow
def test_accelerate_with_fsdp2(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    script = "tests/helpers/accelerate_fsdp2.py"
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]):
        command = [sys.executable, *launcher, script, str(tmp_path), "2" if launcher else "1"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-4000:]
    alone, sharded = torch.load(tmp_path / "1.pt"), torch.load(tmp_path / "2.pt")
    assert alone[0] == sharded[0] == 6
    assert all(map(torch.equal, alone[1], sharded[1]))
    torch.testing.assert_close(sharded[2], alone[2], rtol=0, atol=1e-10)
