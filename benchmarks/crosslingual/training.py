"""One run: one task, one method, one seed. Trains on English, then scores every language."""

import math
import platform
import re
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import graddrop_fused
from benchmarks import progress
from graddrop_fused import dispatch
from graddrop_fused.skip import skip_dropped_layers

from . import models
from .heads import HEADS
from .methods import METHODS, Schedule, count_layers
from .task import LANGUAGE, Task

MASK_ELEMENTS = 64  # of each layer, recorded for the picture of masks


@dataclass(frozen=True)
class Settings:
    """How to train. Scores depend on all of these; a result records them."""

    model: str = models.EMBEDDED
    epochs: int = 4
    batch_size: int = 16
    accumulation: int = 1
    eval_batch_size: int = 64
    lr: float = 1e-4
    weight_decay: float = 0.01
    warmup: float = 0.1  # share of the steps
    max_length: int = 128
    p: float | None = None
    targets: str = "all"
    backend: str = "auto"
    patience: int | None = None  # epochs without a better English dev score before stopping; None: train them all
    curves: bool = False  # score every language's test set after each epoch, too; the run itself is the same


def run(
    task: Task,
    method_name: str,
    seed: int,
    settings: Settings,
    *,
    checkpoints: Path | None = None,
    progress: bool = True,
) -> dict:
    """Train and score.

    Args:
        checkpoints: a folder for this run alone, where it saves after every epoch and from where it goes on if it
            was interrupted. Needed for ``patience``. None: nothing is saved.

    Returns:
        A result that json can write: ``dev`` and ``test`` are scores by language, ``test_average`` their unweighted
        mean, ``curve`` scores by epoch, ``masks`` what was active in each epoch, ``seconds`` and ``cpu_seconds``.
    """
    if settings.patience is not None and checkpoints is None:
        raise ValueError("patience needs a checkpoints folder: the best epoch's model is kept there")
    began, cpu_began = time.perf_counter(), time.process_time()
    method = METHODS[method_name]
    set_seed(seed)  # the new head: the same for all methods
    head_class = HEADS[task.head]
    model, tokenizer = models.load(settings.model, task, head_class.auto_model)
    head = head_class(tokenizer, task.labels, settings.max_length)
    train = head.features(task.train, training=True)
    schedule = Schedule(settings.epochs, _steps_per_epoch(len(train), settings), count_layers(model))
    with ExitStack() as stack:
        folder = checkpoints or stack.enter_context(tempfile.TemporaryDirectory())  # the Trainer makes its folder
        arguments = _arguments(settings, seed, folder, saves=checkpoints is not None)
        model.to(arguments.device)
        optimizer = method.optimizer(
            model,
            schedule,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            seed=seed,
            p=settings.p,
            targets=settings.targets,
            backend=settings.backend,
            fisher=_fisher(model, head, train, settings) if method.fisher else None,
        )
        if method.by_layer:
            stack.enter_context(skip_dropped_layers(model, optimizer))
        trainer = _CrossLingualTrainer(
            task,
            head,
            settings,
            arguments=arguments,
            label=method_name if progress else None,
            model=model,
            train_dataset=train,
            optimizers=(optimizer, None),
            data_collator=head.collator(tokenizer),
        )
        last = get_last_checkpoint(folder) if Path(folder).exists() else None
        trainer.train(resume_from_checkpoint=last)
    train_seconds = time.perf_counter() - began
    dev = trainer.scores({language: task.dev[language] for language in task.languages if task.dev}, "dev")
    test = trainer.scores({language: task.test[language] for language in task.languages}, "test")
    history = trainer.state.log_history
    return {
        "task": task.name,
        "method": method_name,
        "seed": seed,
        "settings": asdict(settings),
        "examples": task.counts(),
        "metric": head.metric,
        "dev": dev,
        "test": test,
        "test_average": float(np.mean(list(test.values()))),
        "curve": [entry["scores"] | {"epoch": entry["epoch"]} for entry in history if "scores" in entry],
        "masks": [entry["masks"] for entry in history if "masks" in entry],
        "steps": trainer.state.global_step,
        "epochs": math.ceil(trainer.state.epoch),
        "optimizer": describe(optimizer),
        "parameters": sum(p.numel() for p in model.parameters()),
        "machine": machine(model.device),
        "resumed": last is not None,
        "train_seconds": round(train_seconds, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu_began, 1),
    }


def _steps_per_epoch(examples: int, settings: Settings) -> int:
    batches = math.ceil(examples / settings.batch_size)
    return max(1, math.ceil(batches / settings.accumulation))


def machine(device: torch.device) -> str:
    """Processor or GPU, threads, versions."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        models_named = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = models_named[0].strip() if models_named else name
    versions = f"torch {torch.__version__}, graddrop_fused {graddrop_fused.__version__}"
    return f"{name}, {torch.get_num_threads()} threads, {versions}"


def describe(optimizer: torch.optim.Optimizer) -> str:
    """The optimizer's name and, if it has one, the backend that serves its first parameter."""
    name = f"{type(optimizer).__module__.split('.')[0]}.{type(optimizer).__name__}"
    if not hasattr(optimizer, "backend"):
        return name
    param = optimizer.param_groups[0]["params"][0]
    module = dispatch.choose(optimizer.backend, param.device, param.dtype)
    return f"{name} ({module.__name__.rpartition('.')[2]} backend)"


def _arguments(settings: Settings, seed: int, folder: Path | str, saves: bool) -> TrainingArguments:
    stops = settings.patience is not None
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.lr,
        max_grad_norm=0.0,  # clipping would see the gradients of dropped layers, or, when they are skipped, not
        warmup_steps=settings.warmup,
        lr_scheduler_type="linear",
        train_sampling_strategy="group_by_length",  # short text padded to long text is most of the time
        seed=seed,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,  # bars of our own say what they count
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy="epoch" if stops or settings.curves else "no",
        save_strategy="epoch" if saves else "no",
        save_total_limit=1,
        load_best_model_at_end=stops,
        metric_for_best_model="eval_dev" if stops else None,
        greater_is_better=True if stops else None,
        restore_callback_states_from_checkpoint=stops,  # how long English dev has not risen
    )


class _CrossLingualTrainer(Trainer):
    """transformers' Trainer; what it evaluates is the English dev score and, if wanted, all languages' test scores."""

    def __init__(
        self, task: Task, head, settings: Settings, *, arguments: TrainingArguments, label: str | None, **kwargs
    ):
        self.task, self.head, self.settings, self.label = task, head, settings, label
        super().__init__(args=arguments, eval_dataset=[], **kwargs)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Masks(self.optimizer))
        if label:
            self.add_callback(_Progress(label))
        if settings.patience is not None:
            self.add_callback(EarlyStoppingCallback(settings.patience))

    def _get_eval_sampler(self, eval_dataset):
        return SequentialSampler(eval_dataset)  # the Trainer would group by length here, too, and shuffle

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        dev = self.scores({LANGUAGE: self.task.dev[LANGUAGE]}, None)[LANGUAGE]
        metrics = {"eval_dev": dev}
        record = {"dev": dev}
        if self.settings.curves:
            record |= self.scores(self.task.test, None)
        self.state.log_history.append({"epoch": self.state.epoch, "step": self.state.global_step, "scores": record})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def scores(self, by_language: dict[str, list], name: str | None) -> dict[str, float]:
        """Language -> score. All languages go through the model together, sorted by length to pad little."""
        if not by_language:
            return {}
        parts = {language: self.head.features(examples, training=False) for language, examples in by_language.items()}
        features = [feature for part in parts.values() for feature in part]
        order = sorted(range(len(features)), key=lambda i: len(features[i]["input_ids"]))
        bar = _PredictionProgress(f"{self.label}: {name}") if self.label and name else None
        if bar:
            self.add_callback(bar)
        with torch.random.fork_rng():  # a data loader draws a seed, which would change the dropout to come
            outputs = self.predict([features[i] for i in order]).predictions
        if bar:
            self.remove_callback(bar)
        back = np.argsort(order)
        several = isinstance(outputs, tuple)
        outputs = tuple(output[back] for output in (outputs if several else (outputs,)))
        scores, at = {}, 0
        for language, part in parts.items():
            mine = tuple(output[at : at + len(part)] for output in outputs)
            at += len(part)
            scores[language] = self.head.score(by_language[language], part, mine if several else mine[0], language)
        return {language: round(score, 3) for language, score in scores.items()}


class _Masks(TrainerCallback):
    """At the beginning of each epoch: which share of each layer the next step keeps, and some elements' masks."""

    def __init__(self, optimizer):
        self.optimizer = getattr(optimizer, "optimizer", optimizer)

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.log_history and any(
            e.get("masks", {}).get("epoch") == int(state.epoch or 0) for e in state.log_history
        ):
            return  # resumed: this epoch is recorded
        layers = {}
        for group in self.optimizer.param_groups:
            matrices = [p for p in group["params"] if p.dim() == 2]
            if matrices and group.get("drop") is not None or group["layer"] not in layers:
                layers[group["layer"]] = self._of(matrices[0] if matrices else group["params"][0], group)
        state.log_history.append({"masks": {"epoch": int(state.epoch or 0), "layers": layers}})

    def _of(self, param: torch.Tensor, group: dict) -> dict:
        if group.get("drop") is None:
            return {"kept": 1.0, "elements": "1" * min(MASK_ELEMENTS, param.numel())}
        mask = self.optimizer.keep_mask(param)
        elements = mask.flatten()[:MASK_ELEMENTS].int().tolist()
        return {"kept": round(mask.float().mean().item(), 4), "elements": "".join(map(str, elements))}


class _Progress(TrainerCallback):
    """A bar over the training steps."""

    def __init__(self, label: str):
        self.label = label

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = progress.bar(state.max_steps, f"{self.label}: train", "step", initial=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_epoch_end(self, args, state, control, **kwargs):
        progress.note(f"{self.label}: epoch {round(state.epoch)} of {round(args.num_train_epochs)}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class _PredictionProgress(TrainerCallback):
    """A bar over the batches of one prediction."""

    def __init__(self, name: str):
        self.name, self.bar = name, None

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.bar is None:
            self.bar = progress.bar(len(eval_dataloader), f"{self.name}, all languages", "batch")
        self.bar.update()

    def on_predict(self, args, state, control, metrics, **kwargs):
        if self.bar is not None:
            self.bar.close()


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
