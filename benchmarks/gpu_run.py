"""A GPU's first day: tests, benchmarks, launches, host time and first compiles in one command and at most 25 minutes.

    make gpu                                  # in .venv; with VENV=/usr in an environment that exists, without network
    python -m benchmarks.gpu_run --stages launches,host      # a part of it: what earlier calls found stays
    python -m benchmarks.gpu_run --rehearse --report results/rehearsal.md    # the same on the CPU, in its smallest form

Every stage is a process of its own that ends at its limit and leaves its output in --out; the report is written after
each stage, so that what was found stays when the machine goes.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import harness, ours, report, results

ROOT = Path(__file__).resolve().parent.parent
# where tests are marked gpu: others, which are not collected, may need packages that are not there
GPU_TESTS = ("tests/test_gpu.py", "tests/test_gpu_training.py", "tests/test_benchmarks.py")
GRACE = 30.0  # seconds that an interrupted stage has to write what it found
LEAST = 10.0  # seconds for which a stage is still started


@dataclass(frozen=True)
class Stage:
    """A command and the seconds that it may take. needs: a program without which the stage is left out."""

    name: str
    title: str
    command: tuple[str, ...]
    limit: float
    needs: str | None = None


@dataclass
class Outcome:
    status: str  # "passed", "failed", "stopped at its limit" or why it was left out
    seconds: float = 0.0


def stages(device: str, out: Path, rehearse: bool) -> list[Stage]:
    """All stages, the most important first."""
    python = (sys.executable, "-m")
    own = ("--device", device, *(("--elements", "30000", "--kinds", "1") if rehearse else ()))
    facts = (*python, "benchmarks.gpu_facts")
    suite = (*python, "benchmarks", "--device", device, "--sweeps", "1", "--out", str(out / "benchmarks"))
    suite += ("--report", str(out / "benchmarks.md"), "-p", "no:cacheprovider")
    suite += ("--size", "smoke", "-k", "peers") if rehearse else ("--size", "full")
    tests = (*python, "pytest", "-m", "gpu", "-q", f"--junitxml={out / 'tests.xml'}", "-p", "no:cacheprovider")
    tests += GPU_TESTS[:1] if rehearse else GPU_TESTS
    return [
        Stage("check", "Self-check", (*python, "graddrop_fused"), 60),
        Stage("tests", "Tests", tests, 420),
        Stage("launches", "Launches", (*facts, "launches", *own), 90),
        Stage("host", "Host time", (*facts, "host", *own), 60),
        Stage("compile", "First steps", (*facts, "compile", *own), 120),
        Stage("benchmarks", "Benchmarks", suite, 600),
        Stage(
            "sanitizer",
            "Sanitizer",
            ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", *python, "graddrop_fused"),
            120,
            needs="compute-sanitizer",
        ),
    ]


def perform(stage: Stage, out: Path, seconds: float) -> Outcome:
    """Runs the stage for at most ``seconds``. Its output goes to the terminal and to OUT/NAME.log; what it prints on
    stdout also to OUT/NAME.out."""
    if stage.needs and not shutil.which(stage.needs):
        return Outcome(f"left out: there is no {stage.needs}")
    if seconds < LEAST:
        return Outcome("left out: no time was left")
    (out / f"{stage.name}.xml").unlink(missing_ok=True)  # of an earlier call
    print(f"--- {stage.title}: {' '.join(stage.command)} (at most {seconds:.0f} s)", flush=True)
    start = time.perf_counter()
    with open(out / f"{stage.name}.log", "w") as log, open(out / f"{stage.name}.out", "w") as kept:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "errors": "replace"}
        with subprocess.Popen(stage.command, cwd=ROOT, text=True, start_new_session=True, **pipes) as process:
            copiers = [
                threading.Thread(target=_copy, args=(process.stdout, sys.stdout, log, kept)),
                threading.Thread(target=_copy, args=(process.stderr, sys.stdout, log)),
            ]
            for copier in copiers:
                copier.start()
            try:
                stopped = _wait(process, seconds)
            finally:  # an interrupt does not reach its session, and what a stage left behind keeps the pipes open
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                for copier in copiers:
                    copier.join()
    status = "stopped at its limit" if stopped else "failed" if process.returncode else "passed"
    outcome = Outcome(status, time.perf_counter() - start)
    print(f"--- {stage.title}: {outcome.status} in {outcome.seconds:.0f} s", flush=True)
    return outcome


def _copy(source, *targets) -> None:
    for line in source:
        for target in targets:
            target.write(line)
            target.flush()


def _wait(process: subprocess.Popen, seconds: float) -> bool:
    """Whether the process had to be stopped: by an interrupt, on which pytest writes what it has, then by force."""
    for sent, limit in ((signal.SIGINT, seconds), (signal.SIGKILL, GRACE)):
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sent)
        else:
            return sent is signal.SIGKILL
    process.wait()
    return True


# The report


def document(planned: list[Stage], out: Path, device: str, path: Path) -> str:
    outcomes = _read(out / "outcomes.json") or {}
    parts = ["# A run on a GPU", *_head(out, device)]
    lines = ["| stage | result | seconds |", "|---|---|---|"]
    for stage in planned:
        found = outcomes.get(stage.name, {"status": "not run", "seconds": 0})
        lines.append(f"| {stage.title} | {found['status']} | {found['seconds']:.0f} |")
    parts.append("\n".join(lines))
    for stage in planned:
        if stage.name in outcomes:
            parts += [f"## {stage.title}", *_section(stage.name, out, path)]
    return "\n\n".join(parts) + "\n"


def _head(out: Path, device: str) -> list[str]:
    import triton

    gpu = "no GPU: a rehearsal on the CPU, whose figures mean nothing"
    if device != "cpu":
        properties = torch.cuda.get_device_properties(0)
        gpu = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} SMs"
        gpu += f", CUDA {torch.version.cuda}" if torch.version.cuda else f", HIP {torch.version.hip}"
    python = ".".join(map(str, sys.version_info[:3]))
    return [
        f"Written by `make gpu` on {datetime.date.today()}, not by hand.",
        f"- GPU: {gpu}\n- Host: {harness.machine()}\n- Python {python}, Triton {triton.__version__}",
    ]


def _section(name: str, out: Path, path: Path) -> list[str]:
    log = (out / f"{name}.log").read_text() if (out / f"{name}.log").exists() else ""
    found = _read(out / f"{name}.out")
    if name == "tests" and (counted := _tests(out / "tests.xml")):
        return counted
    if name == "launches" and found:
        return _facts(found, "kernels + copies", "{kernels} + {copies}", LAUNCHES)
    if name == "host" and found:
        return _facts(found, "microseconds", "{median:.0f} ({low:.0f} to {high:.0f})", HOST)
    if name == "compile" and found:
        return _compiles(found)
    if name == "benchmarks" and results.files(out / "benchmarks"):
        # its headings go one level down
        parts = report.document(results.load(out / "benchmarks"), path)[1:]
        return [re.sub(r"^#", "##", part) for part in parts]
    return ["```\n" + "\n".join(log.splitlines()[-30:]) + "\n```"] if log else []


LAUNCHES = "Of one step, after one that compiled: kernels, and copies to or from the device, from torch's profiler."
HOST = "Until `step()` returns while the device is idle: median and quartiles."


def _tests(file: Path) -> list[str]:
    """A line per file, then everything that failed with its first line. Nothing if the file is missing or cut off."""
    counts: dict[str, Counter] = {}
    failed = []
    try:
        cases = xml.etree.ElementTree.parse(file).iter("testcase")
    except (OSError, xml.etree.ElementTree.ParseError):
        return []
    for case in cases:
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        counts.setdefault(case.get("classname", ""), Counter())[kinds[0] if kinds else "passed"] += 1
        for child in case:
            if child.tag in ("failure", "error"):
                said = (child.get("message") or "").splitlines() or [""]
                failed.append(f"- `{case.get('classname')}::{case.get('name')}`: {said[0][:200]}")
    lines = ["| tests | passed | failed | skipped |", "|---|---|---|---|"]
    for name, count in sorted(counts.items()):
        failures = count["failure"] + count["error"]
        lines.append(f"| {name.removeprefix('tests.')} | {count['passed']} | {failures} | {count['skipped']} |")
    return ["\n".join(lines), *(["**Failed:**\n\n" + "\n".join(failed)] if failed else [])]


def _facts(found: dict, column: str, cell: str, caption: str) -> list[str]:
    """A row per contestant, a column per population."""
    names = list(dict.fromkeys(name for of_population in found.values() for name in of_population))
    lines = [f"| {column} | {' | '.join(found)} |", "|---" * (1 + len(found)) + "|"]
    missing = {}
    for name in names:
        values = [of_population.get(name) for of_population in found.values()]
        missing.update((name, value) for value in values if isinstance(value, str))
        if any(isinstance(value, dict) for value in values):
            cells = [cell.format(**value) if isinstance(value, dict) else "" for value in values]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    said = ["Not measured:\n\n" + "\n".join(f"- {name}: {why}" for name, why in missing.items())] if missing else []
    return [caption, "\n".join(lines), *said]


def _compiles(found: list[dict]) -> list[str]:
    lines = ["| step | dtype | first, empty cache | first, filled cache | second |", "|---|---|---|---|---|"]
    for row in found:
        empty, filled = row["empty cache"], row["filled cache"]
        lines.append(
            f"| {row['step']} | {row['dtype']} | {empty['first']:.2f} s | {filled['first']:.2f} s | "
            f"{1e3 * empty['second']:.2f} ms |"
        )
    return ["The first step of a new process, with Triton's cache empty and with what that left.", "\n".join(lines)]


def _read(file: Path):
    """A JSON file's content, None if it is missing or was cut off."""
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):
        return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", help="comma-separated; default: all")
    parser.add_argument("--minutes", type=float, default=25, help="for all stages together; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="default: %(default)s")
    parser.add_argument("--report", type=Path, default=Path("docs/gpu-run.md"), help="default: %(default)s")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU; figures mean nothing")
    options = parser.parse_args(arguments)
    device = "cpu" if options.rehearse else "cuda"
    if reason := ours.unavailable(device):
        parser.exit(1, f"nothing to run: {reason}\n")
    out = options.out.resolve()
    planned = stages(device, out, options.rehearse)
    chosen = options.stages.split(",") if options.stages else [stage.name for stage in planned]
    if unknown := set(chosen) - {stage.name for stage in planned}:
        parser.error(f"--stages must be of {', '.join(s.name for s in planned)}, got {', '.join(sorted(unknown))}")
    out.mkdir(parents=True, exist_ok=True)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    outcomes, deadline = _read(out / "outcomes.json") or {}, time.perf_counter() + 60 * options.minutes
    failed = False
    for stage in planned:
        if stage.name not in chosen:
            continue
        # an interrupted stage may take GRACE seconds more
        outcome = perform(stage, out, min(stage.limit, deadline - time.perf_counter() - GRACE))
        failed |= outcome.status in ("failed", "stopped at its limit")
        outcomes[stage.name] = asdict(outcome)
        (out / "outcomes.json").write_text(json.dumps(outcomes, indent=1) + "\n")
        options.report.write_text(document(planned, out, device, options.report))
    print(f"report: {options.report}")
    return int(failed)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to end it so is to interrupt it
    signal.signal(signal.SIGINT, signal.default_int_handler)  # stages would inherit that a shell's background is deaf
    sys.exit(main())
