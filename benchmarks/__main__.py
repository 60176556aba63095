"""Run the suite and write its report.

python -m benchmarks                # quick: results/benchmarks-quick.md, beside it a folder of plots and JSON
python -m benchmarks --size full --report docs/benchmarks.md
python -m benchmarks --device cuda  # on a GPU: results/benchmarks-quick-cuda.md
python -m benchmarks -k "peers"     # any option of pytest
"""

import argparse
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import cases, ours, report, results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=cases.SIZES, default="quick")
    parser.add_argument("--device", choices=ours.BACKENDS, default="cpu")
    parser.add_argument("--out", type=Path, help="folder of the JSON; default: results/benchmarks-SIZE[-cuda]")
    parser.add_argument("--sweeps", type=int, help="times to run the suite; default: by size")
    parser.add_argument("--report", type=Path, help="default: results/benchmarks-SIZE[-cuda].md")
    options, rest = parser.parse_known_args()
    if options.sweeps is not None and options.sweeps < 1:
        parser.error(f"--sweeps must be at least 1, got {options.sweeps}")
    if reason := ours.unavailable(options.device):
        parser.exit(1, f"nothing to time: {reason}\n")
    name = f"benchmarks-{options.size}" + ("" if options.device == "cpu" else f"-{options.device}")
    out = options.out or Path(f"results/{name}")
    out.mkdir(parents=True, exist_ok=True)
    for old in results.files(out):
        old.unlink()
    # Sweeps in processes of their own: where tensors lie in memory, and what else the machine does meanwhile, then
    # belongs to the spread that the report states.
    sweeps, status = options.sweeps or cases.SIZES[options.size].sweeps, 0
    # a suite that a test of pytest-xdist starts is none of its workers, which write no JSON
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    for sweep in range(1, sweeps + 1):
        if sweeps > 1:
            print(f"sweep {sweep} of {sweeps}", flush=True)
        command = [sys.executable, "-m", "pytest", Path(__file__).parent, "--size", options.size]
        command += ["--device", options.device, f"--benchmark-json={out / f'{sweep}.json'}", "--benchmark-quiet"]
        status = max(status, _run([*command, *rest], environment))
        if status == pytest.ExitCode.INTERRUPTED:
            break
    if results.files(out):  # a run without any entry writes none
        written = options.report or Path(f"results/{name}.md")
        report.write(results.load(out), written)
        print(f"report: {written}")
    return status


def _run(command: list, environment: dict[str, str]) -> int:
    """The command's exit status, or the number of the signal that ended it. An interrupt reaches pytest as well, which
    then writes what it has."""
    with subprocess.Popen(command, env=environment) as process:
        with contextlib.suppress(KeyboardInterrupt):
            process.wait()
        return abs(process.wait())


if __name__ == "__main__":
    sys.exit(main())
