"""The runs of benchmarks/full_finetuning.py do what they are compared for."""

import json

import pytest
import torch

from benchmarks import full_finetuning

FLAGS = ["--layers", "2", "--width", "32", "--batch", "2", "8", "--steps", "2"]


def test_every_run_trains_and_stands_in_the_table(capsys, tmp_path):
    full_finetuning.main([*FLAGS, "--only", "time", "--out", str(tmp_path / "new" / "results.json")])
    table = capsys.readouterr().out
    here = [name for name in full_finetuning.CONTESTANTS if full_finetuning.installed(name)]
    assert all(f"| 0.9 | {name} | " in table for name in here)
    assert [result["run"] for result in json.loads((tmp_path / "new" / "results.json").read_text())] == here
    assert {"AdamW", "all", "all, bfloat16", "LISA"} <= set(here)


def test_memory_and_plots(tmp_path):
    full_finetuning.main([*FLAGS, "--p", "0.5", "0.9", "--runs", "AdamW", "all", "--plots", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"memory-time.png", "growth.png"}


@pytest.mark.parametrize(
    "more, said",
    [
        (["--plots", ".", "--only", "memory"], "--plots takes times and memory"),
        (["--plots", ".", "--only", "time", "--add", "times.json"], "--plots takes times and memory"),
        (["--add", "absent.json"], "absent.json"),
        (["--report", "empty.md"], "empty.md must have the lines"),
    ],
)
def test_files_that_cannot_be_used_are_said_before_anything_is_measured(more, said, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "times.json").write_text(json.dumps([vars(full_finetuning.Result("all", 0.9, None, (1, 1, 1), None))]))
    (tmp_path / "empty.md").touch()
    monkeypatch.setattr(full_finetuning, "gate", None)  # not called
    with pytest.raises(SystemExit) as stopped:
        full_finetuning.main([*FLAGS, *more])
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_the_gate_finds_a_run_that_trains_otherwise(monkeypatch):
    options = full_finetuning.parser().parse_args(FLAGS)
    wrong = full_finetuning.Contestant(lambda model, p, epoch: torch.optim.AdamW(model.parameters(), lr=1e-2))
    monkeypatch.setitem(full_finetuning.CONTESTANTS, "released", wrong)
    with pytest.raises(AssertionError, match="released"):
        full_finetuning.gate(options)
