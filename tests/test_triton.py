"""The Triton kernels under Triton's interpreter: parity with the reference, and launches counted.

Triton chooses between interpreter and compiler as kernels are decorated, so the cases run in a process of their own,
with TRITON_INTERPRET=1; this file is both that process's tests and the test that starts it. It takes minutes.
"""

import os
import subprocess
import sys
from dataclasses import fields, replace

import interpreter
import parity
import pytest
import torch

from graddrop_fused import (
    GradDrop,
    GradDropAdamW,
    GradFreeze,
    LayerGradDrop,
    LinearAnneal,
    StaticMask,
    triton_backend,
)
from graddrop_fused.contract import Effect, Mask

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_under_the_interpreter starts")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_under_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed: nothing to interpret")
    if reason := interpreter.broken():
        pytest.skip(reason)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@pytest.fixture
def small_passes(monkeypatch):
    """Passes of 512 elements, chunks of 2048: small tensors see both branches and several programs.

    The interpreter is repaired on the way: it truncates to bfloat16 where every GPU rounds to nearest even.
    """
    import numpy as np
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    convert = interpreter._convert_float

    def rounded(values, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(np.array(values)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        return convert(values, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(triton_backend, "CHUNK", 2048)
    real = triton_backend.shape

    def shape(dtypes, warp_size):
        return {**real(dtypes, warp_size), "TILES": 4, "GENERAL": 512, "CHUNK": 2048}

    monkeypatch.setattr(triton_backend, "shape", shape)
    monkeypatch.setattr(triton_backend, "pack_shape", lambda warp_size: {"TILES": 4, "GENERAL": 512, "CHUNK": 2048})
    with np.errstate(all="ignore"):  # of NaN and infinities in gradients
        yield


@interpreted
@pytest.mark.parametrize("case", parity.CASES, ids=lambda case: case.name)
def test_adamw(small_passes, case):
    parity.check_adamw(triton_backend, case)


def distinct(unread: set[str], **ignored) -> list[parity.Case]:
    """The cases that differ in more than what a kernel does not read: those fields of Spec, and of Case."""
    kept = {}
    for case in parity.CASES:
        default = {f.name: f.default for f in fields(parity.Spec) if f.name in unread}
        specs = tuple(replace(spec, **default) for spec in case.specs)
        kept.setdefault(replace(case, name="", specs=specs, **ignored), case)
    return list(kept.values())


ARITHMETIC = {"effect", "amsgrad", "maximize", "step", "lr", "betas", "eps", "weight_decay"}
GRADIENTS = {"grad", "grad_order", "grad_offset", "grad_gap", "grad_expanded", "offset", "rescale", "noise_std"}
NO_AMP = {"grad_scale": None, "found_inf": None}
F32 = torch.float32


@interpreted
@pytest.mark.parametrize("case", distinct(ARITHMETIC, param=F32, state=F32, **NO_AMP), ids=lambda case: case.name)
def test_mask_grads(small_passes, case):
    parity.check_mask_grads(triton_backend, case)


@interpreted
@pytest.mark.parametrize(
    "case",
    distinct(ARITHMETIC | GRADIENTS, param=F32, grad=F32, state=F32, **NO_AMP),
    ids=lambda case: case.name,
)
def test_pack(small_passes, case):
    parity.check_pack(triton_backend, case)


@interpreted
def test_capturable_compiles_all_that_its_schedules_can_reach(small_passes):
    """Kernels are specialised on Batch.pairs: one left out would be applied wrongly, without an error."""
    every_third = torch.arange(515) % 3 > 0
    cases = [  # elements, policy, effect, masks
        (300, GradDrop(anneal=LinearAnneal(0.9, total_steps=3)), "freeze", {Mask.ELEMENT, Mask.KEEP}),
        (33, GradFreeze("bottom-up"), "update", {Mask.DROP, Mask.KEEP}),
        (1000, GradDrop(0.5, block=128), "gradient", {Mask.BLOCK}),
        (257, LayerGradDrop(0.5), "gradient", {Mask.LAYER}),
        (515, StaticMask([every_third]), "update", {Mask.PACKED}),
        (129, GradDrop(0.5, distribution="gaussian"), "gradient", {Mask.GAUSSIAN}),
    ]
    runs = []
    for backend in ("reference", "triton"):
        params = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n, *_ in cases]
        groups = [
            {"params": [p], "drop": drop, "effect": effect}
            for p, (_, drop, effect, _) in zip(params, cases, strict=True)
        ]
        opt = GradDropAdamW(groups, lr=1e-2, capturable=True, steps_per_epoch=2, backend=backend)
        for step in range(6):
            for i, p in enumerate(params):
                p.grad = torch.cos(torch.arange(p.numel()) * (step + 1.0))
                if (i, step) == (0, 4):
                    p.grad = None  # a tensor that the call must leave alone
            opt.step()
        (bucket,) = opt._buckets
        assert bucket.batch.pairs == {(m, Effect[effect.upper()]) for *_, effect, masks in cases for m in masks}
        runs.append(params)
    for actual, expected in zip(runs[1], runs[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@interpreted
@pytest.mark.parametrize("case", [c for c in parity.CASES if c.name in ("mixed-batch", "kinds-freeze", "p-extremes")])
def test_with_tables_on_the_device(small_passes, case):
    parity.check_adamw(triton_backend, case, capturable=True)


@interpreted
def test_one_launch_for_all_tensors(small_passes, monkeypatch):
    from graddrop_fused.kernels.triton import kernels

    launches = []

    class Counted:
        def __init__(self, kernel):
            self.kernel, self.arg_names = kernel, kernel.arg_names

        def __getitem__(self, grid):
            launches.append(grid)
            return self.kernel[grid]

    for name in ("adamw_kernel", "mask_grads_kernel", "pack_kernel"):
        monkeypatch.setattr(kernels, name, Counted(getattr(kernels, name)))
    batch = parity.build(parity.Case("many", tuple(parity.Spec((k,), stream=k) for k in (0, 1, 33, 300, 1000, 2500))))
    batch.packed = [torch.empty((shard.numel + 31) // 32, dtype=torch.int32) for shard in batch.shards]
    for step in range(3):
        triton_backend.adamw(batch, seed=step)
    assert launches == [(1 + 1 + 1 + 1 + 2,)] * 3  # chunks of 2048 of the tensors that are not empty
    triton_backend.mask_grads(batch, seed=1)
    triton_backend.pack(batch, seed=1)
    assert len(launches) == 5
