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


# most instructions per element of the variants that take no more than 64 registers
WITHIN_64 = {
    Variant("none", "fp32"): 23,
    Variant("none", "bf16"): 30,
    Variant("block", "fp32", effects=gpu_report.FREEZE): 43,
    Variant("packed", "fp32"): 26,
    Variant("layer", "fp32"): 24,
    Variant("element", "fp32"): 40,
    Variant("element", "fp32", amsgrad=True): 43,
    Variant("element", "fp32", effects=gpu_report.ANY): 47,
    Variant("element", "bf16"): 47,
    Variant("element", "bf16, fp32 state"): 43,
    Variant("packed", "bf16, fp32 state"): 29,
    Variant("element", "fp32", kernel="mask_grads"): 24,
    Variant("element", "bf16", kernel="mask_grads"): 23,
    Variant("element", "fp32", kernel="pack"): 17,
}


@pytest.mark.parametrize("variant", gpu_report.VARIANTS, ids=str)
def test_no_variant_spills(variant):
    report = gpu_report.examine(variant, "sm_90")
    assert (report.spills, report.stack) == (0, 0)
    assert set(report.widths) == {16}
    if variant in WITHIN_64:
        assert report.registers <= 64
        assert sum(report.per_element.values()) <= WITHIN_64[variant]


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
