"""Fine-tune a multilingual encoder on English, with plain AdamW and with gradient masks; test it in other languages.

python -m benchmarks.crosslingual.demo --data intents --methods fine-tuning,graddrop --out results/demo
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import graddrop_fused
from benchmarks import progress

from . import figures, heads, methods, models, tables, tasks, training
from .methods import METHODS
from .task import Task

STUDY = """\
This is one seed: it shows that the methods run and learn, not which is better. From seed to seed such differences move
by some 2 points. docs/study.md (ten seeds) found no method above plain fine-tuning beyond chance."""
DEFAULT_METHODS = ("fine-tuning", "graddrop", "graddrop-epoch", "layer-graddrop")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.crosslingual.demo", description=__doc__.split("\n\n")[0])
    p.add_argument(
        "--model", default=models.EMBEDDED, help="hub name or local folder (default: the embedded %(default)s)"
    )
    p.add_argument("--data", default="intents", choices=tasks.TASKS, help="task (default: %(default)s)")
    p.add_argument("--xglue", type=Path, help="folder of XGLUE's data, for its tasks")
    p.add_argument(
        "--methods",
        default=",".join(DEFAULT_METHODS),
        help=f"comma-separated, of: {', '.join(METHODS)} (default: %(default)s)",
    )
    p.add_argument("--epochs", type=int, default=4)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--lr", type=float, default=2e-4)
    p.add_argument("--p", type=float, help="drop probability, for methods with a constant one")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--train", type=int, default=512, help="English training examples at most (default: %(default)s)")
    p.add_argument("--test", type=int, default=80, help="test examples per language at most (default: %(default)s)")
    p.add_argument("--backend", default="auto", help="of GradDropAdamW: auto, cpu, triton or reference")
    p.add_argument("--out", type=Path, default=Path("results/demo"), help="folder (default: %(default)s)")
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    wanted = [*dict.fromkeys(arguments.methods.split(","))]
    unknown = [method for method in wanted if method not in METHODS]
    if unknown:
        print(f"unknown method {', '.join(unknown)}: choose from {', '.join(METHODS)}", file=sys.stderr)
        return 2
    began, cpu_began = time.perf_counter(), time.process_time()
    print(f"graddrop_fused {graddrop_fused.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"model {arguments.model}, task {arguments.data}: trained on English alone")
    try:
        task = tasks.load(arguments.data, arguments.xglue).limited(arguments.train, test=arguments.test)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    task = replace(task, dev={})  # nothing is chosen here, so nothing is tried on dev
    settings = training.Settings(
        model=arguments.model,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        p=arguments.p,
        backend=arguments.backend,
    )
    if task.head == "classification":
        guess = heads.majority([example for examples in task.test.values() for example in examples])
        print(f"{len(task.labels)} classes; always saying the most frequent one would score {guess:.1f}")
    try:
        methods.check(wanted, epochs=arguments.epochs, p=arguments.p)
        results = _run(task, wanted, arguments.seed, settings)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing is saved", file=sys.stderr)
        return 130
    _report(task, results, arguments.out)
    print(f"{time.perf_counter() - began:.0f} s ({time.process_time() - cpu_began:.0f} s of CPU time)")
    return 0


def _run(task: Task, wanted: list[str], seed: int, settings: training.Settings) -> list[dict]:
    results = []
    with progress.bar(len(wanted), "methods", "method", leave=True) as bar:
        for method in wanted:
            result = training.run(task, method, seed, settings, training.Record(masks=True, labels=True))
            bar.update()
            progress.say(
                f"{method}: {result['optimizer']}, {result['steps']} steps, {result['seconds']:.0f} s, "
                f"average {result['test_average']:.1f}"
            )
            results.append(result)
    return results


def _report(task: Task, results: list[dict], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    table = tables.markdown(tables.by_language(results))
    lines = gains(task, results)
    for result in results:
        del result["labels"]
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    figures.languages(results, out / "languages.png")
    figures.masks(results, out / "masks.png")
    print(f"\nTest {results[0]['metric']} by language, in per cent; {len(task.train)} English training examples, "
          f"{max(map(len, task.test.values()))} test examples a language at most:\n\n{table}\n")  # fmt: skip
    if lines:
        print("Differences of the average, with the standard error that the choice of test sentences gives them:")
        print("\n".join(lines))
        print(STUDY)
    print("saved: " + ", ".join(str(out / name) for name in ("results.json", "table.md", "languages.png", "masks.png")))


def gains(task: Task, results: list[dict]) -> list[str]:
    """A line per method: its difference from the first one's average, and its standard error over test sentences.

    The error is that of a mean of paired differences, sentence by sentence, language by language. Only for classes.
    """
    if task.head != "classification":
        return []
    base, *others = [
        {
            language: np.array([task.labels.index(e.label) for e in task.test[language]]) == labels
            for language, labels in result["labels"]["last"].items()
        }
        for result in results
    ]
    lines = []
    for result, right in zip(results[1:], others, strict=True):
        differences = [right[language].astype(float) - base[language] for language in right]
        mean = 100 * np.mean([d.mean() for d in differences])
        error = 100 * np.sqrt(np.sum([d.var(ddof=min(1, len(d) - 1)) / len(d) for d in differences])) / len(right)
        lines.append(f"  {result['method']} - {results[0]['method']}: {mean:+.1f} +- {error:.1f}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
