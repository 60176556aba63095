"""Parity: what every backend must agree on with the reference, as declarations and checks.

A :class:`Case` declares one call (a batch of tensors); ``CASES`` is the list that every backend runs and ``cases()``
is a hypothesis strategy over the same fields. ``check_update``, ``check_mask``, ``check_pack`` and
``check_known_answers`` take a backend: any object with the functions of kernels/README.md.

Masks are compared bit for bit. Arithmetic is compared with the reference run in float64, within the rounding error
that float32 arithmetic may make in any order, with or without fused multiply-add (see ``_bounds``).
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import hypothesis.strategies as st
import torch
from torch import Tensor

from graddrop_fused import mask_stream, reference
from graddrop_fused.contract import MAX_FACTORS, Batch, Effect, Integer, Mask, Real, Rounding, Shard
from graddrop_fused.names import ID_BITS
from graddrop_fused.rules import SGD, AdamW, Lion, MaskOnly, Rule

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
KNOWN_ANSWERS = json.loads(Path(__file__).with_name("known_answers.json").read_text())
MARGIN = 67  # elements of storage after every tensor that nobody may write


# Declarations


@dataclass(frozen=True)
class Spec:
    """One tensor of a case."""

    shape: tuple[int, ...]
    mask: Mask = Mask.ELEMENT
    effect: Effect = Effect.GRADIENT
    p: float = 0.5
    window: tuple[int, int] | None = None  # (lo, span) in place of Bernoulli's
    rescale: float | None = None  # None: 1/q
    noise_std: float = 0.5  # Mask.GAUSSIAN
    block: int = 1
    block_steps: bool = False  # under Mask.BLOCK and Effect.FREEZE: blocks have step counts of their own
    draw: int = 1
    stream_id: int = 0
    shard: Shard | None = None  # None: the tensor is a whole parameter
    order: tuple[int, ...] | None = None  # dimensions of the parameter in memory, outermost first; None: row-major
    offset: int = 0  # of the parameter and its state in their storages, in elements
    gap: int = 0  # elements between rows (runs of the innermost dimension) that belong to nobody
    grad_order: tuple[int, ...] | None = None
    grad_offset: int = 0
    grad_gap: int = 0
    grad_expanded: bool = False  # all of the first dimension is one memory (an update only reads it)
    grad: str = "normal"  # "none"; "dropped": NaN and infinities where dropped; "wild": anywhere
    maximize: bool = False
    step: int = 10  # 1: the state is zero
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    momentum: float = 0.9
    dampening: float = 0.1
    nesterov: bool = False
    rounded_at: tuple[int, int] = (3, 2**51 + 5)  # draw and stream id, where the case is stochastic

    def lo_span(self) -> tuple[int, int]:
        return mask_stream.bernoulli_window(self.p) if self.window is None else self.window

    def integers(self) -> list[int]:
        row = dict.fromkeys(Integer, 0)
        row[Integer.LO], row[Integer.SPAN] = self.lo_span()
        row |= {Integer.MASK: self.mask, Integer.EFFECT: self.effect, Integer.BLOCK: self.block}
        row |= {Integer.DRAW: self.draw, Integer.STREAM_ID: self.stream_id}
        return [int(row[column]) for column in Integer]

    def reals(self, rule: Rule) -> list[float]:
        drawn = self.mask in (Mask.ELEMENT, Mask.BLOCK, Mask.LAYER, Mask.PACKED)
        rescale = self.rescale or (mask_stream.rescale(self.lo_span()[1]) if drawn else 1.0)
        update = self.effect == Effect.UPDATE
        row = [0.0] * Real.columns()
        row[Real.GRAD_FACTOR] = (-1.0 if self.maximize else 1.0) * (1.0 if update else rescale)
        row[Real.NOISE_STD] = self.noise_std if self.mask == Mask.GAUSSIAN else 0.0
        row[Real.FACTOR :] = self.factors(rule, rescale if update else 1.0, self.step)
        return [float(x) for x in row]

    def factors(self, rule: Rule, scale: float, step: int) -> list[float]:
        factors = [float(x) for x in rule.factors(self.lr, rule.numbers(vars(self)), scale, step)]
        return factors + [0.0] * (MAX_FACTORS - len(factors))

    def block_factors(self, rule: Rule) -> Tensor | None:
        """Of every block from the tensor's first to its last: counts of steps differ, and the first are small."""
        if not self.block_steps:
            return None
        shard = self.shard or Shard.whole(self.shape)
        if shard.numel == 0:
            return torch.zeros(0, MAX_FACTORS, dtype=F64)
        last = shard.offset + sum((n - 1) * stride for n, stride in zip(shard.shape, shard.strides, strict=True))
        blocks = last // self.block - shard.offset // self.block + 1
        different = [self.factors(rule, 1.0, 1 + (self.step + k) % 8) for k in range(8)]
        return torch.tensor(different, dtype=F64)[torch.arange(blocks) * 5 % 8]


@dataclass(frozen=True)
class Case:
    """One batch. ``steps`` calls are made on it; between them gradients move and every table changes."""

    name: str
    specs: tuple[Spec, ...]
    param: torch.dtype = F32
    grad: torch.dtype = F32
    state: torch.dtype = F32
    rule: Rule = AdamW()
    seed: int = 0x0123456789ABCDEF
    grad_scale: float | None = None
    found_inf: bool | None = None
    steps: int = 2
    stochastic: bool = False  # rounding of bfloat16

    def __str__(self) -> str:
        return self.name

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        return self.param, self.grad, self.state

    def at_step(self, k: int) -> "Case":
        """The case as the k-th call sees it (k = 0: as declared)."""
        if k == 0:
            return self
        specs = tuple(
            replace(
                s,
                draw=s.draw + k & mask_stream.WORD,
                rounded_at=(s.rounded_at[0] + k & mask_stream.WORD, s.rounded_at[1]),
                step=s.step + k,
                lr=s.lr * 0.5,
                p=s.p * 0.75,
                grad_offset=s.grad_offset + k,
                grad="none" if s.grad == "normal" and i == len(self.specs) - 2 else s.grad,
                # a tensor that a step leaves alone, and a policy that has come to keep everything
                mask=Mask.DROP if i == 5 else Mask.KEEP if i == 6 else s.mask,
                effect=Effect.FREEZE if i == 5 else s.effect,
            )
            for i, s in enumerate(self.specs)
        )
        return replace(self, specs=specs)


AWKWARD = (0, 1, 31, 32, 33, 127, 128, 129, 1000)
RULES = {
    "adamw": AdamW(),
    "amsgrad": AdamW(amsgrad=True),
    "sgd": SGD(),
    "momentum": SGD(momentum=True),
    "nesterov": SGD(momentum=True),
    "lion": Lion(),
}
DTYPES = [(p, g, s) for p in (F32, BF16, F16) for g in (F32, BF16, F16) for s in (F32, BF16)] + [(F64, F64, F64)]
_NAMES = {F64: "f64", F32: "f32", BF16: "bf16", F16: "f16"}


def _all_kinds(**fields) -> tuple[Spec, ...]:
    """One tensor of every mask kind."""
    return (
        Spec((17, 23), Mask.KEEP, **fields),
        Spec((129,), Mask.DROP, **fields),
        Spec((1000,), Mask.ELEMENT, p=0.3, **fields),
        Spec((2500,), Mask.BLOCK, block=256, stream_id=3, **fields),
        Spec((33, 5), Mask.LAYER, draw=1, stream_id=1, **fields),
        Spec((33, 5), Mask.LAYER, draw=1, stream_id=2, **fields),
        Spec((17, 23), Mask.PACKED, **fields),
        Spec((777,), Mask.ELEMENT, window=(0xF000, 0x3000), **fields),
    )


_OWN = {"mask": Mask.BLOCK, "effect": Effect.FREEZE, "block_steps": True}
_BLOCK_STEPS = (
    *(
        Spec((n,), block=b, shard=Shard((n,), (1,), 700 * k), stream_id=b, p=0.4, **_OWN)
        for k, (n, b) in enumerate(((99, 1), (300, 5), (700, 23), (600, 128), (700, 200), (5000, 1024), (70, 2**20)))
    ),
    Spec((5000,), block=1024, p=0.9, offset=1, **_OWN),
    Spec((9000,), block=1024, **_OWN),
    Spec((12, 384), block=384, **_OWN),
    Spec((1000,), Mask.ELEMENT, effect=Effect.FREEZE),
    Spec((17, 123), block=123, order=(1, 0), **_OWN),
    Spec((17, 123), block=128, grad_order=(1, 0), **_OWN),
    Spec((17, 90), block=384, shard=Shard.box((17, 90), (17, 100), (0, 3)), **_OWN),
    Spec((5, 4, 9), block=36, shard=Shard.box((5, 4, 9), (17, 4, 9), (7, 0, 0)), gap=3, **_OWN),
    Spec((700,), block=128, shard=Shard((700,), (1,), 2**42 + 64), **_OWN),
    Spec((0, 3), block=3, **_OWN),
    Spec((3000,), block=256, **{**_OWN, "block_steps": False}),
)
_STRIDED_STEPS = (
    Spec((17, 123), block=123, order=(1, 0), stream_id=5, **_OWN),
    Spec((17, 123), block=40, grad_order=(1, 0), stream_id=6, **_OWN),
    Spec((6, 3, 5, 7), block=105, order=(0, 2, 3, 1), grad_order=(0, 2, 3, 1), stream_id=7, **_OWN),
    Spec((17, 90), block=384, shard=Shard.box((17, 90), (17, 100), (0, 3)), order=(1, 0), stream_id=8, **_OWN),
    Spec((17, 123), block=128, order=(1, 0), **{**_OWN, "block_steps": False}),
)
_GAUSSIAN = tuple(Spec((n,), Mask.GAUSSIAN, stream_id=n, shard=Shard((n,), (1,), n)) for n in AWKWARD)


def _sizes_and_kinds() -> list[Case]:
    sizes = [Case(f"size-{n}", (Spec((n,), p=0.3, stream_id=n),)) for n in (*AWKWARD, 4999)]
    kinds = [
        Case(f"kinds-{effect.name.lower()}-{name}", _all_kinds(effect=effect, nesterov=name == "nesterov"), rule=rule)
        for effect in Effect
        for name, rule in RULES.items()
    ]
    return sizes + kinds


def _dtypes() -> list[Case]:
    return [
        Case(
            "dtypes-" + "-".join(_NAMES[d] for d in combination),
            (*_all_kinds(effect=effect), Spec((515,), Mask.GAUSSIAN)),
            *combination,
        )
        for combination, effect in zip(DTYPES, list(Effect) * len(DTYPES), strict=False)
    ]


def _layouts() -> list[Case]:
    return [
        Case("matrix-17x23", (Spec((17, 23)),)),
        Case("transposed", (Spec((17, 23), order=(1, 0), grad_order=(1, 0)),)),
        Case("transposed-param", (Spec((17, 23), order=(1, 0)), Spec((64, 128), order=(1, 0)))),
        Case("transposed-grad", (Spec((17, 23), grad_order=(1, 0)), Spec((128, 64), grad_order=(1, 0)))),
        Case("channels-last", (Spec((8, 3, 5, 7), order=(0, 2, 3, 1), grad_order=(0, 2, 3, 1)),)),
        Case("channels-last-grad", (Spec((8, 3, 5, 7), grad_order=(0, 2, 3, 1), offset=3, mask=Mask.PACKED),)),
        Case("six-dimensions", (Spec((2, 3, 4, 3, 2, 5), order=(5, 3, 1, 4, 2, 0), grad_order=(2, 0, 4, 1, 3, 5)),)),
        Case("size-one-dimensions", (Spec((1, 33, 1, 4), order=(2, 3, 0, 1)), Spec(()), Spec((1, 1)))),
        Case("gaps", tuple(Spec((17, 23), m, gap=k % 3, grad_gap=k % 2) for k, m in enumerate(Mask))),
        Case("gaps-wide", (Spec((9, 256), gap=128), Spec((3, 5, 160), gap=1, order=(1, 0, 2), effect=Effect.FREEZE))),
        Case("grad-expanded", tuple(Spec(shape, grad_expanded=True) for shape in ((1000,), (17, 23), (4, 3, 129)))),
        Case("empty-dimensions", (Spec((0, 5)), Spec((3, 0, 2), order=(2, 1, 0)), Spec((4,)))),
        Case("offset-views", tuple(Spec((300 + k,), offset=k, grad_offset=7 - k, effect=k % 3) for k in range(8))),
        Case(
            "transposed-packed", (Spec((17, 23), Mask.PACKED, order=(1, 0)), Spec((40, 40), Mask.PACKED, order=(1, 0)))
        ),
        Case("transposed-blocks", (Spec((17, 123), Mask.BLOCK, block=128, order=(1, 0), effect=Effect.FREEZE),)),
        Case("transposed-gaussian", (Spec((17, 23), Mask.GAUSSIAN, order=(1, 0)),)),
    ]


def _shards() -> list[Case]:
    return [
        Case(f"flat-shard-{offset}", (Spec((1000,), shard=Shard((1000,), (1,), offset), effect=effect),))
        for effect, offset in zip(Effect, (31, 333, 129), strict=True)
    ] + [
        Case("rows", (Spec((5, 23), shard=Shard.box((5, 23), (17, 23), (7, 0))),)),
        Case("columns", (Spec((17, 9), shard=Shard.box((17, 9), (17, 23), (0, 11))),)),
        Case("columns-transposed", (Spec((17, 9), shard=Shard.box((17, 9), (17, 23), (0, 11)), order=(1, 0)),)),
        Case("box", (Spec((3, 5, 40), shard=Shard.box((3, 5, 40), (4, 9, 130), (1, 3, 71)), grad_order=(2, 0, 1)),)),
        Case("columns-wide", (Spec((6, 384), shard=Shard.box((6, 384), (6, 1024), (0, 128)), effect=Effect.FREEZE),)),
        Case(
            "blocks-in-shards",
            (
                Spec((900,), Mask.BLOCK, block=128, shard=Shard((900,), (1,), 77), effect=Effect.FREEZE),
                Spec(
                    (17, 90), Mask.BLOCK, block=384, shard=Shard.box((17, 90), (17, 100), (0, 3)), effect=Effect.FREEZE
                ),
                Spec(
                    (4000,), Mask.BLOCK, block=1024, p=0.9, shard=Shard((4000,), (1,), 2**36 + 5), effect=Effect.UPDATE
                ),
            ),
        ),
        Case(
            "blocks-of-any-length",
            tuple(
                Spec((3000,), Mask.BLOCK, block=b, effect=k % 3, shard=Shard((3000,), (1,), 500 * k), stream_id=b)
                for k, b in enumerate((1, 5, 23, 127, 129, 200, 640, 2999, 3000, 2**20 + 3))
            )
            + (
                Spec((17, 23), Mask.BLOCK, block=23, effect=Effect.FREEZE, order=(1, 0)),
                Spec((4, 23), Mask.BLOCK, block=23, shard=Shard.box((4, 23), (17, 23), (7, 0)), effect=Effect.FREEZE),
                Spec((17, 9), Mask.BLOCK, block=23, shard=Shard.box((17, 9), (17, 23), (0, 11)), effect=Effect.FREEZE),
            ),
        ),
        *(
            Case(f"block-steps-{_NAMES[dtypes[0]]}-{name}", _BLOCK_STEPS, *dtypes, rule=rule)
            for name, rule in RULES.items()
            for dtypes in (((F32, F32, F32), (BF16, F16, F32), (F64, F64, F64)) if name == "adamw" else ((F32,) * 3,))
        ),
        Case(
            "beyond-32-bits",
            (
                Spec((1000,), shard=Shard((1000,), (1,), 2**32 - 500)),
                Spec((1000,), shard=Shard((1000,), (1,), 2**34 - 500)),
                Spec((1000,), shard=Shard((1000,), (1,), 2**35 - 500)),
                Spec((1000,), shard=Shard((1000,), (1,), 2**43 - 1000), stream_id=2**52 - 1, draw=0xFFFFFFFE),
                Spec((7, 40), shard=Shard.box((7, 40), (1 << 20, 1 << 20), (1 << 19, 999)), stream_id=2**32),
                Spec((130,), Mask.GAUSSIAN, shard=Shard((130,), (1,), 2**35 + 33), stream_id=2**51 + 7),
                Spec((700,), Mask.BLOCK, block=128, shard=Shard((700,), (1,), 2**42 + 64), stream_id=2**40),
                Spec((40,), Mask.LAYER, stream_id=2**50 + 3),
            ),
        ),
    ]


def _gradients_of_all_kinds() -> list[Case]:
    return [
        Case("grad-none", tuple(replace(s, grad="none") for e in Effect for s in _all_kinds(effect=e))),
        Case("grad-none-blocks", tuple(Spec((900,), Mask.BLOCK, block=128, effect=e, grad="none") for e in Effect)),
        Case("nan-dropped", tuple(replace(s, grad="dropped") for e in Effect for s in _all_kinds(effect=e))),
        *(
            Case(f"nan-kept-{name}", tuple(replace(s, grad="wild") for s in _all_kinds()), rule=rule)
            for name, rule in RULES.items()
        ),
        Case(
            "nan-kept-undecayed",
            tuple(replace(s, grad="wild", weight_decay=0.0) for s in (*_all_kinds(), *_all_kinds(nesterov=True))),
            rule=RULES["momentum"],
        ),
        Case("maximize", _all_kinds(maximize=True) + _all_kinds(maximize=True, effect=Effect.UPDATE)),
        Case("amp-scale", _all_kinds(), grad_scale=1536.0, found_inf=False),
        Case("amp-scale-f16", _all_kinds(maximize=True), F32, F16, F32, grad_scale=128.0),
        Case("amp-found-inf", tuple(replace(s, grad="wild") for s in _all_kinds()), grad_scale=64.0, found_inf=True),
    ]


def _others() -> list[Case]:
    mixed = (
        *(Spec((n,), stream_id=n, effect=n % 3, maximize=n % 4 == 0, nesterov=n % 2 == 0) for n in AWKWARD),
        *_all_kinds(),
        Spec((17, 23), order=(1, 0), effect=Effect.FREEZE, lr=1e-2, weight_decay=0.0),
        Spec((100, 9), shard=Shard.box((100, 9), (100, 33), (0, 5)), betas=(0.5, 0.9), eps=1e-4),
        Spec((4999,), Mask.BLOCK, block=128, effect=Effect.FREEZE, step=100_000),
        *_GAUSSIAN,
    )
    return [
        Case("no-tensors", ()),
        Case("gaussian", _GAUSSIAN),
        Case("gaussian-update", (Spec((515,), Mask.GAUSSIAN, effect=Effect.UPDATE), Spec((300,), Mask.GAUSSIAN))),
        *(Case(f"first-step-{name}", _all_kinds(step=1), rule=rule) for name, rule in RULES.items()),
        Case("first-step-bf16", _all_kinds(step=1), BF16, BF16, BF16),
        *(Case(f"mixed-batch-{name}", mixed, rule=rule, steps=3) for name, rule in RULES.items()),
        Case("many-small", tuple(Spec((k % 41,), stream_id=k, p=k / 200, effect=k % 3) for k in range(150))),
        Case("large", (Spec((70_001,), p=0.1), Spec((257, 300), p=0.9, stream_id=9, order=(1, 0)))),
        Case("seed-zero", (Spec((300,)),), seed=0),
        Case("seed-largest", (Spec((300,)),), seed=2**64 - 1),
        Case("p-extremes", tuple(Spec((500,), p=p, effect=e) for p in (0.0, 1e-9, 0.999) for e in Effect)),
        Case("span-extremes", tuple(Spec((500,), window=w) for w in ((0, 0), (0xFFFF, 0), (1, 0xFFFF)))),
        Case("window-wraps", (Spec((1000,), window=(0xC000, 0x7FFF)),)),
        Case("betas-zero", (Spec((300,), betas=(0.0, 0.0)), Spec((300,), betas=(0.0, 0.99), effect=Effect.UPDATE))),
        Case("update-overflows", (Spec((300,), effect=Effect.UPDATE, rescale=1e9, lr=0.1),), F16, F32, F32, steps=2),
        Case(
            "no-decay", (Spec((300,), weight_decay=0.0), Spec((300,), lr=0.0), Spec((300,), lr=0.1, weight_decay=0.3))
        ),
    ]


def _stochastic() -> list[Case]:
    dtypes = ((BF16, BF16, BF16), (BF16, F32, F32), (BF16, F16, BF16))
    kinds = [
        Case(f"{name}-{effect.name.lower()}", _all_kinds(effect=effect), *dtypes[(r + effect) % 3], rule=RULES[name])
        for r, name in enumerate(("adamw", "amsgrad", "sgd", "momentum", "lion"))
        for effect in Effect
    ]
    places = {"transposed", "channels-last-grad", "gaps", "offset-views", "empty-dimensions", "transposed-gaussian"}
    kinds += [replace(c, param=BF16, grad=BF16, state=BF16) for c in _layouts() if c.name in places]
    kinds += [replace(c, param=BF16, grad=F32, state=BF16) for c in _shards()]
    wild = tuple(replace(s, grad="wild") for e in Effect for s in _all_kinds(effect=e))
    kinds.append(Case("wild", wild, BF16, BF16, BF16))
    kinds.append(Case("block-steps-strided", _STRIDED_STEPS, BF16, BF16, BF16))
    kinds.append(Case("first-step", _all_kinds(step=1), BF16, BF16, BF16, grad_scale=8.0))
    return [replace(case, name=f"stochastic-{case.name}", stochastic=True) for case in kinds]


def _declared() -> list[Case]:
    plain = _sizes_and_kinds() + _dtypes() + _layouts() + _shards() + _gradients_of_all_kinds() + _others()
    return plain + _stochastic()


def _edges() -> list[Case]:
    """Windows that end exactly on, one before and one after a drawn number: `<` for `<=`, or a float, shows."""
    at = {"seed": Case.seed, "draw": 1, "stream_id": 0}
    element = mask_stream.element_random(torch.arange(1000), **at).sort().values[[100, 700]].tolist()
    block = mask_stream.block_random(torch.arange(0, 2000, 128), 128, **at).sort().values[[3, 11]].tolist()
    layer = [mask_stream.layer_random(**at)] * 2
    windows = {
        mask: [(first + a, last - first - a + b) for a in (0, 1, -1) for b in (0, 1, -1) if last - first - a + b >= 0]
        for mask, (first, last) in ((Mask.ELEMENT, element), (Mask.BLOCK, block), (Mask.LAYER, layer))
    }
    sizes = {Mask.ELEMENT: (1000, 1), Mask.BLOCK: (2000, 128), Mask.LAYER: (40, 1)}
    return [
        Case(
            f"edges-{mask.name.lower()}",
            tuple(Spec(sizes[mask][:1], mask, window=window, block=sizes[mask][1]) for window in windows[mask]),
            steps=1,
        )
        for mask in windows
    ]


CASES = _declared() + _edges()


@st.composite
def specs(draw, masks=tuple(Mask)) -> Spec:
    """Any one tensor."""
    ndim = draw(st.integers(0, 4))
    if ndim == 1:
        shape = (draw(st.sampled_from(AWKWARD) | st.integers(0, 6000)),)
    else:
        most = {0: 1, 2: 90, 3: 18, 4: 9}[ndim]
        shape = tuple(draw(st.lists(st.integers(0, most), min_size=ndim, max_size=ndim)))
    mask = draw(st.sampled_from(masks))
    start = draw(st.tuples(*[st.integers(0, 70)] * ndim))
    after = draw(st.tuples(*[st.integers(0, 70)] * ndim))
    whole = tuple(a + n + b for a, n, b in zip(start, shape, after, strict=True))
    flat = Shard(shape, Shard.whole(shape).strides, draw(st.integers(0, 300) | st.integers(0, 2**41)))
    order = st.none() | st.permutations(range(ndim)).map(tuple)
    lo, span = st.integers(0, mask_stream.HALF), st.integers(0, mask_stream.HALF)
    shard = draw(st.sampled_from([None, flat, Shard.box(shape, whole, start)]))
    effect = draw(st.sampled_from(Effect))
    block = draw(st.integers(1, 9).map(lambda k: 128 * k) | st.integers(1, 2000)) if mask == Mask.BLOCK else 1
    few = shard is None or shard == flat or math.prod(whole) < 10**6 * block
    own = few and mask == Mask.BLOCK and effect == Effect.FREEZE
    return Spec(
        shape,
        mask,
        effect=effect,
        p=draw(st.sampled_from([0.0, 0.1, 0.5, 0.9]) | st.floats(0.0, 0.999)),
        window=draw(st.none() | st.none() | st.tuples(lo, span)),
        rescale=draw(st.none() | st.sampled_from([1.0, 2.0])),
        noise_std=draw(st.floats(0.0, 3.0)),
        block=block,
        block_steps=own and draw(st.booleans()),
        draw=draw(st.integers(0, 20) | st.integers(0, mask_stream.WORD)),
        stream_id=draw(st.integers(0, 20) | st.integers(0, 2**ID_BITS - 1)),
        shard=shard,
        order=draw(order),
        offset=draw(st.integers(0, 9)),
        grad_order=draw(order),
        gap=draw(st.sampled_from([0, 0, 0, 1, 5])),
        grad_offset=draw(st.integers(0, 9)),
        grad_gap=draw(st.sampled_from([0, 0, 0, 1, 5])),
        grad_expanded=draw(st.sampled_from([False] * 9 + [True])),
        grad=draw(st.sampled_from(["normal", "normal", "normal", "none", "dropped", "wild"])),
        maximize=draw(st.booleans()),
        step=draw(st.integers(1, 100_000)),
        lr=draw(st.just(0.0) | st.floats(1e-12, 0.1)),  # a float32: infinity times a step that underflows is NaN
        betas=(draw(st.just(0.0) | st.floats(0.01, 0.99)), draw(st.just(0.0) | st.floats(0.01, 0.9999))),
        eps=draw(st.floats(1e-9, 1e-2)),
        weight_decay=draw(st.floats(0.0, 0.5)),
        momentum=draw(st.floats(0.01, 0.99)),
        dampening=draw(st.just(0.0) | st.floats(0.0, 0.9)),
        nesterov=draw(st.booleans()),
    )


@st.composite
def cases(draw, dtypes=tuple(DTYPES), masks=tuple(Mask), max_tensors: int = 5) -> Case:
    """Any case whose (param, grad, state) dtypes and mask kinds are among those given."""
    scale = draw(st.none() | st.sampled_from([1.0, 3.0, 128.0, 65536.0]))
    combination = draw(st.sampled_from(dtypes))
    return Case(
        "fuzzed",
        tuple(draw(st.lists(specs(masks), min_size=1, max_size=max_tensors))),
        *combination,
        rule=draw(st.sampled_from(list(RULES.values()))),
        seed=draw(st.integers(0, 2**64 - 1)),
        grad_scale=scale,
        found_inf=None if scale is None else draw(st.sampled_from([False, False, False, True])),
        steps=draw(st.sampled_from([1, 1, 2])),
        stochastic=combination[0] == BF16 and draw(st.booleans()),
    )


# From declaration to tensors


def _place(values: Tensor, dtype: torch.dtype, order=None, offset: int = 0, gap: int = 0) -> Tensor:
    """``values`` as a view with the given memory order, storage offset and gaps, sentinels all around it."""
    order = tuple(range(values.dim())) if order is None else order
    strides, step = [0] * values.dim(), 1
    for d in reversed(order):
        strides[d] = step
        step = step * max(values.shape[d], 1) + gap * (d == order[-1])
    storage = torch.full((offset + step + MARGIN,), 77, device=values.device).to(dtype)
    return storage.as_strided(values.shape, strides, offset).copy_(values.to(dtype))


def _clone(tensor: Tensor | None) -> Tensor | None:
    """A copy of the whole storage with the same view of it."""
    if tensor is None:
        return None
    storage = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage()).clone()
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def lists_of(batch: Batch) -> dict[str, list[Tensor | None]]:
    """The batch's lists of tensors, the states' called "state 0" and so on."""
    states = {f"state {k}": tensors for k, tensors in enumerate(batch.states)}
    tables = {"packed": batch.packed, "block_factors": batch.block_factors}
    return {"params": batch.params, "grads": batch.grads, **states, **tables}


def _mapped(batch: Batch, function) -> Batch:
    """The batch with ``function`` of every tensor, copies of its tables and an empty cache."""

    def each(tensors):
        return [None if t is None else function(t) for t in tensors]

    params = each(batch.params)
    return Batch(
        params=params,
        shards=batch.shards,
        integers=batch.integers.clone(),
        reals=batch.reals.clone(),
        grads=params if batch.grads is batch.params else each(batch.grads),
        states=[each(tensors) for tensors in batch.states],
        packed=each(batch.packed),
        block_factors=each(batch.block_factors),
        rounding=None if batch.rounding is None else batch.rounding.clone(),
    )


def clone(batch: Batch) -> Batch:
    """An equal batch: strides, storage offsets and the storage around the tensors included."""
    return _mapped(batch, _clone)


def in_float64(batch: Batch) -> Batch:
    """The batch with every floating tensor in float64."""
    return _mapped(batch, lambda t: t.to(F64 if t.is_floating_point() else t.dtype, copy=True))


def _tables(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    rounding = torch.tensor([s.rounded_at for s in case.specs], dtype=torch.int64).reshape(-1, len(Rounding))
    integers = torch.tensor([s.integers() for s in case.specs], dtype=torch.int64)
    reals = torch.tensor([s.reals(case.rule) for s in case.specs], dtype=F64)
    return integers.reshape(-1, len(Integer)), reals.reshape(-1, Real.columns()), rounding


def build(case: Case, device="cpu", capturable: bool = False) -> Batch:
    """The tensors and tables of a case; the same ones at every call. ``capturable`` puts the tables on ``device``."""
    generator = torch.Generator().manual_seed(len(case.specs))

    def uniform(spec):
        return torch.rand(spec.shape, generator=generator, dtype=F64)

    params, packed = [], []
    states: list[list[Tensor]] = [[] for _ in case.rule.states]
    for spec in case.specs:
        place = (spec.order, spec.offset, spec.gap)
        started = spec.step > 1
        params.append(_place((uniform(spec) * 4 - 2).to(device), case.param, *place))
        for k, tensors in enumerate(states):  # signed first, then two that are sums of squares
            values = uniform(spec) * 2 - 1 if k == 0 else uniform(spec) ** 2 * k
            tensors.append(_place((values * started).to(device), case.state, *place))
        words = mask_stream.pack_mask(uniform(spec) >= spec.p).to(device) if spec.mask == Mask.PACKED else None
        packed.append(None if words is None else _place(words, torch.int32))
    shards = [spec.shard or Shard.whole(spec.shape) for spec in case.specs]
    integers, reals, rounding = (table.to(device if capturable else "cpu") for table in _tables(case))
    batch = Batch(params, shards, integers, reals, states=states, packed=packed)
    dtype = F64 if case.param == F64 else F32
    tables = [spec.block_factors(case.rule) for spec in case.specs]
    batch.block_factors = [None if table is None else _place(table.to(device), dtype) for table in tables]
    batch.rounding = rounding if case.stochastic else None
    if capturable:
        batch.pairs = frozenset((s.mask, s.effect) for k in range(case.steps) for s in case.at_step(k).specs)
    batch.grads = _gradients(case, batch)
    return batch


def _gradients(case: Case, batch: Batch) -> list[Tensor | None]:
    """New gradients for the batch; where they are dropped or wild depends on its tables."""
    generator = torch.Generator().manual_seed(int(batch.integers[:, Integer.DRAW].sum()) & 0xFFFF)
    grads: list[Tensor | None] = []
    for i, spec in enumerate(case.specs):
        values = torch.randn(spec.shape, generator=generator, dtype=F64) * (case.grad_scale or 1.0) / (1 + i % 3)
        wild = torch.tensor([math.nan, math.inf, -math.inf, 1.0], dtype=F64)
        wild = wild[torch.randint(4, spec.shape, generator=generator)]
        if spec.grad == "dropped":
            kept = torch.as_tensor(reference.keep(batch, i, case.seed)).cpu()
            values = torch.where(kept, values, wild)
        elif spec.grad == "wild":
            values = torch.where(torch.rand(spec.shape, generator=generator) < 0.1, wild, values)
        # finite values stay finite in float16
        values = torch.where(values.isfinite(), values.clamp(-6e4, 6e4), values).to(batch.params[i].device)
        place = (case.grad, spec.grad_order, spec.grad_offset, spec.grad_gap)
        if spec.grad == "none":
            grads.append(None)
        elif spec.grad_expanded and spec.grad != "dropped" and values.dim() > 0 and len(values) > 0:
            grads.append(_place(values[0], case.grad, None, *place[2:]).expand(spec.shape))
        else:
            grads.append(_place(values, *place))
    return grads


def _advance(case: Case, batch: Batch) -> None:
    """Give the batch the tables (in place) and gradients (new tensors) of a later call."""
    for table, values in zip((batch.integers, batch.reals, batch.rounding), _tables(case), strict=True):
        if table is not None:
            table.copy_(values)
    for table, spec in zip(batch.block_factors, case.specs, strict=True):
        if table is not None:
            table.copy_(spec.block_factors(case.rule))
    batch.grads = _gradients(case, batch)


# Comparison


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _say(case: Case, i: int, what: str, wrong: Tensor) -> str:
    first = wrong.reshape(-1).nonzero()[:5].flatten().tolist()
    spec = case.specs[i]
    return f"{case.name}: tensor {i}: {what}: {int(wrong.sum())} of {wrong.numel()} differ, first at {first}; {spec}"


def _assert_bits(case: Case, i: int, what: str, actual: Tensor, expected: Tensor, where: Tensor | bool = True) -> None:
    wrong = (_bits(actual) != _bits(expected)) & torch.as_tensor(where, device=actual.device)
    assert not wrong.any(), _say(case, i, what, wrong)


def _assert_close(case: Case, i: int, what: str, actual: Tensor, truth: Tensor, bound: Tensor) -> None:
    """|actual - truth| <= bound + half a unit in the last place of actual's dtype; NaN and infinities exactly."""
    info = torch.finfo(actual.dtype)
    stored = truth.abs() * info.eps / 2 + info.tiny * info.eps
    ok = (actual.double() - truth).abs() <= bound + stored
    ok = ok | (actual.double() == truth) | (actual.isnan() & truth.isnan())
    overflows = truth.abs() + bound + stored >= info.max
    ok = ok | (actual.isinf() & (actual.sign() == truth.sign()) & overflows)
    assert ok.all(), _say(case, i, what, ~ok) + f"\n{actual[~ok][:5].tolist()} for {truth[~ok][:5].tolist()}"


def _random(case: Case, batch: Batch, i: int, name: str) -> Tensor:
    """The numbers that round a tensor's values."""
    value = 0 if name == "params" else 1 + int(name.removeprefix("state "))
    draw, stream_id = batch.rounding[i].tolist()
    elements = batch.shards[i].elements(0, batch.shards[i].numel, batch.params[i].device)
    at = {"seed": case.seed, "draw": draw, "stream_id": stream_id}
    purpose = mask_stream.Purpose(mask_stream.Purpose.ROUND_PARAM + value)
    return mask_stream.element_random(elements, **at, purpose=purpose).reshape(batch.shards[i].shape)


def _assert_rounded(
    case: Case, i: int, what: str, actual: Tensor, truth: Tensor, bound: Tensor, random: Tensor
) -> None:
    """With given random numbers stochastic rounding is monotone: what it makes of truth +- bound are its bounds."""
    bound = bound + truth.abs() * torch.finfo(F32).eps
    low, high = (mask_stream.round_stochastically(x.to(F32), random) for x in (truth - bound, truth + bound))
    ok = (low <= actual) & (actual <= high) | (actual.isnan() & truth.isnan()) | (actual.double() == truth)
    assert ok.all(), _say(case, i, what, ~ok) + f"\n{actual[~ok][:5].tolist()} for {truth[~ok][:5].tolist()}"


def _assert_surroundings(case: Case, batch: Batch, before: Batch) -> None:
    """Nothing outside the tensors is written, and nothing that a backend only reads."""
    before_lists = lists_of(before)
    for name, tensors in lists_of(batch).items():
        for i, (now, then) in enumerate(zip(tensors, before_lists[name], strict=True)):
            if now is None:
                continue
            storages = [torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage()) for t in (now, then)]
            inside = torch.zeros(len(storages[0]), dtype=torch.bool, device=now.device)
            positions = torch.arange(len(inside), device=now.device)
            inside[positions.as_strided(now.shape, now.stride(), now.storage_offset()).reshape(-1)] = True
            _assert_bits(case, i, f"storage around {name}", *storages, ~inside)


def _kept(case: Case, batch: Batch, i: int) -> Tensor:
    kept = reference.keep(batch, i, case.seed)
    return torch.as_tensor(kept, device=batch.params[i].device).expand(batch.shards[i].shape)


def _noise_bound(case: Case, batch: Batch, i: int) -> Tensor | float:
    """How far a backend's 1 + std * N(0, 1) may be off: docs/mask-stream.md's agreement, 1e-5, or 5e-4 near u = 1."""
    if batch.integers[i, Integer.MASK] != Mask.GAUSSIAN:
        return 0.0
    shard = batch.shards[i]
    index, word = mask_stream.gaussian_counter(shard.elements(0, shard.numel, batch.params[i].device))
    draw, stream_id = int(batch.integers[i, Integer.DRAW]), int(batch.integers[i, Integer.STREAM_ID])
    gaussian = mask_stream.Purpose.GAUSSIAN
    words = mask_stream.outputs(index, seed=case.seed, draw=draw, stream_id=stream_id, purpose=gaussian)
    u = (torch.where(word < 2, words[0], words[2]).double() + 0.5) / 2**32
    normal = torch.where(1 - u >= 1e-5, 1e-5, 5e-4)
    return (float(batch.reals[i, Real.NOISE_STD]) * normal).reshape(shard.shape)


def _bounds(case: Case, before: Batch, truth: Batch, i: int) -> dict[str, Tensor]:
    """How far float32 (or float64) arithmetic may be off, per element; ``before`` and ``truth`` are in float64.

    Each rounding of a value x costs u * |x|, u = 2**-24 (2**-53). The counts are those of the formulas in rules.py with
    a rounded constant for each factor, and allow for every order and for fused multiply-add. The gradient takes 4:
    unscale, sign and rescale, noise (a float32 reciprocal of the AMP scale would be one of them).
    """
    u = 2.0**-53 if case.param == F64 else 2.0**-24
    row, p = before.reals[i].tolist(), before.params[i]
    update = before.integers[i, Integer.EFFECT] == Effect.UPDATE
    g, noise = torch.zeros_like(p), 0.0
    if before.grads[i] is not None:
        taken = torch.where(_kept(case, before, i) | update, before.grads[i], 0.0)
        g = taken.abs() * abs(row[Real.GRAD_FACTOR]) / (case.grad_scale or 1.0)
        noise = 0.0 if update else g * _noise_bound(case, before, i)
        if before.integers[i, Integer.MASK] == Mask.GAUSSIAN and not update:
            g = g * (1 + 7 * row[Real.NOISE_STD])  # no normal of a 32-bit u exceeds 6.7
    factors = dict(zip(case.rule.factor_names, _factors_of(case, before, i), strict=False))
    old, new = ([tensors[i] for tensors in batch.states] for batch in (before, truth))
    p_error, state_errors = _BOUNDS[case.rule.name](u, p, g, 4 * u * g + noise, old, new, **factors)
    tiny = torch.finfo(F64 if case.param == F64 else F32).tiny  # a subnormal may be flushed
    bounds = {"params": p_error + u * truth.params[i].abs() + tiny}
    return bounds | {f"state {k}": error + tiny for k, error in enumerate(state_errors)}


def _factors_of(case: Case, batch: Batch, i: int) -> list[Tensor]:
    """Tensor i's factors of the rule, or those of each of its elements' blocks."""
    dtype = F64 if case.param == F64 else F32
    return [torch.as_tensor(x, dtype=F64) for x in reference._factors(batch, case.rule, i, dtype)]


def _at_least_1(x: Tensor) -> Tensor:
    return x.abs().clamp(min=1.0)


def _adamw_bounds(u, p, g, g_error, old, new, decay, step, one_minus_beta1, beta2, one_minus_beta2, eps):
    """Moments: 4 roundings each of the sizes added (m's terms may cancel, v's do not; v has twice g's relative error).
    Denominator and quotient: 8, where 4 are for the square root and division of a GPU (2 units in the last place);
    p * decay and the difference: 3."""
    m, v, *_ = old
    m_error = one_minus_beta1 * g_error + 4 * u * (m.abs() + one_minus_beta1 * (g + m.abs()))
    new_v = beta2 * v + one_minus_beta2 * g * g
    v_error = one_minus_beta2 * (2 * g * g_error + g_error**2) + 4 * u * new_v
    largest_v = new[-1]
    denominator = largest_v.sqrt() + eps
    quotient = step * new[0].abs() / denominator
    relative = v_error / largest_v.clamp(min=torch.finfo(F32).tiny) / 2 + 8 * u
    # far from the first order where v is nearly all error: sqrt(v + e) - sqrt(v) <= sqrt(e)
    p_error = step * m_error / denominator * (1 + relative) + quotient * relative
    return p_error + 3 * u * _at_least_1(decay) * p.abs(), [m_error] + [v_error] * (len(old) - 1)


def _sgd_bounds(u, p, g, g_error, old, new, weight_decay, momentum, taken, grad_step, buffer_step):
    g_error = g_error + 3 * u * (g + weight_decay * p.abs())
    g = g + weight_decay * p.abs()
    size, error, m_errors = grad_step * g, grad_step * g_error, []
    if old:
        m = momentum * old[0].abs() + taken * g
        m_errors = [taken * g_error + 4 * u * m]
        size, error = size + buffer_step * m, error + buffer_step * m_errors[0]
    return error + 4 * u * (size + p.abs()), m_errors


def _lion_bounds(u, p, g, g_error, old, new, decay, step, one_minus_beta1, one_minus_beta2):
    """Where the direction may come out on either side of zero, so may the step."""
    m = old[0]
    signed_g = (new[0] - m) / one_minus_beta2 + m
    error1, error2 = (f * g_error + 4 * u * (m.abs() + f * (g + m.abs())) for f in (one_minus_beta1, one_minus_beta2))
    near = (m + one_minus_beta1 * (signed_g - m)).abs() <= 2 * error1 + 2.0**-40 * (g + m.abs()) / one_minus_beta2
    return torch.where(near, 2 * step, 0.0) + 4 * u * (step + p.abs() * _at_least_1(decay)), [error2]


_BOUNDS = {"adamw": _adamw_bounds, "sgd": _sgd_bounds, "lion": _lion_bounds}


def check_update(backend, case: Case, device="cpu", capturable: bool = False) -> None:
    """``backend.update`` against the reference in float64, ``case.steps`` calls on one batch."""
    batch = build(case, device, capturable)
    scalar = {"dtype": F32, "device": device}
    amp = {"grad_scale": None if case.grad_scale is None else torch.tensor(case.grad_scale, **scalar)}
    amp["found_inf"] = None if case.found_inf is None else torch.tensor(float(case.found_inf), **scalar)
    for k in range(case.steps):
        case_k = case.at_step(k)
        if k > 0:
            _advance(case_k, batch)
        before = clone(batch)
        truth, before64 = in_float64(before), in_float64(before)
        reference.update(truth, case.rule, seed=case.seed, **amp)
        backend.update(batch, case.rule, seed=case.seed, **amp)
        _compare_update(case_k, batch, before, before64, truth)


def _compare_update(case: Case, batch: Batch, before: Batch, before64: Batch, truth: Batch) -> None:
    _assert_surroundings(case, batch, before)
    for name in ("integers", "reals"):
        assert torch.equal(getattr(batch, name), getattr(before, name)), f"{case.name}: {name} were written"
    now, then, right = lists_of(batch), lists_of(before), lists_of(truth)
    for i in range(len(case.specs)):
        for name in ("grads", "packed", "block_factors"):
            if now[name][i] is not None:
                _assert_bits(case, i, f"{name} were written", now[name][i], then[name][i])
        effect, kept = Effect(int(batch.integers[i, Integer.EFFECT])), _kept(case, before, i)
        for name, bound in _bounds(case, before64, truth, i).items():
            actual, old = now[name][i], then[name][i]
            frozen = effect == Effect.FREEZE or (effect == Effect.UPDATE and name == "params")
            if case.found_inf:
                _assert_bits(case, i, f"{name} changed in a skipped step", actual, old)
                continue
            if frozen:
                _assert_bits(case, i, f"{name}: a dropped element changed", actual, old, ~kept)
                bound = torch.where(kept, bound, 0.0)
            if batch.rounding is not None and actual.dtype == BF16:
                _assert_rounded(case, i, name, actual, right[name][i], bound, _random(case, batch, i, name))
            else:
                _assert_close(case, i, name, actual, right[name][i], bound)


def check_mask(backend, case: Case, device="cpu") -> None:
    """The rule "mask", which masks gradients in place: masks bit for bit from gradients of ones, then values, NaN in
    dropped places included."""
    specs = (replace(s, grad="normal" if s.grad == "none" else s.grad, grad_expanded=False) for s in case.specs)
    specs = tuple(replace(s, effect=Effect.GRADIENT, maximize=False) for s in specs)
    case = replace(case, specs=specs, rule=MaskOnly(), grad_scale=None, found_inf=None, stochastic=False)
    batch = build(case, device)
    for ones in (True, False):
        if ones:
            for grad in batch.grads:
                grad.fill_(1.0)
            batch.reals[:, Real.GRAD_FACTOR] = 1.0
        else:
            _advance(case, batch)
        batch.params = batch.grads  # the masked gradient is written
        before = clone(batch)
        truth = in_float64(before)
        reference.update(truth, case.rule, seed=case.seed)
        backend.update(batch, case.rule, seed=case.seed)
        _assert_surroundings(case, batch, before)
        for i, grad in enumerate(batch.grads):
            kept = _kept(case, before, i)
            _assert_bits(case, i, "a dropped gradient is not 0", grad, torch.zeros_like(grad), ~kept)
            if ones and case.specs[i].mask != Mask.GAUSSIAN:
                _assert_bits(case, i, "mask", grad, kept.to(grad.dtype))
            g, factor = before.grads[i].double().abs(), float(before.reals[i, Real.GRAD_FACTOR])
            u = 2.0**-53 if case.grad == F64 else 2.0**-24
            bound = 4 * u * truth.grads[i].abs() + g * factor * _noise_bound(case, before, i)
            if case.specs[i].mask == Mask.GAUSSIAN:  # 1 + std * normal may cancel
                bound = bound + 4 * u * g * factor * (1 + 7 * case.specs[i].noise_std)
            _assert_close(case, i, "grads", grad, truth.grads[i], torch.where(kept, bound, 0.0))


def check_pack(backend, case: Case, device="cpu") -> None:
    """``backend.pack``: every word equal, unused bits zero, nothing written beyond."""
    case = replace(case, specs=tuple(s for s in case.specs if s.mask != Mask.PACKED))
    for k in range(case.steps):
        batch = build(case.at_step(k), device)
        batch.grads, batch.states = [], []
        batch.packed = [
            _place(torch.full(((s.numel + 31) // 32,), -0x21524111, device=device), torch.int32) for s in batch.shards
        ]
        expected = clone(batch)
        before = clone(batch)
        reference.pack(expected, seed=case.seed)
        backend.pack(batch, seed=case.seed)
        _assert_surroundings(case, batch, before)
        for i, words in enumerate(batch.packed):
            _assert_bits(case, i, "packed words", words, expected.packed[i])


def check_known_answers(backend, device="cpu") -> None:
    """``backend.pack`` gives the stored words of every known mask, all in one call for each seed."""
    for seed in {row["seed"] for row in KNOWN_ANSWERS["masks"]}:
        rows = [row for row in KNOWN_ANSWERS["masks"] if row["seed"] == seed]
        specs = tuple(
            Spec(
                tuple(row["shape"]),
                Mask.ELEMENT if row["block"] == 1 else Mask.BLOCK,
                window=(row["lo"], row["span"]),
                **{key: row[key] for key in ("block", "draw", "stream_id")},
            )
            for row in rows
        )
        batch = build(Case("known-answers", specs, seed=seed), device)
        batch.packed = [torch.zeros(len(row["packed"]), dtype=torch.int32, device=device) for row in rows]
        backend.pack(batch, seed=seed)
        for row, words in zip(rows, batch.packed, strict=True):
            assert words.tolist() == row["packed"], row
