"""The Triton kernels under Triton's interpreter: parity with the reference, and launches counted.

Triton chooses between interpreter and compiler as kernels are decorated, so the cases run in a process of their own,
with TRITON_INTERPRET=1; this file is both that process's tests and the test that starts it. It takes minutes.
"""

import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import hypothesis
import parity
import pytest
import torch
from interpreter import repaired_interpreter
from passes import several_passes

from graddrop_fused import GradDropAdamW, GradDropEpoch, mask_stream, reference, triton_backend
from graddrop_fused.contract import Batch, Layout, Real
from graddrop_fused.device_rows import DeviceRow, device_rows, indexing
from graddrop_fused.layout import LayoutTable
from graddrop_fused.rules import Rule

ROUNDING = str(Path(__file__).with_name("test_rounding.py"))  # has cases for every backend
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_under_the_interpreter starts")


PARTS, SAMPLE = 8, 1  # the interpreter is slow: an ordinary run takes each eighth of its tests


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
@pytest.mark.parametrize("part", range(PARTS))
def test_under_the_interpreter(part):
    if part >= SAMPLE and "GRADDROP_ALL" not in os.environ:
        pytest.skip("runs with the others by make test-all")
    pytest.importorskip("triton", reason="triton is not installed: nothing to interpret")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, ROUNDING],
        env={**os.environ, "TRITON_INTERPRET": "1", "GRADDROP_PART": f"{part}/{PARTS}"},
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


CHUNK, PASS = 1024, 512


@pytest.fixture
def small_passes(monkeypatch):
    """Passes of 512 elements, chunks of 1024: small tensors see every kind of pass and several programs."""
    monkeypatch.setattr(triton_backend, "CHUNK", CHUNK)
    sizes, pack_sizes = triton_backend.sizes, triton_backend.pack_sizes
    small = {"TILES": PASS // 128, "NARROW": PASS // 128, "STRIDED": PASS, "CHUNK": CHUNK}
    monkeypatch.setattr(triton_backend, "sizes", lambda *args: sizes(*args) | small)
    monkeypatch.setattr(
        triton_backend, "pack_sizes", lambda *args: {k: small.get(k, v) for k, v in pack_sizes(*args).items()}
    )
    with repaired_interpreter():
        yield


def distinct(cases: list[parity.Case], unread: set[str], **ignored) -> list[parity.Case]:
    """The cases that differ in more than what a kernel does not read: those fields of Spec, and of Case."""
    kept = {}
    for case in cases:
        default = {f.name: f.default for f in fields(parity.Spec) if f.name in unread}
        specs = tuple(replace(spec, **default) for spec in case.specs)
        kept.setdefault(replace(case, name="", specs=specs, **ignored), case)
    return list(kept.values())


LONG = several_passes(CHUNK, PASS)
# the same to a kernel as other cases: it sees factors, no hyperparameters, and one rule as it sees another
RULES = {"amsgrad": "freeze", "sgd": "update", "momentum": "gradient", "nesterov": "", "lion": "update"}  # with effect
SAME = {"large"} | {f"first-step-{rule}" for rule in parity.RULES} | {f"mixed-batch-{rule}" for rule in RULES}
SAME |= {f"kinds-{e}-{rule}" for rule, effect in RULES.items() for e in ("gradient", "freeze", "update") if e != effect}
# of 2-byte dtypes one each: they differ in conversions, not in accesses
SAME |= {
    case.name for case in parity.CASES if case.name.startswith("dtypes-") and {"f16", "bf16"} <= {*case.name.split("-")}
}
REPLACED = {case.name.removesuffix("-several-passes") for case in LONG}  # by longer tensors
CASES = [case for case in parity.CASES if case.name not in SAME | REPLACED]
CASES += [case for case in LONG if case.name.removesuffix("-several-passes") not in SAME]
NUMBERS = {"lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov", "step"}
ARITHMETIC = NUMBERS | {"effect", "maximize"}
GRADIENTS = {"grad", "grad_order", "grad_offset", "grad_gap", "grad_expanded", "rescale", "noise_std"}
MEMORY = {"order", "offset", "gap"}
NO_AMP = {"grad_scale": None, "found_inf": None, "rule": parity.RULES["sgd"]}
F32 = torch.float32


@interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_update(small_passes, case):
    parity.check_update(triton_backend, case)


@interpreted
@pytest.mark.parametrize("case", distinct(CASES, ARITHMETIC | MEMORY, param=F32, state=F32, **NO_AMP), ids=str)
def test_mask(small_passes, case):
    parity.check_mask(triton_backend, case)


@interpreted
@pytest.mark.parametrize(
    "case",
    distinct(CASES, ARITHMETIC | GRADIENTS | MEMORY, param=F32, grad=F32, state=F32, **NO_AMP),
    ids=str,
)
def test_pack(small_passes, case):
    parity.check_pack(triton_backend, case)


@interpreted
@pytest.mark.nightly
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])  # one size for all cases
@hypothesis.given(case=parity.cases())
def test_fuzz_masks(small_passes, case):
    parity.check_mask(triton_backend, case)
    parity.check_pack(triton_backend, case)


@interpreted
def test_known_answers(small_passes):
    parity.check_known_answers(triton_backend)


@interpreted
@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name in ("mixed-batch-adamw", "kinds-freeze-amsgrad-several-passes", "p-extremes")],
    ids=str,
)
def test_with_tables_on_the_device(small_passes, case):
    parity.check_update(triton_backend, case, capturable=True)


@interpreted
@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name.startswith(("transposed", "six-", "gaps", "box", "beyond"))],
    ids=str,
)
def test_indices_of_64_bits(small_passes, monkeypatch, case):
    """Kernels count in 64 bits where a strided tensor reaches beyond 32: too long for a test, but not its kernel."""
    monkeypatch.setattr(triton_backend, "indexing", lambda rows: indexing(rows) | {"WIDE": True})
    parity.check_update(triton_backend, case)
    parity.check_pack(triton_backend, case)


@interpreted
@pytest.mark.parametrize("offset", [0, 77])
def test_pack_beyond_32_bits_beside_a_strided_tensor(small_passes, monkeypatch, offset):
    """The last chunks of a linear tensor, in a call whose strided one needs indices of 32 bits only."""
    n, first = 2**31 + 3 * CHUNK + 100, 2**31 + CHUNK
    row = [parity.Mask.ELEMENT, parity.Effect.GRADIENT, 1, 7, *mask_stream.bernoulli_window(0.5), 1]
    shards = [parity.Shard((n,), (1,), offset), parity.Shard.box((5, 9), (5, 23), (0, 3))]
    words = [torch.empty((shard.numel + 31) // 32, dtype=torch.int32) for shard in shards]
    integers, reals = torch.tensor([row] * 2), torch.ones(2, Real.columns(), dtype=torch.float64)
    chunk_table = triton_backend.chunk_table

    def last_chunks(numels):
        table = chunk_table(numels)
        return table[(table[:, 0] == 1) | (table[:, 1] >= first)]

    monkeypatch.setattr(triton_backend, "chunk_table", last_chunks)
    triton_backend.pack(Batch([], shards, integers, reals, packed=words), seed=5)
    shards[0] = parity.Shard((n - first,), (1,), offset + first)
    expected = [torch.empty((shard.numel + 31) // 32, dtype=torch.int32) for shard in shards]
    reference.pack(Batch([], shards, integers, reals, packed=expected), seed=5)
    assert torch.equal(words[0][first // 32 :], expected[0])
    assert torch.equal(words[1], expected[1])


@interpreted
def test_one_launch_for_all_tensors(small_passes, monkeypatch):
    from graddrop_fused.kernels.triton import kernels

    launches = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launches.append(grid)
            return self.kernel[grid]

    for name in ("update_kernel", "pack_kernel"):
        monkeypatch.setattr(kernels, name, Counted(getattr(kernels, name)))
    case = parity.Case("many", tuple(parity.Spec((k,), stream_id=k) for k in (0, 1, 33, 300, 1000, 2500)))
    batch = parity.build(case)
    batch.packed = [torch.empty((shard.numel + 31) // 32, dtype=torch.int32) for shard in batch.shards]
    for step in range(3):
        triton_backend.update(batch, case.rule, seed=step)
    assert launches == [(1 + 1 + 1 + 1 + 3,)] * 3  # chunks of 1024 of the tensors that are not empty
    triton_backend.pack(batch, seed=1)
    assert len(launches) == 4


@interpreted
@pytest.mark.parametrize("drop", [GradDropEpoch(0.6, block="row"), GradDropEpoch(0.5, block=128, toggle=True)], ids=str)
@pytest.mark.parametrize("dtype, rounding", [(torch.float32, "nearest"), (torch.bfloat16, "stochastic")], ids=str)
def test_active_runs(small_passes, drop, dtype, rounding):
    """Rows of the tables that are runs, with state packed close: parameters and state of some epochs."""
    options = {"lr": 1e-2, "drop": drop, "effect": "freeze", "seed": 3, "steps_per_epoch": 2, "rounding": rounding}
    sides = []
    for backend in ("triton", "reference"):
        generator = torch.Generator().manual_seed(0)
        shapes = {"a": (17, 128), "b": (9, 300), "c": (33,), "d": (1, 1), "e": (5, 7, 3), "f": (0, 2)}
        params = {n: torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in shapes.items()}
        opt = GradDropAdamW(params.items(), backend=backend, active_state=True, **options)
        for step in range(5):
            for name, p in params.items():
                absent = (name, step) == ("b", 3)
                grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
                p.grad = None if absent else grad
            opt.step()
        sides.append([t for p in params.values() for t in (p.detach(), *opt.state.get(p, {}).values())])
    assert len(sides[0]) == len(sides[1]) > len(shapes)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-9}
    for ours, theirs in zip(*sides, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
        if dtype == torch.bfloat16:  # the same random numbers: but for sums on an edge, the same bits
            assert (ours != theirs).sum() <= 0.01 * ours.numel()


def test_a_rule_without_a_kernel_is_refused():
    class Unknown(Rule):
        name = "unknown"

    with pytest.raises(NotImplementedError, match="kernels/triton/unknown.py"):
        triton_backend.rule_constants(Unknown())


def test_unavailable_says_what_is_missing(monkeypatch, tmp_path):
    triton = pytest.importorskip("triton", reason="triton is not installed: that is what is missing")
    assert triton_backend._no_launcher() is None or "install" in triton_backend._no_launcher()
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(triton_backend.sysconfig, "get_path", lambda name, scheme: str(tmp_path / scheme))
    monkeypatch.setattr(triton_backend.sysconfig, "get_default_scheme", lambda: "venv")
    assert "Python.h is missing" in triton_backend._no_launcher()
    (tmp_path / "posix_prefix").mkdir()
    (tmp_path / "posix_prefix" / "Python.h").touch()
    monkeypatch.setattr(triton_backend.sysconfig, "get_default_scheme", lambda: "posix_local")  # Debian's
    assert triton_backend._no_launcher() is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "cc").touch(0o755)  # which Triton does not look for
    assert "C compiler" in triton_backend._no_launcher()
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert "triton>=3.6" in triton_backend.unavailable(torch.device("cuda"))


# The layout table as a device has it


def _rows(case: parity.Case, in_memory_order: bool = True):
    batch = parity.build(case)
    return batch, device_rows(LayoutTable(batch).table, in_memory_order)


@pytest.mark.parametrize("case", [c for c in parity.CASES if c.specs], ids=str)
def test_rows_walk_every_element_in_the_order_of_memory(case):
    batch, rows = _rows(case)
    for i, row in enumerate(rows):
        size, *strides, _ = row[DeviceRow.SIZE :].reshape(6, -1)
        n = torch.arange(batch.shards[i].numel)
        at = [torch.zeros_like(n) for _ in strides]
        for d in range(6):
            here, n = (n % size[d], n // size[d]) if size[d] > 0 else (n, n)
            at = [a + here * stride[d] for a, stride in zip(at, strides, strict=True)]
        param, grad, index, local = at
        if not row[DeviceRow.LINEAR]:
            assert (param.diff() > 0).all() and (local.sort().values == torch.arange(len(local))).all()
        places = torch.arange(case.specs[i].shape and len(local) or 1)[: len(local)]
        rank = torch.empty_like(places)
        rank[local] = places  # where the row-major elements stand in the order of memory
        assert torch.equal(index[rank] + row[DeviceRow.OFFSET], batch.shards[i].elements(0, len(local)))
        for tensor, offsets in ((batch.params[i], param), (batch.grads[i], grad)):
            if tensor is not None and not row[DeviceRow.LINEAR]:
                flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                there = flat[tensor.storage_offset() + offsets[rank]]
                assert torch.equal(there.nan_to_num(), tensor.reshape(-1).nan_to_num())


def test_reciprocals_divide_exactly():
    sizes = torch.tensor([2, 3, 5, 7, 641, 6700417, 2**16 - 1, 2**16, 2**16 + 1, 2**30, 2**30 + 1, 2**31 - 1])
    sizes = torch.cat([sizes, torch.randint(2, 2**31 - 1, (2000,)), torch.randint(2, 70_000, (2000,))])
    table = torch.zeros(len(sizes), Layout.columns(), dtype=torch.int64)
    table[:, Layout.NDIM], table[:, Layout.SIZE] = 1, sizes
    prepared = device_rows(table, True)[:, DeviceRow.RECIPROCAL]
    multiplier, shift = prepared & 0xFFFFFFFF, prepared >> 32
    multiples = torch.randint(0, 2**31 - 1, (len(sizes),)) // sizes * sizes
    for n in (torch.randint(0, 2**31, (len(sizes),)), multiples, (multiples - 1).clamp(min=0), sizes - 1, sizes):
        high = (n * (multiplier >> 16) + (n * (multiplier & 0xFFFF) >> 16)) >> 16  # of 64 bits, without overflow
        assert torch.equal(high >> shift, n // sizes)


def test_indexing_says_what_kernels_must_count():
    def of(*specs):
        return indexing(_rows(parity.Case("indexing", specs))[1])

    Spec = parity.Spec
    assert of(Spec((17, 23)), Spec(()), Spec((5,)), Spec((0, 3), order=(1, 0))) == {"DIMS": 0, "WIDE": False}
    assert of(Spec((17, 23), order=(1, 0))) == {"DIMS": 2, "WIDE": False}
    assert of(Spec((17, 23)), Spec((8, 3, 5, 7), order=(0, 2, 3, 1))) == {"DIMS": 3, "WIDE": False}
    far = parity.Shard.box((3, 40), (1 << 20, 1 << 31), (1 << 19, 999))
    assert of(Spec((3, 40), shard=far)) == {"DIMS": 2, "WIDE": True}


def test_moved_gradients_are_described_anew():
    """Addresses in the table of a batch, as a launch would read them, after gradients moved, turned, went and came."""
    case = parity.Case("moved", (parity.Spec((17, 23)), parity.Spec((40,)), parity.Spec((8, 3, 5))))
    batch = parity.build(case)
    tables = triton_backend._Tables(batch, torch.device("cpu"), True)
    moves = [
        [torch.zeros_like(g) for g in batch.grads],
        [torch.zeros(23, 17).t(), torch.zeros(40), torch.zeros(5, 3, 8).permute(2, 1, 0)],
        [None, torch.zeros(40), None],
        [torch.zeros(17, 23), None, torch.zeros(8, 3, 5)],
    ]
    for grads in moves:
        batch.grads = grads
        layout = tables.layout_now(batch)
        fresh = device_rows(LayoutTable(batch).table, True)
        present = torch.tensor([g is not None for g in grads])
        assert torch.equal(layout[present], fresh[present])
        assert layout[:, DeviceRow.GRAD].tolist() == [0 if g is None else g.data_ptr() for g in grads]
        assert tables.indexing == indexing(tables.rows)
        assert tables.layout_now(batch) is layout


def test_another_default_device():
    batch = parity.build(parity.Case("elsewhere", (parity.Spec((17, 23)), parity.Spec((400, 30), order=(1, 0)))))
    expected = triton_backend._Tables(batch, torch.device("cpu"), True)
    with torch.device("meta"):
        tables = triton_backend._Tables(batch, torch.device("cpu"), True)
    assert torch.equal(tables.layout, expected.layout) and torch.equal(tables.chunks, expected.chunks)


def test_schedules_that_end_compile_nothing_more():
    """A batch that does not say what it can reach: KEEP and DROP come and go, tensors left alone too."""
    Spec, Mask, Effect = parity.Spec, parity.Mask, parity.Effect

    def of(*specs, pairs=None):
        batch = parity.build(parity.Case("kinds", specs))
        batch.pairs = pairs
        return triton_backend.kinds_and_effects(batch)

    absent = Spec((5,), Mask.DROP, effect=Effect.FREEZE)
    for effect in (Effect.GRADIENT, Effect.UPDATE):
        masks = [of(Spec((5,), mask, effect=effect), absent) for mask in (Mask.KEEP, Mask.DROP)]
        assert masks == [{"KINDS": 1 << Mask.KEEP | 1 << Mask.DROP, "EFFECTS": 1 << effect}] * 2
        with_elements = of(Spec((5,), Mask.ELEMENT, effect=effect), absent)
        assert with_elements["KINDS"] == 1 << Mask.KEEP | 1 << Mask.DROP | 1 << Mask.ELEMENT
        assert with_elements == of(Spec((5,), Mask.ELEMENT, effect=effect), Spec((5,), Mask.KEEP, effect=effect))
    frozen = [of(Spec((5,), mask, effect=Effect.FREEZE)) for mask in (Mask.KEEP, Mask.DROP)]
    assert frozen == [{"KINDS": 1 << Mask.KEEP, "EFFECTS": 1 << Effect.FREEZE}] * 2
    said = frozenset({(Mask.ELEMENT, Effect.FREEZE), (Mask.DROP, Effect.FREEZE)})
    assert of(absent, pairs=said) == {"KINDS": 1 << Mask.ELEMENT, "EFFECTS": 1 << Effect.FREEZE}
