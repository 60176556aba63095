"""Policies as declarations, each with a loop in Python that says its masks, drawn by independent.py.

Tests of policies, checkpoints and capturable share them."""

import math

import independent
import torch
from torch import nn

from graddrop_fused import (
    GradDrop,
    GradDropAdamW,
    GradDropEpoch,
    GradFreeze,
    LayerGradDrop,
    LinearAnneal,
    StaticMask,
    dispatch,
)

BACKENDS = [name for name in ("reference", "cpu") if dispatch.load(name).unavailable(torch.device("cpu")) is None]
SEED, STEPS, PER_EPOCH, LR, DECAY, EPS, BETAS = 2**40 + 9, 9, 2, 1e-2, 0.1, 1e-8, (0.9, 0.999)
SHAPES = {"a.weight": (17, 23), "b.bias": (33,), "c.weight": (129,)}
LAYERS = ["first", "second", "third"]
STATIC = {name: (torch.arange(math.prod(s)) % 3 > 0).reshape(s) for name, s in SHAPES.items()}


def window(p, rescale=True):
    lo, span = independent.bernoulli(p)
    return lo, span, 2**16 / (span + 1) if rescale else 1.0


def by_element(draw_of, window_of, block=1):
    """(step, epoch) -> mask and scale, for a mask drawn for elements or blocks."""

    def mask(step, epoch, name, numel, layer):
        lo, span, scale = window_of(step, epoch)
        stream = independent.name_id(name)
        bits = independent.mask(numel, lo, span, SEED, draw_of(step, epoch), stream, block)
        return [scale if bit else None for bit in bits]

    return mask


def by_layer(draw_of, p_of, scale=1.0):
    def mask(step, epoch, name, numel, layer):
        lo, span = independent.bernoulli(p_of(step, epoch))
        word = independent.layer_random(SEED, draw_of(step, epoch), independent.name_id(LAYERS[layer]))
        return [scale if independent.kept(word, lo, span) else None] * numel

    return mask


def freeze(rank_of, per_epoch=1):
    return lambda step, epoch, name, numel, layer: [1.0 if rank_of(layer) < (epoch + 1) * per_epoch else None] * numel


def gaussian(p):
    def mask(step, epoch, name, numel, layer):
        std, stream = math.sqrt(p / (1 - p)), independent.name_id(name)
        return [1 + std * independent.normal(e, SEED, step, stream) for e in range(numel)]

    return mask


def cycle(p, toggle):
    bounds = independent.epoch_bounds(p)
    count = len(bounds) - 1

    def of(step, epoch):
        k = epoch % count if toggle else min(epoch, count - 1)
        lo = bounds[k] if toggle else 0
        return lo, bounds[k + 1] - 1 - lo, 2**16 / (bounds[k + 1] - lo)

    return by_element(lambda step, epoch: epoch // count if toggle else 0, of)


def each_step(step, epoch):
    return step


def each_epoch(step, epoch):
    return epoch


def falling(start, length, index):
    return max(0.0, start * (1 - index / (length - 1)))


CASES = {
    "GradDrop": (GradDrop(p=0.3), by_element(each_step, lambda s, e: window(0.3))),
    "no rescale": (GradDrop(p=0.3, rescale=False), by_element(each_step, lambda s, e: window(0.3, False))),
    "block": (GradDrop(p=0.5, block=128), by_element(each_step, lambda s, e: window(0.5), 128)),
    "epochs anneal": (
        GradDrop(anneal=LinearAnneal(0.9, epochs=4)),
        by_element(each_step, lambda s, e: window(falling(0.9, 4, e))),
    ),
    "steps anneal": (
        GradDrop(anneal=LinearAnneal(0.8, total_steps=6)),
        by_element(each_step, lambda s, e: window(falling(0.8, 6, s - 1))),
    ),
    "accumulate": (GradDropEpoch(p=0.7), cycle(0.7, False)),
    "toggle": (GradDropEpoch(p=0.6, toggle=True), cycle(0.6, True)),
    "regenerate": (GradDropEpoch(p=0.6, toggle=True, storage="regenerate"), cycle(0.6, True)),
    "replacement": (GradDropEpoch(p=0.4, replacement=True), by_element(each_epoch, lambda s, e: window(0.4))),
    "LayerGradDrop": (LayerGradDrop(p=0.5), by_layer(each_step, lambda s, e: 0.5)),
    "per epoch": (LayerGradDrop(p=0.5, per="epoch"), by_layer(each_epoch, lambda s, e: 0.5)),
    "layers rescaled": (LayerGradDrop(p=0.5, rescale=True), by_layer(each_step, lambda s, e: 0.5, scale=2.0)),
    "layers anneal": (
        LayerGradDrop(anneal=LinearAnneal(0.9, epochs=3)),
        by_layer(each_step, lambda s, e: falling(0.9, 3, e)),
    ),
    "top-down": (GradFreeze("top-down"), freeze(lambda layer: 2 - layer)),
    "bottom-up": (GradFreeze("bottom-up", layers_per_epoch=2), freeze(lambda layer: layer, 2)),
    "StaticMask": (
        StaticMask(STATIC),
        lambda s, e, name, n, layer: [1.0 if bit else None for bit in STATIC[name].flatten().tolist()],
    ),
    "none": (None, lambda s, e, name, numel, layer: [1.0] * numel),
}
EFFECTS = ("gradient", "freeze", "update")
RUNS = [(name, effect) for name in CASES for effect in EFFECTS] + [("gaussian", "gradient")]
CASES["gaussian"] = (GradDrop(p=0.2, distribution="gaussian"), gaussian(0.2))


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES.values()]


def build(drops, effects, backend="reference", **options):
    generator = torch.Generator().manual_seed(99)
    params = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in SHAPES.values()]
    groups = [
        {"params": [(name, p)], "layer": layer, "drop": drop, "effect": effect}
        for name, p, layer, drop, effect in zip(SHAPES, params, LAYERS, drops, effects, strict=True)
    ]
    return params, GradDropAdamW(groups, lr=LR, weight_decay=DECAY, seed=SEED, backend=backend, **options)


def by_the_equations(param, masks, effect, grads, in_parts):
    """One parameter's trajectory, element by element: equations 2 and 3, then AdamW. What is frozen has not
    stepped where the mask decides ``in_parts``, layers or blocks."""
    p, m, v, steps = param, [0.0] * len(param), [0.0] * len(param), [0] * len(param)
    for mask, grad in zip(masks, grads, strict=True):
        for e, scale in enumerate(mask):
            steps[e] += not (in_parts and effect == "freeze" and scale is None)
            t = steps[e]
            if scale is None and effect == "freeze":
                continue
            g = grad[e] if effect == "update" else 0.0 if scale is None else scale * grad[e]
            m[e] = BETAS[0] * m[e] + (1 - BETAS[0]) * g
            v[e] = BETAS[1] * v[e] + (1 - BETAS[1]) * g * g
            m_hat, v_hat = m[e] / (1 - BETAS[0] ** t), v[e] / (1 - BETAS[1] ** t)
            change = -LR * DECAY * p[e] - LR * m_hat / (math.sqrt(v_hat) + EPS)
            if effect == "update":
                change = 0.0 if scale is None else scale * change
            p[e] += change
    return p
