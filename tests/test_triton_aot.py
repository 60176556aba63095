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

ELEMENT = gpu_report.Variant("element", "fp32")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_element_masks_on_nvidia(target):
    report = gpu_report.examine(ELEMENT, target)
    assert (report.spills, report.stack, report.shared) == (0, 0, 0)
    assert set(report.widths) == {16}  # and so 4 loads and 3 stores for each of a pass's 4 accesses
    assert report.widths[16] == 28
    assert report.registers <= 64
    assert sum(report.per_element.values()) <= 50


@pytest.mark.parametrize("mask", ["none", "block", "packed", "layer"])
def test_other_masks_spill_nothing(mask):
    report = gpu_report.examine(gpu_report.Variant(mask, "fp32"), "sm_90")
    assert (report.spills, report.stack) == (0, 0)
    assert set(report.widths) == {16}
    assert report.registers <= 64
    assert sum(report.per_element.values()) <= 50


def test_bfloat16_accesses():
    same = gpu_report.examine(gpu_report.Variant("element", "bf16"), "sm_90")
    assert (same.spills, same.stack, set(same.widths)) == (0, 0, {16})
    assert same.registers <= 64
    # beside float32 state, parameters and gradients move 8 bytes a thread: contiguous across the warp all the same
    mixed = gpu_report.examine(gpu_report.Variant("element", "bf16, fp32 state"), "sm_90")
    assert (mixed.spills, mixed.stack, set(mixed.widths)) == (0, 0, {8, 16})
    assert mixed.registers <= 64


def test_amd():
    report = gpu_report.examine(ELEMENT, "gfx942")
    assert (report.spills, report.stack, report.shared) == (0, 0, 0)
    assert report.widths[16] >= 28


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
        epochs = GradDropAdamW(params, drop=GradDropEpoch(0.5), steps_per_epoch=3, seed=1, backend="triton")
        epochs.step()
        sgd = torch.optim.SGD(params)
        attach(sgd, GradDrop(0.5), seed=1, backend="triton")
        sgd.step()
    adamw, scaled = (k for _, _, k in gpu.launches[:2])
    assert all("cubin" in kernel.asm for _, _, kernel in gpu.launches)
    # one kernel, whatever the seed
    assert all(k is adamw for _, _, k in gpu.launches[2:8:2]) and all(k is scaled for _, _, k in gpu.launches[3:8:2])
    names = ["adamw_kernel"] * 8 + ["pack_kernel", "adamw_kernel", "mask_grads_kernel"]
    assert [(name, grid) for name, grid, _ in gpu.launches] == [(name, (2,)) for name in names]
