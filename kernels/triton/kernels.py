"""The three kernels: load, mask, update, store.

A program takes one chunk (CHUNK consecutive elements of one tensor, in its local row-major order). Passes of TILES
whole tiles take the fast branch where everything lies as 16-byte accesses and the mask stream need it; the rest
(tails, odd offsets, unaligned views, strided layouts) takes the general branch, one counter per element.
"""

import triton
import triton.language as tl

from .adamw import hyperparameters, takes_grad, update, writes_param, writes_state
from .mask import (
    TILE,
    elements_kept,
    elements_noise,
    kept_at,
    mask_numbers,
    only_one,
    resolve_kind,
    side_by_side,
    tile_offsets,
    tiles_kept,
    tiles_noise,
    tiles_words,
    whole_tiles_kept,
)
from .tables import (
    BLOCK_BIT,
    DROP,
    EFFECT,
    EXP_AVG,
    EXP_AVG_SQ,
    FREEZE,
    GAUSSIAN,
    GAUSSIAN_BIT,
    GLOBAL_STRIDE,
    GRAD,
    GRAD_STRIDE,
    GRADIENT,
    INTEGERS,
    LAYOUT,
    MASK_KIND,
    MAX_EXP_AVG_SQ,
    NDIM,
    NOISE_STD,
    NUMEL,
    OFFSET,
    PACKED_WORDS,
    PARAM,
    PARAM_STRIDE,
    REALS,
    RESCALE,
    SIZE,
    UPDATE,
)


@triton.jit
def chunk_at(chunks, layout, CHUNK: tl.constexpr):
    """This program's (tensor, its layout row, first and last + 1 local element)."""
    entry = chunks + 2 * tl.program_id(0).to(tl.int64)
    tensor, start = tl.load(entry), tl.multiple_of(tl.load(entry + 1), TILE)
    row = layout + tensor * LAYOUT
    return tensor, row, start, tl.minimum(start + CHUNK, tl.load(row + NUMEL))


@triton.jit
def is_linear(row, STRIDE: tl.constexpr):
    """One dimension, stride 1. (An empty or one-element tensor has no dimension, and no whole pass either.)"""
    return (tl.load(row + NDIM) == 1) & (tl.load(row + STRIDE) == 1)


@triton.jit
def starts_on_tile(row):
    return (tl.load(row + OFFSET) % TILE == 0) & is_linear(row, GLOBAL_STRIDE)


@triton.jit
def pointer(entry, dtype: tl.constexpr):
    """The pointer that a layout table's ``entry`` holds."""
    return tl.load(entry).to(tl.pointer_type(dtype))


@triton.jit
def aligned(entry, dtype: tl.constexpr):
    """The same, to be accessed 16 bytes at a time: the compiler takes the hint only after the cast."""
    return tl.multiple_of(tl.load(entry).to(tl.pointer_type(dtype)), 16)


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
def has_grad(row, kind, effect):
    """A gradient that is absent, or dropped as a whole, is not read."""
    return (tl.load(row + GRAD) != 0) & ((kind != DROP) | (effect == UPDATE))


@triton.jit
def noise_std(kind, effect, reals, dtype: tl.constexpr):
    return tl.where((kind == GAUSSIAN) & (effect != UPDATE), tl.load(reals + NOISE_STD), 0.0).to(dtype)


@triton.jit
def locate(local, row, STRIDE: tl.constexpr):
    """Local row-major indices (int64) -> memory offsets or, with GLOBAL_STRIDE, steps of the global index."""
    offset = tl.zeros_like(local)
    rest = local
    for outer in range(1, tl.load(row + NDIM)):
        d = tl.load(row + NDIM) - outer
        size = tl.load(row + SIZE + d)
        offset += rest % size * tl.load(row + STRIDE + d)
        rest = rest // size
    return offset + rest * tl.load(row + STRIDE)


@triton.jit(do_not_specialize=["seed"])
def adamw_kernel(
    chunks,  # (programs, 2), int64: tensor, first local element
    layout,  # (tensors, 33), int64: contract.Layout
    integers,  # (tensors, 7), int64: contract.Integer
    reals,  # (tensors, 9), float64: contract.Real
    seed: tl.uint64,
    grad_scale,  # one float, or None without AMP
    found_inf,  # one float, or None without AMP
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    KINDS: tl.constexpr,  # bit k: Mask k may occur; this and the next but for tensors that are left alone
    EFFECTS: tl.constexpr,  # bit k: Effect k may occur
    AMSGRAD: tl.constexpr,  # some tensor has a max_exp_avg_sq
    TILES: tl.constexpr,  # of a fast pass
    VECTOR: tl.constexpr,  # consecutive elements of a thread
    GENERAL: tl.constexpr,  # elements of a general pass: one per thread
    CHUNK: tl.constexpr,  # elements of a program
):
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    tensor, row, start, stop = chunk_at(chunks, layout, CHUNK)
    integers += tensor * INTEGERS
    reals += tensor * REALS
    seed = seed.to(tl.uint64)
    kind, effect = tl.load(integers + MASK_KIND), tl.load(integers + EFFECT)
    if (kind == DROP) & (effect == FREEZE):
        return
    effect = only_one(effect, EFFECTS, 3)
    kind = resolve_kind(kind, integers, seed, KINDS)
    if (kind == DROP) & (effect == FREEZE):
        return

    pointers = tl.load(row + PARAM) | tl.load(row + GRAD) | tl.load(row + EXP_AVG) | tl.load(row + EXP_AVG_SQ)
    pointers |= tl.load(row + MAX_EXP_AVG_SQ) | tl.load(row + PACKED_WORDS)
    fast = starts_on_tile(row) & is_linear(row, PARAM_STRIDE) & is_linear(row, GRAD_STRIDE) & (pointers % 16 == 0)
    middle = start + tl.where(fast, (stop - start) // (TILES * TILE) * (TILES * TILE), 0)

    # the tail first: it needs fewer registers, and nothing of it stays in them during the fast passes
    adamw_elements(
        middle, stop, row, integers, reals, kind, effect, seed, grad_scale,
        PARAM_DTYPE, GRAD_DTYPE, STATE_DTYPE, KINDS, AMSGRAD, GENERAL,
    )  # fmt: skip
    adamw_tiles(
        start, middle, row, integers, reals, kind, effect, seed, grad_scale,
        PARAM_DTYPE, GRAD_DTYPE, STATE_DTYPE, KINDS, AMSGRAD, TILES, VECTOR,
    )  # fmt: skip


# The two branches load their numbers each for itself: what stayed in registers across the first would lower the
# occupancy of both.


@triton.jit
def adamw_tiles(
    start, stop, row, integers, reals, kind, effect, seed, grad_scale,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, STATE_DTYPE: tl.constexpr, KINDS: tl.constexpr,
    AMSGRAD: tl.constexpr, TILES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if PARAM_DTYPE == tl.float64 else tl.float32
    factors = hyperparameters(reals, effect, grad_scale, dtype)
    lo, span, block, draw, stream = mask_numbers(integers)
    offset = tl.load(row + OFFSET)
    p_ptr, g_ptr = aligned(row + PARAM, PARAM_DTYPE), aligned(row + GRAD, GRAD_DTYPE)
    m_ptr, v_ptr = aligned(row + EXP_AVG, STATE_DTYPE), aligned(row + EXP_AVG_SQ, STATE_DTYPE)
    vmax_ptr, has_vmax = aligned(row + MAX_EXP_AVG_SQ, STATE_DTYPE), tl.load(row + MAX_EXP_AVG_SQ) != 0
    packed = aligned(row + PACKED_WORDS, tl.int32)
    reads_grad = has_grad(row, kind, effect)
    std = noise_std(kind, effect, reals, dtype)

    for first in range(start, stop, TILES * TILE):
        first = tl.multiple_of(first, TILE)
        whole = whole_tiles_kept(kind, offset + first, lo, span, block, draw, stream, seed, KINDS, TILES)
        bits = tiles_kept(
            kind, whole, offset + first, packed + first // 32, lo, span, draw, stream, seed, KINDS, TILES, VECTOR
        )
        whole = whole[:, :, None]
        live, any_live = tl.full([TILES, 1, 1], True, tl.int1), True
        if BLOCK_BIT & KINDS:
            # dropped blocks under FREEZE are neither read nor written; a pass without any other ends here
            live = writes_state(whole, effect)
            any_live = tl.max(live.to(tl.int32).reshape(TILES), 0) != 0
        if any_live:
            grad_live = tl.where(reads_grad, takes_grad(whole, effect), False)
            vmax_live = tl.where(has_vmax, live, False)
            if GAUSSIAN_BIT & KINDS:
                noise = tiles_noise(offset + first, draw, stream, seed, TILES, VECTOR)
            for w in tl.static_range(4):
                at = first + w * 32
                kept = kept_at(bits, w, VECTOR)
                p_raw = load_tiles(p_ptr + at, live, None, TILES, VECTOR)
                g = load_tiles(g_ptr + at, grad_live, 0, TILES, VECTOR).to(dtype)
                m_raw = load_tiles(m_ptr + at, live, None, TILES, VECTOR)
                v_raw = load_tiles(v_ptr + at, live, None, TILES, VECTOR)
                vmax_raw = v_raw
                if AMSGRAD:
                    vmax_raw = load_tiles(vmax_ptr + at, vmax_live, None, TILES, VECTOR)
                if GAUSSIAN_BIT & KINDS:
                    g = g * (1 + std * noise[w])
                p, m, v, vmax = update(
                    p_raw.to(dtype), g, m_raw.to(dtype), v_raw.to(dtype), vmax_raw.to(dtype),
                    factors, takes_grad(kept, effect), has_vmax, AMSGRAD,
                )  # fmt: skip
                # a select of the raw values: a frozen element keeps its bits, and the store its full width
                p = tl.where(writes_param(kept, effect), p.to(PARAM_DTYPE), p_raw)
                m = tl.where(writes_state(kept, effect), m.to(STATE_DTYPE), m_raw)
                v = tl.where(writes_state(kept, effect), v.to(STATE_DTYPE), v_raw)
                store_tiles(p_ptr + at, p, live, TILES, VECTOR)
                store_tiles(m_ptr + at, m, live, TILES, VECTOR)
                store_tiles(v_ptr + at, v, live, TILES, VECTOR)
                if AMSGRAD:
                    vmax = tl.where(writes_state(kept, effect), vmax.to(STATE_DTYPE), vmax_raw)
                    store_tiles(vmax_ptr + at, vmax, vmax_live, TILES, VECTOR)


@triton.jit
def adamw_elements(
    start, stop, row, integers, reals, kind, effect, seed, grad_scale,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, STATE_DTYPE: tl.constexpr, KINDS: tl.constexpr,
    AMSGRAD: tl.constexpr, GENERAL: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if PARAM_DTYPE == tl.float64 else tl.float32
    has_vmax = tl.load(row + MAX_EXP_AVG_SQ) != 0
    for base in range(start, stop, GENERAL):
        local = base + tl.arange(0, GENERAL)
        inside = local < stop
        index = tl.load(row + OFFSET) + locate(local, row, GLOBAL_STRIDE)
        kept = elements_kept(kind, local, inside, index, pointer(row + PACKED_WORDS, tl.int32), integers, seed, KINDS)
        state_live = inside & writes_state(kept, effect)
        vmax_live = tl.where(has_vmax, state_live, False)
        at = locate(local, row, PARAM_STRIDE)
        p_ptr, m_ptr = pointer(row + PARAM, PARAM_DTYPE) + at, pointer(row + EXP_AVG, STATE_DTYPE) + at
        v_ptr = pointer(row + EXP_AVG_SQ, STATE_DTYPE) + at
        vmax_ptr = pointer(row + MAX_EXP_AVG_SQ, STATE_DTYPE) + at
        g_ptr = pointer(row + GRAD, GRAD_DTYPE) + locate(local, row, GRAD_STRIDE)
        grad_live = tl.where(has_grad(row, kind, effect), state_live, False)
        p = tl.load(p_ptr, mask=state_live, other=0).to(dtype)
        g = tl.load(g_ptr, mask=grad_live, other=0).to(dtype)
        m = tl.load(m_ptr, mask=state_live, other=0).to(dtype)
        v = tl.load(v_ptr, mask=state_live, other=0).to(dtype)
        vmax = v
        if AMSGRAD:
            vmax = tl.load(vmax_ptr, mask=vmax_live, other=0).to(dtype)
        if GAUSSIAN_BIT & KINDS:
            g = g * (1 + noise_std(kind, effect, reals, dtype) * elements_noise(index, integers, seed))
        factors = hyperparameters(reals, effect, grad_scale, dtype)
        p, m, v, vmax = update(p, g, m, v, vmax, factors, takes_grad(kept, effect), has_vmax, AMSGRAD)
        tl.store(p_ptr, p.to(PARAM_DTYPE), mask=inside & writes_param(kept, effect))
        tl.store(m_ptr, m.to(STATE_DTYPE), mask=state_live)
        tl.store(v_ptr, v.to(STATE_DTYPE), mask=state_live)
        if AMSGRAD:
            tl.store(vmax_ptr, vmax.to(STATE_DTYPE), mask=vmax_live)


@triton.jit(do_not_specialize=["seed"])
def mask_grads_kernel(
    chunks,
    layout,
    integers,
    reals,
    seed: tl.uint64,
    GRAD_DTYPE: tl.constexpr,
    KINDS: tl.constexpr,
    TILES: tl.constexpr,
    VECTOR: tl.constexpr,
    GENERAL: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Arguments as :func:`adamw_kernel`'s."""
    tensor, row, start, stop = chunk_at(chunks, layout, CHUNK)
    integers += tensor * INTEGERS
    reals += tensor * REALS
    seed = seed.to(tl.uint64)
    kind = resolve_kind(tl.load(integers + MASK_KIND), integers, seed, KINDS)
    if tl.load(row + GRAD) == 0:
        return
    dtype: tl.constexpr = tl.float64 if GRAD_DTYPE == tl.float64 else tl.float32
    rescale = tl.load(reals + RESCALE).to(dtype)
    lo, span, block, draw, stream = mask_numbers(integers)
    offset = tl.load(row + OFFSET)

    fast = starts_on_tile(row) & is_linear(row, GRAD_STRIDE)
    fast &= (tl.load(row + GRAD) | tl.load(row + PACKED_WORDS)) % 16 == 0
    middle = start + tl.where(fast, (stop - start) // (TILES * TILE) * (TILES * TILE), 0)
    g_ptr, packed = aligned(row + GRAD, GRAD_DTYPE), aligned(row + PACKED_WORDS, tl.int32)
    std = noise_std(kind, GRADIENT, reals, dtype)
    for first in range(start, middle, TILES * TILE):
        first = tl.multiple_of(first, TILE)
        whole = whole_tiles_kept(kind, offset + first, lo, span, block, draw, stream, seed, KINDS, TILES)
        bits = tiles_kept(
            kind, whole, offset + first, packed + first // 32, lo, span, draw, stream, seed, KINDS, TILES, VECTOR
        )
        if GAUSSIAN_BIT & KINDS:
            noise = tiles_noise(offset + first, draw, stream, seed, TILES, VECTOR)
        for w in tl.static_range(4):
            at = g_ptr + first + w * 32
            g = load_tiles(at, whole[:, :, None], 0, TILES, VECTOR).to(dtype) * rescale
            if GAUSSIAN_BIT & KINDS:
                g = g * (1 + std * noise[w])
            g = tl.where(kept_at(bits, w, VECTOR), g, 0.0).to(GRAD_DTYPE)
            store_tiles(at, g, None, TILES, VECTOR)

    for base in range(middle, stop, GENERAL):
        local = base + tl.arange(0, GENERAL)
        inside = local < stop
        index = offset + locate(local, row, GLOBAL_STRIDE)
        kept = elements_kept(kind, local, inside, index, pointer(row + PACKED_WORDS, tl.int32), integers, seed, KINDS)
        at = pointer(row + GRAD, GRAD_DTYPE) + locate(local, row, GRAD_STRIDE)
        g = tl.load(at, mask=inside & kept, other=0).to(dtype) * rescale
        if GAUSSIAN_BIT & KINDS:
            g = g * (1 + noise_std(kind, GRADIENT, reals, dtype) * elements_noise(index, integers, seed))
        tl.store(at, tl.where(kept, g, 0.0).to(GRAD_DTYPE), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def pack_kernel(
    chunks,
    layout,
    integers,
    seed: tl.uint64,
    KINDS: tl.constexpr,
    TILES: tl.constexpr,
    GENERAL: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Arguments as :func:`adamw_kernel`'s."""
    tensor, row, start, stop = chunk_at(chunks, layout, CHUNK)
    integers += tensor * INTEGERS
    seed = seed.to(tl.uint64)
    kind = resolve_kind(tl.load(integers + MASK_KIND), integers, seed, KINDS)
    lo, span, block, draw, stream = mask_numbers(integers)
    offset = tl.load(row + OFFSET)

    fast = starts_on_tile(row) & (tl.load(row + PACKED_WORDS) % 16 == 0)
    middle = start + tl.where(fast, (stop - start) // (TILES * TILE) * (TILES * TILE), 0)
    packed = aligned(row + PACKED_WORDS, tl.int32)
    for first in range(start, middle, TILES * TILE):
        first = tl.multiple_of(first, TILE)
        whole = whole_tiles_kept(kind, offset + first, lo, span, block, draw, stream, seed, KINDS, TILES)
        words = tiles_words(kind, whole, offset + first, lo, span, draw, stream, seed, KINDS, TILES)
        at = first // 32 + tl.arange(0, TILES)[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(packed + at, words)

    WORDS: tl.constexpr = GENERAL // 32
    packed = pointer(row + PACKED_WORDS, tl.int32)  # not aligned here
    for base in range(middle, stop, GENERAL):
        local = base + tl.arange(0, WORDS)[:, None] * 32 + tl.arange(0, 32)[None, :]
        inside = local < stop
        index = offset + locate(local, row, GLOBAL_STRIDE)
        kept = inside & elements_kept(kind, local, inside, index, packed, integers, seed, KINDS)
        words = tl.sum(kept.to(tl.int32) << tl.arange(0, 32)[None, :], 1)
        first_bits = base + tl.arange(0, WORDS) * 32
        tl.store(packed + first_bits // 32, words, mask=first_bits < stop)
