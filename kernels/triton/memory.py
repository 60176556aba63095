"""Where elements lie: pointers from the layout table, accesses of 16 bytes, positions to offsets."""

import triton
import triton.language as tl

from .tables import (
    GLOBAL_STRIDE,
    GRAD_STRIDE,
    LOCAL_STRIDE,
    NDIM,
    NUMEL,
    PARAM_STRIDE,
    RECIPROCAL,
    ROW,
    SIZE,
    TILE,
)


@triton.jit
def chunk_at(chunks, layout, CHUNK: tl.constexpr):
    """This program's (tensor, its layout row, first and last + 1 element)."""
    entry = chunks + 2 * tl.program_id(0).to(tl.int64)
    tensor, start = tl.load(entry), tl.multiple_of(tl.load(entry + 1), TILE)
    row = layout + tensor * ROW
    return tensor, row, start, tl.minimum(start + CHUNK, tl.load(row + NUMEL))


@triton.jit
def is_linear(row):
    """Memory and the global index both run through the tensor with stride 1. One element has no dimension."""
    strides_are_1 = (
        (tl.load(row + PARAM_STRIDE) == 1) & (tl.load(row + GRAD_STRIDE) == 1) & (tl.load(row + GLOBAL_STRIDE) == 1)
    )
    ndim = tl.load(row + NDIM)
    return (ndim == 0) | ((ndim == 1) & strides_are_1)


@triton.jit
def pointer(entry, dtype: tl.constexpr):
    """The pointer that a layout table's ``entry`` holds."""
    return tl.load(entry).to(tl.pointer_type(dtype))


@triton.jit
def aligned(entry, dtype: tl.constexpr):
    """The same, to be accessed 16 bytes at a time: the compiler takes the hint only after the cast."""
    return tl.multiple_of(tl.load(entry).to(tl.pointer_type(dtype)), 16)


@triton.jit
def tile_offsets(TILES: tl.constexpr, VECTOR: tl.constexpr, WIDTH: tl.constexpr):
    """Where each thread's first WIDTH elements of access 0 lie in a pass, [TILES, PARTS, WIDTH]."""
    starts = tl.arange(0, TILES)[:, None] * TILE + tl.arange(0, 32 // VECTOR)[None, :] * VECTOR
    return starts[:, :, None] + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def load_tiles(ptr, mask, other, TILES: tl.constexpr, VECTOR: tl.constexpr):
    """[TILES, PARTS, VECTOR] at ``ptr``, 16 bytes at a time: where VECTOR elements are more, in two halves."""
    WIDTH: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    if WIDTH >= VECTOR:
        return tl.load(ptr + tile_offsets(TILES, VECTOR, VECTOR), mask=mask, other=other)
    else:
        near = tl.load(ptr + tile_offsets(TILES, VECTOR, WIDTH), mask=mask, other=other)
        far = tl.load(ptr + WIDTH + tile_offsets(TILES, VECTOR, WIDTH), mask=mask, other=other)
        return side_by_side(near, far, TILES, VECTOR)


@triton.jit
def store_tiles(ptr, values, mask, TILES: tl.constexpr, VECTOR: tl.constexpr):
    WIDTH: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    if WIDTH >= VECTOR:
        tl.store(ptr + tile_offsets(TILES, VECTOR, VECTOR), values, mask=mask)
    else:
        near, far = values.reshape(TILES, 32 // VECTOR, 2, WIDTH).permute(0, 1, 3, 2).split()
        tl.store(ptr + tile_offsets(TILES, VECTOR, WIDTH), near, mask=mask)
        tl.store(ptr + WIDTH + tile_offsets(TILES, VECTOR, WIDTH), far, mask=mask)


@triton.jit
def side_by_side(near, far, TILES: tl.constexpr, VECTOR: tl.constexpr):
    """Two [TILES, PARTS, VECTOR // 2] -> [TILES, PARTS, VECTOR], each thread's elements behind one another."""
    return tl.join(near, far).permute(0, 1, 3, 2).reshape(TILES, 32 // VECTOR, VECTOR)


@triton.jit
def in_a_row(a, b, c, d):
    """Four [...] -> [..., 4]."""
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(a.shape + [4])


@triton.jit
def locate(position, row, PACKED: tl.constexpr):
    """Where elements lie, from their positions in the order of the row's dimensions.

    All in the integer type of ``position``: offsets of parameter and gradient, steps of the global index and, with
    PACKED, the local row-major index, which only packed words need.
    """
    number: tl.constexpr = position.dtype
    zero = tl.zeros_like(position)
    param, grad, index, local, rest = zero, zero, zero, zero, position
    ndim = tl.load(row + NDIM).to(tl.int32)
    for outer in range(1, ndim):
        column = row + (ndim - outer)
        size = tl.load(column + SIZE).to(number)
        quotient = divide(rest, size, column)
        here = rest - quotient * size
        param += here * tl.load(column + PARAM_STRIDE).to(number)
        grad += here * tl.load(column + GRAD_STRIDE).to(number)
        index += here * tl.load(column + GLOBAL_STRIDE).to(number)
        if PACKED:
            local += here * tl.load(column + LOCAL_STRIDE).to(number)
        rest = quotient
    param += rest * tl.load(row + PARAM_STRIDE).to(number)
    grad += rest * tl.load(row + GRAD_STRIDE).to(number)
    index += rest * tl.load(row + GLOBAL_STRIDE).to(number)
    if PACKED:
        local += rest * tl.load(row + LOCAL_STRIDE).to(number)
    return param, grad, index, local


@triton.jit
def divide(n, size, column):
    """n // size. Of 32 bits by the multiplication that device_rows.py prepares: a division takes some 20 instructions."""
    if n.dtype == tl.int64:
        return n // size
    else:
        prepared = tl.load(column + RECIPROCAL)
        high = tl.umulhi(n.to(tl.uint32), prepared.to(tl.uint32))
        return (high >> (prepared >> 32).to(tl.uint32)).to(tl.int32)
