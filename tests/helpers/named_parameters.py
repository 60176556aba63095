"""Four named parameters and gradients for them, the same at every call."""

import torch

SHAPES = {"a.weight": (17, 23), "a.bias": (33,), "b.weight": (3, 129), "b.bias": (1,)}


def parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in SHAPES.items()}


def give_gradients(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params.values():
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))
