"""The reference backend: masked AdamW in plain PyTorch, in the paper's order. This is the specification.

Source: "Gradient Sparsification for Masked Fine-Tuning of Transformers", equations 2 and 3, and Loshchilov and
Hutter 2019, "Decoupled Weight Decay Regularization" (AdamW). Runs on any device, for any dense tensor.
"""

import torch
from torch import Tensor

from . import mask_stream
from .contract import Batch, Effect, Integer, Mask, Real

_CHUNK = 1 << 22  # elements whose random words are held at once


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot serve ``device``, or None."""
    return None


def adamw(batch: Batch, *, seed: int, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
    """One masked AdamW step for every tensor of the batch, in place.

    ``grad_scale`` (AMP) divides every gradient; where ``found_inf`` is nonzero nothing changes.
    """
    if found_inf is not None and found_inf.item():
        return
    inv_grad_scale = 1.0 if grad_scale is None else grad_scale.double().reciprocal().item()
    for i in range(len(batch.params)):
        _adamw(batch, i, seed, inv_grad_scale)


def _adamw(batch: Batch, i: int, seed: int, inv_grad_scale: float) -> None:
    effect = Effect(int(batch.integers[i, Integer.EFFECT]))
    sign, scale, _, decay, step_size, beta1, beta2, eps, bias_correction2_sqrt = batch.reals[i].tolist()
    param, exp_avg, exp_avg_sq = batch.params[i], batch.exp_avgs[i], batch.exp_avg_sqs[i]
    max_exp_avg_sq = batch.max_exp_avg_sqs[i] if batch.max_exp_avg_sqs else None
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32

    kept = keep(batch, i, seed)  # bool tensor, or one bool for all elements
    p, m, v = param.to(dtype), exp_avg.to(dtype), exp_avg_sq.to(dtype)
    g = torch.zeros_like(p) if batch.grads[i] is None else batch.grads[i].to(dtype) * (inv_grad_scale * sign)
    if effect == Effect.UPDATE:  # the whole step is rescaled, decay included
        decay, step_size = 1 - scale * (1 - decay), scale * step_size
    else:
        g = _masked(g, kept, scale * _noise(batch, i, seed, dtype))  # equations 2 and 3

    new_p = p * decay
    new_m = m + (1 - beta1) * (g - m)
    new_v = beta2 * v + (1 - beta2) * g * g
    new_vmax = new_v if max_exp_avg_sq is None else torch.maximum(max_exp_avg_sq.to(dtype), new_v)
    new_p = new_p - step_size * new_m / (new_vmax.sqrt() / bias_correction2_sqrt + eps)

    if effect in (Effect.FREEZE, Effect.UPDATE):
        _assign(param, new_p, kept)
    else:
        _assign(param, new_p)
    state_kept = kept if effect == Effect.FREEZE else True
    _assign(exp_avg, new_m, state_kept)
    _assign(exp_avg_sq, new_v, state_kept)
    if max_exp_avg_sq is not None:
        _assign(max_exp_avg_sq, new_vmax, state_kept)


def mask_grads(batch: Batch, *, seed: int) -> None:
    """Equation 2 alone, in place on every gradient: rescale * grad where kept, else 0."""
    for i, grad in enumerate(batch.grads):
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        scale = float(batch.reals[i, Real.RESCALE]) * _noise(batch, i, seed, dtype)
        grad.copy_(_masked(grad.to(dtype), keep(batch, i, seed), scale))


def pack(batch: Batch, *, seed: int) -> None:
    """Draw every tensor's mask and write it to ``batch.packed`` (int32 words, local row-major order)."""
    for i, words in enumerate(batch.packed):
        kept = keep(batch, i, seed)
        if not isinstance(kept, Tensor):
            kept = torch.full(batch.shards[i].shape, kept, device=words.device)
        words.copy_(mask_stream.pack_mask(kept))


def keep(batch: Batch, i: int, seed: int) -> Tensor | bool:
    """Tensor i's mask: a bool tensor of its local shape, or one bool where a single decision holds for all of it."""
    mask, _, draw, stream, lo, span, block = batch.integers[i].tolist()
    at = {"seed": seed, "draw": draw, "stream": stream}
    if mask in (Mask.KEEP, Mask.GAUSSIAN):
        return True
    if mask == Mask.DROP:
        return False
    if mask == Mask.LAYER:
        return bool(mask_stream.decide(mask_stream.layer_word(**at), lo, span))
    if mask == Mask.PACKED:
        return mask_stream.unpack_mask(batch.packed[i], batch.shards[i].shape)

    def decide(elements):
        if mask == Mask.BLOCK:
            words = mask_stream.block_words(elements, block, **at)
        else:
            words = mask_stream.element_words(elements, **at)
        return mask_stream.decide(words, lo, span)

    return _by_chunks(batch, i, torch.bool, decide)


def _noise(batch: Batch, i: int, seed: int, dtype: torch.dtype) -> Tensor | float:
    if batch.integers[i, Integer.MASK] != Mask.GAUSSIAN:
        return 1.0
    draw, stream = int(batch.integers[i, Integer.DRAW]), int(batch.integers[i, Integer.STREAM])
    std = float(batch.reals[i, Real.NOISE_STD])
    return _by_chunks(
        batch, i, dtype, lambda e: 1.0 + std * mask_stream.gaussian(e, seed=seed, draw=draw, stream=stream)
    )


def _by_chunks(batch: Batch, i: int, dtype: torch.dtype, values) -> Tensor:
    """``values(global element indices)`` for the whole local tensor, in its shape."""
    shard, device = batch.shards[i], (batch.params or batch.packed)[i].device
    out = torch.empty(shard.numel, dtype=dtype, device=device)
    for start in range(0, shard.numel, _CHUNK):
        stop = min(start + _CHUNK, shard.numel)
        out[start:stop] = values(shard.elements(start, stop, device))
    return out.reshape(shard.shape)


def _masked(g: Tensor, kept: Tensor | bool, scale: Tensor | float) -> Tensor:
    """A select, not a product: a dropped NaN is a zero."""
    if isinstance(kept, Tensor):
        return torch.where(kept, g * scale, 0.0)
    return g * scale if kept else torch.zeros_like(g)


def _assign(tensor: Tensor, value: Tensor, kept: Tensor | bool = True) -> None:
    """``tensor[kept] = value[kept]``; elements that are not kept keep their bits."""
    if isinstance(kept, Tensor):
        tensor.copy_(torch.where(kept, value.to(tensor.dtype), tensor))
    elif kept:
        tensor.copy_(value)
