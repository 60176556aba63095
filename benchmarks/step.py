"""One optimizer step on the CPU: ours against torch's, on the same tensors, in turns.

    python -m benchmarks.step                          # XLM-R Large's shapes, the first 67 M elements
    python -m benchmarks.step --population small       # 1,000 tensors of 1,000 elements
    python -m benchmarks.step --population tiny --threads 1 --turns 2001  # one of them: what a step costs in Python
    python -m benchmarks.step --elements all           # the whole model: needs 9 GB
    python -m benchmarks.step --dtype bfloat16 --state-dtype float32

Printed are medians over turns of the ratio to torch.optim.AdamW(fused=True), with quartiles. The floor only streams the
bytes of an unmasked float32 step. `python -m benchmarks` runs the whole suite.
"""

import argparse

import torch

from benchmarks import cases, harness, populations, report, run
from benchmarks.ours import DRAWN, FLOOR, FROZEN_BLOCKS, LOWER_LEVELS, NO_MASK, PACKED, ROUNDED
from benchmarks.peers import BASE, COMPOSED
from benchmarks.results import CaseResult
from graddrop_fused import cpu


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--population", choices=populations.POPULATIONS, default="xlmr-large")
    parser.add_argument("--elements", default="67000000", help="how many, or 'all'")
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--state-dtype", choices=("float32", "bfloat16"), default=None, help="default: as parameters")
    parser.add_argument("--no-composition", action="store_true", help="leave out the slow mask-then-fused composition")
    options = parser.parse_args()
    if reason := cpu.unavailable(torch.device("cpu")):
        parser.exit(1, f"nothing to time: {reason}\n")

    dtype = getattr(torch, options.dtype)
    state_dtype = getattr(torch, options.state_dtype or options.dtype)
    names = [DRAWN, PACKED, NO_MASK, FROZEN_BLOCKS, *LOWER_LEVELS]
    if dtype == torch.bfloat16:
        names.insert(1, ROUNDED)
    if state_dtype != dtype:
        names = [base := cases.MIXED[0], *names]
    else:
        names = [base := BASE, "torch foreach", *([] if options.no_composition else [COMPOSED]), *names]
    if dtype == state_dtype == torch.float32:
        names.append(FLOOR)
    elements = None if options.elements == "all" else int(float(options.elements))
    case = cases.case(
        options.population,
        cases.PEER_TIMES,
        names,
        options.population,
        quick=elements,
        base=base,
        dtype=dtype,
        state_dtype=state_dtype,
        threads=options.threads,
    )
    result = run.run(case, cases.SIZES["quick"], turns=options.turns)

    print(f"{harness.machine(result.threads)}; op at {cpu.levels()[-1]}")
    found = CaseResult.of(case, result)
    print(f"{case.name}: {report.facts(found)}, {options.turns} turns\n")
    for reason in result.red.values():
        print(f"red gate, no speed is reported: {reason}")
    if base in result.red:
        parser.exit(1)
    print(report.table(found))
    if found.has(COMPOSED, DRAWN):
        print(f"\n{COMPOSED} / {DRAWN}: {found.ratio(COMPOSED, DRAWN)[0]:.1f}")
    if found.has(ROUNDED, DRAWN):
        print("\n{} / {}: {:.2f} ({:.2f} to {:.2f})".format(ROUNDED, DRAWN, *found.ratio(ROUNDED, DRAWN)))
    parser.exit(1 if result.red else 0)


if __name__ == "__main__":
    main()
