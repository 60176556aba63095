"""Run tasks x methods x seeds, then write the paper's tables and figures.

    python -m benchmarks.crosslingual --tasks intents,multiemo --seeds 0,1,2 --out results/comparison
    python -m benchmarks.crosslingual --tasks all-xglue --xglue xglue_full_dataset --model xlm-roberta-large
    python -m benchmarks.crosslingual --tasks intents,multiemo --out results/comparison --report-only

Results are JSON lines, a file per task. A run that is there already is not done again, so an interrupted command goes
on where it stopped; XGLUE runs go on from their last epoch. Several processes may share --out if their tasks differ.
The study of docs/study.md has a command of its own: python -m benchmarks.crosslingual.study.
"""

import argparse
import shutil
import signal
import sys
from dataclasses import fields, replace
from pathlib import Path

from benchmarks import progress

from . import figures, methods, models, paper, recipes, reports, results, tables, tasks, training
from .methods import METHODS
from .task import Task

# In a report: the line below which everything is written anew
RESULTS = "<!-- results: the command below writes all that follows -->"
# English training examples, and dev and test examples per language
SIZES = {
    "quick": {"intents": (400, 20, 50), "multiemo": (320, 20, 50)},
    "standard": {"intents": (None, 100, 200), "multiemo": (2000, 100, 200)},
    "full": {},
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.crosslingual",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--tasks", default="intents", help=f"comma-separated, or all-xglue, of: {', '.join(tasks.TASKS)}")
    p.add_argument("--methods", default="all", help=f"comma-separated, of: {', '.join(METHODS)}; all: without "
                   "those that save memory, whose learning rates are others (default: all)")  # fmt: skip
    p.add_argument("--seeds", default="0,1,2", help="comma-separated (default: %(default)s)")
    p.add_argument("--size", default="quick", choices=SIZES, help="of the embedded tasks (default: %(default)s)")
    p.add_argument("--xglue", type=Path, metavar="FOLDER", help="XGLUE's data, xglue_full_dataset")
    p.add_argument(
        "--model", default=models.EMBEDDED, help="hub name or local folder (default: the embedded %(default)s)"
    )
    p.add_argument("--out", type=Path, default=Path("results/crosslingual"), help="folder (default: %(default)s)")
    p.add_argument("--report", type=Path, metavar="FILE", help="Markdown file (default: OUT/report.md)")
    p.add_argument("--report-only", action="store_true", help="only write tables and figures of what is there")
    p.add_argument("--paper", action="store_true", help="only print the paper's own tables, and what to know of them")
    p.add_argument(
        "--recipe", choices=recipes.RECIPES, help="xglue: XGLUE's own (default for its tasks); short: of embedded tasks"
    )
    p.add_argument("--curves", action=argparse.BooleanOptionalAction, default=True,
                   help="test the first seed after every epoch (default: yes)")  # fmt: skip
    own = p.add_argument_group("in place of the recipe")
    kinds = {"epochs": int, "batch-size": int, "accumulation": int, "lr": float, "max-length": int,
             "weight-decay": float, "clip": float, "p": float, "targets": str, "backend": str}  # fmt: skip
    for name, kind in kinds.items():
        own.add_argument(f"--{name}", type=kind)
    own.add_argument("--optimizer", choices=methods.OPTIMIZERS)
    own.add_argument("--choose", choices=("best", "last"), help="the epoch that is scored")
    own.add_argument("--mask-head", action=argparse.BooleanOptionalAction, help="mask the new head, too (default: no)")
    own.add_argument("--autocast", action=argparse.BooleanOptionalAction, help="bfloat16 (default: no)")
    own.add_argument("--train", type=int, help="English training examples at most")
    own.add_argument("--dev", type=int, help="dev examples per language at most")
    own.add_argument("--test", type=int, help="test examples per language at most")
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.paper:
        print("\n\n".join([paper.notes(), *map(tables.markdown, tables.paper_tables({}).values())]))
        return 0
    try:
        names = _names("task", arguments.tasks, tasks.TASKS, {"all-xglue": tuple(tasks.xglue.TASKS)})
        wanted = _names("method", arguments.methods, METHODS, {"all": methods.COMPARED})
        seeds = _seeds(arguments.seeds)
        if not arguments.report_only:
            for settings in map(_settings_of(arguments), names):
                methods.check(
                    wanted, epochs=settings.epochs, p=settings.p, kind=settings.optimizer, clip=settings.clip,
                    accumulation=settings.accumulation,
                )  # fmt: skip
            for task in [_load(name, arguments) for name in names]:  # a last one's missing file is said at once
                _run_task(task, wanted, seeds, arguments)
        report = arguments.report or arguments.out / "report.md"
        write_report(arguments.out, report, " ".join(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it stopped", file=sys.stderr)
        return 130
    print(f"tables and figures: {report}")
    return 0


def _names(what: str, text: str, known, groups: dict[str, tuple[str, ...]]) -> list[str]:
    names = [*dict.fromkeys(name for part in text.split(",") for name in groups.get(part, (part,)))]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown {what} {', '.join(unknown)}: choose from {', '.join((*groups, *known))}")
    return names


def _seeds(text: str) -> list[int]:
    try:
        return [*dict.fromkeys(map(int, text.split(",")))]
    except ValueError:
        raise ValueError(f"seeds must be comma-separated integers, got {text!r}") from None


def _load(name: str, arguments: argparse.Namespace) -> Task:
    """The task in its size. Raises ValueError also if there are runs with other settings or examples."""
    given = (arguments.train, arguments.dev, arguments.test)
    size = SIZES[arguments.size].get(name, (None, None, None))
    task = tasks.load(name, arguments.xglue).limited(*(b if a is None else a for a, b in zip(given, size, strict=True)))
    path = arguments.out / f"{name}.jsonl"
    results.check_comparable(results.read(path).values(), task, _settings_of(arguments)(name), path)
    return task


def _run_task(task: Task, wanted: list[str], seeds: list[int], arguments: argparse.Namespace) -> None:
    name = task.name
    settings = _settings_of(arguments)(name)
    path = arguments.out / f"{name}.jsonl"
    done = results.read(path)
    runs = [(method, seed) for seed in seeds for method in wanted]  # seed by seed: paired from the beginning
    missing = [run for run in runs if results.key(name, *run) not in done]
    with progress.bar(len(runs), name, "run", len(runs) - len(missing), leave=True) as bar:
        for method, seed in missing:
            folder = arguments.out / "checkpoints" / f"{name}-{method}-{seed}"
            saves = name in tasks.xglue.TASKS  # the embedded ones take minutes
            # the figures are of one seed; those of all would double the time
            first = seed == seeds[0]
            record = training.Record(curves=arguments.curves and first, masks=first)
            result = training.run(task, method, seed, settings, record, checkpoints=folder if saves else None)
            results.append(path, result)
            shutil.rmtree(folder, ignore_errors=True)
            bar.update()
            progress.say(f"{name} {method} seed {seed}: {result['test_average']:.2f} ({result['seconds']:.0f} s)")


def _settings_of(arguments: argparse.Namespace):
    """Task name -> Settings, of its recipe and what flags put in place of it."""
    names = [field.name for field in fields(training.Settings)]
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name, None) is not None}
    return lambda name: replace(recipes.recipe(name, arguments.recipe), **given)


def write_report(folder: Path, report: Path, command: str) -> None:
    """The report, tables as CSV, and the figures, from every results file in ``folder``."""
    by_task = {path.stem: list(results.read(path).values()) for path in sorted(folder.glob("*.jsonl"))}
    by_task = {name: runs for name, runs in by_task.items() if runs}
    for name, runs in by_task.items():
        results.check_alike(runs, folder / f"{name}.jsonl")
    if not by_task:
        raise ValueError(f"{folder}: no results")
    machines = sorted({run["machine"] for runs in by_task.values() for run in runs})
    parts = [
        f"`python -m benchmarks.crosslingual {command}`",
        f"Trained on English; {'; '.join(machines)}. Scores are test scores in per cent. A gain is over plain "
        "fine-tuning with the same seeds, with the 95 % confidence interval of its mean over seeds and p of a "
        "two-sided paired t-test; neither is corrected for the number of methods.",
    ]

    def table(rows: tables.Rows, name: str) -> str:
        tables.write_csv(rows, folder / f"{name}.csv")
        return tables.markdown(rows)

    def figure(drawn: bool, path: Path, what: str) -> None:
        if drawn:
            parts.append(reports.link(path, report, what))

    tables.write_csv(tables.scores(run for runs in by_task.values() for run in runs), folder / "scores.csv")
    if any(name in tasks.xglue.TASKS for name in by_task):
        parts += ["## XGLUE", table(tables.understanding(by_task), "understanding"), "### Beside the paper",
                  paper.notes() + " Where our recipe differs from XGLUE's or our model from XLM-R Large, the sections "
                  "below say so.",
                  *(table(rows, name) for name, rows in tables.paper_tables(by_task).items())]  # fmt: skip
    for name, runs in by_task.items():
        parts += [
            f"## {name}",
            _described(runs),
            table(tables.by_method(runs), f"{name}-methods"),
            table(tables.by_language(runs), f"{name}-languages"),
        ]
        masks, curves, gains = (folder / f"{name}-{figure}.png" for figure in ("masks", "curves", "gains"))
        first_seed = [run for run in runs if run["seed"] == runs[0]["seed"]]
        figure(figures.masks(first_seed, masks), masks, "masks over epochs")
        figure(figures.curves(runs, curves), curves, "test score over epochs")
        figure(figures.gains(runs, gains, tables.BASELINE), gains, "gain by language")
    reports.write_below(report, RESULTS, parts, "# Zero-shot cross-lingual results")


def _described(runs: list[dict]) -> str:
    settings, examples = runs[0]["settings"], runs[0]["examples"]
    text = (
        f"{settings['model']}, {examples['train']} English training examples, {examples['test']} test examples in "
        f"{len(runs[0]['test'])} languages; {recipes.described(settings)}. Averages include English."
    )
    if runs[0]["metric"] == "accuracy":
        one, average = tables.sampling_error(runs)
        text += (
            f" The choice of test examples alone gives a score a standard error of about {one:.1f} points in one "
            f"language, and {average:.1f} in the average if languages are independent."
        )
    return text


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to end it so is to interrupt it
    sys.exit(main())
