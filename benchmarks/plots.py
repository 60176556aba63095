"""Plots of a run. Each returns False, and writes nothing, if the run lacks what it shows."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot as plt  # noqa: E402  the backend must be chosen first

from benchmarks import cases  # noqa: E402
from benchmarks.ours import BLOCK, DRAWN, FLOOR, FROZEN_BLOCKS, NO_MASK, PACKED, SHARES  # noqa: E402
from benchmarks.peers import BASE, COMPOSED  # noqa: E402
from benchmarks.results import CaseResult, Run  # noqa: E402

COLOURS = {
    DRAWN: "tab:blue",
    PACKED: "tab:green",
    NO_MASK: "tab:orange",
    FROZEN_BLOCKS: "tab:purple",
    FLOOR: "black",
    BASE: "tab:red",
    "torch foreach": "tab:brown",
    COMPOSED: "tab:grey",
}


def _band(ratio: tuple[float, float, float]) -> list[list[float]]:
    """Error bars from the median to the quartiles."""
    middle, low, high = ratio
    return [[middle - low], [high - middle]]


def side_by_side(run: Run, path: Path) -> bool:
    """Ratios to torch fused of everybody on the same tensors, quartiles as bars, the floor as a line."""
    case = run.cases.get("peers")
    if case is None or not case.has(BASE):
        return False
    names = sorted((name for name in case.names if name != FLOOR), key=lambda name: case.ratio(name)[0])
    ours = {c.name for c in cases.OURS}
    figure, axes = plt.subplots(figsize=(9, 0.36 * len(names) + 1.3), layout="constrained")
    for y, name in enumerate(names):
        ratio = case.ratio(name)
        axes.barh(y, ratio[0], color="tab:blue" if name in ours else "silver", height=0.7)
        axes.errorbar(ratio[0], y, xerr=_band(ratio), color="black", capsize=2.5, linewidth=1)
        axes.text(ratio[2] * 1.05, y, f"{ratio[0]:.2f}", va="center", fontsize="small")
    axes.axvline(1, color="tab:red", linewidth=1, label=BASE)
    if case.has(FLOOR):
        axes.axvline(case.ratio(FLOOR)[0], color="black", linestyle="--", linewidth=1, label="streaming floor")
    axes.set_xscale("log")
    axes.set_xlim(right=axes.get_xlim()[1] * 1.5)
    _plain(axes.xaxis)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(f"time / {BASE}, median and quartiles (ours blue)")
    axes.set_title(f"One step: {_size(case)}, {case.dtype}, threads: {case.threads}")
    axes.legend(loc="lower right", fontsize="small")
    return _save(figure, path)


def by_case(run: Run, path: Path) -> bool:
    """Ours by population, dtype and threads: a row per case."""
    questions = (cases.PEER_TIMES, cases.POPULATION_TIMES, cases.DTYPE_TIMES, cases.THREAD_TIMES)
    rows = [case for question in questions for case in run.of(question) if case.has(case.base, DRAWN, PACKED)]
    if not rows:
        return False
    shown = [DRAWN, PACKED, NO_MASK, FROZEN_BLOCKS, FLOOR]
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(rows) + 1.5), layout="constrained")
    for i, name in enumerate(shown):
        at = [(y + 0.12 * (2 - i), case.ratio(name)) for y, case in enumerate(rows) if case.has(name)]
        for y, ratio in at:
            axes.errorbar(ratio[0], y, xerr=_band(ratio), fmt="o", markersize=4.5, capsize=2, color=COLOURS[name])
        axes.plot([], [], "o", color=COLOURS[name], label="streaming floor" if name == FLOOR else name)
    axes.axvline(1, color="tab:red", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{case.name}\n{_size(case)}" for case in rows], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("time / torch fused on the same tensors, median and quartiles")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(fontsize="small", loc="outside lower center", ncols=3)
    return _save(figure, path)


def growth(run: Run, path: Path) -> bool:
    """Cost as p, the number of elements and the number of tensors grow."""
    by_p, by_size, by_count = run.cases.get("p"), run.of(cases.BY_SIZE), run.of(cases.BY_COUNT)
    if by_p is None or not by_size or not by_count or not by_p.has(BASE):
        return False
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for label, colour, pattern in (
        ("GradDrop(p)", "tab:blue", "GradDrop(p={})"),
        (f"GradDrop(p, block={BLOCK}), freeze", "tab:purple", f"GradDrop(p={{}}, block={BLOCK}), freeze"),
    ):
        points = [(p, by_p.ratio(pattern.format(p))) for p in SHARES if by_p.has(pattern.format(p))]
        _line(left, points, label, colour)
    left.set_xlabel("p")
    left.set_ylim(bottom=0)
    for axes, found, label in ((middle, by_size, "elements, one tensor"), (right, by_count, "tensors, 4 M elements")):
        for name in (COMPOSED, "torch foreach", DRAWN, PACKED, NO_MASK, FLOOR):
            points = [(case.x, case.ratio(name)) for case in found if case.has(name, BASE)]
            _line(axes, points, name, COLOURS[name])
        axes.set_xlabel(label)
        axes.set_xscale("log", base=2 if axes is middle else 10)
        axes.set_yscale("log")
        _plain(axes.yaxis)
    for axes in (left, middle, right):
        axes.axhline(1, color="tab:red", linewidth=1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    left.set_ylabel("time / torch fused, median and quartiles")
    return _save(figure, path)


def roofline(run: Run, path: Path) -> bool:
    """Time per element over bytes per element, under the memory's line and our fastest arithmetic in cache."""
    case = run.cases.get("peers")
    if case is None or not case.has(FLOOR):
        return False
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    rate = case.traffic[FLOOR] / case.nanoseconds(FLOOR)  # bytes per nanosecond
    widest = 32
    axes.plot([0, widest], [0, widest / rate], color="black", label=f"memory: the floor's {rate:.1f} GB/s")
    for name, style in ((DRAWN, ":"), (NO_MASK, "--")):
        times = [c.nanoseconds(name) for c in run.of(cases.BY_SIZE) if c.has(name)]
        if times:
            label = f"{name}: fastest at any size, {min(times):.2f} ns"
            axes.axhline(min(times), color=COLOURS[name], linestyle=style, label=label)
    markers = {"peers": "o", "p": "o", "bfloat16": "s", "bfloat16, float32 state": "^"}
    for case_name, marker in markers.items():
        found = run.cases.get(case_name)
        for name in found.traffic if found else ():
            if name in COLOURS and (case_name != "p" or name != BASE):
                y = found.nanoseconds(name)
                axes.plot(found.traffic[name], y, marker, color=COLOURS[name], markersize=6, linestyle="none")
    for name in (BASE, DRAWN, PACKED, NO_MASK, FROZEN_BLOCKS):
        axes.plot([], [], "o", color=COLOURS[name], label=name)
    for case_name, marker in list(markers.items())[2:]:
        axes.plot([], [], marker, color="white", markeredgecolor="black", label=case_name)
    axes.set_xlim(0, widest)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bytes that a step must move, per element")
    axes.set_ylabel("ns per element, median")
    axes.set_title("No step can be below the memory's line; a busy one is not below its arithmetic")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="upper left")
    return _save(figure, path)


def _line(axes, points: list[tuple[float, tuple[float, float, float]]], label: str, colour: str) -> None:
    if points:
        x, ratio = zip(*points, strict=True)
        middle, low, high = zip(*ratio, strict=True)
        axes.plot(x, middle, "o-", markersize=4, color=colour, label=label)
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def _size(case: CaseResult) -> str:
    tensors = "one tensor" if case.tensors == 1 else f"{case.tensors:,} tensors"
    return f"{case.elements / 1e6:.3g} M elements, {tensors}"


def _plain(axis) -> None:
    """2 rather than 2 x 10^0."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: "")


def _save(figure, path: Path) -> bool:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


PLOTS = {"side-by-side": side_by_side, "by-case": by_case, "growth": growth, "roofline": roofline}
