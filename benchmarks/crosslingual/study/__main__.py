"""Run the study of docs/study.md, then write its tables and figures.

    python -m benchmarks.crosslingual.study --quick
    python -m benchmarks.crosslingual.study
    python -m benchmarks.crosslingual.study --out docs/study --report docs/study.md --choosing docs/choosing.md

Each finished run is a line of OUT/study.jsonl at once. The same command goes on where it stopped. To spread it over
machines: --parts tune on one; copy its file to all; --parts first,effects --seeds 0-3 on one, --seeds 4-9 on another;
join the files (cat, a line that is there twice does no harm); then the whole command once more, for multiemo.
"""

import argparse
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from .. import models, reports
from . import pool, report
from .plan import PARTS, Plan, quick


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.crosslingual.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--quick", action="store_true", help="the machinery in minutes; its results mean nothing")
    p.add_argument("--out", type=Path, help="folder (default: results/study, or results/study-quick)")
    p.add_argument("--report", type=Path, metavar="FILE", help="Markdown file (default: OUT/report.md)")
    p.add_argument("--choosing", type=Path, metavar="FILE", help="Markdown file that takes the table of gains, too")
    p.add_argument("--report-only", action="store_true", help="only write tables and figures of what is there")
    p.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: %(default)s)")
    p.add_argument("--seeds", help="reported seeds, as in 0-4 or 0,3 (default: all of the design's)")
    p.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one a core, %(default)s")
    p.add_argument("--bfloat16", action="store_true", help="autocast: half the time where a processor multiplies it")
    p.add_argument("--model", default=models.EMBEDDED, help="default: the embedded %(default)s")
    p.add_argument("--dry-run", action="store_true", help="only say what is there and what is missing")
    return p


def plan_of(arguments: argparse.Namespace) -> Plan:
    plan = Plan(arguments.model, autocast=arguments.bfloat16)
    return quick(plan) if arguments.quick else plan


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    out = arguments.out or Path("results/study-quick" if arguments.quick else "results/study")
    path = out / "study.jsonl"
    try:
        plan = plan_of(arguments)
        parts = _parts(arguments.parts)
        mine = plan
        if arguments.seeds is not None:  # what goes on to multiemo depends on all seeds
            mine = replace(plan, seeds=_seeds(arguments.seeds, plan.seeds), best=0)
        if arguments.choosing:
            reports.around(arguments.choosing, report.BEGIN, report.END)  # hours before it is written
        done = pool.read(path, plan)
        if arguments.dry_run:
            print(_missing(mine, done, parts))
            return 0
        if not arguments.report_only:
            done = _work(mine, path, arguments.processes, parts)
        if parts == ["tune"] and not arguments.report_only:
            return 0
        to = arguments.report or out / "report.md"
        command = "python -m benchmarks.crosslingual.study " + " ".join(sys.argv[1:] if argv is None else argv)
        report.write(plan, done, out, to, arguments.choosing, command.strip())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: finished runs are in {path}, and the same command goes on from there", file=sys.stderr)
        return 130
    print(f"tables and figures: {to}")
    return 0


def _work(plan: Plan, path: Path, processes: int, parts: list[str]) -> dict[tuple, dict]:
    done = pool.work(plan, path, processes, parts)
    unknown = [arm.name for arm in plan.first if plan.lr(arm, done) is None]
    if unknown and parts != ["tune"]:
        raise ValueError(f"no learning rate is known for {', '.join(unknown)}: --parts tune comes first")
    return done


def _missing(plan: Plan, done: dict[tuple, dict], parts: list[str]) -> str:
    lines = []
    for part in parts:
        there = [result for key, result in done.items() if key[0] == part]
        hours = sum(result["cpu_seconds"] for result in there) / 3600
        lines.append(f"{part}: {len(there)} of {plan.count(done, [part])} runs there, {hours:.2f} core-hours")
    known = [result["cpu_seconds"] for result in done.values()]
    if known:
        rest = max(0, plan.count(done, parts) - sum(key[0] in parts for key in done))
        mean = sum(known) / len(known)
        lines.append(f"about {rest * mean / 3600:.1f} core-hours to go, at {mean:.0f} s a run")
    return "\n".join(lines)


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"parts must be of {', '.join(PARTS)}, got {', '.join(unknown)}")
    return parts


def _seeds(text: str, designed: tuple[int, ...]) -> tuple[int, ...]:
    seeds = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            seeds += range(int(first), int(last or first) + 1)
    except ValueError:
        seeds = []
    if not seeds or not set(seeds) <= set(designed):
        raise ValueError(f"seeds must be of the design's {designed[0]}-{designed[-1]}, as in 0-4 or 0,3, got {text!r}")
    return tuple(seeds)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to end it so is to interrupt it: workers end, too
    sys.exit(main())
