"""The native CPU op: every instruction-set level of this processor against the reference and, bit for bit, the
oracle."""

import math
import os
import re
import shutil
import subprocess
import types
from functools import partial
from pathlib import Path

import parity
import pytest
import torch
from hypothesis import given

from graddrop_fused import cpu, dispatch, mask_stream, reference
from graddrop_fused.contract import CONTRACT_VERSION, Batch, Effect, Integer, Mask, Real, Shard
from graddrop_fused.rules import SGD, AdamW, MaskOnly

CPU = torch.device("cpu")
LEVELS = list(range(len(cpu.levels()))) + [cpu.ORACLE]
NAMES = {**dict(enumerate(cpu.LEVELS)), cpu.ORACLE: "oracle"}
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
OTHER_DTYPES = [(F32, F32, F16), (F32, F32, F64), (BF16, BF16, F16), (F64, F32, F64), (F64, F64, F32)]  # of `Case`
SIMD = [level for level in LEVELS if level != cpu.ORACLE]

needs_op = pytest.mark.skipif(cpu.unavailable(CPU) is not None, reason=str(cpu.unavailable(CPU)))
at_every_level = pytest.mark.parametrize("level", LEVELS, ids=NAMES.get)
at_every_simd_level = pytest.mark.parametrize("level", SIMD, ids=NAMES.get)


def backend(level: int):
    return types.SimpleNamespace(update=partial(cpu.update, level=level), pack=partial(cpu.pack, level=level))


def assert_same_bits(a: Batch, b: Batch) -> None:
    others = parity.lists_of(b)
    for name, tensors in parity.lists_of(a).items():
        for i, (x, y) in enumerate(zip(tensors, others[name], strict=True)):
            if x is not None:
                assert torch.equal(parity._bits(x), parity._bits(y)), f"{name}[{i}] differs"


def assert_same_as_oracle(level: int, case: parity.Case) -> None:
    """NaN apart, whose payload is the processor's business."""
    specs = tuple(parity.replace(s, grad=s.grad.replace("wild", "normal")) for s in case.specs)
    compare_with_oracle(level, parity.replace(case, specs=specs))
    if all(s.grad != "none" and not s.grad_expanded for s in specs):  # what is masked in place must be there
        specs = tuple(parity.replace(s, grad="normal") for s in specs)
        compare_with_oracle(level, parity.replace(case, specs=specs, rule=MaskOnly()))


def compare_with_oracle(level: int, case: parity.Case) -> None:
    expected = parity.build(case)
    actual = parity.clone(expected)
    for batch, at in ((expected, cpu.ORACLE), (actual, level)):
        if case.rule == MaskOnly():
            batch.params = batch.grads
        cpu.update(batch, case.rule, seed=case.seed, level=at)
    assert_same_bits(actual, expected)


# Against the reference: masks bit for bit, arithmetic by tolerance


@needs_op
@at_every_level
@pytest.mark.parametrize("case", parity.CASES, ids=str)
def test_parity(level, case):
    parity.check_update(backend(level), case)
    parity.check_mask(backend(level), case)
    parity.check_pack(backend(level), case)


@needs_op
@at_every_level
def test_known_answers(level):
    parity.check_known_answers(backend(level))


@needs_op
@at_every_simd_level
@given(case=parity.cases())
def test_fuzz(level, case):
    parity.check_update(backend(level), case)
    assert_same_as_oracle(level, case)


@needs_op
@at_every_simd_level
@given(case=parity.cases())
def test_fuzz_masks(level, case):
    parity.check_mask(backend(level), case)
    parity.check_pack(backend(level), case)


# Bit for bit: levels, threads, cuts, layouts


@needs_op
@at_every_simd_level
@pytest.mark.parametrize("case", parity.CASES, ids=str)
def test_levels_give_the_oracles_bits(level, case):
    assert_same_as_oracle(level, case)


@needs_op
@at_every_simd_level
@pytest.mark.parametrize("dtypes", OTHER_DTYPES, ids=lambda dtypes: "-".join(map(str, dtypes)))
def test_other_dtypes_are_widened(level, dtypes):
    """Those that no optimizer has: they were taken for bfloat16 or float64, and memory read and written beyond."""
    for rule in parity.RULES.values():
        compare_with_oracle(level, parity.Case("other", (parity.Spec((1000,)),), *dtypes, rule=rule))


@needs_op
@at_every_level
def test_subnormal_state_becomes_zero(level):
    """What decays without gradients would stay subnormal for ever, and slow. Callers' arithmetic is not touched."""
    batch = small_batch()
    for tensors in (batch.params, *batch.states):
        tensors[0].fill_(1e-39)
    batch.grads[0] = None
    cpu.update(batch, AdamW(), seed=0, level=level)
    for tensors in (batch.params, *batch.states):
        assert torch.equal(tensors[0], torch.zeros(300))
    assert (torch.full((100,), 1e-39) * 1.0 != 0).all()


@needs_op
@at_every_level
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_a_nan_stays_in_amsgrads_maximum(level, dtype):
    """As in torch.maximum, also where exp_avg_sq has none, since somebody has put another in its place."""
    case = parity.Case("nan", (parity.Spec((300,)),), dtype, dtype, dtype, rule=AdamW(amsgrad=True))
    batch = parity.build(case)
    batch.states[2][0][::3] = math.nan
    cpu.update(batch, case.rule, seed=case.seed, level=level)
    there = torch.arange(300) % 3 == 0
    assert torch.equal(batch.params[0].isnan(), there) and torch.equal(batch.states[2][0].isnan(), there)
    assert not batch.states[1][0].isnan().any()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_op
@at_every_simd_level
@pytest.mark.parametrize("effect", Effect)
def test_threads_give_the_same_bits(level, effect, threads):
    specs = [parity.Spec((n,), stream_id=n, effect=effect, p=0.3) for n in (1, 70_001, 0, 129, 4999, 131_072, 33)]
    specs += [parity.Spec((90_000,), Mask.BLOCK, block=1024, effect=effect), parity.Spec((5000,), Mask.GAUSSIAN)]
    specs += [parity.Spec((200, 300), order=(1, 0), effect=effect), parity.Spec((300, 301), Mask.PACKED)]
    case = parity.Case("threads", tuple(specs))
    results = []
    for count in (1, 2, 3, 4):
        threads(count)
        batch = parity.build(case)
        cpu.update(batch, AdamW(), seed=case.seed, level=level)
        masked = parity.clone(batch)
        masked.params, masked.states = masked.grads, []
        cpu.update(masked, MaskOnly(), seed=case.seed, level=level)
        batch.grads = masked.grads
        for i, words in enumerate(batch.packed):
            batch.packed[i] = (
                torch.zeros((batch.shards[i].numel + 31) // 32, dtype=torch.int32) if words is None else words
            )
        batch.cache.clear()
        cpu.pack(batch, seed=case.seed, level=level)
        results.append(batch)
    for other in results[1:]:
        assert_same_bits(other, results[0])


@needs_op
@at_every_simd_level
def test_a_shard_computes_what_the_whole_does(level):
    n = 3000
    whole = parity.build(parity.Case("whole", (parity.Spec((n,), p=0.4),)))
    parts = parity.clone(whole)
    cpu.update(whole, AdamW(), seed=3, level=level)
    for begin, end in ((0, 77), (77, 1000), (1000, 1128), (1128, n)):
        views = {name: [getattr(parts, name)[0][begin:end]] for name in ("params", "grads")}
        views["states"] = [[tensors[0][begin:end]] for tensors in parts.states]
        shard = Shard((end - begin,), (1,), begin)
        batch = Batch(shards=[shard], integers=parts.integers, reals=parts.reals, **views)
        cpu.update(batch, AdamW(), seed=3, level=level)
    assert_same_bits(parts, whole)


@needs_op
@at_every_simd_level
def test_gradients_that_move_and_change_layout(level):
    """One Batch over steps: gradients absent, moved, transposed, expanded, back again."""
    case = parity.Case("moving", (parity.Spec((17, 23)), parity.Spec((40,))))
    actual, expected = parity.build(case), parity.build(case)
    new = [lambda: torch.randn(17, 23), lambda: torch.randn(23, 17).t(), lambda: torch.randn(23).expand(17, 23)]
    none = lambda: None  # noqa: E731
    for make in (none, new[0], new[1], new[1], none, new[2], new[0], new[0], new[1], none, new[0], none, new[1]):
        grad = make()
        for batch in (actual, expected):
            batch.grads[0] = grad
        expected.cache.clear()
        cpu.update(actual, AdamW(), seed=1, level=level)
        cpu.update(expected, AdamW(), seed=1, level=cpu.ORACLE)
        assert_same_bits(actual, expected)


@needs_op
@at_every_simd_level
def test_first_gradient_of_a_sliced_parameter(level):
    """Its Batch was made without a gradient, and the gradient lies otherwise than the parameter."""
    case = parity.Case("sliced", (parity.Spec((17, 46)),))
    actual, expected = parity.build(case), parity.build(case)
    for batch in (actual, expected):
        for tensors in (batch.params, *batch.states):
            tensors[0] = tensors[0][:, ::2]
        batch.shards[0] = Shard.whole((17, 23))
    for grad in (None, torch.randn(17, 23), torch.randn(17, 23)):
        actual.grads[0] = expected.grads[0] = grad
        expected.cache.clear()
        cpu.update(actual, AdamW(), seed=1, level=level)
        cpu.update(expected, AdamW(), seed=1, level=cpu.ORACLE)
        assert_same_bits(actual, expected)


@needs_op
@at_every_simd_level
def test_blocks_of_every_length_are_what_their_elements_are(level):
    """A block mask equals the packed one of the same bits, tile borders and shards included."""
    for effect in Effect:
        for block in (1, 2, 7, 64, 100, 128, 1000, 1024):
            spec = parity.Spec((5000,), Mask.BLOCK, block=block, effect=effect, shard=Shard((5000,), (1,), 77))
            drawn = parity.build(parity.Case("blocks", (spec,)))
            read = parity.clone(drawn)
            read.packed = [torch.zeros(157, dtype=torch.int32)]
            cpu.pack(read, seed=3, level=level)
            read.integers[:, Integer.MASK] = Mask.PACKED
            read.cache.clear()
            for batch in (drawn, read):
                cpu.update(batch, AdamW(), seed=3, level=level)
            assert_same_bits(read, parity.replace(drawn, packed=read.packed))


# What compilers make of it


@needs_op
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump, to read the op's instructions")
def test_no_masked_loads():
    """The hardware's prefetcher does not follow a masked load (or store), so that a step from memory would take nearly
    twice as long. Compilers fold a select into the load before it unless something keeps them apart."""
    (op,) = Path(cpu.__file__).parent.glob("_cpu.*")
    if b"clang version" in op.read_bytes():
        pytest.skip("clang folds them all the same: its op is right, and slower where memory is fast")
    if b"__asan_init" in op.read_bytes():
        pytest.skip("a sanitizer's build (make sanitize) is compiled otherwise; the suite looks at the usual one")
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", op], check=True, capture_output=True, text=True
    ).stdout
    own = r"\(%[re](?:ip|sp|bp)"  # constants, and the stack
    masked = [line for line in text.splitlines() if "{%k" in line and "(%" in line and not re.search(own, line)]
    assert not masked, f"{len(masked)} masked memory accesses, the first: {masked[:3]}"
    assert len(text) > 100_000  # it was the op that was read


# More than 2**31 elements


@needs_op
def test_pack_beyond_32_bits():
    n, tail = 2**31 + 1000, 200_000
    rows = {"integers": torch.tensor([[Mask.ELEMENT, 0, 1, 7, *mask_stream.bernoulli_window(0.5), 1]])}
    rows["reals"] = torch.ones(1, Real.columns(), dtype=torch.float64)
    words = torch.empty((n + 31) // 32, dtype=torch.int32)
    cpu.pack(Batch(params=[torch.zeros(1).expand(n)], shards=[Shard.whole((n,))], packed=[words], **rows), seed=5)
    start = n - tail - (n - tail) % 32
    expected = torch.empty((n - start + 31) // 32, dtype=torch.int32)
    reference.pack(Batch(params=[], shards=[Shard((n - start,), (1,), start)], packed=[expected], **rows), seed=5)
    assert torch.equal(words[start // 32 :], expected)


@needs_op
@pytest.mark.slow
@pytest.mark.skipif(
    os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 12 << 30, reason="needs 12 GiB of free memory"
)
def test_masking_beyond_32_bits():
    n, tail = 2**31 + 1000, 4000
    rows = {"integers": torch.tensor([[Mask.ELEMENT, 0, 1, 7, *mask_stream.bernoulli_window(0.5), 1]])}
    rows["reals"] = torch.ones(1, Real.columns(), dtype=torch.float64)
    grad = torch.ones(n, dtype=torch.bfloat16)
    grads = [grad]
    cpu.update(Batch(params=grads, shards=[Shard.whole((n,))], grads=grads, **rows), MaskOnly(), seed=5)
    elements = torch.arange(n - tail, n)
    random = mask_stream.element_random(elements, seed=5, draw=1, stream_id=7)
    kept = mask_stream.decide(random, *mask_stream.bernoulli_window(0.5))
    assert torch.equal(grad[-tail:], kept.to(torch.bfloat16))


# Why it cannot run


@pytest.fixture
def reload(monkeypatch):
    """A function that makes cpu load again; afterwards everything is as before."""

    def again():
        cpu._load.cache_clear()
        dispatch.choose.cache_clear()
        dispatch._warn_if_unavailable.cache_clear()

    with monkeypatch.context() as patch:
        yield types.SimpleNamespace(setattr=patch.setattr, setenv=patch.setenv, again=again)
    again()


def small_batch() -> Batch:
    return parity.build(parity.Case("small", (parity.Spec((300,)),)))


def assert_reference_serves(*parts: str) -> None:
    reason = cpu.unavailable(CPU)
    assert reason is not None and "\n" not in reason
    for part in parts:
        assert part in reason
    with pytest.warns(RuntimeWarning, match="reference serves cpu tensors") as caught:
        assert dispatch.choose("auto", CPU, torch.float32) is reference
        assert dispatch.choose("auto", CPU, torch.bfloat16) is reference
    assert [str(warning.message).endswith(reason) for warning in caught] == [True]  # once
    with pytest.raises(RuntimeError, match="backend='cpu'"):
        dispatch.choose("cpu", CPU, torch.float32)
    with pytest.raises(RuntimeError) as error:
        cpu.update(small_batch(), AdamW(), seed=0)
    assert str(error.value) == reason


def test_not_built(reload, tmp_path):
    reload.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    reload.setenv("GRADDROP_CACHE", str(tmp_path))
    reload.again()
    assert_reference_serves("was not built", "python -m graddrop_fused build")


@pytest.mark.parametrize(
    "method, error",
    [("home", RuntimeError("Could not determine home directory.")), ("exists", PermissionError(13, "denied"))],
)
def test_not_built_and_no_cache_to_look_into(reload, tmp_path, method, error):
    """As in containers: a user without an entry in /etc/passwd, or with the home directory of another."""

    def fail(*_):
        raise error

    reload.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    reload.setenv("GRADDROP_CACHE", "")
    reload.setenv("XDG_CACHE_HOME", "")
    reload.setattr(Path, method, fail)
    reload.again()
    assert_reference_serves("was not built", "python -m graddrop_fused build")


def test_broken(reload, tmp_path):
    (tmp_path / "_cpu.abi3.so").write_bytes(b"not a library")
    reload.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    reload.again()
    assert_reference_serves("_cpu.abi3.so does not load")


@needs_op
def test_built_for_another_contract(reload):
    reload.setattr(cpu, "CONTRACT_VERSION", 999)
    reload.again()
    assert_reference_serves("another version", f"contract version {CONTRACT_VERSION}, not 999")


@needs_op
def test_built_for_another_mask_stream(reload):
    """Its masks would be others."""
    reload.setattr(mask_stream, "VERSION", 999)
    reload.again()
    assert_reference_serves("another version", "mask stream version 2, not 999")


@needs_op
def test_rule_that_it_does_not_know():
    batch = small_batch()
    before = parity.clone(batch)
    with pytest.raises(ValueError, match="rule must be one that .* lists .*, got 'sgd' with 2"):
        cpu.update(batch, SGD(momentum=True), seed=0)
    assert_same_bits(batch, before)


@needs_op
@pytest.mark.parametrize("name", cpu.levels())
def test_capability_forces_a_level(reload, name):
    reload.setenv("GRADDROP_CPU_CAPABILITY", name)
    reload.again()
    assert cpu.unavailable(CPU) is None
    assert cpu._op(None)[1] == cpu.LEVELS.index(name)


@needs_op
def test_capability_that_this_processor_lacks(reload):
    reload.setenv("GRADDROP_CPU_CAPABILITY", "avx1024")
    reload.again()
    assert_reference_serves("GRADDROP_CPU_CAPABILITY=avx1024", ", ".join(cpu.LEVELS[: len(SIMD)]))


@needs_op
def test_level_beyond_this_processor():
    if len(SIMD) == len(cpu.LEVELS):
        pytest.skip("this processor has every level")
    with pytest.raises(RuntimeError, match="level must be 0 to"):
        cpu.update(small_batch(), AdamW(), seed=0, level=len(SIMD))


def test_other_devices():
    assert "cuda" in cpu.unavailable(torch.device("cuda"))


@needs_op
def test_tables_of_another_shape_are_refused():
    batch = small_batch()
    batch.integers = batch.integers[:, : Integer.BLOCK].contiguous()
    before = parity.clone(batch)
    with pytest.raises(RuntimeError, match="columns"):
        cpu.update(batch, AdamW(), seed=0)
    assert_same_bits(batch, before)


@needs_op
def test_dtype_that_it_does_not_know():
    batch = small_batch()
    batch.params[0] = batch.params[0].to(torch.complex64)
    with pytest.raises(TypeError, match="parameter must have one of the dtypes"):
        cpu.update(batch, AdamW(), seed=0)
