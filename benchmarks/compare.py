"""Does a second run reproduce a first?

    python -m benchmarks.compare results/FIRST results/SECOND

A ratio is reproduced if the second run's median lies between the first run's quartiles, or the first's between the
second's. Printed are those that are not, and how many are.
"""

import argparse

from benchmarks import results


def ratios(run: results.Run) -> dict[tuple[str, str], tuple[float, float, float]]:
    """(case, contestant) -> (median, lower quartile, upper quartile) of its ratio to the case's base."""
    return {
        (case.name, name): case.ratio(name)
        for case in run.cases.values()
        if case.has(case.base)
        for name in case.names
        if name != case.base
    }


def reproduced(a: tuple[float, float, float], b: tuple[float, float, float]) -> bool:
    return a[1] <= b[0] <= a[2] or b[1] <= a[0] <= b[2]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first")
    parser.add_argument("second")
    options = parser.parse_args()
    first, second = (ratios(results.load(path)) for path in (options.first, options.second))
    both = [key for key in first if key in second]
    missed = [key for key in both if not reproduced(first[key], second[key])]
    if missed:
        print("| case | step | first | second | second / first |\n|---|---|---|---|---|")
    for case, name in missed:
        a, b = first[case, name], second[case, name]
        print(f"| {case} | {name} | {spread(a)} | {spread(b)} | {b[0] / a[0]:.2f} |")
    print(f"\n{len(both) - len(missed)} of {len(both)} ratios are reproduced within the quartiles of either run")
    for which, lacking in (("first", set(second) - set(first)), ("second", set(first) - set(second))):
        if lacking:
            print(f"{len(lacking)} ratios are not in the {which} run")


def spread(ratio: tuple[float, float, float]) -> str:
    return f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"


if __name__ == "__main__":
    main()
