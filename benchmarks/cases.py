"""What is asked of the contestants, as declarations. Add a case here."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import populations
from benchmarks.contestant import Contestant
from benchmarks.ours import (
    BLOCK,
    COPIES,
    DRAWN,
    FLOOR,
    FROZEN_BLOCKS,
    LOWER_LEVELS,
    LOWER_PACKS,
    NO_MASK,
    OURS,
    PACKED,
    ROUNDED,
    SHARES,
)
from benchmarks.peers import BASE, COMPOSED, MASKS, PEERS
from benchmarks.tensors import Tensors, Training

CONTESTANTS = {c.name: c for c in [*PEERS, *OURS, *MASKS]}


@dataclass(frozen=True)
class Size:
    """How much time the suite takes: sweeps over all cases; in a sweep, seconds of timing per case, bounds of turns."""

    name: str
    sweeps: int
    seconds: float
    least: int
    most: int

    def turns(self, seconds_per_turn: float) -> int:
        return min(self.most, max(self.least, int(self.seconds / seconds_per_turn)))


SIZES = {
    "smoke": Size("smoke", 1, 0, 2, 2),  # all of the code in seconds: tests
    "quick": Size("quick", 1, 2.5, 9, 51),
    "full": Size("full", 3, 3, 7, 51),
}


@dataclass(frozen=True)
class Case:
    """Contestants on one set of tensors.

    question: the section of the report it belongs to.
    elements: how many at size quick and full; None leaves the case out.
    x: the case's place on the question's axis, where it has one.
    base: whose time the others are divided by.
    """

    name: str
    question: str
    contestants: tuple[Contestant, ...]
    shapes: Callable[[int], list]
    elements: dict[str, int | None]
    base: str = BASE
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype | None = None
    threads: int | None = None
    memory: bool = False
    x: float | None = None
    training: bool = False

    def tensors(self, size: Size, device: str) -> Tensors:
        if self.training:
            model = {"smoke": (1, 64, 2, 8), "quick": (4, 384, 8, 64), "full": (12, 384, 16, 64)}[size.name]
            return Training(*model)
        return Tensors.random(self.shapes(self.elements[size.name]), self.dtype, self.state_dtype, device)


def case(
    name, question, contestants, population="xlmr-large", quick=None, full=None, smoke: int | None = 30_000, **more
) -> Case:
    """``population``: a name, or a function of the number of elements."""
    named = isinstance(population, str)
    return Case(
        name,
        question,
        tuple(CONTESTANTS[c] if isinstance(c, str) else c for c in contestants),
        (lambda elements: populations.shapes(population, elements)) if named else population,
        {"smoke": smoke, "quick": quick, "full": full},
        **more,
    )


def one(elements):
    return [(elements,)]


def equal(count):
    return lambda elements: [(max(1, elements // count),)] * count


M = 1_000_000
FROZEN = [f"GradDrop(p={p}, block={BLOCK}), freeze" for p in SHARES]
COMPOSITIONS = [
    COMPOSED,
    "F.dropout, then torch fused",
    "Child-Tuning-F, then torch fused",
    "dropgrad, torch fused",
    "magma-optimizer, torch fused",
    "pytorch-optimizer's Magma, torch fused",
]
FAST = [BASE, "DeepSpeedCPUAdam", DRAWN, PACKED, NO_MASK, FROZEN_BLOCKS, FLOOR, COPIES]
GPU_PEERS = ["apex FusedAdam", "FlashOptim FlashAdamW", "torchao AdamW8bit", "bitsandbytes AdamW8bit"]
EVERYONE = [BASE, "torch foreach", "torch for-loop", *COMPOSITIONS, "attach(), then torch fused", *GPU_PEERS, *FAST[1:]]
POLICIES = [
    BASE,
    NO_MASK,
    DRAWN,
    "GradDrop, update",
    "GradDrop, freeze",
    "GradDrop, gaussian",
    PACKED,
    "GradDropEpoch, drawn again",
    "GradDropEpoch, toggle",
    "GradDropEpoch, replacement",
    "LayerGradDrop(p=0.5)",
    "GradFreeze, half the layers",
    "StaticMask",
    FROZEN_BLOCKS,
]
MIXED = [
    "torch fused, state like parameters",
    "DeepSpeedCPUAdam",
    DRAWN,
    ROUNDED,
    PACKED,
    NO_MASK,
    FROZEN_BLOCKS,
    COPIES,
]

PEER_TIMES, POLICY_TIMES = "Side by side", "By policy"
POPULATION_TIMES, DTYPE_TIMES, THREAD_TIMES = "By tensor population", "By dtype", "By threads and instruction set"
BY_P, BY_SIZE, BY_COUNT = "As p grows", "As size grows", "As the number of tensors grows"
DRAWING, SHARE = "Mask drawing alone", "Share of a training step"
ON_CPU = (THREAD_TIMES, DRAWING, SHARE)  # questions that are not asked of a GPU

CASES = [
    case("peers", PEER_TIMES, EVERYONE, quick=16 * M, full=67 * M, memory=True),
    case("policies", POLICY_TIMES, POLICIES, quick=16 * M, full=67 * M, memory=True),
    case("xlmr-large", POPULATION_TIMES, FAST, full=600 * M),
    case("xlmr-base", POPULATION_TIMES, FAST, "xlmr-base", quick=32 * M, full=300 * M),
    case("llama-7b", POPULATION_TIMES, FAST, "llama-7b", full=202_383_360),  # one layer of 32
    case("huge", POPULATION_TIMES, FAST, "huge", quick=32 * M, full=256 << 20),
    case("small", POPULATION_TIMES, EVERYONE, "small", quick=M, full=M, smoke=M, memory=True),
    case(
        "bfloat16",
        DTYPE_TIMES,
        [BASE, "torch foreach", DRAWN, ROUNDED, PACKED, NO_MASK, FROZEN_BLOCKS, COPIES],
        quick=16 * M,
        full=67 * M,
        dtype=torch.bfloat16,
        state_dtype=torch.bfloat16,
    ),
    case(
        "bfloat16, float32 state",
        DTYPE_TIMES,
        MIXED,
        quick=16 * M,
        full=67 * M,
        base=MIXED[0],
        dtype=torch.bfloat16,
        state_dtype=torch.float32,
    ),
    case(
        "one thread",
        THREAD_TIMES,
        [BASE, COMPOSED, DRAWN, PACKED, NO_MASK, FROZEN_BLOCKS, FLOOR],
        quick=16 * M,
        full=67 * M,
        threads=1,
    ),
    case(
        "one thread, small",
        THREAD_TIMES,
        [BASE, DRAWN, PACKED, NO_MASK],
        "small",
        quick=M,
        full=M,
        threads=1,
    ),
    case("instruction sets", THREAD_TIMES, [BASE, DRAWN, *LOWER_LEVELS, FLOOR], quick=16 * M, full=67 * M),
    case("p", BY_P, [BASE, *[f"GradDrop(p={p})" for p in SHARES], *FROZEN], quick=16 * M, full=67 * M),
    *(
        case(
            f"2^{power} elements",
            BY_SIZE,
            [BASE, COMPOSED, DRAWN, PACKED, NO_MASK, FLOOR, COPIES],
            one,
            quick=1 << power if power % 4 == 0 else None,
            full=1 << power,
            smoke=1 << power if power < 16 else None,
            x=1 << power,
        )
        for power in range(10, 28, 2)
    ),
    *(
        case(
            f"{count} tensors" if count > 1 else "1 tensor",
            BY_COUNT,
            [BASE, "torch foreach", COMPOSED, DRAWN, PACKED, NO_MASK],
            equal(count),
            quick=4 * M if count != 10_000 else None,
            full=4 * M,
            smoke=30_000 if count < 1000 else None,
            x=count,
        )
        for count in (1, 10, 100, 1000, 10_000)
    ),
    case(
        "masks",
        DRAWING,
        ["Tensor.bernoulli_, float32", "Tensor.bernoulli_, bool", "torch.rand >= p", "pack", *LOWER_PACKS],
        equal(16),
        quick=16 * M,
        full=67 * M,
        base="pack",
    ),
    case(
        "training",
        SHARE,
        ["forward and backward", BASE, COMPOSED, DRAWN, PACKED, NO_MASK],
        quick=1,
        full=1,
        base="forward and backward",
        training=True,
    ),
]


def chosen(size: Size, device: str = "cpu") -> list[Case]:
    """The cases of a size, with the contestants that run on ``device``."""
    found = []
    for c in CASES:
        contestants = tuple(x for x in c.contestants if device in x.devices)
        if c.elements[size.name] and (device == "cpu" or c.question not in ON_CPU):
            found.append(Case(**{**vars(c), "contestants": contestants}))
    return found
