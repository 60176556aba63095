"""Our contestants: every policy, the op's instruction-set levels, mask drawing alone, and the streaming floors."""

import torch

from benchmarks.contestant import LR, Contestant, P, one_pass
from benchmarks.gate import Claim, MaskClaim, NoClaim
from benchmarks.peers import fused
from benchmarks.tensors import Tensors
from graddrop_fused import (
    GradDrop,
    GradDropAdamW,
    GradDropEpoch,
    GradFreeze,
    LayerGradDrop,
    StaticMask,
    attach,
    cpu,
    dispatch,
)
from graddrop_fused.contract import Batch, Integer, Mask, Real, Shard
from graddrop_fused.layout import LayoutTable
from graddrop_fused.mask_stream import HALF, bernoulli_window

BLOCK = 1024
BACKENDS = {"cpu": "cpu", "cuda": "triton"}  # by device; never "auto", which would time the reference in silence


def claim(p: float, **more) -> Claim:
    """What we claim of a mask with drop probability p: the rescale is that of the rounded p that decides."""
    return Claim(p=p, rescale=(HALF + 1) / (bernoulli_window(p)[1] + 1), **more)


MASKED = claim(P)


def unavailable(device: str) -> str | None:
    """Why ours cannot be timed on ``device``, in one line, or None."""
    return dispatch.load(BACKENDS[device]).unavailable(torch.device(device))


def optimizer(tensors: Tensors, policy=None, per_layer: bool = False, **arguments) -> GradDropAdamW:
    """``policy``: a function of the tensors, or None. per_layer: a group for each tensor."""
    params = tensors.groups() if per_layer else tensors.params
    drop = policy(tensors) if policy else None
    backend = BACKENDS[tensors.device.type]
    own = tensors.give(
        GradDropAdamW(params, lr=LR, drop=drop, backend=backend, state_dtype=tensors.state_dtype, **arguments)
    )
    if drop is not None and drop.needs_epoch:
        own.set_epoch(0)
    return own


def ours(name: str, claims: Claim, policy=None, traffic=None, **arguments) -> Contestant:
    return Contestant(name, lambda t: optimizer(t, policy, **arguments).step, claims, traffic=traffic)


def at_level(level: str, step):
    """``step`` with the op's level forced, as GRADDROP_CPU_CAPABILITY does."""
    index = cpu.LEVELS.index(level)

    def call():
        load, cpu._load = cpu._load, lambda: (index, None)
        try:
            return step()
        finally:
            cpu._load = load

    return call


def masks_of(tensors: Tensors) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.rand(p.shape, device=p.device) >= P for p in tensors.params]


def attached(tensors: Tensors):
    torchs = fused(tensors)
    attach(torchs, drop=GradDrop(p=P), seed=0)
    return torchs.step


def _batch(tensors: Tensors, **more) -> Batch:
    count = len(tensors.params)
    return Batch(
        params=[p.detach() for p in tensors.params],
        shards=[Shard.whole(p.shape) for p in tensors.params],
        integers=torch.zeros(count, len(Integer), dtype=torch.int64),
        reals=torch.zeros(count, Real.columns(), dtype=torch.float64),
        grads=[p.grad for p in tensors.params],
        states=[tensors.exp_avgs, tensors.exp_avg_sqs],
        **more,
    )


def floor(tensors: Tensors):
    """A step that only streams: reads p, g, m, v and writes p, m, v, unchanged."""
    batch = _batch(tensors)
    layout = LayoutTable(batch).table
    ops, level = cpu._op(None)
    return lambda: ops.floor(layout, batch.integers, batch.reals, level)


def copies(tensors: Tensors):
    """A GPU's floor: plain copies that read and write as many bytes as a step without a mask."""
    size = tensors.elements * tensors.bytes_per_element // 2  # a copy reads and writes
    times = -(-size // (1 << 28))  # at most 256 MiB a copy: beyond any cache, and little beside the tensors
    source = torch.zeros(size // times, dtype=torch.uint8, device=tensors.device)
    target = torch.empty_like(source)

    def call():
        for _ in range(times):
            target.copy_(source)

    return call


def pack(tensors: Tensors):
    """Draws the mask of every tensor into packed words."""
    words = [torch.empty((p.numel() + 31) // 32, dtype=torch.int32) for p in tensors.params]
    batch = _batch(tensors, packed=words)
    batch.integers[:, Integer.MASK] = Mask.ELEMENT
    batch.integers[:, Integer.DRAW] = 1
    batch.integers[:, Integer.STREAM_ID] = torch.arange(len(words))
    batch.integers[:, Integer.LO], batch.integers[:, Integer.SPAN] = bernoulli_window(P)

    def call():
        cpu.pack(batch, seed=0)
        return words

    return call


def _block_traffic(p: float):
    return lambda tensors: (1 - p) * one_pass(tensors)


DRAWN, PACKED, NO_MASK, FLOOR = "GradDrop", "GradDropEpoch, packed mask", "no mask", "floor"
FROZEN_BLOCKS = "GradDrop(p=0.9, block=1024), freeze"
ROUNDED = "GradDrop, stochastic rounding"  # of bfloat16 parameters
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)

OURS = [
    ours(DRAWN, MASKED, lambda t: GradDrop(p=P), one_pass),
    ours(ROUNDED, MASKED, lambda t: GradDrop(p=P), one_pass, rounding="stochastic"),
    ours(PACKED, MASKED, lambda t: GradDropEpoch(p=P), lambda t: one_pass(t) + 1 / 8),
    ours(NO_MASK, Claim(), None, one_pass),
    ours("GradDrop, update", claim(P, effect="update"), lambda t: GradDrop(p=P), effect="update"),
    ours("GradDrop, freeze", claim(P, effect="freeze"), lambda t: GradDrop(p=P), effect="freeze"),
    ours("GradDrop, gaussian", Claim(p=P, gaussian=True), lambda t: GradDrop(p=P, distribution="gaussian")),
    ours("GradDropEpoch, drawn again", MASKED, lambda t: GradDropEpoch(p=P, storage="regenerate")),
    ours("GradDropEpoch, toggle", MASKED, lambda t: GradDropEpoch(p=P, toggle=True)),
    ours("GradDropEpoch, replacement", MASKED, lambda t: GradDropEpoch(p=P, replacement=True)),
    ours("LayerGradDrop(p=0.5)", Claim(p=0.5, rescale=1.0, unit=None), lambda t: LayerGradDrop(p=0.5), per_layer=True),
    ours(
        "GradFreeze, half the layers",
        Claim(p=None, rescale=1.0, effect="freeze", unit=None),
        lambda t: GradFreeze("top-down", layers_per_epoch=(len(t.params) + 1) // 2),
        per_layer=True,
    ),
    ours("StaticMask", Claim(p=P, rescale=1.0), lambda t: StaticMask(masks_of(t))),
    Contestant("attach(), then torch fused", attached, MASKED, spoils_gradients=True),
    *(ours(f"GradDrop(p={p})", claim(p), lambda t, p=p: GradDrop(p=p), one_pass) for p in SHARES),
    *(
        ours(
            f"GradDrop(p={p}, block={BLOCK}), freeze",
            claim(p, unit=BLOCK, effect="freeze"),
            lambda t, p=p: GradDrop(p=p, block=BLOCK),
            _block_traffic(p),
            effect="freeze",
        )
        for p in SHARES
    ),
    *(
        Contestant(
            f"GradDrop at {level}",
            lambda t, level=level: at_level(level, optimizer(t, lambda t: GradDrop(p=P)).step),
            MASKED,
            devices=("cpu",),
        )
        for level in cpu.levels()[:-1]
    ),
    Contestant("pack", pack, MaskClaim(P, reference=True), devices=("cpu",)),
    *(
        Contestant(
            f"pack at {level}",
            lambda t, level=level: at_level(level, pack(t)),
            MaskClaim(P, reference=True),
            devices=("cpu",),
        )
        for level in cpu.levels()[:-1]
    ),
    Contestant(FLOOR, floor, NoClaim(), devices=("cpu",), traffic=one_pass),
    Contestant("forward and backward", lambda t: t.forward_and_backward, NoClaim()),
]
# under the same name, since a case has one floor; in every dtype, where the op's own streams float32 alone
COPIES = Contestant(FLOOR, copies, NoClaim(), devices=("cuda",), traffic=one_pass)
LOWER_LEVELS = [f"GradDrop at {level}" for level in cpu.levels()[:-1]]
LOWER_PACKS = [f"pack at {level}" for level in cpu.levels()[:-1]]
