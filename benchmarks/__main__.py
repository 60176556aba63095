"""Run the suite and write its report.

python -m benchmarks                # quick: results/benchmarks-quick.json, .md and plots
python -m benchmarks --size full --report docs/benchmarks.md
python -m benchmarks --device cuda  # on a GPU: results/benchmarks-quick-cuda.json, .md and plots
python -m benchmarks -k "peers"     # any option of pytest
"""

import argparse
import sys
from pathlib import Path

import pytest

from benchmarks import cases, ours, report, results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=cases.SIZES, default="quick")
    parser.add_argument("--device", choices=ours.BACKENDS, default="cpu")
    parser.add_argument("--json", type=Path, help="default: results/benchmarks-SIZE[-cuda].json")
    parser.add_argument("--report", type=Path, help="default: results/benchmarks-SIZE[-cuda].md")
    options, rest = parser.parse_known_args()
    if reason := ours.unavailable(options.device):
        parser.exit(1, f"nothing to time: {reason}\n")
    name = f"benchmarks-{options.size}" + ("" if options.device == "cpu" else f"-{options.device}")
    path = options.json or Path(f"results/{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # a run without any entry writes none
    suite = Path(__file__).parent
    arguments = [str(suite), "--size", options.size, "--device", options.device, f"--benchmark-json={path}"]
    status = pytest.main([*arguments, "--benchmark-quiet", *rest])
    if path.exists():
        written = options.report or Path(f"results/{name}.md")
        report.write(results.load(path), written)
        print(f"report: {written}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
