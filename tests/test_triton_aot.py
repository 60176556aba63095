"""The Triton kernels compiled ahead of time, without a GPU: what the compilers' output must say."""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: nothing to compile")
import fake_gpu
import parity
import torch
import triton

from benchmarks import gpu_report
from graddrop_fused import triton_backend

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: this process interprets and cannot compile"
)

Variant = gpu_report.Variant
VERSION = ".".join(triton.__version__.split(".")[:2])


@pytest.mark.parametrize("target", gpu_report.TARGETS)
def test_element_masks_on_every_target(target):
    report = gpu_report.examine(Variant("element"), target)
    wide = report.passes["wide"]
    assert (report.spills, report.stack) == (0, 0)
    assert wide.widths == {16: 28}  # 4 loads and 3 stores for each of a pass's 4 accesses
    # 72: 28 warps for each of sm_80's SMs, where 64 would allow 32; 128: 4 waves for each SIMD of gfx942
    assert report.registers <= {"sm_80": 72, "gfx942": 128}.get(target, 64)
    assert wide.instructions <= (38 if target.startswith("sm") else 51)


# {Triton: {variant: [registers, instructions per element of the wide, narrow and strided pass]}}, as measured on sm_90
BOUNDS = json.loads((Path(__file__).parent / "helpers/triton_bounds.json").read_text())


@pytest.mark.parametrize("variant", gpu_report.VARIANTS, ids=str)
def test_no_variant_spills(variant):
    report = gpu_report.examine(variant, "sm_90")
    assert (report.spills, report.stack) == (0, 0)
    of_tables = {4, 8} if variant.mask == "block" else set()  # its blocks' own factors
    assert 16 in report.passes["wide"].widths and set(report.passes["wide"].widths) <= {16} | of_tables
    most = BOUNDS.get(VERSION, {}).get(str(variant))
    if most is None:
        pytest.skip(f"its registers and instructions were not measured with Triton {VERSION}")
    passes = [report.passes[name] for name in ("wide", "narrow", "strided") if name in report.passes]
    found = report.registers, *(round(p.instructions, 1) for p in passes)
    assert all(number <= bound for number, bound in zip(found, most, strict=True)), f"{found}, at most {most}"


@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
def test_blocks_with_counts_of_their_own(dtypes):
    report = gpu_report.examine(Variant("block", dtypes, effect="freeze", own=True), "sm_90")
    assert (report.spills, report.stack) == (0, 0)
    widths = report.passes["wide"].widths
    assert set(widths) == {16, 4} and widths[4] == 6  # a factor at a time, of each tile's block
    variant = Variant("block", dtypes, effect="freeze", own=True, dims=2)
    assert "amdgcn" in gpu_report.compile_variant(variant, "gfx942").asm


def test_launches_compile_as_they_are_made(monkeypatch):
    """The arguments of real launches, with all that Triton specialises on: one kernel, whatever their values are."""
    case = parity.Case("launches", (parity.Spec((1000,)), parity.Spec((33,))))
    scalar = torch.zeros((), device=fake_gpu.DEVICE)

    def batch(tables_on_device=False):
        b = parity.build(case)
        tensors = [b.params, b.grads, *b.states]
        b.params, b.grads, *b.states = ([t.to(fake_gpu.DEVICE) for t in of] for of in tensors)
        if tables_on_device:
            b.pairs = frozenset({(parity.Mask.ELEMENT, parity.Effect.GRADIENT)})
            b.integers, b.reals = b.integers.to(fake_gpu.DEVICE), b.reals.to(fake_gpu.DEVICE)
        return b

    with fake_gpu.gpu(monkeypatch, compiles=True) as gpu:
        for seed in (0, 1, 16, 2**64 - 1):  # 1 and multiples of 16 are what Triton likes to build in
            triton_backend.update(batch(), case.rule, seed=seed)
            triton_backend.update(batch(), case.rule, seed=seed, grad_scale=scalar)
        triton_backend.update(batch(True), case.rule, seed=1, grad_scale=scalar, found_inf=scalar)
        packed = batch()
        packed.packed = [torch.empty(32, dtype=torch.int32, device=fake_gpu.DEVICE)] * 2
        triton_backend.pack(packed, seed=1)
        mask = batch()
        mask.params, mask.states = mask.grads, []
        triton_backend.update(mask, parity.MaskOnly(), seed=1)
    plain, scaled = (k for _, _, k in gpu.launches[:2])
    assert all("cubin" in kernel.asm for _, _, kernel in gpu.launches)
    assert all(k is plain for _, _, k in gpu.launches[2:8:2]) and all(k is scaled for _, _, k in gpu.launches[3:8:2])
    names = ["update_kernel"] * 9 + ["pack_kernel", "update_kernel"]
    assert [(name, grid) for name, grid, _ in gpu.launches] == [(name, (2,)) for name in names]
