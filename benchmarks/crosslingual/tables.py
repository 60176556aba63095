"""Tables of results, as training.run returns them: rows of cells, for readers (Markdown) and programs (CSV)."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import ttest_rel

from . import paper, xglue
from .methods import METHODS

Rows = list[list[str]]  # the first is the header
BASELINE = "fine-tuning"


def by_language(results: list[dict]) -> Rows:
    """A row per method, a column per language, the average last: test scores in per cent, means over seeds."""
    languages = list(results[0]["test"])
    rows = [[f"{results[0]['task']}, {results[0]['metric']}", *languages, "average"]]
    for method, runs in _methods(results):
        means = [np.mean([run["test"][language] for run in runs]) for language in languages]
        rows.append([method, *(f"{mean:.1f}" for mean in means), f"{np.mean([_average(r) for r in runs]):.1f}"])
    return rows


def by_method(results: list[dict]) -> Rows:
    """A row per method: mean and standard deviation over seeds of the average, and the gain over plain fine-tuning."""
    base = {run["seed"]: _average(run) for run in results if run["method"] == BASELINE}
    rows = [["method", "seeds", "average", "std", "en", "others", *_GAIN, "train s"]]
    for method, runs in _methods(results):
        values = [_average(run) for run in runs]
        english = np.mean([run["test"].get("en", np.nan) for run in runs])
        others = np.mean([score for run in runs for language, score in run["test"].items() if language != "en"])
        seconds = np.median([run["train_seconds"] for run in runs])
        rows.append([
            method, str(len(runs)), f"{np.mean(values):.2f}", _number(_std(values)), f"{english:.2f}", f"{others:.2f}",
            *_gain_cells(method, {run["seed"]: _average(run) for run in runs}, base), f"{seconds:.0f}",
        ])  # fmt: skip
    return rows


def understanding(results: dict[str, list[dict]]) -> Rows:
    """The paper's table 2: a row per method, a column per XGLUE task, and their mean.

    A seed counts for the mean only if it ran on all of the tasks.
    """
    tasks = [name for name in xglue.TASKS if name in results]
    complete = len(tasks) == len(xglue.TASKS)
    score = "understanding score" if complete else f"mean of {len(tasks)}"
    rows = [["method", *tasks, score, "std", *_GAIN]]
    base = _means_over_tasks([results[task] for task in tasks], BASELINE)
    present = {run["method"] for runs in results.values() for run in runs}
    for method in (name for name in METHODS if name in present):
        cells = []
        for task in tasks:
            values = [_average(run) for run in results[task] if run["method"] == method]
            cells.append(_number(np.mean(values) if values else None))
        means = _means_over_tasks([results[task] for task in tasks], method)
        mean = np.mean(list(means.values())) if means else None
        rows.append([
            method, *cells, _number(mean), _number(_std(means.values())), *_gain_cells(method, means, base),
        ])  # fmt: skip
    return rows


def beside_paper(names: list[str], theirs: dict[str, list[float]], ours: dict[str, dict[str, float]]) -> Rows:
    """Two rows per method of the paper, its own figures and ours.

    ``names``: columns of ``theirs``, whose last number is the printed average. ``ours``: method -> column -> score.
    The mean of a row is computed; ours is left out where a column is missing.
    """
    rows = [["method", "whose", *names, "mean", "printed"]]
    for method, (*scores, printed) in theirs.items():
        rows.append([method, "paper", *(f"{s:.2f}" for s in scores), f"{np.mean(scores):.2f}", f"{printed:.2f}"])
        found = ours.get(method, {})
        if found:
            complete = all(name in found for name in names)
            mean = _number(np.mean([found[name] for name in names])) if complete else ""
            rows.append(["", "ours", *(_number(found.get(name)) for name in names), mean, ""])
    return rows


def paper_tables(results: dict[str, list[dict]]) -> dict[str, Rows]:
    """The paper's table 1 (XNLI by language) and table 2 (XGLUE by task) with ours, which are means over seeds."""
    xnli = {
        method: {language: float(np.mean([run["test"][language] for run in runs])) for language in runs[0]["test"]}
        for method, runs in _methods(results.get("xnli", []))
    }
    by_task: dict[str, dict[str, float]] = {}
    for task in paper.XGLUE_TASKS:
        for method, runs in _methods(results.get(task, [])):
            by_task.setdefault(method, {})[task] = float(np.mean([_average(run) for run in runs]))
    return {
        "paper-xnli": beside_paper(paper.XNLI_LANGUAGES, paper.XNLI, xnli),
        "paper-xglue": beside_paper(paper.XGLUE_TASKS, paper.XGLUE, by_task),
    }


def scores(results: Iterable[dict]) -> Rows:
    """A row per task, method, seed, split and language."""
    rows = [["task", "method", "seed", "split", "language", "metric", "score"]]
    for result in results:
        for split in ("dev", "test"):
            rows += [
                [result["task"], result["method"], str(result["seed"]), split, language, result["metric"], str(score)]
                for language, score in result[split].items()
            ]
    return rows


def markdown(rows: Rows) -> str:
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]

    def line(cells: list[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


def write_csv(rows: Rows, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


class Gain(NamedTuple):
    """A method's mean gain over plain fine-tuning with the same seeds, its 95 % confidence interval, and p of the
    two-sided paired t-test over seeds. The last three are None for fewer than two seeds, or if all gains are equal."""

    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


def paired(values: dict[int, float], base: dict[int, float]) -> Gain | None:
    """``values`` and ``base`` are scores by seed. None if they have no seed in common."""
    seeds = sorted(values.keys() & base.keys())
    if not seeds:
        return None
    ours, theirs = [values[seed] for seed in seeds], [base[seed] for seed in seeds]
    mean = float(np.mean(np.subtract(ours, theirs)))
    if len(seeds) < 2 or np.ptp(np.subtract(ours, theirs)) == 0:
        return Gain(mean)
    test = ttest_rel(ours, theirs)
    return Gain(mean, *map(float, test.confidence_interval(0.95)), float(test.pvalue))


_GAIN = ["gain", "95 % interval", "p"]


def _gain_cells(method: str, values: dict[int, float], base: dict[int, float]) -> list[str]:
    gain = paired(values, base) if method != BASELINE else None
    if gain is None:
        return ["", "", ""]
    interval = "" if gain.low is None else f"{gain.low:+.2f} to {gain.high:+.2f}"
    return [_number(gain.mean, "+"), interval, _number(gain.p, digits=3)]


def sampling_error(results: list[dict]) -> tuple[float, float]:
    """Standard error of an accuracy, in points, that comes from the choice of test sentences: (one language's, the
    average's). The second takes languages for independent; translations of the same sentences are not.
    """
    score = np.mean([_average(run) for run in results]) / 100
    languages = len(results[0]["test"])
    sentences = results[0]["examples"]["test"] / languages
    one = 100 * (score * (1 - score) / sentences) ** 0.5
    return float(one), float(one / languages**0.5)


def _means_over_tasks(by_task: list[list[dict]], method: str) -> dict[int, float]:
    scores = [{run["seed"]: _average(run) for run in runs if run["method"] == method} for runs in by_task]
    seeds = set.intersection(*map(set, scores)) if scores else set()
    return {seed: float(np.mean([task[seed] for task in scores])) for seed in sorted(seeds)}


def _average(result: dict) -> float:
    return result["test_average"]


def _methods(results: list[dict]) -> list[tuple[str, list[dict]]]:
    """In the order of METHODS."""
    found = [(name, [run for run in results if run["method"] == name]) for name in METHODS]
    return [(name, runs) for name, runs in found if runs]


def _std(values: Iterable[float]) -> float | None:
    values = list(values)
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _number(value: float | None, sign: str = "", digits: int = 2) -> str:
    return "" if value is None else f"{value:{sign}.{digits}f}"
