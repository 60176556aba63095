"""The reference backend: the masked update in plain PyTorch, in the paper's order. This is the specification.

Source: "Gradient Sparsification for Masked Fine-Tuning of Transformers", equations 2 and 3; the update rules are in
rules.py. Runs on any device, for any dense tensor.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import mask_stream
from .contract import Batch, Effect, Integer, Mask, Real, Rounding, Runs, Scattered, elements
from .mask_stream import Purpose
from .rules import Rule

_CHUNK = 1 << 22  # elements whose random numbers are held at once


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot serve ``device``, or None."""
    return None


def update(
    batch: Batch, rule: Rule, *, seed: int, grad_scale: Tensor | None = None, found_inf: Tensor | None = None
) -> None:
    """One masked step of ``rule`` for every tensor of the batch, in place.

    ``grad_scale`` (AMP) divides every gradient; where ``found_inf`` is nonzero nothing changes.
    """
    prepare(batch, rule, seed=seed, grad_scale=grad_scale, found_inf=found_inf)()


def prepare(
    batch: Batch, rule: Rule, *, seed: int, grad_scale: Tensor | None = None, found_inf: Tensor | None = None
) -> Callable[[], None]:
    """:func:`update` up to its launch, which is returned. It allocates as it goes, and so may be broken off between two
    tensors; ``batch.done`` then says how many are updated."""
    if found_inf is not None and found_inf.item():
        return lambda: None
    inv_grad_scale = 1.0 if grad_scale is None else grad_scale.double().reciprocal().item()

    update_one = partial(_update, batch) if batch.runs is None else partial(_update_runs, batch, batch.runs)

    def launch() -> None:
        for i, param in enumerate(batch.params):
            if param.numel():  # an empty one's shape may have changed
                update_one(rule, i, seed, inv_grad_scale)
            batch.done = i + 1

    return launch


def _update_runs(batch: Batch, runs: Runs, rule: Rule, i: int, seed: int, inv_grad_scale: float) -> None:
    """Tensor i's runs as if they were tensors: those of equal numbers are taken out together, updated and put back."""
    param, grad, states = batch.params[i], batch.grads[i], [state[i] for state in batch.states]
    rows, contiguous = runs.of_tensor(i), param.is_contiguous()
    param = param.view(-1) if contiguous else param
    _, alike = torch.cat([batch.integers[rows].double(), batch.reals[rows]], 1).unique(dim=0, return_inverse=True)
    writes = []
    for kind in range(int(alike.max()) + 1 if len(alike) else 0):
        these = (alike == kind).nonzero().reshape(-1) + rows.start
        mask, effect, *_ = batch.integers[these[0]].tolist()
        if mask == Mask.DROP and effect == Effect.FREEZE:  # left alone, and fit for backward passes yet to come
            continue
        lengths = runs.lengths[these]
        places = elements(runs.starts[these], lengths).to(param.device)
        at = places if contiguous else torch.unravel_index(places, param.shape)
        in_state = elements(runs.state_starts[these], lengths).to(param.device)
        part = Batch(
            params=[param[at]],
            shards=[Scattered((len(places),), (1,), indices=batch.shards[i].at(places))],
            integers=batch.integers[these[:1]],
            reals=batch.reals[these[:1]],
            grads=[None if grad is None else grad.reshape(-1)[places]],
            states=[[state[in_state]] for state in states],
            rounding=None if batch.rounding is None else batch.rounding[these[:1]],
        )
        _update(part, rule, 0, seed, inv_grad_scale)
        writes.append((param, at, part.params[0]))
        writes += [(state, in_state, new) for state, (new,) in zip(states, part.states, strict=True)]
    for tensor, at, value in writes:  # only now, since memory may run out before
        tensor[at] = value


def _update(batch: Batch, rule: Rule, i: int, seed: int, inv_grad_scale: float) -> None:
    effect = Effect(int(batch.integers[i, Integer.EFFECT]))
    row = batch.reals[i].tolist()
    param, grad, states = batch.params[i], batch.grads[i], [state[i] for state in batch.states]
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    factors = _factors(batch, rule, i, dtype)

    kept = keep(batch, i, seed)  # bool tensor, or one bool for all elements
    p = param.to(dtype)
    g = torch.zeros_like(p) if grad is None else grad.to(dtype) * (inv_grad_scale * row[Real.GRAD_FACTOR])
    if effect != Effect.UPDATE:
        g = _masked(g * _noise(batch, i, seed, dtype), kept)  # equations 2 and 3

    new_p, new_states = rule.update(p, g, [state.to(dtype) for state in states], factors)

    new_p = _rounded(batch, i, seed, new_p, param.dtype, Purpose.ROUND_PARAM)
    writes = [(param, _selected(new_p, True if effect == Effect.GRADIENT else kept, param))]
    for k, (state, new_state) in enumerate(zip(states, new_states, strict=True)):
        new_state = _rounded(batch, i, seed, new_state, state.dtype, Purpose(Purpose.ROUND_STATE_0 + k))
        writes.append((state, _selected(new_state, kept if effect == Effect.FREEZE else True, state)))
    for tensor, value in writes:  # only now, since memory may run out before
        if value is not None:
            tensor.copy_(value)


def pack(batch: Batch, *, seed: int) -> None:
    """Draw every tensor's mask and write it to ``batch.packed`` (int32 words, local row-major order)."""
    for i in range(len(batch.packed)):
        words = _words(batch, i)
        kept = keep(batch, i, seed)
        if not isinstance(kept, Tensor):
            kept = torch.full(batch.shards[i].shape, kept, device=words.device)
        words.copy_(mask_stream.pack_mask(kept))


def keep(batch: Batch, i: int, seed: int) -> Tensor | bool:
    """Tensor i's mask: a bool tensor of its local shape, or one bool where a single decision holds for all of it."""
    mask, _, draw, stream_id, lo, span, block = batch.integers[i].tolist()
    at = {"seed": seed, "draw": draw, "stream_id": stream_id}
    if mask in (Mask.KEEP, Mask.GAUSSIAN):
        return True
    if mask == Mask.DROP:
        return False
    if mask == Mask.LAYER:
        return bool(mask_stream.decide(mask_stream.layer_random(**at), lo, span))
    if mask == Mask.PACKED:
        return mask_stream.unpack_mask(_words(batch, i), batch.shards[i].shape)

    def decide(elements: Tensor) -> Tensor:
        if mask == Mask.BLOCK:
            random = mask_stream.block_random(elements, block, **at)
        else:
            random = mask_stream.element_random(elements, **at)
        return mask_stream.decide(random, lo, span)

    return _by_chunks(batch, i, torch.bool, decide)


def _factors(batch: Batch, rule: Rule, i: int, dtype: torch.dtype) -> list:
    """The rule's factors: numbers, or tensors of the local shape where blocks have their own."""
    mask, effect, block = batch.integers[i, [Integer.MASK, Integer.EFFECT, Integer.BLOCK]].tolist()
    table = batch.block_factors[i] if batch.block_factors else None
    count = len(rule.factor_names)
    if table is None or mask != Mask.BLOCK or effect != Effect.FREEZE:
        return batch.reals[i, Real.FACTOR : Real.FACTOR + count].tolist()
    first = batch.shards[i].offset // block

    def of(k: int) -> Callable[[Tensor], Tensor]:
        return lambda elements: table[elements // block - first, k]

    return [_by_chunks(batch, i, dtype, of(k)) for k in range(count)]


def _noise(batch: Batch, i: int, seed: int, dtype: torch.dtype) -> Tensor | float:
    if batch.integers[i, Integer.MASK] != Mask.GAUSSIAN:
        return 1.0
    draw, stream_id = int(batch.integers[i, Integer.DRAW]), int(batch.integers[i, Integer.STREAM_ID])
    std = float(batch.reals[i, Real.NOISE_STD])
    return _by_chunks(
        batch, i, dtype, lambda e: 1.0 + std * mask_stream.gaussian(e, seed=seed, draw=draw, stream_id=stream_id)
    )


def _rounded(batch: Batch, i: int, seed: int, value: Tensor, dtype: torch.dtype, purpose: Purpose) -> Tensor:
    """``value`` in ``dtype``: to nearest, or bfloat16 by the mask stream's own numbers."""
    if batch.rounding is None or dtype != torch.bfloat16:
        return value.to(dtype)
    draw, stream_id = (int(batch.rounding[i, column]) for column in Rounding)
    at: dict[str, Any] = {"seed": seed, "draw": draw, "stream_id": stream_id, "purpose": purpose}
    random = _by_chunks(batch, i, torch.int32, lambda e: mask_stream.element_random(e, **at))
    return mask_stream.round_stochastically(value, random)


def _by_chunks(batch: Batch, i: int, dtype: torch.dtype, values: Callable[[Tensor], Tensor]) -> Tensor:
    """``values(global element indices)`` for the whole local tensor, in its shape."""
    shard = batch.shards[i]
    device = batch.params[i].device if batch.params else _words(batch, i).device
    out = torch.empty(shard.numel, dtype=dtype, device=device)
    for start in range(0, shard.numel, _CHUNK):
        stop = min(start + _CHUNK, shard.numel)
        out[start:stop] = values(shard.elements(start, stop, device))
    return out.reshape(shard.shape)


def _words(batch: Batch, i: int) -> Tensor:
    words = batch.packed[i]
    assert words is not None
    return words


def _masked(g: Tensor, kept: Tensor | bool) -> Tensor:
    """A select, not a product: a dropped NaN is a zero."""
    if isinstance(kept, Tensor):
        return torch.where(kept, g, 0.0)
    return g if kept else torch.zeros_like(g)


def _selected(value: Tensor, kept: Tensor | bool, tensor: Tensor) -> Tensor | None:
    """``value`` where it is kept, and ``tensor`` elsewhere, whose elements keep their bits; None if that is all."""
    if isinstance(kept, Tensor):
        return torch.where(kept, value.to(tensor.dtype), tensor)
    return value if kept else None
