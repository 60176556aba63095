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
    # 56: 36 warps for each SM; 64: 8 waves for each SIMD of gfx942
    assert report.registers <= (56 if target.startswith("sm") else 64)
    assert wide.instructions <= (36 if target.startswith("sm") else 45)


# {Triton: {variant: gpu_report.numbers on sm_90}}, which python -m benchmarks.gpu_report --bounds writes
BOUNDS = json.loads((Path(__file__).parent / "helpers/triton_bounds.json").read_text())
SAMPLE = {  # what an ordinary run compiles: one of each kind of pass, the quick ones
    "none, fp32",
    "element, fp32",
    "element, bf16",
    "packed, fp32",
    "block, fp32, freeze, own counts",
    "element, fp32, 2 dimensions",
    "none, bf16, stochastic rounding",
    "pack: element",
}


def test_bounds_are_of_declared_variants():
    names = [str(variant) for variant in gpu_report.VARIANTS]
    assert len(set(names)) == len(names)
    for of in BOUNDS.values():
        assert SAMPLE <= set(of) <= set(names)


def test_docs_show_the_bounds():
    page = (Path(__file__).parents[1] / "docs/gpu.md").read_text("utf-8")
    assert gpu_report.bounds_table(BOUNDS) in page


def test_a_table_without_bounds_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu_report", "--table", "docs/gpu.md"])
    with pytest.raises(SystemExit):
        gpu_report.main()
    assert "--bounds FILE" in capsys.readouterr().err


@pytest.mark.parametrize("variant", gpu_report.VARIANTS, ids=str)
def test_no_variant_spills(variant):
    if str(variant) not in SAMPLE and "GRADDROP_ALL" not in os.environ:
        pytest.skip("compiled with the others by make test-all")
    report = gpu_report.examine(variant, "sm_90")
    assert (report.spills, report.stack) == (0, 0)
    widths = dict(report.passes["wide"].widths)
    if variant.own:
        assert widths.pop(4) == 6  # a factor at a time, of each tile's block
    assert set(widths) == {16}
    found, most = gpu_report.numbers(report), BOUNDS.get(VERSION, {}).get(str(variant))
    if most is None:
        pytest.skip(f"its registers and instructions were not measured with Triton {VERSION}")
    assert all(number <= bound for number, bound in zip(found, most, strict=True)), f"{found}, at most {most}"


def test_strided_blocks_with_counts_of_their_own_compile_for_amd():
    variant = Variant("block", effect="freeze", own=True, dims=2)
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
