"""The reference and the contract's geometry against loops written from the equations, and against torch's AdamW."""

import itertools
import math
from functools import partial

import independent
import parity
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import F32, F64, Case, Spec

from graddrop_fused import reference
from graddrop_fused.contract import Batch, Effect, Integer, Layout, Mask, Real, Shard
from graddrop_fused.layout import collapse, layout_row
from graddrop_fused.rules import SGD, AdamW


def sign(x):
    return (x > 0) - (x < 0)


def adamw_by_hand(spec: Spec, rule, g: float, p: float, state: list[float]) -> tuple[float, list[float]]:
    """(change of the parameter, new state), from the paper's and the rule's own equations; ``state`` is m, v, vmax."""
    (beta1, beta2), (m, v, *vmax) = spec.betas, state
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    vmax = [max(old, v) for old in vmax]
    m_hat = m / (1 - beta1**spec.step)
    v_hat = (vmax[0] if vmax else v) / (1 - beta2**spec.step)
    return -spec.lr * spec.weight_decay * p - spec.lr * m_hat / (math.sqrt(v_hat) + spec.eps), [m, v, *vmax]


def sgd_by_hand(spec: Spec, rule, g: float, p: float, state: list[float]) -> tuple[float, list[float]]:
    g += spec.weight_decay * p
    if not state:
        return -spec.lr * g, []
    m = g if spec.step == 1 else spec.momentum * state[0] + (1 - spec.dampening) * g
    return -spec.lr * (g + spec.momentum * m if spec.nesterov else m), [m]


def lion_by_hand(spec: Spec, rule, g: float, p: float, state: list[float]) -> tuple[float, list[float]]:
    (beta1, beta2), (m,) = spec.betas, state
    return -spec.lr * (sign(beta1 * m + (1 - beta1) * g) + spec.weight_decay * p), [beta2 * m + (1 - beta2) * g]


BY_HAND = {"adamw": adamw_by_hand, "sgd": sgd_by_hand, "lion": lion_by_hand}


def step_by_hand(spec: Spec, rule, seed: int, e: int, kept: bool, g: float, p: float, state: list[float]):
    """One element's masked step in Python floats: (parameter, state), from equations 2 and 3."""
    lo, span = spec.lo_span()
    rescale = 2**16 / (span + 1) if spec.mask not in (Mask.KEEP, Mask.DROP, Mask.GAUSSIAN) else 1.0
    if spec.maximize:
        g = -g
    if spec.effect == Effect.FREEZE and not kept:
        return p, state
    if spec.effect != Effect.UPDATE:
        g = rescale * g if kept else 0.0
    if spec.mask == Mask.GAUSSIAN:
        g *= 1 + spec.noise_std * independent.normal(e, seed, spec.draw, spec.stream_id)
    change, state = BY_HAND[rule.name](spec, rule, g, p, state)
    if spec.effect == Effect.UPDATE:
        change = rescale * change if kept else 0.0
    return p + change, state


def kept_by_hand(spec: Spec, seed: int, e: int, bit: bool) -> bool:
    at = (seed, spec.draw, spec.stream_id)
    drawn = {
        Mask.ELEMENT: lambda: independent.element_random(e, *at),
        Mask.BLOCK: lambda: independent.block_random(e // spec.block, *at),
        Mask.LAYER: lambda: independent.layer_random(*at),
    }
    if spec.mask in drawn:
        return independent.kept(drawn[spec.mask](), *spec.lo_span())
    return {Mask.KEEP: True, Mask.GAUSSIAN: True, Mask.DROP: False, Mask.PACKED: bit}[spec.mask]


STEPS = [
    Spec(shape, mask, effect, p=0.4, block=128 if mask == Mask.BLOCK else 1, stream_id=number, **options)
    for mask, effect in itertools.product(Mask, Effect)
    for number, shape, options in (
        (1, (17, 23), {}),
        (2, (300,), {"nesterov": True, "shard": Shard((300,), (1,), 2**33 + 55), "maximize": True}),
        (4, (9, 20), {"order": (1, 0), "grad_gap": 1, "shard": Shard.box((9, 20), (9, 77), (0, 31)), "step": 1}),
    )
    if not (mask == Mask.GAUSSIAN and effect != Effect.GRADIENT)
]


@pytest.mark.parametrize("spec", STEPS, ids=lambda s: f"{s.mask.name}-{s.effect.name}-{s.stream_id}".lower())
@pytest.mark.parametrize("rule", dict.fromkeys(parity.RULES.values()), ids=repr)
def test_an_update_follows_the_equations(spec, rule):
    case = Case("by-hand", (spec,), F64, F64, F64, rule, grad_scale=128.0 if spec.stream_id == 4 else None)
    batch = parity.build(case)
    before = parity.clone(batch)
    scale = None if case.grad_scale is None else torch.tensor(case.grad_scale)
    reference.update(batch, rule, seed=case.seed, grad_scale=scale)

    whole = spec.shard or Shard.whole(spec.shape)
    words = None if before.packed[0] is None else before.packed[0].tolist()
    seen = set()
    for n, index in enumerate(itertools.product(*map(range, spec.shape))):
        e = whole.offset + sum(i * s for i, s in zip(index, whole.strides, strict=True))
        bit = words is not None and bool(words[n // 32] >> (n % 32) & 1)
        kept = kept_by_hand(spec, case.seed, e, bit)
        seen.add(kept)
        old = [tensors[0][index].item() for tensors in before.states]
        g = before.grads[0][index].item() / (case.grad_scale or 1.0)
        p, state = step_by_hand(spec, rule, case.seed, e, kept, g, before.params[0][index].item(), old)
        assert batch.params[0][index].item() == pytest.approx(p, rel=1e-11, abs=1e-13)
        for tensors, value in zip(batch.states, state, strict=True):
            assert tensors[0][index].item() == pytest.approx(value, rel=1e-11, abs=1e-13)
    if spec.mask in (Mask.ELEMENT, Mask.PACKED):
        assert seen == {True, False}


@pytest.mark.parametrize("case", parity.CASES, ids=str)
def test_the_reference_is_within_its_own_tolerances(case):
    """In float32, bfloat16 and float16 against itself in float64: the bounds that other backends are held to."""
    parity.check_update(reference, case)
    parity.check_mask(reference, case)
    parity.check_pack(reference, case)


def test_the_reference_gives_the_known_answers():
    parity.check_known_answers(reference)


@given(case=parity.cases())
def test_the_reference_on_fuzzed_cases(case):
    parity.check_update(reference, case)
    parity.check_mask(reference, case)
    parity.check_pack(reference, case)


class Mutant:
    """The reference with one mistake. The parity checks must not let it pass."""

    def __init__(self, before=None, after=None):
        self.before, self.after = before or (lambda batch: None), after or (lambda batch: None)

    def _run(self, function, batch, **options):
        self.before(batch)
        function(batch, **options)
        self.after(batch)

    def update(self, batch, rule, **options):
        self._run(partial(reference.update, rule=rule), batch, **options)

    def pack(self, batch, **options):
        self._run(reference.pack, batch, **options)


def forget_offset(batch):
    batch.shards = [Shard(s.shape, s.strides, 0) for s in batch.shards]


def write_past_the_end(batch):
    p = batch.params[0]
    p.as_strided((1,), (1,), p.storage_offset() + p.numel()).fill_(0.0)


def narrow_window(batch):
    batch.integers[:, Integer.SPAN] -= 1


def nudge_parameter(batch):
    batch.params[0].mul_(1 + 2.0**-20)


def nudge_moment(batch):
    batch.states[1][0].mul_(1 + 2.0**-18)


def touch_frozen(batch):
    batch.states[0][0].mul_(-1)


SHARDED = Case("sharded", (Spec((300,), shard=Shard((300,), (1,), 33)),), steps=1)
FROZEN = Case("frozen", (Spec((300,), Mask.DROP, Effect.FREEZE),), steps=1)
EDGES = next(case for case in parity.CASES if case.name == "edges-element")


@pytest.mark.parametrize(
    ("mutant", "case", "checks"),
    [
        (Mutant(before=forget_offset), SHARDED, "update mask pack"),
        (Mutant(before=narrow_window), EDGES, "update mask pack"),
        (Mutant(after=write_past_the_end), SHARDED, "update mask pack"),
        (Mutant(after=nudge_parameter), SHARDED, "update mask"),
        (Mutant(after=nudge_moment), SHARDED, "update"),
        (Mutant(after=touch_frozen), FROZEN, "update"),
    ],
    ids=("offset", "window", "overrun", "parameter", "moment", "frozen"),
)
def test_the_checks_can_fail(mutant, case, checks):
    for check in checks.split():
        with pytest.raises(AssertionError):
            getattr(parity, f"check_{check}")(mutant, case)


AGAINST_TORCH = {
    "adamw": (torch.optim.AdamW, {}),
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "maximize": (torch.optim.AdamW, {"maximize": True}),
    "no-decay": (torch.optim.AdamW, {"weight_decay": 0.0}),
    "other-betas": (torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-4, "lr": 1e-2}),
    "sgd": (torch.optim.SGD, {"weight_decay": 0.1}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3, "maximize": True}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", AGAINST_TORCH)
def test_with_nothing_dropped_it_is_torchs(dtype, name):
    """100 steps. bfloat16 parameters and state are rounded once a step here and after every operation by torch, so a
    step may end one unit in the last place (2**-8) off and 100 of them drift apart: 10 units of the largest value."""
    theirs_class, options = AGAINST_TORCH[name]
    generator = torch.Generator().manual_seed(0)
    settings = {"lr": 1e-3} | options
    start = [torch.randn(shape, generator=generator, dtype=F64).to(dtype) for shape in ((17, 23), (129,), ())]
    theirs = [torch.nn.Parameter(t.clone()) for t in start]
    ours = [t.clone() for t in start]
    optimizer = theirs_class(theirs, foreach=False, **settings)
    rule = {torch.optim.AdamW: AdamW, torch.optim.SGD: SGD}[theirs_class].of(optimizer.param_groups[0])
    states = [[torch.zeros_like(p) for p in ours] for _ in rule.states]
    integers = torch.zeros(len(ours), len(Integer), dtype=torch.int64)
    integers[:, Integer.MASK] = Mask.KEEP
    for step in range(1, 101):
        grads = [torch.randn(p.shape, generator=generator, dtype=F64).to(dtype) for p in ours]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        known = {k: v for k, v in optimizer.param_groups[0].items() if k in Spec.__dataclass_fields__}
        row = Spec((), Mask.KEEP, step=step, **known).reals(rule)
        shards = [Shard.whole(p.shape) for p in ours]
        reals = torch.tensor([row] * len(ours), dtype=F64)
        reference.update(Batch(ours, shards, integers, reals, grads, states), rule, seed=0)
    # 100 steps of a few roundings each; bfloat16 as above
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 10 * 2.0**-8}[dtype]
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).abs().max() <= tolerance * q.abs().max().clamp(min=1.0)
        if dtype != torch.bfloat16:
            for tensors, state_name in zip(states, rule.states, strict=True):
                expected = optimizer.state[theirs[0]][state_name]
                # squares cannot cancel, a mean of signed gradients can
                atol = 1e-9 if state_name.endswith("_sq") else 1e-6
                torch.testing.assert_close(tensors[0], expected, rtol=1e-5, atol=atol)


# Geometry


@st.composite
def geometries(draw):
    """A shard of random shape and box, and two random dense layouts of it."""
    whole = draw(st.lists(st.integers(1, 5), max_size=5))
    start = [draw(st.integers(0, n)) for n in whole]
    local = [draw(st.integers(0, n - s)) for n, s in zip(whole, start, strict=True)]
    offset = draw(st.sampled_from([0, 7, 2**40]))
    shard = Shard.box(local, whole, start)
    orders = [draw(st.permutations(range(len(whole)))) for _ in range(2)]
    tensors = [parity._place(torch.zeros(local), F32, order, draw(st.integers(0, 3))) for order in orders]
    return whole, start, Shard(shard.shape, shard.strides, shard.offset + offset), offset, tensors


@given(geometry=geometries())
def test_elements_of_a_box(geometry):
    whole, start, shard, offset, _ = geometry
    numbers = torch.arange(math.prod(whole)).reshape(whole)
    box = numbers[tuple(slice(s, s + n) for s, n in zip(start, shard.shape, strict=True))].reshape(-1) + offset
    assert torch.equal(shard.elements(0, shard.numel), box)
    for cut in {0, shard.numel // 3, shard.numel}:
        assert torch.equal(shard.elements(cut, shard.numel), box[cut:])
        assert torch.equal(shard.elements(0, cut), box[:cut])


@given(geometry=geometries())
def test_layout_rows_walk_every_element_in_row_major_order(geometry):
    _, _, shard, _, (param, grad) = geometry
    collapsed = collapse(shard, param.stride(), grad.stride())
    assert len({len(part) for part in collapsed}) == 1 and 1 not in collapsed[0]
    batch = Batch([param], [shard], torch.zeros(1, len(Integer)), torch.zeros(1, Real.columns()), grads=[grad])
    row = layout_row(batch, 0)
    assert len(row) == Layout.columns()
    assert row[Layout.PARAM] == param.data_ptr() and row[Layout.GRAD] == grad.data_ptr() and row[Layout.STATE] == 0
    assert (row[Layout.NUMEL], row[Layout.OFFSET]) == (shard.numel, shard.offset)
    dims = row[Layout.NDIM]
    sizes = row[Layout.SIZE :][:dims]

    def walk(first_column):
        strides = row[first_column:][:dims]
        return [sum(i * s for i, s in zip(at, strides, strict=True)) for at in itertools.product(*map(range, sizes))]

    if shard.numel:
        assert [shard.offset + step for step in walk(Layout.GLOBAL_STRIDE)] == shard.elements(0, shard.numel).tolist()
        for tensor, column in ((param, Layout.PARAM_STRIDE), (grad, Layout.GRAD_STRIDE)):
            indices = itertools.product(*map(range, tensor.shape))
            expected = [sum(i * s for i, s in zip(at, tensor.stride(), strict=True)) for at in indices]
            assert walk(column) == expected


def test_dense_tensors_collapse_to_one_dimension():
    whole = Shard.whole((4, 5, 6))
    strides = torch.empty(4, 5, 6).stride()
    assert collapse(whole, strides) == ([120], [1], [1])
    assert collapse(Shard.box((4, 5, 6), (9, 5, 6), (2, 0, 0)), strides) == ([120], [1], [1])
    assert collapse(Shard.box((4, 5, 6), (4, 5, 9), (0, 0, 2)), strides) == ([20, 6], [9, 1], [6, 1])


def test_a_tensor_of_too_many_dimensions_is_refused_by_name():
    param = torch.zeros(2, 2, 2, 2, 2, 2, 2).permute(6, 5, 4, 3, 2, 1, 0)
    batch = Batch([param], [Shard.whole(param.shape)], torch.zeros(1, len(Integer)), torch.zeros(1, Real.columns()))
    with pytest.raises(ValueError, match="must collapse to at most 6 dimensions for compiled backends, got 7"):
        layout_row(batch, 0)
