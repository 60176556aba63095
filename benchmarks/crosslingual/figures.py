"""Figures of results, as training.run returns them."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot as plt  # noqa: E402  the backend must be chosen first
from matplotlib.ticker import MaxNLocator  # noqa: E402

from .training import average  # noqa: E402

MARKERS = "osv^D<>pP*X"
COLOURS = plt.get_cmap("tab20").colors[::2] + plt.get_cmap("tab20").colors[1::2]


def languages(results: list[dict], path: Path) -> None:
    """Test score by language, a bar per method."""
    languages = [*results[0]["test"], "average"]
    figure, axes = plt.subplots(figsize=(max(8, 0.75 * len(languages)), 4.5), layout="constrained")
    width = 0.8 / len(results)
    for i, result in enumerate(results):
        scores = [*result["test"].values(), result["test_average"]]
        at = np.arange(len(languages)) + (i - (len(results) - 1) / 2) * width
        axes.bar(at, scores, width, label=result["method"], color=COLOURS[i % len(COLOURS)])
    axes.axvline(len(languages) - 1.5, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(languages)), languages)
    axes.set_ylabel(f"{results[0]['metric']}, %")
    axes.set_title(
        f"{results[0]['task']}: trained on English, tested in each language, one seed; the average includes English",
        fontsize="small",
    )
    axes.legend(ncols=min(4, len(results)), fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.08))
    save(figure, path)


def masks(results: list[dict], path: Path) -> bool:
    """The masks over epochs, after the paper's figure 1: a row per method, a panel per epoch.

    In a panel each row is a layer, the last at the top, and its cells are the first elements of one of its weights:
    dark is trained, light is dropped in the epoch's first step, grey is no element. The number is the share of all of
    the model's elements that are trained. Returns False, and draws nothing, if no run recorded its masks.
    """
    results = [result for result in results if result["masks"]]
    if not results:
        return False
    epochs = max(len(result["masks"]) for result in results)
    figure, grid = plt.subplots(
        len(results),
        epochs,
        figsize=(2.1 * epochs + 1.5, 1.5 * len(results) + 0.6),
        squeeze=False,
        layout="constrained",
    )
    colours = plt.get_cmap("Blues").with_extremes(bad="lightgrey")
    for row, result in zip(grid, results, strict=True):
        for axes, record in zip(row, result["masks"], strict=False):
            cells = mask_cells(record["layers"])
            axes.imshow(
                cells, cmap=colours, vmin=-0.15, vmax=1.2, aspect="auto", origin="lower", interpolation="nearest"
            )
            for edge in np.arange(len(cells) - 1) + 0.5:
                axes.axhline(edge, color="white", linewidth=0.6)
            share = 100 * trained_share(record["layers"])
            axes.set_title(f"epoch {record['epoch'] + 1}: {share:.0f} % trained", fontsize="x-small")
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
        for axes in row[len(result["masks"]) :]:
            axes.set_axis_off()
        row[0].set_ylabel(result["method"], fontsize="x-small")
    figure.suptitle(
        "Masks at the start of each epoch: layers from embeddings (bottom) to head (top), the first elements of each; "
        "the share is of all elements of the model",
        fontsize="small",
    )
    save(figure, path)
    return True


def mask_cells(layers: dict[str, dict]) -> np.ndarray:
    """A row per layer of 1 (trained), 0 (dropped) and nan (the layer's weight has no such element)."""
    width = max(len(layer["elements"]) for layer in layers.values())
    cells = np.full((len(layers), width), np.nan)
    for row, layer in zip(cells, layers.values(), strict=True):
        row[: len(layer["elements"])] = [int(bit) for bit in layer["elements"]]
    return cells


def trained_share(layers: dict[str, dict]) -> float:
    """The share of all elements that are trained."""
    return sum(layer["trained"] for layer in layers.values()) / sum(layer["numel"] for layer in layers.values())


def curves(results: list[dict], path: Path) -> bool:
    """Test score, averaged over languages, after each epoch, a line per method: mean over seeds.

    Returns False, and draws nothing, if no run was tested after its epochs.
    """
    results = [result for result in results if any("test" in point for point in result["curve"])]
    if not results:
        return False
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, (method, runs) in enumerate(_by_method(results).items()):
        # one that was interrupted may have been tested in some epochs only
        points = [point for run in runs for point in run["curve"] if "test" in point]
        epochs = sorted({point["epoch"] for point in points})
        means = [np.mean([average(point["test"]) for point in points if point["epoch"] == epoch]) for epoch in epochs]
        axes.plot(epochs, means, marker=MARKERS[i % len(MARKERS)], label=method, color=COLOURS[i % len(COLOURS)])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"test {results[0]['metric']}, %")
    seeds = sorted({result["seed"] for result in results})
    languages = len(results[0]["test"])
    axes.set_title(
        f"{results[0]['task']}: test score over epochs, mean of {languages} languages (English included), seed "
        f"{', '.join(map(str, seeds))} alone",
        fontsize="small",
    )
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)
    return True


def gains(results: list[dict], path: Path, baseline: str) -> bool:
    """Test score minus the baseline's of the same seed, by language: mean over seeds, bars of one standard deviation.

    Returns False, and draws nothing, without runs to compare.
    """
    base = {run["seed"]: run["test"] for run in results if run["method"] == baseline}
    methods = _by_method([run for run in results if run["method"] != baseline and run["seed"] in base])
    if not methods:
        return False
    tested = list(methods[next(iter(methods))][0]["test"])
    gain_of = {
        method: np.array([[run["test"][name] - base[run["seed"]][name] for name in tested] for run in runs])
        for method, runs in methods.items()
    }
    columns = 3
    rows = -(-len(methods) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(13, 2.4 * rows), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(methods) :]:
        axes.set_axis_off()
    for i, (axes, (method, gain)) in enumerate(zip(grid.flat, gain_of.items(), strict=False)):
        spread = gain.std(0, ddof=1) if len(gain) > 1 else None
        axes.bar(range(len(tested)), gain.mean(0), yerr=spread, color=COLOURS[(i + 1) % len(COLOURS)], capsize=1.5,
                 error_kw={"linewidth": 0.8})  # fmt: skip
        axes.axhline(0, color="black", linewidth=0.8)
        axes.axhline(gain.mean(), color="grey", linewidth=0.8, linestyle="--")
        seeds = f"{len(gain)} seed{'s' * (len(gain) > 1)}"
        axes.set_title(f"{method}: {gain.mean():+.2f} ({seeds})", fontsize="small")
        axes.set_xticks(range(len(tested)), tested, fontsize="x-small")
        axes.tick_params(axis="x", labelbottom=True)  # sharex hides them above the last row
    # one method that fails must not flatten all the others
    limit = 1.5 * np.quantile(np.abs([gain.mean(0) for gain in gain_of.values()]), 0.85) or 1.0
    axes.set_ylim(-limit, limit)
    figure.supylabel(f"gain over {baseline}, points of {results[0]['metric']}", fontsize="small")
    figure.suptitle(
        f"{results[0]['task']}: gain by language, mean over seeds; error bars: one standard deviation "
        f"between seeds, no interval of the mean; dashed and in titles: mean of {len(tested)} languages, English "
        "included; long bars leave the axes",
        fontsize="small",
    )
    save(figure, path)
    return True


def _by_method(results: list[dict]) -> dict[str, list[dict]]:
    methods: dict[str, list[dict]] = {}
    for result in results:
        methods.setdefault(result["method"], []).append(result)
    return methods


def save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
