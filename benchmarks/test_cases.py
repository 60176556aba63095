"""The suite as pytest-benchmark sees it: an entry for every contestant of every case.

pytest-benchmark times one callable after another; here all contestants of a case take turns. So the case is run once,
and each entry then plays its own times back: pytest-benchmark's timer is a clock that stands still but for them.
"""

import dataclasses

import pytest

from benchmarks import cases

_now = 0.0


def clock() -> float:
    return _now


def play(seconds: float) -> None:
    global _now
    _now += seconds


def pytest_generate_tests(metafunc):
    options = metafunc.config.option
    pairs = [(case, c) for case in cases.chosen(cases.SIZES[options.size], options.device) for c in case.contestants]
    metafunc.parametrize("case, contestant", pairs, ids=[f"{case.name}: {c.name}" for case, c in pairs])


@pytest.mark.benchmark(timer=clock)
@pytest.mark.timeout(0)  # the first contestant of a case waits for all of them
def test_case(case, contestant, result_of, request):
    global _now
    name, result = contestant.name, result_of(case)
    if name in result.missing:
        pytest.skip(result.missing[name])
    if name in result.red:
        pytest.fail(result.red[name], pytrace=False)
    benchmark = request.getfixturevalue("benchmark")  # not before: one that is not used is warned of
    benchmark.group = case.name
    benchmark.params = {"case": case.name, "contestant": name}
    benchmark.extra_info["traffic"] = result.traffic.get(name)
    if name in result.memory:
        benchmark.extra_info["memory"] = dataclasses.asdict(result.memory[name])
    seconds = result.timing.seconds[name]
    _now, turns = 0.0, iter(seconds)
    benchmark.pedantic(play, setup=lambda: ((next(turns),), {}), rounds=len(seconds))
