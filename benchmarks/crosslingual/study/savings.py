"""What all savings of memory and time together do to scores, beside full fine-tuning and LoRA: docs/memory.md.

    python -m benchmarks.crosslingual.study.savings --out docs/memory --report docs/memory.md

Texts, training and scores are those of docs/study.md with true labels, but for 20 epochs, in which p = 0.9 comes by
every row twice; learning rates are searched for in the same way, on seed 1000, and seeds 0 to 4 are reported. Finished
runs are lines of OUT/savings.jsonl, and the same command goes on where it stopped.
"""

import argparse
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from .. import models, reports, tables
from . import pool
from .outcomes import Predictions
from .plan import BASELINE, TRUE, Arm, Plan
from .report import family_table, rates_table, scores_table
from .runs import study_task

ARMS = (Arm(BASELINE, "fine-tuning"), Arm("all savings, p = 0.9", "all-savings", 0.9), Arm("LoRA", "lora"))
BEGIN, END = "<!-- what savings do to scores: begin -->", "<!-- what savings do to scores: end -->"


def plan(model: str = models.EMBEDDED) -> Plan:
    return replace(
        Plan(model), first=ARMS, effects=(), best=0, seeds=tuple(range(5)), noises=(TRUE,), tuning_seeds=(1000,),
        widenings=4, epochs=20,
    )  # fmt: skip


def report(planned: Plan, done: dict[tuple, dict]) -> str:
    """Markdown. Raises ValueError without a seed that all methods have."""
    results = [result for key, result in done.items() if key[0] == "first"]
    found = Predictions(results, study_task(planned.task, planned), planned)
    if len(found.runs) < len(ARMS) or not found.seeds:
        raise ValueError("no seed has results of all methods yet")
    pairs = [(arm.name, BASELINE) for arm in ARMS[1:]] + [(ARMS[1].name, ARMS[2].name)]
    family = [found.compare(*pair) for pair in pairs]
    hours = sum(result["cpu_seconds"] for result in done.values()) / 3600
    machines = sorted({f"{result['machine']}, {result['arithmetic']}" for result in done.values()})
    state = (
        f"{len(found.seeds)} of {len(planned.seeds)} seeds, {len(done)} runs, {hours:.1f} core-hours; "
        f"{'; '.join(machines)}. Scores in per cent, differences in points "
        "with intervals over seeds and sentences."
    )
    found_tables = [scores_table(found), family_table(family, "score"), rates_table(planned, done)]
    return "\n\n".join([state, *map(tables.markdown, found_tables)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/savings"), help="folder (default: %(default)s)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="Markdown file that takes the tables")
    parser.add_argument(
        "--bfloat16", action="store_true", help="autocast: half the time where a processor multiplies it"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one a core, %(default)s")
    arguments = parser.parse_args(argv)
    planned = replace(plan(), autocast=arguments.bfloat16)
    try:
        if arguments.report:
            reports.around(arguments.report, BEGIN, END)  # hours before it is written
        done = pool.work(planned, arguments.out / "savings.jsonl", arguments.processes, ("tune", "first"))
        text = report(planned, done)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from there", file=sys.stderr)
        return 130
    print(text)
    if arguments.report:
        reports.write_between(arguments.report, BEGIN, END, text)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to end it so is to interrupt it: workers end, too
    sys.exit(main())
