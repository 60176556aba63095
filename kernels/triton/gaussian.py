"""Gaussian masks on loaded values: standard normals from the mask stream's words, a whole word each."""

import triton
import triton.language as tl

from .memory import in_a_row, side_by_side
from .philox import select, words_at
from .tables import FOR_GAUSSIAN


@triton.jit
def wide_noise(first, key, TILES: tl.constexpr, VECTOR: tl.constexpr):
    """Standard normals of the four accesses of a wide pass, [TILES, PARTS, VECTOR] each."""
    counters = tile_counters(first, TILES) + (tl.arange(0, 32 // VECTOR) * VECTOR)[None, :]
    near = four_lanes_noise(counters, key)
    if VECTOR == 4:
        return near
    else:
        far = four_lanes_noise(counters + 4, key)
        return (
            side_by_side(near[0], far[0], TILES, VECTOR),
            side_by_side(near[1], far[1], TILES, VECTOR),
            side_by_side(near[2], far[2], TILES, VECTOR),
            side_by_side(near[3], far[3], TILES, VECTOR),
        )


@triton.jit
def narrow_noise(first, key, TILES: tl.constexpr):
    """Standard normals of the four words of a narrow pass, [TILES, 32] each."""
    return normals(words_at(tile_counters(first, TILES) + tl.arange(0, 32)[None, :], FOR_GAUSSIAN, key))


@triton.jit
def strided_noise(index, key):
    """A standard normal for each global element index."""
    low = index.to(tl.uint32)
    return select(low >> 5, normals(words_at((index >> 7 << 5) + (low & 31), FOR_GAUSSIAN, key)))


@triton.jit
def tile_counters(first, TILES: tl.constexpr):
    """The first counter of each tile, [TILES, 1], int64. ``first``: global index, a multiple of 128."""
    return (first >> 2) + tl.arange(0, TILES)[:, None] * 32


@triton.jit
def four_lanes_noise(counters, key):
    """A lane at a time: drawn in the shape of an access, noise would go through shared memory to reach its layout."""
    a = normals(words_at(counters, FOR_GAUSSIAN, key))
    b = normals(words_at(counters + 1, FOR_GAUSSIAN, key))
    c = normals(words_at(counters + 2, FOR_GAUSSIAN, key))
    d = normals(words_at(counters + 3, FOR_GAUSSIAN, key))
    return (
        in_a_row(a[0], b[0], c[0], d[0]),
        in_a_row(a[1], b[1], c[1], d[1]),
        in_a_row(a[2], b[2], c[2], d[2]),
        in_a_row(a[3], b[3], c[3], d[3]),
    )


@triton.jit
def normals(words):
    """Box-Muller: four words -> four standard normals (float32)."""
    radius0, cos0, sin0 = polar(words[0], words[1])
    radius2, cos2, sin2 = polar(words[2], words[3])
    return radius0 * cos0, radius0 * sin0, radius2 * cos2, radius2 * sin2


@triton.jit
def polar(radius_word, angle_word):
    """sqrt(-2 ln u), cos(2 pi u'), sin(2 pi u') with u, u' = (word + 0.5) / 2**32.

    Near u = 1 a float32 cannot hold word + 0.5 well enough for the logarithm, so 1 - u comes from the inverted
    word. The angle is reduced to a quarter turn in integers; Taylor polynomials are exact to 3e-8 within it.
    """
    scale: tl.constexpr = 2.0**-32
    near_one = radius_word >= 0x80000000
    word = tl.where(near_one, radius_word ^ 0xFFFFFFFF, radius_word)
    distance = word.to(tl.float32) * scale + 0.5 * scale
    radius = tl.sqrt(-2.0 * tl.log(tl.where(near_one, 1.0 - distance, distance)))

    quadrant = tl.add(angle_word, 0x20000000, sanitize_overflow=False) >> 30
    rest = tl.sub(angle_word, quadrant << 30, sanitize_overflow=False).to(tl.int32, bitcast=True)
    x = (rest.to(tl.float32) + 0.5) * (6.283185307179586 * scale)
    x2 = x * x
    sin = x * (1 + x2 * (-1 / 6 + x2 * (1 / 120 + x2 * (-1 / 5040 + x2 * (1 / 362880)))))
    cos = 1 + x2 * (-1 / 2 + x2 * (1 / 24 + x2 * (-1 / 720 + x2 * (1 / 40320))))
    swap = quadrant & 1 != 0
    cos_turned, sin_turned = tl.where(swap, sin, cos), tl.where(swap, cos, sin)
    minus_cos = (quadrant == 1) | (quadrant == 2)
    return radius, tl.where(minus_cos, -cos_turned, cos_turned), tl.where(quadrant >= 2, -sin_turned, sin_turned)
