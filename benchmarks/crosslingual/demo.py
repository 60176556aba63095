"""Fine-tune a multilingual encoder on English, with plain AdamW and with gradient masks; test it in other languages.

python -m benchmarks.crosslingual.demo --data intents --methods fine-tuning,graddrop --out results/demo
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import graddrop_fused
from benchmarks import progress

from . import figures, heads, models, tables, tasks, training
from .methods import METHODS

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
    methods = arguments.methods.split(",")
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        print(f"unknown method {', '.join(unknown)}: choose from {', '.join(METHODS)}", file=sys.stderr)
        return 2
    began, cpu_began = time.perf_counter(), time.process_time()
    print(f"graddrop_fused {graddrop_fused.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"model {arguments.model}, task {arguments.data}: trained on English alone")
    task = tasks.load(arguments.data, arguments.xglue).limited(arguments.train, test=arguments.test)
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
    results = []
    for method in progress.each(methods, "methods", "method"):
        result = training.run(task, method, arguments.seed, settings)
        progress.say(
            f"{method}: {result['optimizer']}, {result['steps']} steps, {result['seconds']:.0f} s, "
            f"average {result['test_average']:.1f}"
        )
        results.append(result)
    arguments.out.mkdir(parents=True, exist_ok=True)
    table = tables.markdown(tables.by_language(results))
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "table.md").write_text(table + "\n", encoding="utf-8")
    figures.languages(results, arguments.out / "languages.png")
    figures.masks(results, arguments.out / "masks.png")
    print(f"\nTest {results[0]['metric']} by language, in per cent; {len(task.train)} English training examples, "
          f"{max(map(len, task.test.values()))} test examples a language:\n\n{table}\n")  # fmt: skip
    print(f"{time.perf_counter() - began:.0f} s ({time.process_time() - cpu_began:.0f} s of CPU time)")
    print("saved: " + ", ".join(str(arguments.out / name) for name in
                                ("results.json", "table.md", "languages.png", "masks.png")))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
