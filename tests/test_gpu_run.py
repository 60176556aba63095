"""`make gpu` without a GPU: a rehearsal of all stages on the CPU, and what happens when some go wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cases, gpu_facts, gpu_run
from benchmarks.gpu_run import ROOT, Stage
from benchmarks.peers import BASE
from graddrop_fused import cpu

needs_op = pytest.mark.skipif(
    cpu.unavailable(torch.device("cpu")) is not None, reason="the native CPU op is not built here"
)


@needs_op
@pytest.mark.slow
@pytest.mark.nightly
def test_a_rehearsal_runs_every_stage_and_writes_the_report(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_run", "--rehearse", "--out", tmp_path / "out"]
    command += ["--report", tmp_path / "run.md"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "run.md").read_text()
    for stage in gpu_run.stages("cpu", tmp_path, True):
        assert f"## {stage.title}" in text
        if not stage.needs:
            assert f"| {stage.title} | passed |" in text, done.stdout
            assert f"--- {stage.title}: passed" in done.stdout
    assert "self-check passed" in text
    assert "| test_gpu | 0 | 0 |" in text, "GPU tests skip here"
    assert f"| {BASE} | 0 + 0 | 0 + 0 |" in text, "a CPU launches nothing"
    assert "### Side by side" in text and (tmp_path / "run" / "side-by-side.png").exists()
    first = json.loads((tmp_path / "out" / "compile.out").read_text())
    assert [row["dtype"] for row in first] == [gpu_facts.FIRST_STEPS[0][1]]


def test_without_a_gpu_it_says_so_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu_run.main([])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("nothing to run: ")


def test_a_stage_that_fails_or_hangs_does_not_keep_the_others_from_running(tmp_path, monkeypatch, capsys):
    say = (sys.executable, "-c")
    planned = [
        Stage("check", "Hangs", (*say, "import time; print('begun', flush=True); time.sleep(600)"), 3),
        Stage("tests", "Fails", (*say, "import sys; print('why', file=sys.stderr); sys.exit(3)"), 60),
        Stage("host", "Works", (*say, """print('{"small": {"us": {"median": 7, "low": 6, "high": 9}}}')"""), 60),
        Stage("sanitizer", "Absent", ("nothing",), 60, needs="a program that nobody has"),
    ]
    monkeypatch.setattr(gpu_run, "stages", lambda *args: planned)
    monkeypatch.setattr(gpu_run, "LEAST", 0)
    monkeypatch.setattr(gpu_run.ours, "unavailable", lambda device: None)
    began = time.monotonic()
    assert gpu_run.main(["--rehearse", "--out", str(tmp_path / "out"), "--report", str(tmp_path / "run.md")]) == 1
    assert time.monotonic() - began < 300
    text = (tmp_path / "run.md").read_text()
    assert "| Hangs | stopped at its limit |" in text and "begun" in text
    assert "| Fails | failed |" in text and "why" in text
    assert "| Works | passed |" in text and "| us | 7 (6 to 9) |" in text
    assert "| Absent | left out: there is no a program that nobody has |" in text


@pytest.mark.parametrize("ends", ["interrupted", "leaves a process behind", "prints what is no text"])
def test_nothing_of_a_stage_goes_on_after_it(tmp_path, ends, ctrl_c_is_heard):
    sleep = "import subprocess, sys; s = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    code = {
        "interrupted": sleep + "print('begun', flush=True); s.wait()",
        "leaves a process behind": sleep + "print('begun')",
        "prints what is no text": "import sys; sys.stdout.buffer.write(b'begun \\xff\\n' * 40_000)",
    }[ends]
    run = (
        "import pathlib, sys; from benchmarks import gpu_run\n"
        f"stage = gpu_run.Stage('check', 'Check', (sys.executable, '-c', {code!r}), 60)\n"
        f"print(gpu_run.perform(stage, pathlib.Path({str(tmp_path)!r}), 60).status)"
    )
    command = [sys.executable, "-c", run]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        if ends == "interrupted":
            next(line for line in process.stdout if line == "begun\n")
            process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=50)[0]
        assert process.returncode == (-signal.SIGINT if ends == "interrupted" else 0)
    assert ends == "interrupted" or said.endswith("passed\n")
    assert "begun" in (tmp_path / "check.log").read_text()


def test_no_stage_starts_without_time(tmp_path):
    stage = Stage("check", "Late", (sys.executable, "-c", "raise SystemExit"), 60)
    assert gpu_run.perform(stage, tmp_path, 1.0).status == "left out: no time was left"


def test_all_stages_fit_into_the_time_that_is_promised(tmp_path):
    limits = [stage.limit for stage in gpu_run.stages("cuda", tmp_path, False)]
    assert sum(limits) + gpu_run.GRACE <= 25 * 60


@pytest.mark.parametrize(
    "available, said",
    [
        ("warnings.warn('CUDA initialization: The NVIDIA driver on your system is too old')", "torch sees none"),
        ("True", "compute capability 8.0 or newer, a GPU is older"),
    ],
    ids=["an old driver", "an old GPU"],
)
def test_gpu_tests_skip_with_the_reason(tmp_path, available, said):
    (tmp_path / "old_machine.py").write_text(
        f"import warnings, torch\ntorch.cuda.is_available = lambda: {available}\n"
        "torch.cuda.get_device_capability = lambda device: (7, 5)\n"
        "torch.cuda.get_device_name = lambda device: 'a GPU'\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "old_machine", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "CC": "cc"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [*command, "-k", "test_a_stream"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "1 skipped" in done.stdout and said in done.stdout, done.stdout + done.stderr


def test_all_files_with_gpu_tests_are_run():
    files = {path.relative_to(ROOT).as_posix(): path.read_text() for path in ROOT.glob("tests/test_*.py")}
    marked = {name for name, text in files.items() if re.search(r"pytest\.mark\.gpu", text)}
    assert marked == set(gpu_run.GPU_TESTS)


def test_what_failed_is_named(tmp_path):
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.test_gpu" name="a"/>'
        '<testcase classname="tests.test_gpu" name="b"><failure message="E  wrong&#10;more"/></testcase>'
        '<testcase classname="tests.test_gpu" name="c"><skipped message="no"/></testcase></testsuite></testsuites>'
    )
    table, failed = gpu_run._tests(tmp_path / "tests.xml")
    assert "| test_gpu | 1 | 1 | 1 |" in table
    assert failed == "**Failed:**\n\n- `tests.test_gpu::b`: E  wrong"


@pytest.mark.parametrize("name, file", [("tests", "tests.xml"), ("launches", "launches.out"), ("host", "host.out"),
                                        ("compile", "compile.out")])  # fmt: skip
def test_a_stage_that_leaves_nothing_whole_shows_the_end_of_its_log(tmp_path, name, file):
    (tmp_path / f"{name}.log").write_text("begun\nCUDA error: out of memory\n")
    assert gpu_run._section(name, tmp_path, tmp_path / "run.md") == ["```\nbegun\nCUDA error: out of memory\n```"]
    (tmp_path / file).write_text('<testsuites><testcase classname="a" na')
    assert "CUDA error: out of memory" in gpu_run._section(name, tmp_path, tmp_path / "run.md")[0]


def test_tests_that_end_without_results_do_not_show_those_of_an_earlier_call(tmp_path):
    (tmp_path / "tests.xml").write_text('<testsuites><testcase classname="tests.test_gpu" name="a"/></testsuites>')
    crash = Stage("tests", "Tests", (sys.executable, "-c", "print('a crash'); raise SystemExit(9)"), 60)
    assert gpu_run.perform(crash, tmp_path, 60).status == "failed"
    assert gpu_run._section("tests", tmp_path, tmp_path / "run.md") == ["```\na crash\n```"]


def test_kernels_and_copies_are_told_apart():
    on_gpu, on_cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    names = [("adamw_kernel", on_gpu), ("Memcpy HtoD (Pinned -> Device)", on_gpu), ("Memset (Device)", on_gpu)]
    names += [("cudaLaunchKernel", on_cpu), ("Optimizer.step#GradDropAdamW.step", on_gpu)]
    events = [SimpleNamespace(name=n, device_type=d, is_user_annotation="#" in n) for n, d in names]
    assert gpu_facts.count(events) == {"kernels": 1, "copies": 2}


@needs_op
@pytest.mark.parametrize("late", [False, True], ids=["when built", "at its first step"])
def test_a_peer_that_does_not_run_is_listed(monkeypatch, late):
    def broken(tensors):
        raise OSError("no such library")

    build = (lambda tensors: lambda: broken(tensors)) if late else broken
    monkeypatch.setitem(cases.CONTESTANTS, BASE, replace(cases.CONTESTANTS[BASE], build=build))
    monkeypatch.setattr(gpu_facts, "POPULATIONS", {"small": None})
    facts = gpu_facts.over_steps(gpu_facts.launches, "cpu", 3000)
    assert facts["small"][BASE] == "does not run (OSError: no such library)"
    assert gpu_facts._lacks_ours(facts["small"])
    *_, table, missing = gpu_run._facts(facts, "kernels + copies", "{kernels} + {copies}", gpu_run.LAUNCHES)
    assert "| GradDrop | 0 + 0 |" in table and BASE not in table
    assert f"- {BASE}: does not run" in missing
