"""active_state=True: moments for active elements only, against torch's optimizers over blocks that are parameters of
their own."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn

from graddrop_fused import (
    GradDrop,
    GradDropAdamW,
    GradDropEpoch,
    GradDropLion,
    GradDropSGD,
    GradFreeze,
    LayerGradDrop,
    LinearAnneal,
    StaticMask,
    release_gradients,
    skip_dropped_layers,
    skip_dropped_rows,
)

SHAPES = {
    "matrix": (17, 23),
    "vector": (133,),
    "scalar": (),
    "empty": (0, 3),
    "odd": (1, 129),
    "cube": (33, 2, 3),
    "31": (31,),
    "one": (1, 1),
    "tall": (32, 31),
}
PER_EPOCH, EPOCHS = 3, 6
ADAMW = {"lr": 1e-2, "weight_decay": 0.1}
RULES = {
    "AdamW": (partial(GradDropAdamW, **ADAMW), partial(torch.optim.AdamW, **ADAMW)),
    "amsgrad": (partial(GradDropAdamW, amsgrad=True, **ADAMW), partial(torch.optim.AdamW, amsgrad=True, **ADAMW)),
    "SGD": (
        partial(GradDropSGD, lr=1e-2, momentum=0.9, dampening=0.5, weight_decay=0.1),
        partial(torch.optim.SGD, lr=1e-2, momentum=0.9, dampening=0.5, weight_decay=0.1),
    ),
    "plain SGD": (partial(GradDropSGD, lr=1e-2), partial(torch.optim.SGD, lr=1e-2)),
    "Lion": (partial(GradDropLion, lr=1e-2), partial(GradDropLion, lr=1e-2, backend="reference")),
}
BLOCKS = {
    "toggle": GradDropEpoch(0.75, block="row", toggle=True),
    "accumulate": GradDropEpoch(0.75, block="row"),
    "replacement": GradDropEpoch(0.75, block="row", replacement=True),
    "toggle 128": GradDropEpoch(0.75, block=128, toggle=True),
    "accumulate 128": GradDropEpoch(0.75, block=128),
    "held": GradDrop(0.75, block=128, hold=2),
    "annealed": GradDropEpoch(anneal=LinearAnneal(0.75, epochs=3), block="row", replacement=True, rescale=False),
}
LAYERS = {
    "GradFreeze": GradFreeze(),
    "bottom-up": GradFreeze("bottom-up", layers_per_epoch=2),
    "LayerGradDrop": LayerGradDrop(0.5, per="epoch"),
    "held layers": LayerGradDrop(0.5, hold=2),
}
BACKENDS = ("reference", "cpu")


def named(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {n: nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for n, s in SHAPES.items()}


def by_layers(params):
    """Groups of a layer each, of one or two parameters."""
    items = list(params.items())
    return [{"params": items[i : i + 2], "layer": str(i)} for i in range(0, len(items), 2)]


def give_gradients(params, step, missing=()):
    for number, (name, p) in enumerate(params.items()):
        generator = torch.Generator().manual_seed(1000 * step + number)
        g = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.grad = None if (name, step) in missing else g


def block_numbers(shape, block):
    """Each element's block, from the definition."""
    elements = torch.arange(torch.Size(shape).numel())
    if block == "row":
        return elements // max(1, torch.Size(shape[1:]).numel()) if len(shape) > 1 else elements
    return elements // block


class Split:
    """Every block (or whole parameter) as a parameter of its own of another optimizer. It has state while it is active."""

    def __init__(self, params, make, drop):
        self.drop = drop
        self.numbers = {n: block_numbers(p.shape, getattr(drop, "block", 10**9)) for n, p in params.items()}
        self.pieces = {}
        for name, p in params.items():
            flat = p.detach().reshape(-1)
            for number in self.numbers[name].unique().tolist():
                self.pieces[name, number] = nn.Parameter(flat[self.numbers[name] == number].clone())
        self.optimizer = make(list(self.pieces.values()))

    def step(self, params, masks, rescale=1.0):
        for (name, number), piece in self.pieces.items():
            of_block = self.numbers[name] == number
            kept = masks[name].reshape(-1)[of_block]
            assert kept.all() or not kept.any()
            grad = params[name].grad
            piece.grad = None
            if not kept.all():
                self.optimizer.state.pop(piece, None)
            elif grad is not None:
                piece.grad = rescale * grad.reshape(-1)[of_block]
        self.optimizer.step()

    def value(self, name, like):
        out = torch.zeros(like.numel(), dtype=like.dtype)
        for (owner, number), piece in self.pieces.items():
            if owner == name:
                out[self.numbers[name] == number] = piece.detach()
        return out.reshape(like.shape)

    def state(self, name, key, like):
        """(elements that have state, their values)."""
        has, out = torch.zeros(like.numel(), dtype=torch.bool), torch.zeros(like.numel(), dtype=like.dtype)
        for (owner, number), piece in self.pieces.items():
            if owner == name and piece in self.optimizer.state and self.optimizer.state[piece].get(key) is not None:
                has[self.numbers[name] == number] = True
                out[self.numbers[name] == number] = self.optimizer.state[piece][key].detach().reshape(-1).to(like.dtype)
        return has, out


def spread(entry, key, like):
    """The same of our state."""
    has, out = torch.zeros(like.numel(), dtype=torch.bool), torch.zeros(like.numel(), dtype=like.dtype)
    if not entry:
        return has, out
    if "active" not in entry:
        value = entry[key].detach()
        return ~has, value.reshape(-1).to(like.dtype).expand(like.numel()).clone()
    at = 0
    for start, length, count in entry["active"].tolist():
        has[start : start + length] = True
        out[start : start + length] = entry[key][count] if key == "step" else entry[key][at : at + length]
        at += length
    assert at == (entry[key].numel() if key != "step" else at)
    return has, out


def rescale_of(drop, step):
    """1/q at a step, by hand."""
    if isinstance(drop, LayerGradDrop | GradFreeze) or drop is None or drop.rescale is False:
        return 1.0
    if isinstance(drop, GradDropEpoch) and not (drop.toggle or drop.replacement):
        return 4 / min(4, step // PER_EPOCH + 1)
    return 4.0


def optimizer(make, params, drop, **options):
    groups = by_layers(params) if drop is not None and drop.layerwise else params.items()
    options = {"drop": drop, "effect": "freeze", "seed": 5, "steps_per_epoch": PER_EPOCH, **options}
    return make(groups, active_state=True, **options)


MISSING = {("matrix", 4), ("vector", 0), ("vector", 7), ("tall", 8), ("cube", 3)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("policy", [*BLOCKS, *LAYERS, "none"])
def test_it_trains_as_torch_does_on_blocks_that_are_parameters(policy, rule, backend):
    drop = {**BLOCKS, **LAYERS, "none": None}[policy]
    ours, theirs = RULES[rule]
    params = named()
    opt = optimizer(ours, params, drop, backend=backend)
    truth = Split(params, theirs, drop)
    for step in range(PER_EPOCH * EPOCHS):
        give_gradients(params, step, MISSING)
        masks = {name: opt.keep_mask(p) for name, p in params.items()}
        opt.step()
        truth.step(params, masks, rescale_of(drop, step))
        for name, p in params.items():
            torch.testing.assert_close(p.detach(), truth.value(name, p), rtol=1e-12, atol=1e-12, msg=f"{name} {step}")
            for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "step"):
                has, expected = truth.state(name, key, p)
                if not has.any() or (key == "step" and rule == "Lion"):
                    continue
                held, values = spread(opt.state[p], key, p)
                assert (held | ~has).all(), (name, key, step)  # active before its first gradient: zeros
                torch.testing.assert_close(values[has], expected[has], rtol=1e-12, atol=1e-12)
            held, _ = spread(opt.state.get(p, {}), "step", p)
            assert not (held & ~masks[name].reshape(-1)).any(), (name, step)
