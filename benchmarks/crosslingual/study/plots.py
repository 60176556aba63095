"""The study's figures. Intervals are 95 %, of the bootstrap over seeds and sentences, for each estimate alone."""

from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from ..figures import COLOURS, MARKERS, plt, save
from .bootstrap import Estimate
from .outcomes import GIB, Comparison, Predictions
from .plan import BASELINE

FAR = 3.0  # times most estimates' reach: what lies beyond is marked at the edge, or has a scale of its own


def _named(noise: float) -> str:
    return f"{100 * noise:.0f} % wrong labels" if noise else "true labels"


def forest(families: list[list[Comparison]], outcome: str, title: str, path: Path) -> None:
    """An outcome's estimates with intervals: a row per comparison, a panel per family."""
    every = dict.fromkeys(_compared(comparison) for family in families for comparison in family)
    rows = {name: row for row, name in enumerate(every)}
    low, high = _reach([getattr(c, outcome) for family in families for c in family])
    figure, grid = plt.subplots(
        1, len(families), figsize=(5.5 * len(families) + 1, 0.35 * len(rows) + 1.6),
        sharex=True, sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for axes, family in zip(grid[0], families, strict=True):
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set_xlim(low, high)
        axes.set_title(_named(family[0].noise), fontsize="small")
        for comparison in family:
            found, row = getattr(comparison, outcome), rows[_compared(comparison)]
            if low < found.mean < high:
                axes.plot([found.low, found.high], [row, row], color="black", linewidth=1.2)
                axes.plot(found.mean, row, "o", color="black", markersize=4)
                continue
            side = "left" if found.mean <= low else "right"
            arrow = "\N{LEFTWARDS ARROW}" if side == "left" else "\N{RIGHTWARDS ARROW}"
            text = f" {arrow} {found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f}) "
            axes.text(low if side == "left" else high, row, text, ha=side, va="center", fontsize="small")
    grid[0][0].set_yticks(range(len(rows)), list(rows), fontsize="small")
    grid[0][0].invert_yaxis()
    figure.supxlabel("points; bars: 95 % intervals, seeds and sentences drawn again", fontsize="small")
    figure.suptitle(title, fontsize="small")
    save(figure, path)


def _compared(comparison: Comparison) -> str:
    return comparison.method if comparison.base == BASELINE else f"{comparison.method} - {comparison.base}"


def _reach(estimates: list[Estimate]) -> tuple[float, float]:
    """Limits of an axis that shows the intervals, but for those that lie far beyond most."""
    ends = sorted(max(abs(e.low), abs(e.high)) for e in estimates if np.isfinite(e.low))
    if not ends:
        return -1.0, 1.0
    usual = [end for end in ends if end <= FAR * ends[len(ends) // 2]]
    return -1.1 * usual[-1] or -1.0, 1.1 * usual[-1] or 1.0


def curves(predictions: list[Predictions], path: Path) -> None:
    """Dev average over epochs: the mean over seeds, with two standard errors of it as a band for the baseline."""
    figure, grid = plt.subplots(
        1, len(predictions), figsize=(6 * len(predictions) + 2, 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    every = list(dict.fromkeys(method for found in predictions for method in found.runs))
    for axes, found in zip(grid[0], predictions, strict=True):
        for method, runs in found.runs.items():
            i = every.index(method)
            dev = np.array([run["dev"] for run in runs])
            epochs = range(1, dev.shape[1] + 1)
            axes.plot(epochs, dev.mean(0), marker=MARKERS[i % len(MARKERS)], markersize=3, label=method,
                      color=COLOURS[i % len(COLOURS)])  # fmt: skip
            if method == BASELINE and len(runs) > 1:
                error = 2 * dev.std(0, ddof=1) / len(runs) ** 0.5
                axes.fill_between(epochs, dev.mean(0) - error, dev.mean(0) + error, color="lightgrey")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(f"{_named(found.noise)}, {len(found.seeds)} seeds", fontsize="small")
        axes.set_xlabel("epoch")
    grid[0][0].set_ylabel("dev accuracy, mean over languages (English included), %")
    lines = {line.get_label(): line for axes in grid[0] for line in axes.get_lines()}
    grid[0][-1].legend(
        [lines[method] for method in every], every, fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5)
    )
    figure.suptitle(
        f"Dev score over epochs, mean over seeds; band: two standard errors of {BASELINE}", fontsize="small"
    )
    save(figure, path)


def languages(family: list[Comparison], path: Path) -> None:
    """Gain of each language over its pre-training text, a panel per method, with intervals and the fitted line."""
    family = [comparison for comparison in family if comparison.base == BASELINE]
    columns = 3
    rows = -(-len(family) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(13, 2.8 * rows), sharex=True, squeeze=False, layout="constrained"
    )
    limits = _reach([found for comparison in family for found in comparison.languages.values()])
    for axes in grid.flat[len(family) :]:
        axes.set_axis_off()
    for axes, comparison in zip(grid.flat, family, strict=False):
        for language, found in comparison.languages.items():
            axes.plot([GIB[language]] * 2, [found.low, found.high], color="lightgrey", linewidth=1)
            axes.annotate(language, (GIB[language], found.mean), fontsize="x-small", ha="center", va="center")
        others = [language for language in comparison.languages if language != "en"]
        x = np.log10([GIB[language] for language in others])
        middle = np.mean([comparison.languages[language].mean for language in others])
        axes.plot(10 ** x[np.argsort(x)], middle + comparison.slope.mean * (np.sort(x) - x.mean()), linewidth=1)
        if limits[0] < comparison.score.mean < limits[1]:
            axes.set_ylim(*limits)
            axes.axhline(0, color="black", linewidth=0.6)
        axes.set_xscale("log")
        axes.set_title(f"{comparison.method}: slope {comparison.slope.mean:+.2f}", fontsize="small")
    figure.supxlabel("GiB of pre-training text (CC-100)", fontsize="small")
    figure.supylabel(f"gain over {BASELINE}, points", fontsize="small")
    figure.suptitle(
        f"{_named(family[0].noise)}: gain by language with 95 % intervals; line: least squares without English",
        fontsize="small",
    )
    save(figure, path)
