"""One run of the study: a seed's own training text, its wrong labels, training, and predictions made compact."""

import base64
import hashlib
import random
import zlib
from dataclasses import replace
from functools import cache

import numpy as np

from .. import tasks, training
from ..task import Example, Task
from .plan import Plan, Run

_MAX_LENGTH = {"multiemo": 48}
_QUIET = training.Record(progress=False)


def execute(run: Run, plan: Plan) -> dict:
    """Train and score; a line of the study's results.

    ``dev`` is the dev average of every epoch, ``best`` and ``last`` are test averages of the best and last epoch, and
    the same names with ``_labels`` hold every predicted class (see :func:`pack`).
    """
    task = study_task(run.task, plan)
    task = replace(task, train=training_text(task, plan.train, run.noise, run.seed))
    tunes = run.part == "tune"
    if tunes:
        task = replace(task, test={})
    settings = training.Settings(
        model=plan.model, epochs=plan.epochs, batch_size=16, lr=run.lr, decay="constant", warmup=0.0,
        weight_decay=0.01, p=run.arm.p, effect=run.arm.effect, max_length=_MAX_LENGTH.get(run.task, 128),
        autocast=plan.autocast, choose="best",
    )  # fmt: skip
    record = replace(_QUIET, last=not tunes, labels=not tunes)
    result = training.run(task, run.arm.method, run.seed, settings, record)
    line = {
        "part": run.part, "task": run.task, "method": run.arm.name, "noise": run.noise, "seed": run.seed,
        "lr": run.lr, "plan": plan.settings(), "chosen_epoch": result["chosen_epoch"],
        "dev": [round(training.average(point["dev"]), 4) for point in result["curve"]],
        "seconds": result["seconds"], "cpu_seconds": result["cpu_seconds"], "machine": result["machine"],
        "arithmetic": plan.arithmetic,
    }  # fmt: skip
    if not tunes:
        line |= {"best": result["test_average"], "last": training.average(result["last"]), "texts": digest(task)}
        line |= {f"{name}_labels": pack(labels) for name, labels in result["labels"].items()}
    return line


@cache
def study_task(name: str, plan: Plan) -> Task:
    """The task with all of its training text, and the dev and test sentences of the plan."""
    test = plan.multiemo_test if name == "multiemo" else plan.test
    return tasks.load(name).limited(dev=plan.dev, test=test)


def training_text(task: Task, count: int, noise: float, seed: int) -> list[Example]:
    """The seed's own ``count`` training sentences, a share ``noise`` of them with another label, drawn uniformly.

    One sentence of each class, the others at random. The sentences do not depend on ``noise``.
    """
    if not len(task.labels) <= count <= len(task.train):
        raise ValueError(f"train must be {len(task.labels)} (one a class) to {len(task.train)}, got {count}")
    rng = random.Random(f"sentences {seed}")
    order = rng.sample(range(len(task.train)), len(task.train))
    firsts = {}
    for i in order:
        firsts.setdefault(task.train[i].label, i)
    chosen = [*firsts.values(), *(i for i in order if i not in set(firsts.values()))][:count]
    examples = [task.train[i] for i in sorted(chosen)]
    rng = random.Random(f"wrong labels {seed}")
    for i in rng.sample(range(count), round(noise * count)):
        others = [label for label in task.labels if label != examples[i].label]
        examples[i] = replace(examples[i], label=rng.choice(others))
    return examples


def pack(labels: dict[str, np.ndarray]) -> str:
    """Predicted classes, language after language, as text: a byte each, deflated, in base64."""
    classes = np.concatenate([*labels.values()])
    if classes.max() > 255:
        raise ValueError(f"labels must be classes below 256, got {classes.max()}")
    return base64.b64encode(zlib.compress(classes.astype(np.uint8).tobytes(), 9)).decode()


def unpack(text: str) -> np.ndarray:
    """Inverse of :func:`pack`: the classes of all languages in one array."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)


def digest(task: Task) -> str:
    """Of the test sentences and their labels, in the order in which predictions stand."""
    rows = [(lang, *example.texts(), example.label) for lang in task.languages for example in task.test[lang]]
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
