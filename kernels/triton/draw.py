"""Which elements survive, on loaded values: the mask stream's halves, windows, blocks and packed bits.

Elements come in three forms.

*Wide*: TILES whole tiles of the mask stream, 16 bytes an access. Element 128 * t + 32 * w + VECTOR * k + j of a pass
is element (t, k, j) of the w-th access, [TILES, PARTS, VECTOR] with PARTS = 32 // VECTOR. A thread holds the last
dimension, so VECTOR // 2 counters serve all its 4 * VECTOR elements, and its decisions are one integer of its own,
[TILES, PARTS]: bit VECTOR * w + j. (Masks made in the shape of an access would go through shared memory to reach its
layout.)

*Narrow*: the same tiles, an element an access. Element 128 * t + 32 * w + l is element (t, l) of the w-th access,
[TILES, 32], so a counter serves a thread's four elements.

*Strided*: elements anywhere, in one dimension, a counter each.
"""

import triton
import triton.language as tl

from .memory import in_a_row
from .philox import select, words_at
from .tables import (
    BLOCK,
    BLOCK_BIT,
    BLOCK_SIZE,
    DRAW,
    DROP,
    ELEMENT,
    ELEMENT_BIT,
    FOR_BLOCK,
    FOR_ELEMENT,
    FOR_LAYER,
    KEEP,
    LAYER,
    LAYER_BIT,
    LO,
    PACKED,
    PACKED_BIT,
    SPAN,
    STREAM_ID,
    TILE,
)

FAR = tl.constexpr(1 << 30)  # beyond every element of a chunk, and far from the end of 32 bits


@triton.jit
def mask_numbers(integers, seed):
    """A tensor's row of Batch.integers -> (window, block, key), as the functions here take them."""
    lo, span = tl.load(integers + LO).to(tl.uint32), tl.load(integers + SPAN).to(tl.uint32)
    stream_id = tl.load(integers + STREAM_ID)
    key = (
        tl.load(integers + DRAW).to(tl.uint32),
        stream_id.to(tl.uint32),
        (stream_id >> 32).to(tl.uint32) << 12,
        seed,
    )
    return (lo << 16, span << 16 | 0xFFFF), tl.load(integers + BLOCK_SIZE), key


@triton.jit
def decide(half, window):
    """Kept iff (r - lo) mod 2**16 <= span. The 16 bits of r are the upper half of ``half``, whose lower half is free.

    Window and number stand 16 bits higher than in the specification: a difference of 32 bits wraps by itself.
    """
    lo, span = window
    return tl.sub(half, lo, sanitize_overflow=False) <= span


@triton.jit
def raised(word, upper):
    """The word's lower or upper half (``upper``: 0 or 1, uint32) as :func:`decide` takes it."""
    return word << (16 - 16 * upper)


@triton.jit
def only_one(value, BITS: tl.constexpr, COUNT: tl.constexpr):
    """``value``, as a number known to the compiler where BITS leave only one: it drops every other branch."""
    for only in tl.static_range(COUNT):
        if BITS == 1 << only:
            value = tl.full([], only, tl.int64)
    return value


@triton.jit
def resolve_kind(kind, integers, seed, KINDS: tl.constexpr):
    """The tensor's mask kind with LAYER decided: its one number makes it KEEP or DROP."""
    kind = only_one(kind, KINDS, 7)
    if LAYER_BIT & KINDS:
        if kind == LAYER:
            window, _, key = mask_numbers(integers, seed)
            word = words_at(tl.full([], 0, tl.int64), FOR_LAYER, key)[0]
            kind = tl.where(decide(word << 16, window), KEEP, DROP).to(tl.int64)
    return kind


@triton.jit
def block_kept(number, window, key):
    """Decisions of blocks (int64)."""
    words = words_at(number >> 3, FOR_BLOCK, key)
    low = number.to(tl.uint32)
    return decide(raised(select(low >> 1, words), low & 1), window)


@triton.jit
def block_origin(first, block):
    """What :func:`block_at` needs from the global index ``first``: its block, how far to the next, size, inverse.

    The divisions are made once for a chunk: one of 64 bits takes more registers than all the rest. The inverse is
    2**31 / size, rounded up: :func:`blocks_on` multiplies by it, which is exact up to 2**14, twice a chunk.
    """
    number = first // block
    to_next = tl.minimum((number + 1) * block - first, FAR).to(tl.int32)
    size = tl.minimum(block, FAR).to(tl.uint32)
    return number, to_next, size, (0x7FFFFFFF + size) // size


@triton.jit
def blocks_on(offset, origin):
    """How many blocks those at ``offset`` (int32, up to a chunk's) are behind that of ``origin``."""
    _, to_next, _, inverse = origin
    beyond = offset - to_next
    return tl.where(beyond < 0, 0, 1 + tl.umulhi(beyond.to(tl.uint32) << 1, inverse).to(tl.int32))


@triton.jit
def block_at(offset, origin, window, key):
    """Decisions of the blocks at ``offset``."""
    return block_kept(origin[0] + blocks_on(offset, origin), window, key)


# Wide


@triton.jit
def whole_tiles_kept(kind, tile, origin, window, key, KINDS: tl.constexpr, TILES: tl.constexpr):
    """[TILES, 1]: False where a whole tile is dropped at once, by DROP or as part of a dropped block.

    ``tile``: the first one, counted from that of ``origin``, which is of :func:`block_origin` in tiles.
    """
    kept = tl.zeros([TILES, 1], tl.int32) + kind.to(tl.int32) != DROP
    if BLOCK_BIT & KINDS:
        if kind == BLOCK:
            kept = block_at(tile.to(tl.int32) + tl.arange(0, TILES)[:, None], origin, window, key)
    return kept


@triton.jit
def wide_kept(kind, whole, first, packed, window, key, KINDS: tl.constexpr, TILES: tl.constexpr, VECTOR: tl.constexpr):
    """Each thread's decisions, [TILES, PARTS].

    ``first``: global index of the first element, a multiple of 128. ``whole``: of whole_tiles_kept. ``packed``: at the
    first tile's words, 16-byte aligned.
    """
    bits = tl.broadcast_to(tl.where(whole, -1, 0), [TILES, 32 // VECTOR])
    if ELEMENT_BIT & KINDS:
        if kind == ELEMENT:
            bits = drawn_bits(first, window, key, TILES, VECTOR)
    if PACKED_BIT & KINDS:
        if kind == PACKED:
            bits = packed_bits(packed, TILES, VECTOR)
    return bits


@triton.jit
def tile_counters(first, TILES: tl.constexpr):
    """The first counter of each tile, [TILES, 1], int64. ``first``: global index, a multiple of 128.

    ``first >> 3`` says the same, and Triton 3.9.0 then spills a number of the rule "mask".
    """
    return first // TILE * 16 + tl.arange(0, TILES)[:, None] * 16


@triton.jit
def drawn_bits(first, window, key, TILES: tl.constexpr, VECTOR: tl.constexpr):
    counters = tile_counters(first, TILES) + (tl.arange(0, 32 // VECTOR) * (VECTOR // 2))[None, :]
    bits = tl.zeros([TILES, 32 // VECTOR], tl.int32)
    # a counter at a time: all at once they would take registers that the update needs
    for pair in range(0, VECTOR, 2):
        words = words_at(counters + pair // 2, FOR_ELEMENT, key)
        for w in tl.static_range(4):
            bits |= two_bits(words[w], window) << (VECTOR * w + pair)
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
def kept_at(bits, w, VECTOR: tl.constexpr):
    """The mask of access w, [TILES, PARTS, VECTOR]."""
    return (bits[:, :, None] >> (tl.arange(0, VECTOR) + VECTOR * w)[None, None, :]) & 1 != 0


@triton.jit
def tiles_words(kind, whole, first, window, key, KINDS: tl.constexpr, TILES: tl.constexpr):
    """Every tile's four words of decisions, [TILES, 4]: a thread draws whole tiles, to store 16 bytes at a time.

    Arguments as :func:`wide_kept`'s.
    """
    w0 = tl.where(whole, -1, 0)
    w1, w2, w3 = w0, w0, w0
    if ELEMENT_BIT & KINDS:
        if kind == ELEMENT:
            counters = tile_counters(first, TILES)
            w0, w1, w2, w3 = w0 & 0, w1 & 0, w2 & 0, w3 & 0
            for lane in range(16):
                words = words_at(counters + lane, FOR_ELEMENT, key)
                w0 |= two_bits(words[0], window) << 2 * lane
                w1 |= two_bits(words[1], window) << 2 * lane
                w2 |= two_bits(words[2], window) << 2 * lane
                w3 |= two_bits(words[3], window) << 2 * lane
    return in_a_row(w0, w1, w2, w3).reshape(TILES, 4)


@triton.jit
def two_bits(word, window):
    return decide(word << 16, window).to(tl.int32) | decide(word, window).to(tl.int32) << 1


# Narrow


@triton.jit
def narrow_kept(kind, offset, inside, first, packed, origin, window, key, KINDS: tl.constexpr, TILES: tl.constexpr):
    """Each thread's four decisions, four [TILES, 32].

    ``offset``: int32, [TILES, 32], the thread's first element, counted from that of the chunk, which stands at bit 0 of
    ``packed`` and at the :func:`block_origin` ``origin``. ``first``: global index of the pass's first element, a
    multiple of 128. ``inside``: four [TILES, 32], is the element in the chunk?
    """
    k0 = tl.zeros([TILES, 32], tl.int32) + kind.to(tl.int32) != DROP
    k1, k2, k3 = k0, k0, k0
    if ELEMENT_BIT & KINDS:
        if kind == ELEMENT:
            k0, k1, k2, k3 = narrow_drawn(first, window, key, TILES)
    if BLOCK_BIT & KINDS:
        if kind == BLOCK:
            k0, k1, k2, k3 = narrow_blocks(offset, origin, window, key, TILES)
    if PACKED_BIT & KINDS:
        if kind == PACKED:
            words = packed + (offset >> 5)
            k0 = packed_bit(words, offset, inside[0])
            k1 = packed_bit(words + 1, offset, inside[1])
            k2 = packed_bit(words + 2, offset, inside[2])
            k3 = packed_bit(words + 3, offset, inside[3])
    return k0, k1, k2, k3


@triton.jit
def narrow_drawn(first, window, key, TILES: tl.constexpr):
    lane = tl.arange(0, 32).to(tl.uint32)[None, :]
    words, upper = words_at(tile_counters(first, TILES) + lane // 2, FOR_ELEMENT, key), lane % 2
    return (
        decide(raised(words[0], upper), window),
        decide(raised(words[1], upper), window),
        decide(raised(words[2], upper), window),
        decide(raised(words[3], upper), window),
    )


@triton.jit
def narrow_blocks(offset, origin, window, key, TILES: tl.constexpr):
    """Of four elements, 32 apart, blocks of 96 and more hold at most two: those of the first and of the last one."""
    large = origin[2] >= 96
    bits = tl.zeros([TILES, 32], tl.int32)
    for w in range(0, 4, tl.where(large, 3, 1)):  # one after another, for registers
        bits |= block_at(offset + 32 * w, origin, window, key).to(tl.int32) << w
    k0, k3, first = bits & 1 != 0, bits & 8 != 0, blocks_on(offset, origin)
    k1 = tl.where(large, tl.where(blocks_on(offset + 32, origin) == first, k0, k3), bits & 2 != 0)
    k2 = tl.where(large, tl.where(blocks_on(offset + 64, origin) == first, k0, k3), bits & 4 != 0)
    return k0, k1, k2, k3


@triton.jit
def packed_bit(words, offset, inside):
    """Bit ``offset % 32`` of the words at the pointers ``words``."""
    return (tl.load(words, mask=inside, other=0) >> (offset & 31).to(tl.int32)) & 1 != 0


# Strided


@triton.jit
def strided_kept(kind, local, inside, index, packed, block, window, key, KINDS: tl.constexpr):
    """One mask bit per element. ``local``: row-major index in the tensor, ``index``: in the whole parameter (int64)."""
    kept = tl.zeros_like(index) + kind != DROP
    if ELEMENT_BIT & KINDS:
        if kind == ELEMENT:
            low = index.to(tl.uint32)
            words = words_at((index >> 7 << 4) + (low >> 1 & 15), FOR_ELEMENT, key)
            kept = decide(raised(select(low >> 5, words), low & 1), window)
    if BLOCK_BIT & KINDS:
        if kind == BLOCK:
            kept = block_kept(index // block, window, key)
    if PACKED_BIT & KINDS:
        if kind == PACKED:
            kept = packed_bit(packed + local // 32, local, inside)
    return kept
