"""One run: one task, one method, one seed. Trains on English, then scores every language."""

import json
import platform
import re
import shutil
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

import graddrop_fused
from graddrop_fused import dispatch
from graddrop_fused.trainer import GradDropCallback

from . import models
from .callbacks import MaskRecord, PredictionProgress, TrainingProgress, Unfreezing
from .heads import HEADS
from .methods import METHODS, Method, Schedule, adapted, count_layers, layers_per_epoch
from .task import Example, Task


@dataclass(frozen=True)
class Settings:
    """How to train. Scores depend on all of these; a result records them."""

    model: str = models.EMBEDDED
    epochs: int = 4
    batch_size: int = 16  # examples of a forward pass, on all devices together
    accumulation: int = 1
    eval_batch_size: int = 64
    optimizer: str = "adamw"  # a key of methods.OPTIMIZERS
    lr: float = 1e-4
    decay: str = "linear"  # of the learning rate, or "constant"
    weight_decay: float = 0.01
    warmup: float = 0.1  # share of the steps
    clip: float = 0.0  # norm of all gradients, before masks; 0: not clipped, and dropped layers are skipped
    max_length: int = 128
    p: float | None = None  # None: the method's own
    effect: str | None = None  # None: the method's own
    targets: str = "all"
    mask_head: bool = False
    backend: str = "auto"
    autocast: bool = False  # forward and backward in bfloat16
    choose: str = "last"  # whose model is scored: the "last" epoch's, or the "best" by the dev average over languages


@dataclass(frozen=True)
class Record:
    """What a run keeps beside its scores. It changes none of them."""

    curves: bool = False  # test scores of every epoch
    last: bool = False  # test scores of the last epoch, beside the best one's
    labels: bool = False  # predicted class of every test example
    masks: bool = False  # what was trained in each epoch
    progress: bool = True


def run(
    task: Task, method_name: str, seed: int, settings: Settings, record: Record, *, checkpoints: Path | None = None
) -> dict:
    """Train and score.

    Args:
        checkpoints: a folder for this run alone, where it saves after every epoch and from where it goes on if it
            was interrupted. None: nothing is kept.

    Returns:
        A result that json can write, but for ``labels``. ``dev`` and ``test`` are scores by language of the chosen
        epoch, ``test_average`` their unweighted mean, ``curve`` scores by epoch, ``labels`` {"best" or "last":
        {language: classes}}.

    Raises:
        ValueError: if the model cannot be had, the settings do not fit it or the devices, or ``checkpoints`` are of
            other settings.
    """
    began, cpu_began = time.perf_counter(), time.process_time()
    method = METHODS[method_name]
    set_seed(seed)  # the new head: the same for all methods
    head_class = HEADS[task.head]
    model, tokenizer = models.load(settings.model, task, head_class.auto_model)
    models.check_length(model, tokenizer, settings.max_length)
    model = adapted(model) if method.adapters else model
    head = head_class(tokenizer, task.labels, settings.max_length)
    train = head.features(task.train, training=True)
    with ExitStack() as stack:
        folder = Path(checkpoints or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        last = _last_checkpoint(folder, asdict(settings) | {"examples": task.counts()})
        arguments = _arguments(settings, record, seed, folder, saves=checkpoints is not None)
        model.to(arguments.device)
        schedule = Schedule(settings.epochs, count_layers(model))
        optimizer = _optimizer(method, model, schedule, settings, seed, head, train)
        trainer = _CrossLingualTrainer(
            task, head, settings, record,
            args=arguments, label=method_name, model=model, train_dataset=train, optimizers=(optimizer, None),
            data_collator=head.collator(tokenizer),
            callbacks=_callbacks(method, optimizer, schedule, settings, record, arguments),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=last)
        train_seconds = time.perf_counter() - began
        scored = trainer.final_scores()
    return {
        "task": task.name,
        "method": method_name,
        "seed": seed,
        "settings": asdict(settings),
        "examples": task.counts(),
        "metric": head.metric,
        **scored,
        **trainer.history(),
        "optimizer": describe(optimizer),
        "parameters": sum(p.numel() for p in model.parameters()),
        "machine": machine(model.device),
        "resumed": last is not None,
        "train_seconds": round(train_seconds, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu_began, 1),
    }


def differences(given: dict, wanted: dict) -> dict:
    """What is not as ``wanted``: name -> (given, wanted)."""
    return {name: (given.get(name), value) for name, value in wanted.items() if given.get(name) != value}


def _last_checkpoint(folder: Path, wanted: dict) -> str | None:
    """The last whole checkpoint in ``folder``, which remembers what it is of. Raises ValueError if that differs."""
    for saved in folder.glob("checkpoint-*"):
        if not (saved / TRAINER_STATE_NAME).exists():  # its last file: the run ended while it was written
            shutil.rmtree(saved)
    last, begun = get_last_checkpoint(folder), folder / "begun.json"
    there = json.loads(begun.read_text("utf-8")) if last and begun.exists() else wanted
    other = differences(there, wanted)
    if other:
        raise ValueError(
            f"{folder} holds a run that was interrupted and had other settings (there, now): {other}; choose another "
            "--out, or the same settings, or remove that folder"
        )
    if last is None:
        begun.write_text(json.dumps(wanted), encoding="utf-8")
    return last


def average(by_language: dict[str, float]) -> float:
    """A task's score: the unweighted mean over its languages, English included. nan without any."""
    return float(np.mean(list(by_language.values()))) if by_language else float("nan")


def machine(device: torch.device) -> str:
    """Processor or GPU, threads, versions."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        models_named = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = models_named[0].strip() if models_named else name
    threads = torch.get_num_threads()
    versions = f"torch {torch.__version__}, graddrop_fused {graddrop_fused.__version__}"
    return f"{name}, {threads} thread{'s' * (threads > 1)}, {versions}"


def describe(optimizer: torch.optim.Optimizer) -> str:
    """The optimizer's name and, if it has one, the backend that serves its first parameter."""
    name = f"{type(optimizer).__module__.split('.')[0]}.{type(optimizer).__name__}"
    if not hasattr(optimizer, "backend"):
        return name
    param = optimizer.param_groups[0]["params"][0]
    module = dispatch.choose(optimizer.backend, param.device, param.dtype)
    return f"{name} ({module.__name__.rpartition('.')[2]} backend)"


def _optimizer(method: Method, model, schedule, settings: Settings, seed: int, head, train) -> torch.optim.Optimizer:
    return method.optimizer(
        model,
        schedule,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        seed=seed,
        p=settings.p,
        effect=settings.effect,
        targets=settings.targets,
        mask_head=settings.mask_head,
        backend=settings.backend,
        kind=settings.optimizer,
        fisher=_fisher(model, head, train, settings) if method.fisher else None,
    )


def _callbacks(method: Method, optimizer, schedule: Schedule, settings: Settings, record: Record, arguments) -> list:
    """In the order in which they see an epoch begin: what sets masks, before what records them."""
    callbacks = []
    if method.masks:
        # Clipping would see fewer gradients, and the replicas of several devices share no hooks
        skips = method.by_layer and not settings.clip and arguments.n_gpu <= 1
        savings = {"release_gradients": True, "skip_dropped_rows": True} if method.saves else {}
        callbacks.append(GradDropCallback(skip_dropped_layers=skips, **savings))
    if method.unfreezes:
        per_epoch = layers_per_epoch(schedule)
        callbacks.append(Unfreezing(optimizer, method.unfreezes, per_epoch, settings.mask_head))
    if record.masks:
        callbacks.append(MaskRecord(optimizer))
    if record.progress:
        callbacks.append(TrainingProgress(method.name))
    return callbacks


def _arguments(settings: Settings, record: Record, seed: int, folder: Path, saves: bool) -> TrainingArguments:
    evaluates = settings.choose == "best" or record.curves
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_eval_batch_size=settings.eval_batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.lr,
        max_grad_norm=settings.clip,
        warmup_steps=settings.warmup,
        lr_scheduler_type=settings.decay,
        bf16=settings.autocast,
        use_cpu=settings.autocast and not torch.cuda.is_available(),  # without a GPU bf16 asks for it
        train_sampling_strategy="group_by_length",  # short text padded to long text is most of the time
        seed=seed,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,  # bars of our own say what they count
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy="epoch" if evaluates else "no",
        save_strategy="epoch" if saves else "no",
        save_total_limit=1,
    )
    devices = max(1, arguments.n_gpu) * arguments.world_size
    if settings.batch_size % devices:
        raise ValueError(
            f"batch_size must be a multiple of the {devices} devices that share a batch, got {settings.batch_size}"
        )
    arguments.per_device_train_batch_size = settings.batch_size // devices
    return arguments


class _CrossLingualTrainer(Trainer):
    """transformers' Trainer, which evaluates the dev sets of all languages and, if wanted, their test sets.

    The weights of the epoch with the best dev average are in ``best.pt`` of its folder. Which epoch that is follows
    from its history, so that an interruption changes nothing.
    """

    def __init__(self, task: Task, head, settings: Settings, record: Record, *, label: str, **kwargs):
        self.task, self.head, self.settings, self.record, self.label = task, head, settings, record, label
        super().__init__(eval_dataset=[], **kwargs)
        self.remove_callback(PrinterCallback)

    def _get_eval_sampler(self, eval_dataset):
        return SequentialSampler(eval_dataset)  # the Trainer would group by length here, too, and shuffle

    @property
    def _best(self) -> Path:
        return Path(self.args.output_dir) / "best.pt"

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        dev, _ = self._score(self.task.dev, "dev")
        scores = {"epoch": round(self.state.epoch), "dev": dev}
        if self.record.curves:
            scores["test"], _ = self._score(self.task.test, "test")
        if self.settings.choose == "best":
            before = [average(scores["dev"]) for scores in self.history()["curve"]]
            if not before or average(dev) > max(before):
                torch.save(self.model.state_dict(), self._best)
        self.state.log_history.append({"scores": scores})
        metrics = {"eval_dev": average(dev)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def history(self) -> dict:
        """curve, masks, steps and epochs, as far as the run went."""
        entries = self.state.log_history
        return {
            "curve": [entry["scores"] for entry in entries if "scores" in entry],
            "masks": [entry["masks"] for entry in entries if "masks" in entry],
            "steps": self.state.global_step,
            "epochs": round(self.state.epoch),
        }

    def final_scores(self) -> dict:
        """dev, test, test_average and chosen_epoch; last and labels, if they are to be recorded."""
        labels, found = {}, {}
        if self.settings.choose == "last" or self.record.last:
            found["last"], labels["last"] = self._score(self.task.test, "test")
        epoch = self.settings.epochs
        if self.settings.choose == "best":
            epoch = max(self.history()["curve"], key=lambda scores: (average(scores["dev"]), -scores["epoch"]))["epoch"]
            if epoch == self.settings.epochs and "last" in found:
                found["best"], labels["best"] = found["last"], labels["last"]
            else:
                self.model.load_state_dict(torch.load(self._best, weights_only=True))
                found["best"], labels["best"] = self._score(self.task.test, "test")
        dev, _ = self._score(self.task.dev, "dev")
        test = found[self.settings.choose]
        result = {"dev": dev, "test": test, "test_average": average(test), "chosen_epoch": epoch}
        if self.record.last:
            result["last"] = found["last"]
        if self.record.labels:
            result["labels"] = labels
        return result

    def _score(
        self, by_language: dict[str, list[Example]], name: str
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Language -> score, and language -> outputs' classes. Languages go through the model together, sorted by
        length to pad little."""
        if not by_language:
            return {}, {}
        languages = [language for language in self.task.languages if language in by_language]
        parts = {lang: self.head.features(by_language[lang], training=False, language=lang) for lang in languages}
        features = [feature for part in parts.values() for feature in part]
        order = sorted(range(len(features)), key=lambda i: len(features[i]["input_ids"]))
        bar = PredictionProgress(f"{self.label}: {name}") if self.record.progress else None
        if bar:
            self.add_callback(bar)
        with torch.random.fork_rng():  # a data loader draws a seed, which would change the dropout to come
            outputs = self.predict([features[i] for i in order]).predictions
        if bar:
            self.remove_callback(bar)
        back = np.argsort(order)
        several = isinstance(outputs, tuple)
        outputs = tuple(output[back] for output in (outputs if several else (outputs,)))
        scores, classes, at = {}, {}, 0
        for language, part in parts.items():
            mine = tuple(output[at : at + len(part)] for output in outputs)
            at += len(part)
            score = self.head.score(by_language[language], part, mine if several else mine[0], language)
            scores[language] = round(score, 3)
            classes[language] = mine[0].argmax(-1)
        return scores, classes


def _fisher(model: nn.Module, head, features: list[dict], settings: Settings) -> dict[str, torch.Tensor]:
    """The squared gradient of each parameter, averaged over the training batches (empirical Fisher information)."""
    collate = head.collator(head.tokenizer)
    fisher = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    model.eval()
    starts = range(0, len(features), settings.batch_size)
    for start in starts:
        batch = collate(features[start : start + settings.batch_size])
        model.zero_grad()
        model(**batch.to(model.device)).loss.backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                fisher[name] += p.grad.square() / len(starts)
    model.zero_grad()
    model.train()
    return fisher
