"""Which elements survive, on loaded values: the mask stream's words, windows, blocks, packed bits and noise.

Two forms occur. *Tiles*: TILES whole tiles of the mask stream, where element 128 * t + 32 * w + VECTOR * k + j of a
pass is element (t, k, j) of the w-th access, [TILES, PARTS, VECTOR] with PARTS = 32 // VECTOR. A thread holds the last
dimension. One counter serves its four words, so a thread's 4 * VECTOR decisions are one integer of its own, [TILES,
PARTS]: bit VECTOR * w + j. (Masks made in the shape of an access would go through shared memory to reach its layout.)
*Elements*: 1-D tensors of any elements, a counter each.
"""

import triton
import triton.language as tl

from .philox import words_at
from .tables import (
    BLOCK,
    BLOCK_BIT,
    BLOCK_SIZE,
    DRAW,
    DROP,
    ELEMENT,
    ELEMENT_BIT,
    KEEP,
    LAYER,
    LAYER_BIT,
    LO,
    PACKED,
    PACKED_BIT,
    SPAN,
    STREAM,
)

TILE = tl.constexpr(128)

# counter word 1, bits 24 to 31
FOR_ELEMENT = tl.constexpr(0)
FOR_LAYER = tl.constexpr(1)
FOR_GAUSSIAN = tl.constexpr(2)
FOR_BLOCK = tl.constexpr(3)


@triton.jit
def decide(word, lo, span):
    """Kept iff (word - lo) mod 2**32 <= span."""
    return tl.sub(word, lo, sanitize_overflow=False) <= span


@triton.jit
def select(which, four):
    return tl.where(which < 2, tl.where(which == 0, four[0], four[1]), tl.where(which == 2, four[2], four[3]))


@triton.jit
def mask_numbers(integers):
    """A tensor's row of Batch.integers -> lo, span, block, draw, stream."""
    return (
        tl.load(integers + LO).to(tl.uint32),
        tl.load(integers + SPAN).to(tl.uint32),
        tl.load(integers + BLOCK_SIZE),
        tl.load(integers + DRAW).to(tl.uint32),
        tl.load(integers + STREAM).to(tl.uint32),
    )


@triton.jit
def only_one(value, BITS: tl.constexpr, COUNT: tl.constexpr):
    """``value``, as a number known to the compiler where BITS leave only one: it drops every other branch."""
    for only in tl.static_range(COUNT):
        if BITS == 1 << only:
            value = tl.full([], only, tl.int64)
    return value


@triton.jit
def resolve_kind(kind, integers, seed, KINDS: tl.constexpr):
    """The tensor's mask kind with LAYER decided: its one word makes it KEEP or DROP."""
    kind = only_one(kind, KINDS, 7)
    if LAYER_BIT & KINDS:
        if kind == LAYER:
            lo, span, _, draw, stream = mask_numbers(integers)
            word = words_at(tl.full([], 0, tl.int64), FOR_LAYER, draw, stream, seed)[0]
            kind = tl.where(decide(word, lo, span), KEEP, DROP).to(tl.int64)
    return kind


@triton.jit
def whole_tiles_kept(kind, first, lo, span, block, draw, stream, seed, KINDS: tl.constexpr, TILES: tl.constexpr):
    """[TILES, 1]: False where a whole tile is dropped at once, by DROP or as part of a dropped block."""
    kept = tl.zeros([TILES, 1], tl.int32) + kind.to(tl.int32) != DROP
    if BLOCK_BIT & KINDS:
        if kind == BLOCK:
            tiles_per_block = block // TILE
            number = first // block
            # tiles until the next block; 32-bit division suffices, for a pass has far fewer than 2**16 tiles
            left = tl.minimum((number + 1) * tiles_per_block - first // TILE, 1 << 16).to(tl.int32)
            beyond = tl.arange(0, TILES)[:, None] - left
            further = 1 + beyond // tl.minimum(tiles_per_block, 1 << 16).to(tl.int32)
            kept = block_kept(number + tl.where(beyond < 0, 0, further), lo, span, draw, stream, seed)
    return kept


@triton.jit
def block_kept(number, lo, span, draw, stream, seed):
    return decide(select(number % 4, words_at(number // 4, FOR_BLOCK, draw, stream, seed)), lo, span)


@triton.jit
def tiles_kept(
    kind,
    whole,
    first,
    packed,
    lo,
    span,
    draw,
    stream,
    seed,
    KINDS: tl.constexpr,
    TILES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Each thread's decisions, [TILES, PARTS].

    ``first``: global index of the first element, a multiple of 128. ``whole``: of whole_tiles_kept. ``packed``: at the
    first tile's words, 16-byte aligned.
    """
    bits = tl.broadcast_to(tl.where(whole, -1, 0), [TILES, 32 // VECTOR])
    if ELEMENT_BIT & KINDS:
        if kind == ELEMENT:
            bits = drawn_bits(first, lo, span, draw, stream, seed, TILES, VECTOR)
    if PACKED_BIT & KINDS:
        if kind == PACKED:
            bits = packed_bits(packed, TILES, VECTOR)
    return bits


@triton.jit
def tile_counters(first, TILES: tl.constexpr, VECTOR: tl.constexpr):
    """Counter indices of every thread's first lane, [TILES, PARTS], int64."""
    return first // TILE * 32 + tl.arange(0, TILES)[:, None] * 32 + tl.arange(0, 32 // VECTOR)[None, :] * VECTOR


@triton.jit
def tile_offsets(TILES: tl.constexpr, VECTOR: tl.constexpr, WIDTH: tl.constexpr):
    """Where each thread's first WIDTH elements of access 0 lie in a pass, [TILES, PARTS, WIDTH]."""
    starts = tl.arange(0, TILES)[:, None] * TILE + tl.arange(0, 32 // VECTOR)[None, :] * VECTOR
    return starts[:, :, None] + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def drawn_bits(first, lo, span, draw, stream, seed, TILES: tl.constexpr, VECTOR: tl.constexpr):
    counters = tile_counters(first, TILES, VECTOR)
    bits = tl.zeros([TILES, 32 // VECTOR], tl.int32)
    # a loop that stays one: lanes drawn all at once would take registers that the update needs
    for lane in range(0, VECTOR, 2):
        for next in tl.static_range(2):
            words = words_at(counters + lane + next, FOR_ELEMENT, draw, stream, seed)
            for w in tl.static_range(4):
                bits |= decide(words[w], lo, span).to(tl.int32) << (VECTOR * w + next) << lane
    return bits


@triton.jit
def packed_bits(packed, TILES: tl.constexpr, VECTOR: tl.constexpr):
    """A tile's four words are one 16-byte load for each of its threads."""
    tile, part, w = tl.arange(0, TILES), tl.arange(0, 32 // VECTOR), tl.arange(0, 4)
    no_offset = part[None, :, None] * 0
    words = tl.load(packed + tile[:, None, None] * 4 + no_offset + w[None, None, :])
    evens, odds = words.reshape(TILES, 32 // VECTOR, 2, 2).split()
    word0, word2 = evens.split()
    word1, word3 = odds.split()
    words = word0, word1, word2, word3
    bits = tl.zeros([TILES, 32 // VECTOR], tl.int32)
    for w in tl.static_range(4):
        bits |= ((words[w] >> (part * VECTOR)[None, :]) & ((1 << VECTOR) - 1)) << (VECTOR * w)
    return bits


@triton.jit
def tiles_words(kind, whole, first, lo, span, draw, stream, seed, KINDS: tl.constexpr, TILES: tl.constexpr):
    """Every tile's four words of decisions, [TILES, 4]: a thread draws whole tiles, to store 16 bytes at a time.

    Arguments as :func:`tiles_kept`'s.
    """
    w0 = tl.where(whole, -1, 0)
    w1, w2, w3 = w0, w0, w0
    if ELEMENT_BIT & KINDS:
        if kind == ELEMENT:
            counters = first // TILE * 32 + tl.arange(0, TILES)[:, None] * 32
            w0, w1, w2, w3 = w0 & 0, w1 & 0, w2 & 0, w3 & 0
            for lane in range(32):
                words = words_at(counters + lane, FOR_ELEMENT, draw, stream, seed)
                w0 |= decide(words[0], lo, span).to(tl.int32) << lane
                w1 |= decide(words[1], lo, span).to(tl.int32) << lane
                w2 |= decide(words[2], lo, span).to(tl.int32) << lane
                w3 |= decide(words[3], lo, span).to(tl.int32) << lane
    return in_a_row(w0, w1, w2, w3).reshape(TILES, 4)


@triton.jit
def kept_at(bits, w, VECTOR: tl.constexpr):
    """The mask of access w, [TILES, PARTS, VECTOR]."""
    return (bits[:, :, None] >> (tl.arange(0, VECTOR) + VECTOR * w)[None, None, :]) & 1 != 0


@triton.jit
def elements_kept(kind, local, inside, index, packed, integers, seed, KINDS: tl.constexpr):
    """One mask bit per element. ``local``: row-major index in the tensor, ``index``: in the whole parameter."""
    lo, span, block, draw, stream = mask_numbers(integers)
    kept = tl.zeros_like(local) + kind != DROP
    if ELEMENT_BIT & KINDS:
        if kind == ELEMENT:
            kept = decide(select(index // 32 % 4, element_words(index, FOR_ELEMENT, draw, stream, seed)), lo, span)
    if BLOCK_BIT & KINDS:
        if kind == BLOCK:
            kept = block_kept(index // block, lo, span, draw, stream, seed)
    if PACKED_BIT & KINDS:
        if kind == PACKED:
            word = tl.load(packed + local // 32, mask=inside, other=0)
            kept = (word >> (local % 32).to(tl.int32)) & 1 != 0
    return kept


@triton.jit
def element_words(index, purpose: tl.constexpr, draw, stream, seed):
    return words_at(index // TILE * 32 + index % 32, purpose, draw, stream, seed)


@triton.jit
def tiles_noise(first, draw, stream, seed, TILES: tl.constexpr, VECTOR: tl.constexpr):
    """Standard normals of the four accesses, [TILES, PARTS, VECTOR] each."""
    counters = tile_counters(first, TILES, VECTOR)
    near = four_lanes_noise(counters, draw, stream, seed)
    if VECTOR == 4:
        return near
    else:
        far = four_lanes_noise(counters + 4, draw, stream, seed)
        return (
            side_by_side(near[0], far[0], TILES, VECTOR),
            side_by_side(near[1], far[1], TILES, VECTOR),
            side_by_side(near[2], far[2], TILES, VECTOR),
            side_by_side(near[3], far[3], TILES, VECTOR),
        )


@triton.jit
def four_lanes_noise(counters, draw, stream, seed):
    """A lane at a time: drawn in the shape of an access, noise would go through shared memory to reach its layout."""
    a = normals(words_at(counters, FOR_GAUSSIAN, draw, stream, seed))
    b = normals(words_at(counters + 1, FOR_GAUSSIAN, draw, stream, seed))
    c = normals(words_at(counters + 2, FOR_GAUSSIAN, draw, stream, seed))
    d = normals(words_at(counters + 3, FOR_GAUSSIAN, draw, stream, seed))
    return (
        in_a_row(a[0], b[0], c[0], d[0]),
        in_a_row(a[1], b[1], c[1], d[1]),
        in_a_row(a[2], b[2], c[2], d[2]),
        in_a_row(a[3], b[3], c[3], d[3]),
    )


@triton.jit
def in_a_row(a, b, c, d):
    """Four [...] -> [..., 4]."""
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(a.shape + [4])


@triton.jit
def side_by_side(near, far, TILES: tl.constexpr, VECTOR: tl.constexpr):
    """Two [TILES, PARTS, VECTOR // 2] -> [TILES, PARTS, VECTOR], each thread's elements behind one another."""
    return tl.join(near, far).permute(0, 1, 3, 2).reshape(TILES, 32 // VECTOR, VECTOR)


@triton.jit
def elements_noise(index, integers, seed):
    _, _, _, draw, stream = mask_numbers(integers)
    return select(index // 32 % 4, normals(element_words(index, FOR_GAUSSIAN, draw, stream, seed)))


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
