"""The Triton kernels compiled ahead of time, without a GPU: what the compilers' output must say."""

import os

import pytest

pytest.importorskip("triton", reason="triton is not installed: nothing to compile")
import fake_gpu
import torch

from benchmarks import gpu_report
from graddrop_fused import GradDrop, GradDropAdamW, GradDropEpoch, attach

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: this process interprets and cannot compile"
)

Variant = gpu_report.Variant


@pytest.mark.parametrize("target", gpu_report.TARGETS)
def test_element_masks_on_every_target(target):
    report = gpu_report.examine(Variant("element", "fp32"), target)
    assert (report.spills, report.stack, report.shared) == (0, 0, 0)
    assert report.widths == {16: 28}  # 4 loads and 3 stores for each of a pass's 4 accesses
    assert report.registers <= (64 if target.startswith("sm") else 128)  # 128: 4 waves for each SIMD of gfx942
    assert sum(report.per_element.values()) <= (40 if target.startswith("sm") else 51)


# on sm_90: most registers, and most instructions per element
BOUNDS = {
    "none, fp32": (48, 23),
    "none, bf16, fp32 state": (56, 27),
    "none, bf16": (56, 29),
    "element, fp32": (48, 40),
    "element, bf16, fp32 state": (64, 43),
    "element, bf16": (64, 47),
    "block, fp32, freeze": (56, 43),
    "block, bf16, fp32 state, freeze": (72, 39),
    "block, bf16, freeze": (64, 43),
    "packed, fp32": (48, 26),
    "packed, bf16, fp32 state": (56, 29),
    "packed, bf16": (56, 31),
    "layer, fp32": (48, 24),
    "layer, bf16, fp32 state": (56, 26),
    "layer, bf16": (56, 30),
    "gaussian, fp32": (72, 67),
    "gaussian, bf16, fp32 state": (80, 68),
    "gaussian, bf16": (80, 71),
    "element, fp32, amsgrad": (56, 43),
    "element, bf16, fp32 state, amsgrad": (80, 46),
    "element, bf16, amsgrad": (72, 52),
    "element, fp32, any effect": (64, 47),
    "element, bf16, fp32 state, any effect": (80, 51),
    "element, bf16, any effect": (80, 55),
    "all, fp32, any effect": (96, 109),
    "all, bf16, fp32 state, any effect": (152, 105),
    "all, bf16, any effect": (152, 110),
    "mask_grads: element, fp32": (48, 20),
    "mask_grads: element, bf16": (48, 23),
    "pack: element": (64, 17),
}


@pytest.mark.parametrize("variant", gpu_report.VARIANTS, ids=str)
def test_no_variant_spills(variant):
    report, (registers, instructions) = gpu_report.examine(variant, "sm_90"), BOUNDS[str(variant)]
    assert (report.spills, report.stack) == (0, 0)
    assert set(report.widths) == {16}
    assert report.registers <= registers
    assert sum(report.per_element.values()) <= instructions


def test_launches_compile_as_they_are_made(monkeypatch):
    """The arguments of real launches, with all that Triton specialises on, from the optimizer down."""
    params = [torch.nn.Parameter(torch.zeros(n, device=fake_gpu.DEVICE)) for n in (1000, 33)]
    for p in params:
        p.grad = torch.zeros_like(p)
    with fake_gpu.gpu(monkeypatch, compiles=True) as gpu:
        for seed in (0, 1, 16, 2**64 - 1):  # 1 and multiples of 16 are what Triton likes to build in
            optimizer = GradDropAdamW(params, drop=GradDrop(0.5), seed=seed, backend="triton")
            optimizer.step()
            optimizer.grad_scale = torch.full((), 2.0, device=fake_gpu.DEVICE)
            optimizer.step()
        captured = GradDropAdamW(params, drop=GradDrop(0.5), capturable=True, backend="triton")
        captured.grad_scale = captured.found_inf = torch.zeros((), device=fake_gpu.DEVICE)
        captured.step()
        epochs = GradDropAdamW(params, drop=GradDropEpoch(0.5), steps_per_epoch=3, seed=1, backend="triton")
        epochs.step()
        sgd = torch.optim.SGD(params)
        attach(sgd, GradDrop(0.5), seed=1, backend="triton")
        sgd.step()
    adamw, scaled = (k for _, _, k in gpu.launches[:2])
    assert all("cubin" in kernel.asm for _, _, kernel in gpu.launches)
    # one kernel, whatever the seed
    assert all(k is adamw for _, _, k in gpu.launches[2:8:2]) and all(k is scaled for _, _, k in gpu.launches[3:8:2])
    names = ["adamw_kernel"] * 9 + ["pack_kernel", "adamw_kernel", "mask_grads_kernel"]
    assert [(name, grid) for name, grid, _ in gpu.launches] == [(name, (2,)) for name in names]
