"""The GPU's step benchmark: its contestants, gate and table, on this machine's processor and, marked gpu, on a GPU."""

import pytest
import torch

from benchmarks import gpu_step
from graddrop_fused import reference

SHAPES = [(1000,), (17, 23), (129,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "device, backend", [("cpu", "reference"), pytest.param("cuda", "triton", marks=pytest.mark.gpu)]
)
def test_every_contestant_is_timed(device, backend, dtype):
    lines = gpu_step.table(SHAPES, dtype, torch.device(device), backend, turns=2)
    assert lines[0].startswith("3 tensors, 1,520 elements")
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in lines[4:]}
    assert len(rows) == 8 and float(rows[gpu_step.BASE][0]) == 1.0
    assert float(rows[gpu_step.FLOOR][3].removesuffix(" |")) == 1.0


def test_nothing_is_timed_after_a_wrong_step(monkeypatch):
    adamw = reference.adamw

    def wrong(batch, **arguments):
        adamw(batch, **arguments)
        batch.params[1][0, 0] += 1e-3

    monkeypatch.setattr(reference, "adamw", wrong)
    monkeypatch.setattr(gpu_step.harness, "take_turns", lambda *_: pytest.fail("a wrong step was timed"))
    with pytest.raises(AssertionError, match="no timing is reported"):
        gpu_step.table(SHAPES, torch.float32, torch.device("cpu"), "reference", turns=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: the command would time it")
def test_without_a_gpu_the_command_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu_step"])
    with pytest.raises(SystemExit) as stopped:
        gpu_step.main()
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nothing to time: ")
