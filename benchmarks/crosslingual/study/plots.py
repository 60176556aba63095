"""The study's figures. Intervals are 95 %, of the bootstrap over seeds and sentences, for each estimate alone."""

from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from ..figures import COLOURS, MARKERS, plt, save
from .outcomes import GIB, Comparison, Predictions
from .plan import BASELINE


def _named(noise: float) -> str:
    return f"{100 * noise:.0f} % wrong labels" if noise else "true labels"


def forest(families: list[list[Comparison]], outcome: str, title: str, path: Path) -> None:
    """An outcome's estimates with intervals: a row per comparison, a panel per family."""
    figure, grid = plt.subplots(
        1, len(families), figsize=(5.5 * len(families) + 1, 0.35 * max(map(len, families)) + 1.6),
        sharex=True, sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for axes, family in zip(grid[0], families, strict=True):
        for row, comparison in enumerate(family):
            found = getattr(comparison, outcome)
            axes.plot([found.low, found.high], [row, row], color="black", linewidth=1.2)
            axes.plot(found.mean, row, "o", color="black", markersize=4)
        axes.axvline(0, color="grey", linewidth=0.8)
        names = [c.method if c.base == BASELINE else f"{c.method} - {c.base}" for c in family]
        axes.set_yticks(range(len(family)), names, fontsize="small")
        axes.set_title(_named(family[0].noise), fontsize="small")
    grid[0][0].invert_yaxis()
    figure.supxlabel("points; bars: 95 % intervals, seeds and sentences drawn again", fontsize="small")
    figure.suptitle(title, fontsize="small")
    save(figure, path)


def curves(predictions: list[Predictions], path: Path) -> None:
    """Dev average over epochs: the mean over seeds, with two standard errors of it as a band for the baseline."""
    figure, grid = plt.subplots(
        1, len(predictions), figsize=(6 * len(predictions) + 2, 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, found in zip(grid[0], predictions, strict=True):
        for i, (method, runs) in enumerate(found.runs.items()):
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
    grid[0][-1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
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
        rows, columns, figsize=(13, 2.8 * rows), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
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
