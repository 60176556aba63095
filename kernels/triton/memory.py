"""Where elements lie: pointers from the layout table, accesses of 16 bytes, positions to offsets."""

import triton
import triton.language as tl

from .tables import (
    GLOBAL_STRIDE,
    GRAD_STRIDE,
    LINEAR,
    LOCAL_STRIDE,
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
    """Memory and the global index both run through the tensor with stride 1."""
    return tl.load(row + LINEAR) != 0


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
def dimensions(row, number: tl.constexpr, DIMS: tl.constexpr):
    """What :func:`locate` needs: for each dimension (size, multiplier, shift, strides), innermost first."""
    dims = ()
    for d in tl.static_range(DIMS):
        prepared = tl.load(row + RECIPROCAL + d)
        dims = dims + (
            (
                tl.load(row + SIZE + d).to(number),
                prepared.to(tl.uint32),
                (prepared >> 32).to(tl.uint32),
                tl.load(row + PARAM_STRIDE + d).to(number),
                tl.load(row + GRAD_STRIDE + d).to(number),
                tl.load(row + GLOBAL_STRIDE + d).to(number),
                tl.load(row + LOCAL_STRIDE + d).to(number),
            ),
        )
    return dims


@triton.jit
def locate(position, dims, DIMS: tl.constexpr):
    """Where elements lie, from their positions in the order of the row's dimensions.

    Offsets of parameter and gradient, steps of the global index and the local row-major index, all in the integer type
    of ``position``. A tensor of fewer than DIMS dimensions has nothing left for those that it lacks.
    """
    zero = tl.zeros_like(position)
    param, grad, index, local, rest = zero, zero, zero, zero, position
    for d in tl.static_range(DIMS):
        size, multiplier, shift, param_stride, grad_stride, global_stride, local_stride = dims[d]
        here = rest
        if d < DIMS - 1:
            rest = divide(here, size, multiplier, shift)
            here = here - rest * size
        param += here * param_stride
        grad += here * grad_stride
        index += here * global_stride
        local += here * local_stride
    return param, grad, index, local


@triton.jit
def divide(n, size, multiplier, shift):
    """n // size, in 32 bits by the multiplication that device_rows.py prepares: a division takes 20 instructions."""
    if n.dtype == tl.int64:
        return n // size
    else:
        return (tl.umulhi(n.to(tl.uint32), multiplier) >> shift).to(tl.int32)
