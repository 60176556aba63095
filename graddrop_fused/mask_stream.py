"""The mask stream, version 2: which gradient elements survive.

    keep = f(seed, draw, stream id, element)

A pure function of four integers. It holds no generator and no state, so a mask is the same bits on every
device, thread count, world size, sharding and resume. docs/mask-stream.md is the full specification; this
module is its executable form and the truth that every kernel is compared with.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox4x32-10).
"""

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from .names import ID_BITS

VERSION = 2

WORD = 0xFFFFFFFF  # the largest unsigned 32-bit value
HALF = 0xFFFF  # the largest unsigned 16-bit value: what an element's random number can be
INDEX_BITS = 40  # of a counter index
TILE = 128  # elements decided by 16 consecutive counters: 4 output words x 16 lanes x 2 halves
_CHUNK = 1 << 22  # elements drawn at once: bounds the memory the int64 arithmetic takes

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Purpose(IntEnum):
    """Bits 8 to 11 of counter word 1: what a random number is for."""

    ELEMENT = 0
    LAYER = 1
    GAUSSIAN = 2
    BLOCK = 3
    ROUND_PARAM = 4  # stochastic rounding: of the parameter, and of the rule's first, second and third state
    ROUND_STATE_0 = 5
    ROUND_STATE_1 = 6
    ROUND_STATE_2 = 7


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32 with 10 rounds.

    Args:
        counter: int64, shape (..., 4), each value an unsigned 32-bit word.
        key: int64, shape (..., 2), likewise; broadcast against ``counter``.

    Returns:
        int64, shape (..., 4): the four unsigned 32-bit output words of each counter.

    Raises:
        TypeError: if either is not int64. ValueError: on another trailing shape, or on values of more than 32 bits.
    """
    for name, words, size in (("counter", counter, 4), ("key", key, 2)):
        if not isinstance(words, Tensor) or words.dtype != torch.int64:
            found = getattr(words, "dtype", type(words))
            raise TypeError(f"{name} must be an int64 tensor of unsigned 32-bit values, got {found}")
        if words.dim() == 0 or words.shape[-1] != size:
            raise ValueError(f"{name} must have shape (..., {size}), got {tuple(words.shape)}")
        if words.numel() and not 0 <= int(words.min()) <= int(words.max()) <= WORD:
            raise ValueError(f"{name} must hold values in [0, 2**32), got {int(words.min())} to {int(words.max())}")
    rounds = _philox_rounds(*counter.unbind(-1), *key.unbind(-1))
    return torch.stack(torch.broadcast_tensors(*rounds), dim=-1)


def _philox_rounds(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> list[Any]:
    """On int64 tensors, or on plain integers."""
    for _ in range(_ROUNDS):
        # int64 products wrap; masking after an arithmetic shift gives their unsigned high half
        product0, product2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product2 >> 32) & WORD) ^ c1 ^ k0,
            product2 & WORD,
            ((product0 >> 32) & WORD) ^ c3 ^ k1,
            product0 & WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & WORD, (k1 + _WEYL[1]) & WORD
    return [c0, c1, c2, c3]


def outputs(index: Tensor, *, seed: int, draw: int, stream_id: int, purpose: Purpose) -> list[Tensor]:
    """The four output words at 40-bit counter indices ``index`` (int64, any shape): four int64 tensors."""
    return _philox_rounds(
        index & WORD,
        (index >> 32) | _counter_word1(purpose, stream_id),
        torch.full_like(index, draw),
        torch.full_like(index, stream_id & WORD),
        torch.full_like(index, seed & WORD),
        torch.full_like(index, seed >> 32),
    )


def _counter_word1(purpose: Purpose, stream_id: int) -> int:
    """Counter word 1 of the counter indices below 2**32: above their 8 bits stand 4 of purpose and 20 of the id."""
    return int(purpose) << 8 | (stream_id >> 32) << 12


def element_random(
    elements: Tensor, *, seed: int, draw: int, stream_id: int, purpose: Purpose = Purpose.ELEMENT
) -> Tensor:
    """One 16-bit random number per element: a counter serves eight elements, two in each of its output words.

    Args:
        elements: int64, any shape: flat row-major indices in the whole parameter.

    Returns:
        int64 of the same shape, unsigned 16-bit values.
    """
    index = 16 * (elements // TILE) + elements % 32 // 2
    words = outputs(index, seed=seed, draw=draw, stream_id=stream_id, purpose=purpose)
    return _half(_select(words, elements // 32 % 4), elements % 2)


def block_random(elements: Tensor, block: int, *, seed: int, draw: int, stream_id: int) -> Tensor:
    """The 16-bit random number of each element's block of ``block`` consecutive elements."""
    b = elements // block
    words = outputs(b // 8, seed=seed, draw=draw, stream_id=stream_id, purpose=Purpose.BLOCK)
    return _half(_select(words, b // 2 % 4), b % 2)


def layer_random(*, seed: int, draw: Any, stream_id: Any) -> Any:
    """The 16-bit random number of a whole layer; ``stream_id`` is the layer's. Integers, or int64 tensors of many."""
    # plain integers: 100 times faster than tensors of one element, and asked for before every forward pass
    word1 = _counter_word1(Purpose.LAYER, stream_id)
    return _philox_rounds(0, word1, draw, stream_id & WORD, seed & WORD, seed >> 32)[0] & HALF


def gaussian(elements: Tensor, *, seed: int, draw: int, stream_id: int) -> Tensor:
    """A standard normal per element (float64), by Box-Muller from the four whole words at the element's counter."""
    index, word = gaussian_counter(elements)
    words = outputs(index, seed=seed, draw=draw, stream_id=stream_id, purpose=Purpose.GAUSSIAN)
    u = [(w.double() + 0.5) / 2**32 for w in words]
    normals = []
    for radius, angle in ((u[0], u[1]), (u[2], u[3])):
        r = torch.sqrt(-2.0 * torch.log(radius))
        normals += [r * torch.cos(2 * math.pi * angle), r * torch.sin(2 * math.pi * angle)]
    return _select(normals, word)


def gaussian_counter(elements: Tensor) -> tuple[Tensor, Tensor]:
    """Elements (int64) -> (counter index, which of its four normals): 32 counters make a tile of 128 elements."""
    return 32 * (elements // TILE) + elements % 32, elements // 32 % 4


def round_stochastically(values: Tensor, random: Tensor) -> Tensor:
    """float32 ``values`` to bfloat16: up with the share of a unit in the last place that they are beyond it.

    The bits plus a 16-bit number, of which the upper half is kept. A NaN and an infinity are rounded as to nearest.

    Args:
        random: integers of the same shape, unsigned 16-bit values: of :func:`element_random`.
    """
    bits = values.contiguous().view(torch.int32)
    upper = ((bits + random.to(torch.int32)) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isfinite(), upper, values.to(torch.bfloat16))


def _select(four: Sequence[Tensor], which: Tensor) -> Tensor:
    return torch.where(which < 2, torch.where(which == 0, four[0], four[1]), torch.where(which == 2, four[2], four[3]))


def _half(words: Tensor, upper: Tensor) -> Tensor:
    return (words >> 16 * upper) & HALF


def decide(random: Any, lo: Any, span: Any) -> Any:
    """Kept iff (random - lo) mod 2**16 <= span. Integers only, so that every backend agrees on every bit."""
    return ((random - lo) & HALF) <= span


# Windows: how a probability becomes (lo, span)


def bernoulli_window(p: float) -> tuple[int, int]:
    """(lo, span) that drops with probability p, rounded to a multiple of 2**-16.

    Raises ValueError if p is not in [0, 1), or rounds to 1.
    """
    lo = round(float(p) * 2**16) if 0.0 <= p < 1.0 else 2**16  # numpy's float16 ends below 2**16
    if lo >= 2**16:
        raise ValueError(f"p must be in [0, 1) and leave a keep probability of at least 2**-16, got {p!r}")
    return lo, HALF - lo


def epoch_bounds(p: float) -> list[int]:
    """Bounds B(0) = 0 < B(1) < ... = 2**16 of the windows that partition one cycle, one window an epoch.

    Raises ValueError if p is not in [0, 1), or if an epoch's window would be empty.
    """
    bernoulli_window(p)  # the same range check
    p = float(p)
    if 1.0 - p < 2.0**-16:
        raise ValueError(f"p must leave a keep probability of at least 2**-16 without replacement, got {p!r}")
    bounds, total = [0], 0.0
    while bounds[-1] < 2**16:
        total += 1.0 - p
        bounds.append(round(2**16 * min(1.0, total)))
    return bounds


def rescale(span: int) -> float:
    """1 / q with the exact keep probability q = (span + 1) / 2**16."""
    return 2**16 / (span + 1)


# Packed form: contiguous int32 words, bit l of word w is element 32 * w + l, unused bits zero


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool mask of any shape, in row-major order -> int32 words, shape (ceil(numel / 32),).

    Raises:
        TypeError: if ``mask`` is not a bool tensor.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask))}")
    bits = mask.reshape(-1)
    count = (bits.numel() + 31) // 32
    words = torch.zeros(count, dtype=torch.int64, device=mask.device)
    for lane in range(32):  # one lane at a time: no 32x larger temporary
        lane_bits = bits[lane::32]
        words[: lane_bits.numel()] |= lane_bits.to(torch.int64) << lane
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_mask(words: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of :func:`pack_mask`: int32 words -> bool tensor of ``shape``.

    Raises:
        TypeError: if ``words`` is not int32. ValueError: if their number does not fit ``shape``.
    """
    if not isinstance(words, Tensor) or words.dtype != torch.int32:
        raise TypeError(f"words must be an int32 tensor, got {getattr(words, 'dtype', type(words))}")
    numel = math.prod(shape)
    count = (numel + 31) // 32
    if words.dim() != 1 or words.numel() != count:
        raise ValueError(f"words must have shape ({count},) for a mask of {tuple(shape)}, got {tuple(words.shape)}")
    if numel <= 1 << 16:  # few calls, where they are what takes time
        lanes = torch.arange(32, dtype=torch.int32, device=words.device)
        return ((words.unsqueeze(1) >> lanes) & 1 != 0).reshape(-1)[:numel].reshape(tuple(shape))
    mask = torch.empty(words.numel() * 32, dtype=torch.bool, device=words.device)
    for lane in range(32):  # no temporary of 32 times the words
        mask[lane::32] = (words >> lane) & 1 != 0
    return mask[:numel].reshape(tuple(shape))


def keep_mask(
    shape: Sequence[int],
    p: float,
    *,
    seed: int = 0,
    draw: int = 1,
    stream_id: int = 0,
    block: int = 1,
    window: tuple[int, int] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The mask of one parameter, straight from the specification.

    Args:
        shape: shape of the whole parameter.
        p: drop probability in [0, 1), rounded to a multiple of 2**-16; ignored when ``window`` is given.
        seed: unsigned 64-bit. draw: unsigned 32-bit (step, epoch or cycle). stream_id: unsigned 52-bit.
        block: 1 for a decision per element, or B for one per B consecutive elements.
        window: (lo, span), 16 bits each, to decide with in place of Bernoulli's.

    Returns:
        bool tensor of ``shape``: True where the gradient is kept.

    Raises:
        ValueError: naming the argument that is out of its range.
    """
    lo, span = bernoulli_window(p) if window is None else window
    for name, value, bits in (
        ("seed", seed, 64),
        ("draw", draw, 32),
        ("stream_id", stream_id, ID_BITS),
        ("lo", lo, 16),
        ("span", span, 16),
    ):
        if not 0 <= value < 2**bits:
            raise ValueError(f"{name} must be in [0, 2**{bits}), got {value!r}")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block!r}")
    mask = torch.empty(math.prod(shape), dtype=torch.bool, device=device)
    for start in range(0, mask.numel(), _CHUNK):
        part = mask[start : start + _CHUNK]
        elements = torch.arange(start, start + part.numel(), device=device)
        random = (
            element_random(elements, seed=seed, draw=draw, stream_id=stream_id)
            if block == 1
            else block_random(elements, block, seed=seed, draw=draw, stream_id=stream_id)
        )
        part.copy_(decide(random, lo, span))
    return mask.reshape(tuple(shape))
