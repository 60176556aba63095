"""The suite's report in Markdown, with plots, from pytest-benchmark's JSON.

    python -m benchmarks.report results/benchmarks-full docs/benchmarks.md

Plots go into a folder of the report's name. A contestant with a red gate has no figures.
"""

import argparse
import os
from pathlib import Path

from benchmarks import cases, plots, results
from benchmarks.ours import DRAWN, FLOOR, FROZEN_BLOCKS, NO_MASK, PACKED
from benchmarks.peers import BASE
from benchmarks.results import CaseResult, Run

GROWING = (cases.BY_SIZE, cases.BY_COUNT)
HEADLINES = [
    *((name, DRAWN) for name in cases.COMPOSITIONS),
    (DRAWN, BASE),
    (PACKED, BASE),
    (NO_MASK, BASE),
    (FROZEN_BLOCKS, BASE),
    ("DeepSpeedCPUAdam", BASE),
    (FLOOR, BASE),
    (DRAWN, PACKED),
    (DRAWN, NO_MASK),
]
CAPTIONS = {
    "side-by-side": "Everybody on the same tensors.",
    "by-case": "By population, dtype and threads. bfloat16 with float32 state is"
    " compared with torch's own bfloat16 state.",
    "growth": "As p, elements and tensors grow; bands are quartiles.",
    "roofline": "Time over traffic. The memory's line is what the streaming floor reaches; the others are what our"
    " steps need where everything is in cache.",
}


def write(run: Run, path: Path) -> None:
    """The report of ``run`` at ``path``, plots beside it."""
    path.write_text("\n\n".join(document(run, path)) + "\n")


def document(run: Run, path: Path) -> list[str]:
    """The paragraphs of the report that is to stand at ``path``, whose plots it draws."""
    folder = path.parent / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {name: plot(run, folder / f"{name}.png") for name, plot in plots.PLOTS.items()}
    figures = {
        name: f"![{CAPTIONS[name]}]({path.stem}/{name}.png)\n\n{CAPTIONS[name]}" for name in drawn if drawn[name]
    }
    parts = [*_head(run, path), *_headlines(run)]
    parts += [figures[name] for name in ("side-by-side", "by-case") if name in figures]
    for question in dict.fromkeys(case.question for case in run.cases.values()):
        parts += [f"## {question}", *section(run, question)]
    parts += ["## Growth and roofline" if "growth" in figures or "roofline" in figures else ""]
    parts += [figures[name] for name in ("growth", "roofline") if name in figures]
    gpu = os.path.relpath("docs/gpu.md", path.parent)
    parts += [
        "## GPU",
        f"[gpu.md]({gpu}) has what the compilers say of the Triton kernels: registers, spills, access widths and"
        " instructions per element (`python -m benchmarks.gpu_report`)."
        + (" No GPU was timed here." if run.device == "cpu" else ""),
    ]
    return [part for part in parts if part]


def table(case: CaseResult) -> str:
    """Ratios of every contestant to the case's base, with quartiles."""
    per_element = case.question not in (cases.DRAWING, cases.SHARE)
    last = {cases.DRAWING: "Gbit/s", cases.SHARE: "share of a step with it"}.get(case.question, "ns per element")
    columns = ["step", f"time / {case.base}", "quartiles", last]
    if case.has(FLOOR):
        columns.append("share of the floor's rate")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in case.names:
        middle, low, high = case.ratio(name)
        if per_element:
            figure = f"{case.nanoseconds(name):.2f}"
        elif case.question == cases.DRAWING:
            figure = f"{1 / case.nanoseconds(name):.2f}"
        else:
            figure = "" if name == case.base else f"{100 * middle / (1 + middle):.1f} %"
        cells = [name, f"{middle:.2f}", f"{low:.2f} to {high:.2f}", figure]
        if case.has(FLOOR):
            cells.append(_share(case, name))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(case: CaseResult, name: str) -> str:
    """Bytes that a step must move over its time, as a share of the floor's rate, where they are known."""
    if name not in case.traffic:
        return ""
    return f"{case.traffic[name] / case.traffic[FLOOR] / case.ratio(name, FLOOR)[0]:.2f}"


def _head(run: Run, path: Path) -> list[str]:
    machine = run.machine
    turns = [len(seconds) for case in run.cases.values() for seconds in case.timing.seconds.values()]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    size = "" if run.size == "quick" else f" --size {run.size}"
    device = "" if run.device == "cpu" else f" --device {run.device}"
    gpu = f", {machine['gpu']}" if "gpu" in machine else ""
    target = "" if path.parent.name == "results" else f" --report {path}"
    parts = [
        "# Benchmarks",
        f"Written by `python -m benchmarks{size}{device}{target}` on {run.date[:10]}, not by hand."
        " `make bench` runs the quick form.",
        "All contestants of a case share parameters, gradients and moments in one process and take turns in random"
        " order. Figures are medians over turns of ratios to the case's base, with quartiles; the full size sweeps over"
        " all cases three times, in processes of their own. Before a contestant is timed, one step of it on these"
        " tensors must compute what it claims (`benchmarks/gate.py`). `python -m benchmarks.compare FIRST SECOND` says"
        " whether a second run reproduces the ratios.",
        f"- Machine: {machine['summary']}{gpu}; op at {machine['op']}; {machine['memory'] / 2**30:.0f} GiB memory\n"
        f"- Packages: {packages}\n"
        f"- Turns per case: {min(turns, default=0)} to {max(turns, default=0)}; sweeps: {run.sweeps}",
    ]
    missing = {name: reason for case in run.cases.values() for name, reason in case.missing.items()}
    if run.device == "cpu":
        missing |= {c.name: f"needs a GPU: {c.install}" for c in cases.CONTESTANTS.values() if "cpu" not in c.devices}
    if missing:
        parts.append("Not timed:\n\n" + "\n".join(f"- {name}: {reason}" for name, reason in missing.items()))
    red = {f"{name} in {case.name}": why for case in run.cases.values() for name, why in case.red.items()}
    if red:
        parts.append("**Red gates: no speed is reported.**\n\n" + "\n".join(f"- {n}: {why}" for n, why in red.items()))
    return parts


def _headlines(run: Run) -> list[str]:
    case = run.cases.get("peers")
    pairs = [(a, b) for a, b in HEADLINES if case and case.has(a, b)]
    if not pairs:
        return []
    lines = ["| step | beside | time | quartiles |", "|---|---|---|---|"]
    for a, b in pairs:
        middle, low, high = case.ratio(a, b)
        lines.append(f"| {a} | {b} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    return ["## In short", facts(case), "\n".join(lines)]


def section(run: Run, question: str) -> list[str]:
    """A question's paragraphs and tables."""
    if question in GROWING:
        return [_growth_table(run.of(question))]
    parts = []
    for case in run.of(question):
        parts += [f"**{case.name}**: {facts(case)}", _measured(case)]
        if case.memory:
            parts += [
                "Memory of one step beyond what it holds already (packed masks: 1/8 byte per element; magma-optimizer:"
                " a momentum of its own), from torch's allocator:",
                _memory_table(case),
            ]
    return parts


def _measured(case: CaseResult) -> str:
    if not case.has(case.base):
        return f"No ratios: {case.base} was not timed."
    return table(case)


def facts(case: CaseResult) -> str:
    """Tensors, elements, dtypes and threads, in words."""
    threads = "one thread" if case.threads == 1 else f"{case.threads} threads"
    tensors = "one tensor" if case.tensors == 1 else f"{case.tensors:,} tensors"
    state = "" if case.state_dtype == case.dtype else f", {case.state_dtype} state"
    return f"{tensors}, {case.elements:,} elements, {case.dtype}{state}, {threads}"


def _memory_table(case: CaseResult) -> str:
    lines = ["| step | peak, bytes per element | allocated, bytes per element | allocations |", "|---|---|---|---|"]
    for name, memory in case.memory.items():
        peak, allocated = memory["peak"] / case.elements, memory["allocated"] / case.elements
        lines.append(f"| {name} | {peak:.3g} | {allocated:.3g} | {memory['allocations']:,} |")
    return "\n".join(lines)


def _growth_table(found: list[CaseResult]) -> str:
    """A row per case, a column per contestant."""
    found = [case for case in found if case.has(case.base)]
    if not found:
        return "No ratios: the base was not timed."
    names = [name for name in found[0].names if name != found[0].base]
    lines = [f"| time / {found[0].base} | ns per element | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for case in found:
        cells = []
        for name in names:
            cells.append("{:.2f} ({:.2f} to {:.2f})".format(*case.ratio(name)) if case.has(name) else "")
        lines.append(f"| {case.name} | {case.nanoseconds(case.base):.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("report", type=Path)
    options = parser.parse_args()
    write(results.load(options.folder), options.report)


if __name__ == "__main__":
    main()
