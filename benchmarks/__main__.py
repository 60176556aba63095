"""Run the suite and write its report.

python -m benchmarks                # quick: results/benchmarks-quick.json, .md and plots
python -m benchmarks --size full --report docs/benchmarks.md
python -m benchmarks -k "peers"     # any option of pytest
"""

import argparse
import sys
from pathlib import Path

import pytest

from benchmarks import cases, report, results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=cases.SIZES, default="quick")
    parser.add_argument("--json", type=Path, help="default: results/benchmarks-SIZE.json")
    parser.add_argument("--report", type=Path, help="default: results/benchmarks-SIZE.md")
    options, rest = parser.parse_known_args()
    path = options.json or Path(f"results/benchmarks-{options.size}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # a run without any entry writes none
    suite = Path(__file__).parent
    arguments = [str(suite), "--size", options.size, f"--benchmark-json={path}", "--benchmark-quiet", *rest]
    status = pytest.main(arguments)
    if path.exists():
        written = options.report or Path(f"results/benchmarks-{options.size}.md")
        report.write(results.load(path), written)
        print(f"report: {written}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
