"""Stochastic rounding on loaded values: the mask stream's 16-bit numbers, added to float32's bits.

Numbers come in the forms of draw.py: for each access of a pass a tuple of them, the parameter's and, where the states
are bfloat16, the states'. An empty tuple rounds to nearest.
"""

import triton
import triton.language as tl

from .draw import tile_counters
from .memory import in_a_row
from .philox import select, words_at
from .tables import FOR_ROUND_PARAM, ROUND_DRAW, ROUND_STREAM_ID


@triton.jit
def rounding_key(rounding, seed):
    """A tensor's row of Batch.rounding, as words_at takes it."""
    stream_id = tl.load(rounding + ROUND_STREAM_ID)
    draw = tl.load(rounding + ROUND_DRAW).to(tl.uint32)
    return draw, stream_id.to(tl.uint32), (stream_id >> 32).to(tl.uint32) << 12, seed


@triton.jit
def stored(x, dtype: tl.constexpr, random, VALUE: tl.constexpr):
    """``x`` as it is stored. VALUE: its place in the tuple ``random``, 0 for the parameter, 1 and on for the states."""
    if len(random) == 0 or dtype != tl.bfloat16:
        return x.to(dtype)
    else:
        moved = tl.add(x.to(tl.uint32, bitcast=True), random[VALUE], sanitize_overflow=False)
        upper = tl.where(x == x, moved >> 16, 0x7FC0)  # a NaN's bits could carry into something else
        return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.constexpr_function
def rounded_values(states, state_dtype):
    """How many of an element's values are bfloat16."""
    return 1 + (states if state_dtype == tl.bfloat16 else 0)


@triton.jit
def wide_words(first, key, VALUES: tl.constexpr, TILES: tl.constexpr):
    """For each value, the four counters' words of a thread's eight elements, [TILES, 4] each.

    ``first``: global index of the first element, a multiple of 128.
    """
    counters = tile_counters(first, TILES) + (tl.arange(0, 4) * 4)[None, :]
    drawn = ()
    for value in tl.static_range(VALUES):
        drawn = drawn + (
            (
                words_at(counters, FOR_ROUND_PARAM + value, key),
                words_at(counters + 1, FOR_ROUND_PARAM + value, key),
                words_at(counters + 2, FOR_ROUND_PARAM + value, key),
                words_at(counters + 3, FOR_ROUND_PARAM + value, key),
            ),
        )
    return drawn


@triton.jit
def wide_random(drawn, w: tl.constexpr, VALUES: tl.constexpr, TILES: tl.constexpr):
    """Of the wide pass's access ``w``, [TILES, 4, 8] each."""
    random = ()
    for value in tl.static_range(VALUES):
        a, b, c, d = drawn[value]
        words = in_a_row(a[w], b[w], c[w], d[w])
        random = random + (tl.join(words & 0xFFFF, words >> 16).reshape(TILES, 4, 8),)
    return random


@triton.jit
def narrow_words(first, key, VALUES: tl.constexpr, TILES: tl.constexpr):
    """For each value, the words of a narrow pass's four accesses."""
    counters = tile_counters(first, TILES) + (tl.arange(0, 32) // 2)[None, :]
    drawn = ()
    for value in tl.static_range(VALUES):
        drawn = drawn + (words_at(counters, FOR_ROUND_PARAM + value, key),)
    return drawn


@triton.jit
def narrow_random(drawn, w: tl.constexpr, VALUES: tl.constexpr):
    """Of the narrow pass's access ``w``, [TILES, 32] each."""
    upper = (tl.arange(0, 32).to(tl.uint32) % 2)[None, :]
    random = ()
    for value in tl.static_range(VALUES):
        random = random + (half_of(drawn[value][w], upper),)
    return random


@triton.jit
def strided_random(index, key, VALUES: tl.constexpr):
    """Of elements anywhere. ``index``: in the whole parameter (int64)."""
    low = index.to(tl.uint32)
    counters = (index >> 7 << 4) + (low >> 1 & 15)
    random = ()
    for value in tl.static_range(VALUES):
        word = select(low >> 5, words_at(counters, FOR_ROUND_PARAM + value, key))
        random = random + (half_of(word, low & 1),)
    return random


@triton.jit
def half_of(word, upper):
    """Its lower or upper 16 bits (``upper``: 0 or 1, uint32)."""
    return (word >> (16 * upper)) & 0xFFFF
