"""`python -m graddrop_fused` tells the truth: it passes here, and it fails when a backend computes wrongly."""

import os
import subprocess
import sys

import pytest
import torch

from graddrop_fused import __main__ as main
from graddrop_fused import __version__, dispatch, reference

CPU = torch.device("cpu")


@pytest.mark.parametrize("capability", [None, "none"], ids=["all", "no CPU backend"])
def test_command_reports_every_backend_and_passes(capability):
    """With Triton's interpreter off, whatever this process uses: Triton then has a reason not to serve CPU tensors."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if capability:
        environment["GRADDROP_CPU_CAPABILITY"] = capability
    result = subprocess.run(
        [sys.executable, "-m", "graddrop_fused"], capture_output=True, text=True, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    first, *lines, last = result.stdout.splitlines()
    assert f"graddrop_fused {__version__}," in first
    assert last.startswith("self-check passed")
    on_cpu = {line.split()[1]: line for line in lines if line.split()[0] == "cpu"}
    assert set(on_cpu) == {*dispatch.NAMES, "auto"}
    assert " cannot run: " in on_cpu["triton"]
    assert " ok" in on_cpu["reference"]
    reason = dispatch.load("cpu").unavailable(CPU) or (capability and "GRADDROP_CPU_CAPABILITY=none: ")
    assert (" ok: " if reason is None else f" cannot run: {reason}") in on_cpu["cpu"]
    assert on_cpu["auto"].split()[-1] == ("cpu" if reason is None else "reference")


@pytest.mark.parametrize("broken, said", [("pack", "known answer"), ("prepare", "torch.optim.AdamW")])
def test_a_wrong_backend_is_found(monkeypatch, capsys, broken, said):
    right = getattr(reference, broken)

    def wrong(batch, *rule, **options):
        result = right(batch, *rule, **options)
        (batch.packed if broken == "pack" else batch.params)[0].view(-1)[0] += 1
        return result

    monkeypatch.setattr(reference, broken, wrong)
    assert main.main([]) == 1
    out = capsys.readouterr().out
    assert said in out and "FAILED" in out.splitlines()[-1]


def test_a_crash_is_a_finding(monkeypatch):
    def crash(batch, rule, **options):
        raise OSError("no such kernel")

    monkeypatch.setattr(reference, "prepare", crash)
    assert main.self_check("reference", CPU) == "FAILED: OSError: no such kernel"
