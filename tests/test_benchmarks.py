"""The benchmark suite: all of it runs, and what computes something else gets no figure. Times are never asserted."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as suite
from benchmarks import cases, compare, harness, memory, ours, populations, report, results, run
from benchmarks.contestant import LR, Contestant
from benchmarks.gate import Claim, MaskClaim, Red, Sample
from benchmarks.harness import Timing
from benchmarks.ours import FLOOR
from benchmarks.peers import BASE, adamw, fused, masked_by
from benchmarks.tensors import Tensors
from graddrop_fused import cpu

ROOT = Path(__file__).resolve().parent.parent
needs_op = pytest.mark.skipif(
    cpu.unavailable(torch.device("cpu")) is not None, reason="the native CPU op is not built here"
)


@pytest.fixture(
    scope="module", params=[pytest.param("cpu", marks=needs_op), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def smoke(request, tmp_path_factory):
    """The suite in its smallest form, with a wrong contestant and a case that does not run: (its exit, folder of its
    JSON, report)."""
    folder = tmp_path_factory.mktemp("benchmarks")
    command = [sys.executable, "-m", "benchmarks", "--size", "smoke", "--device", request.param]
    command += ["-p", "tests.helpers.wrong_contestant", "-q"]
    command += ["--out", folder / "run", "--report", folder / "run.md", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert (folder / "run.md").exists(), done.stdout + done.stderr
    return done, folder / "run", folder / "run.md"


def test_every_case_gives_an_entry_per_contestant(smoke):
    done, path, _ = smoke
    entries = json.loads((path / "1.json").read_text())["benchmarks"]
    assert {entry["stats"]["rounds"] for entry in entries} == {2}
    assert all(entry["stats"]["min"] > 0 and len(entry["stats"]["data"]) == 2 for entry in entries)
    found = results.load(path)
    for case in cases.chosen(cases.SIZES["smoke"], found.device):
        named = {c.name for c in case.contestants}
        of_case = found.cases[case.name]
        assert set(of_case.names) | set(of_case.missing) == named, done.stdout
        assert not of_case.red


def test_a_wrong_contestant_has_no_figures(smoke):
    done, path, markdown = smoke
    assert done.returncode == 1 and "3 failed" in done.stdout, done.stdout
    case = results.load(path).cases["wrong"]
    assert case.names == [BASE] and "parameter" in case.red["torch fused, no decay"]
    text = markdown.read_text()
    assert "Red gates" in text and "- torch fused, no decay in wrong: " in text
    assert "| torch fused, no decay |" not in text


def test_a_case_that_does_not_run_is_tried_once_and_stands_in_the_report(smoke):
    done, path, markdown = smoke
    assert done.stdout.count("no memory asked for") == 1 and "in no_memory" in done.stdout
    assert results.load(path).cases["too large"].names == []
    assert "- torch foreach in too large: does not run (MemoryError: none is left)" in markdown.read_text()


def test_the_report_has_every_question_and_plot(smoke):
    _, path, markdown = smoke
    text, found = markdown.read_text(), results.load(path)
    for question in {case.question for case in cases.chosen(cases.SIZES["smoke"], found.device)}:
        assert f"## {question}\n" in text
    for plot in ("side-by-side", "by-case", "growth", "roofline"):
        assert f"(run/{plot}.png)" in text and (markdown.parent / "run" / f"{plot}.png").stat().st_size > 10_000
    for case in found.cases.values():
        assert all(f"- {name}: {reason}" in text for name, reason in case.missing.items())
    assert ("- apex FusedAdam: needs a GPU: " in text) == (found.device == "cpu")
    assert "| share of the floor's rate |" in text


def test_beside_a_floor_stand_shares_of_its_rate():
    timing = Timing({BASE: [2.0], "half the bytes": [2.0], "bytes not known": [2.0], FLOOR: [1.0]})
    traffic = {BASE: 28.0, "half the bytes": 14.0, FLOOR: 28.0}
    facts = results.facts(cases.case("case", "question", []), run.Result(elements=1))
    lines = report.table(results.CaseResult(**facts, timing=timing, traffic=traffic)).splitlines()
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["0.50", "0.25", "", "1.00"]
    assert len({line.count("|") for line in lines}) == 1


# the reference is slow on many tensors, and other cases have the same contestants
GPU_CASES = [
    case for case in cases.chosen(cases.SIZES["smoke"], "cuda") if len(case.shapes(case.elements["smoke"])) < 100
]


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_everybody_of_a_gpu_case_is_timed_with_the_reference_standing_in(case, monkeypatch):
    monkeypatch.setitem(ours.BACKENDS, "cpu", "reference")
    result = run.run(case, cases.SIZES["smoke"])
    assert not result.red
    assert set(result.timing.seconds) | set(result.missing) == {c.name for c in case.contestants}


def test_every_call_on_a_gpu_waits_for_it():
    calls = []
    harness.take_turns({"a": lambda: calls.append("a")}, turns=1, warmup=0, synchronize=lambda: calls.append("wait"))
    assert calls == ["wait", "a", "wait"]


def test_step_counts_lie_where_torch_wants_them():
    tensors = Tensors.random([(3,)], torch.float32, device="meta")
    for optimizer, device in ((fused(tensors), "meta"), (adamw(tensors, foreach=True), "cpu")):
        assert optimizer.state[tensors.params[0]]["step"].device.type == device


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: the suite would time it")
def test_without_a_gpu_the_suite_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cuda"])
    with pytest.raises(SystemExit) as stopped:
        suite.main()
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("nothing to time: ") and printed.err.count("\n") == 1


def test_an_interrupted_suite_waits_for_what_pytest_writes(ctrl_c_is_heard):
    child = """
import sys, time
try:
    print("begun", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)  # longer than subprocess.run waits before it kills
    print("written")
    sys.exit(2)
"""
    code = (
        "import os, sys; from benchmarks.__main__ import _run\n"
        f"print(_run([sys.executable, '-c', {child!r}], os.environ))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout.readline() == "begun\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate(timeout=50)[0] == "written\n2\n"


def test_a_suite_that_crashes_has_failed():
    assert suite._run([sys.executable, "-c", "import os; os.abort()"], os.environ) == signal.SIGABRT


@needs_op
def test_sweeps_that_are_none_leave_earlier_results(tmp_path, monkeypatch, capsys):
    (tmp_path / "1.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--out", str(tmp_path), "--sweeps", "-1"])
    with pytest.raises(SystemExit) as stopped:
        suite.main()
    assert stopped.value.code == 2 and "--sweeps must be at least 1, got -1" in capsys.readouterr().err
    assert (tmp_path / "1.json").exists()


def test_a_run_reproduces_itself(smoke, capsys, monkeypatch):
    path = str(smoke[1])
    monkeypatch.setattr(sys, "argv", ["compare", path, path])
    compare.main()
    count = len(compare.ratios(results.load(path)))
    assert count > 50 and f"{count} of {count} ratios are reproduced" in capsys.readouterr().out


def test_sweeps_are_pooled(smoke, tmp_path):
    text = (smoke[1] / "1.json").read_text()
    for sweep in (1, 2):
        (tmp_path / f"{sweep}.json").write_text(text)
    once, twice = results.load(smoke[1]), results.load(tmp_path)
    assert twice.sweeps == 2
    for name, case in once.cases.items():
        pooled = twice.cases[name].timing.seconds
        assert pooled == {contestant: seconds * 2 for contestant, seconds in case.timing.seconds.items()}


def test_reproduced_means_within_the_quartiles_of_either_run():
    assert compare.reproduced((1.0, 0.9, 1.1), (1.05, 1.04, 1.06))
    assert compare.reproduced((1.05, 1.04, 1.06), (1.0, 0.9, 1.1))
    assert not compare.reproduced((1.0, 0.9, 1.1), (1.2, 1.15, 1.3))


def wrong(mask):
    return Contestant("wrong", masked_by(mask), Claim(p=0.1), spoils_gradients=True)


def drop(grad, p=0.1, rescale=None):
    kept = torch.rand(grad.shape) >= p
    grad.copy_(torch.where(kept, grad * (rescale or 1 / (1 - p)), 0))


WRONG = {
    "a share of 0.2 dropped": wrong(lambda g: drop(g, 0.2, 1 / 0.9)),
    "no rescale": wrong(lambda g: drop(g, 0.1, 1.0)),
    "nothing dropped": wrong(lambda g: g.mul_(1 / 0.9)),
    "does nothing": Contestant("wrong", lambda t: lambda: None),
    "two steps": Contestant("wrong", lambda t: two_steps(fused(t))),
    "a tensor left out": Contestant("wrong", lambda t: torch_but_the_last(t)),
    "freezes elements, not blocks": Contestant("wrong", masked_by(drop), Claim(p=0.1, unit=128), spoils_gradients=True),
    "parts of tensors": Contestant("wrong", masked_by(drop), Claim(p=0.1, unit=None), spoils_gradients=True),
    "momentum moves what it claims to freeze": Contestant(
        "wrong", masked_by(drop), Claim(p=0.1, effect="freeze"), spoils_gradients=True
    ),
    "half of a tensor moves": Contestant(
        "wrong", lambda t: half_of_it(t), Claim(p=None, rescale=1.0, effect="update", unit=None)
    ),
    "a mask, not noise": Contestant("wrong", masked_by(drop), Claim(p=0.3, gaussian=True), spoils_gradients=True),
    "masks with another share": Contestant("wrong", lambda t: lambda: [p > 9 for p in t.params], MaskClaim(0.1)),
    "masks of another stream": Contestant(
        "wrong", lambda t: lambda: [torch.rand(p.shape) >= 0.1 for p in t.params], MaskClaim(0.1, reference=True)
    ),
}


def half_of_it(tensors):
    whole = fused(tensors)
    before = [p.detach()[: len(p) // 2].clone() for p in tensors.params]

    def step():
        whole.step()
        for param, old in zip(tensors.params, before, strict=True):
            param.detach()[: len(old)].copy_(old)

    return step


def two_steps(whole):
    return lambda: (whole.step(), whole.step())


def torch_but_the_last(tensors):
    whole = fused(tensors)
    whole.param_groups[0]["params"].pop()
    return whole.step


@pytest.mark.parametrize("contestant", WRONG.values(), ids=WRONG)
def test_a_red_gate_reports_no_speed(contestant):
    case = cases.case("case", "question", [BASE, contestant], lambda n: [(n,), (17, 23), (1,)], smoke=600_000)
    result = run.run(case, cases.SIZES["smoke"])
    assert list(result.red) == ["wrong"] and list(result.timing.seconds) == [BASE]
    found = results.CaseResult.of(case, result)
    assert "| wrong |" not in report.table(found)


def test_a_peer_that_does_not_run_is_listed_with_how_to_get_it():
    def broken(tensors):
        raise RuntimeError("no compiler\nand more")

    absent = Contestant("absent", broken, module="no_such_module.part", install="pip install it")
    fails = Contestant("fails", broken, module="json", install="pip install it")
    late = Contestant("late", lambda t: lambda: broken(t), module="json", install="pip install it")
    case = cases.case("case", "question", [BASE, absent, fails, late], lambda n: [(n,)])
    result = run.run(case, cases.SIZES["smoke"])
    assert result.missing == {
        "absent": "not installed: pip install it",
        "fails": "does not run (RuntimeError: no compiler): pip install it",
        "late": "does not run (RuntimeError: no compiler): pip install it",
    }
    assert list(result.timing.seconds) == [BASE]


def test_without_its_base_a_case_has_no_ratios():
    case = cases.case("case", "question", [WRONG["does nothing"], BASE], lambda n: [(n,)], base="wrong")
    result = run.run(case, cases.SIZES["smoke"])
    found = results.CaseResult.of(case, result)
    here = results.Run("smoke", "cpu", "", {}, 1, {"case": found})
    assert "No ratios: wrong was not timed." in report.section(here, "question")
    assert compare.ratios(here) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_lets_right_contestants_through_and_puts_the_sample_back(dtype):
    tensors = Tensors.random([(600_000,), (17, 23), (1,), (129, 128)], dtype)
    sample = Sample(tensors)
    before = sample.read()
    for claim, build in (
        (Claim(), lambda t: fused(t).step),
        (Claim(p=0.1), masked_by(drop)),
    ):
        claim.check("right", build(tensors), sample, LR)
        after = sample.read()
        assert all(torch.equal(getattr(before, field), getattr(after, field)) for field in "pgmv")
    with pytest.raises(Red, match="right, (parameter|first moment)"):
        Claim(p=0.1).check("right", masked_by(lambda g: drop(g, 0.1, 1.0))(tensors), sample, LR)


def freezing(unit, p):
    """torch's step, but for units that are frozen with probability p."""

    def build(tensors):
        whole = fused(tensors)

        def step():
            held = []
            for param, m, v in zip(tensors.params, tensors.exp_avgs, tensors.exp_avg_sqs, strict=True):
                keep = (torch.rand(-(-param.numel() // unit)) >= p).repeat_interleave(unit)[: param.numel()]
                held.append((keep.view(param.shape), [(t.detach(), t.detach().clone()) for t in (param, m, v)]))
            whole.step()
            for keep, states in held:
                for now, old in states:
                    now.copy_(torch.where(keep, now, old))

        return step

    return build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unit", [1, 128])
def test_a_gradient_that_is_zero_does_not_redden_the_gate(dtype, unit):
    """torch 2.11 draws zeros among bfloat16 gradients; a zero says nothing of its element's mask."""
    tensors = Tensors.random([(600_000,), (17, 23), (129, 128)], dtype)
    for param in tensors.params:
        param.grad.view(-1)[::7] = 0
    claim = Claim(p=0.5, rescale=1.0, effect="freeze", unit=unit)
    claim.check("right", freezing(unit, 0.5)(tensors), Sample(tensors), LR)
    with pytest.raises(Red, match="keeps" if unit == 1 else "in part|keeps"):
        claim.check("wrong", freezing(1, 0.1)(tensors), Sample(tensors), LR)


def test_gradients_that_a_contestant_spoils_are_put_back():
    tensors = Tensors.random([(1000,)], torch.float32)
    grads = [p.grad.clone() for p in tensors.params]
    tensors.save_gradients()
    masked_by(drop)(tensors)()
    assert not torch.equal(tensors.params[0].grad, grads[0])
    tensors.restore_gradients()
    assert torch.equal(tensors.params[0].grad, grads[0])


def test_memory_of_a_step():
    x = torch.ones(1 << 20)

    def step():
        y = x * 2
        y = y + 1  # two alive
        del y
        (x * 3).add_(1)

    found = memory.measure(step)
    size = x.numel() * 4
    assert 2 * size <= found.peak < 2 * size + 1000
    assert 3 * size <= found.allocated < 3 * size + 1000
    assert found.allocations >= 3
    assert memory.measure(lambda: x.add_(1)).peak < 1000


def test_a_turn_calls_everybody_once_and_tidies_up():
    calls = []
    timing = harness.take_turns(
        {name: lambda name=name: calls.append(name) for name in "abc"},
        turns=4,
        warmup=1,
        tidy={"b": lambda: calls.append("tidy")},
    )
    assert {name: len(seconds) for name, seconds in timing.seconds.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(sorted(calls[i : i + 4]) == ["a", "b", "c", "tidy"] for i in range(0, 20, 4))
    assert [calls[i + 1] for i, name in enumerate(calls) if name == "b"] == ["tidy"] * 5


def test_ratios_are_of_the_same_turn():
    timing = Timing({"a": [1.0, 20.0, 3.0], "b": [1.0, 10.0, 1.0]})
    assert timing.ratio("a", "b") == (2.0, 1.5, 2.5)


def test_populations_are_the_models():
    assert sum(map(math.prod, populations.shapes("llama-7b", None))) == 6_738_415_616
    # XLM-R Large has 559,890,432; the head's dense layer is the pooler's size, and its output makes 2 classes
    assert sum(map(math.prod, populations.shapes("xlmr-large", None))) == 559_890_432 + 2 * 1024 + 2
    assert sum(map(math.prod, populations.shapes("llama-7b", 202_383_360))) == 202_383_360
