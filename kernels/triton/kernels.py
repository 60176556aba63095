"""The two kernels: a step of any rule, and packing. Both load, mask, compute and store in passes over a chunk.

A program takes one chunk: CHUNK consecutive elements of one tensor. Three kinds of pass share it (forms of draw.py):

- *wide*, 16 bytes an access, where memory is linear, aligned to them and begins on a tile of the mask stream;
- *narrow*, where memory is linear: tails, short tensors, views and shards at odd places, blocks that tiles do not fit;
- *strided*, whatever the strides.

A rule is a module with a jitted ``update(p, g, states, factors)`` on loaded values; RULE is that function.
"""

import triton
import triton.language as tl

from .draw import (
    block_origin,
    blocks_on,
    kept_at,
    mask_numbers,
    narrow_kept,
    only_one,
    resolve_kind,
    strided_kept,
    tiles_words,
    whole_tiles_kept,
    wide_kept,
)
from .effects import takes_grad, writes_param, writes_state
from .gaussian import narrow_noise, strided_noise, wide_noise
from .memory import aligned, chunk_at, dimensions, is_linear, load_tiles, locate, pointer, store_tiles
from .rounding import (
    narrow_random,
    narrow_words,
    rounded_values,
    rounding_key,
    stored,
    strided_random,
    wide_random,
    wide_words,
)
from .tables import (
    BLOCK,
    BLOCK_BIT,
    BLOCK_FACTORS,
    BLOCK_SIZE,
    DROP,
    EFFECT,
    FACTOR,
    FREEZE,
    GAUSSIAN,
    GAUSSIAN_BIT,
    GRAD,
    GRAD_FACTOR,
    INTEGERS,
    MASK_KIND,
    MAX_FACTORS,
    NOISE_STD,
    OFFSET,
    PACKED_WORDS,
    PARAM,
    REALS,
    ROUNDINGS,
    STATE,
    TILE,
    UPDATE,
)


@triton.jit(do_not_specialize=["seed"])
def update_kernel(
    chunks,  # (programs, 2), int64: tensor, first element
    layout,  # (tensors, 46), int64: device_rows.DeviceRow
    integers,  # (tensors, 7), int64: contract.Integer
    reals,  # (tensors, 8), float64: contract.Real
    rounding,  # (tensors, 2), int64: contract.Rounding, or None to round to nearest
    seed: tl.uint64,
    grad_scale, found_inf,  # one float each, or None without AMP
    RULE: tl.constexpr, STATES: tl.constexpr, FACTORS: tl.constexpr,  # tensors of state; numbers that the rule takes
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, STATE_DTYPE: tl.constexpr,
    KINDS: tl.constexpr, EFFECTS: tl.constexpr,  # bit k: Mask or Effect k may occur, but for tensors left alone
    OWN: tl.constexpr,  # blocks may have factors of their own
    DIMS: tl.constexpr, WIDE: tl.constexpr,  # most of a tensor that is not linear (0: all are); beyond 32 bits
    TILES: tl.constexpr, VECTOR: tl.constexpr,  # tiles of a wide pass, and a thread's consecutive elements in it
    NARROW: tl.constexpr, STRIDED: tl.constexpr, CHUNK: tl.constexpr,  # tiles, elements of such a pass; of a program
):  # fmt: skip
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    tensor, row, start, stop = chunk_at(chunks, layout, CHUNK)
    all_integers, all_reals, all_rounding = integers, reals, rounding
    integers += tensor * INTEGERS
    reals += tensor * REALS
    if rounding is not None:
        rounding += tensor * ROUNDINGS
    seed = seed.to(tl.uint64)
    kind, effect = tl.load(integers + MASK_KIND), tl.load(integers + EFFECT)
    if (kind == DROP) & (effect == FREEZE):
        return
    effect = only_one(effect, EFFECTS, 3)
    kind = resolve_kind(kind, integers, seed, KINDS)
    if (kind == DROP) & (effect == FREEZE):
        return

    if DIMS > 0:
        if not is_linear(row):
            update_strided(
                start, stop, row, integers, reals, rounding, kind, effect, seed, grad_scale, RULE, STATES, FACTORS,
                PARAM_DTYPE, GRAD_DTYPE, STATE_DTYPE, KINDS, OWN, DIMS, WIDE, STRIDED,
            )  # fmt: skip
            return
    whole = whole_passes(start, stop, TILES)
    middle = start + tl.where(fits_wide(row, integers, kind, STATES, KINDS), whole, 0)

    # the tail first: it needs fewer registers, and nothing of it stays in them during the wide passes
    update_narrow(
        middle, stop, row, integers, reals, rounding, kind, effect, seed, grad_scale, RULE, STATES, FACTORS,
        PARAM_DTYPE, GRAD_DTYPE, STATE_DTYPE, KINDS, OWN, NARROW,
    )  # fmt: skip
    if start < middle:
        # read again: what stayed in registers across the tail would lower the occupancy of all
        tensor, row, start, stop = chunk_at(chunks, layout, CHUNK)
        middle = start + whole_passes(start, stop, TILES)
        integers, reals = all_integers + tensor * INTEGERS, all_reals + tensor * REALS
        if rounding is not None:
            rounding = all_rounding + tensor * ROUNDINGS
        update_wide(
            start, middle, row, integers, reals, rounding, kind, effect, seed, grad_scale, RULE, STATES, FACTORS,
            PARAM_DTYPE, GRAD_DTYPE, STATE_DTYPE, KINDS, OWN, TILES, VECTOR,
        )  # fmt: skip


# The passes load their numbers each for itself: what stayed in registers across one would lower the occupancy of all.


@triton.jit
def update_wide(
    start, stop, row, integers, reals, rounding, kind, effect, seed, grad_scale,
    RULE: tl.constexpr, STATES: tl.constexpr, FACTORS: tl.constexpr,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, STATE_DTYPE: tl.constexpr, KINDS: tl.constexpr,
    OWN: tl.constexpr, TILES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = arithmetic(PARAM_DTYPE)
    VALUES: tl.constexpr = rounded_values(STATES, STATE_DTYPE)
    if rounding is not None:
        random_key = rounding_key(rounding, seed)
    factors, grad_factor, std = numbers(reals, kind, effect, grad_scale, FACTORS, dtype)
    window, block, key = mask_numbers(integers, seed)
    # from here on everything is counted from the chunk's part of the tensor, in 32 bits
    count, index = (stop - start).to(tl.int32), tl.load(row + OFFSET) + start
    p_ptr, g_ptr = aligned(row + PARAM, PARAM_DTYPE) + start, aligned(row + GRAD, GRAD_DTYPE) + start
    state_ptrs = ()
    for k in tl.static_range(STATES):
        state_ptrs = state_ptrs + (aligned(row + STATE + k, STATE_DTYPE) + start,)
    packed = aligned(row + PACKED_WORDS, tl.int32) + start // 32
    reads_grad = has_grad(row, kind, effect)
    origin = block_origin(index // TILE, tl.maximum(block // TILE, 1))
    if OWN:
        table = block_table(row, kind, effect, origin[0], block, dtype)

    for first in range(0, count, TILES * TILE):
        first = tl.multiple_of(first, TILE)
        whole = whole_tiles_kept(kind, first // TILE, origin, window, key, KINDS, TILES)
        bits = wide_kept(kind, whole, index + first, packed + first // 32, window, key, KINDS, TILES, VECTOR)
        whole = whole[:, :, None]
        live, any_live = tl.full([TILES, 1, 1], True, tl.int1), True
        if BLOCK_BIT & KINDS:
            # dropped blocks under FREEZE are neither read nor written; a pass without any other ends here
            live = writes_state(whole, effect)
            any_live = tl.max(live.to(tl.int32).reshape(TILES), 0) != 0
        if any_live:
            grad_live = tl.where(reads_grad, takes_grad(whole, effect), False)
            if GAUSSIAN_BIT & KINDS:
                noise = wide_noise(index + first, key, TILES, VECTOR)
            if rounding is not None:
                drawn = wide_words(index + first, random_key, VALUES, TILES)
            if OWN:
                on = blocks_on(first // TILE + tl.arange(0, TILES)[:, None, None], origin)
                mine = block_factors(table, on, live, factors, FACTORS)
            else:
                mine = factors
            for w in tl.static_range(4):
                at = first + w * 32
                factor = grad_factor
                if GAUSSIAN_BIT & KINDS:
                    factor = (1 + std * noise[w]) * grad_factor
                random = ()
                if rounding is not None:
                    random = wide_random(drawn, w, VALUES, TILES)
                update_access(
                    p_ptr + at, g_ptr + at, state_ptrs, at, live, grad_live, kept_at(bits, w, VECTOR), effect, factor,
                    mine, random, RULE, STATES, TILES, VECTOR, dtype,
                )  # fmt: skip


@triton.jit
def update_access(
    p_ptr, g_ptr, state_ptrs, at, live, grad_live, kept, effect, grad_factor, factors, random,
    RULE: tl.constexpr, STATES: tl.constexpr, TILES: tl.constexpr, VECTOR: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """One access of a wide pass, at ``p_ptr`` and ``g_ptr``; the states' is at ``at``."""
    p_raw = load_tiles(p_ptr, live, None, TILES, VECTOR)
    g = load_tiles(g_ptr, grad_live, 0, TILES, VECTOR).to(dtype)
    old, states = (), ()
    for k in tl.static_range(STATES):
        old = old + (load_tiles(state_ptrs[k] + at, live, None, TILES, VECTOR),)
        states = states + (old[k].to(dtype),)
    g = tl.where(takes_grad(kept, effect), g * grad_factor, 0.0)
    p, states = RULE(p_raw.to(dtype), g, states, factors)
    # a select of the raw values: a frozen element keeps its bits, and the store its full width
    p = tl.where(writes_param(kept, effect), stored(p, p_ptr.dtype.element_ty, random, 0), p_raw)
    store_tiles(p_ptr, p, live, TILES, VECTOR)
    for k in tl.static_range(STATES):
        new = stored(states[k], state_ptrs[k].dtype.element_ty, random, 1 + k)
        new = tl.where(writes_state(kept, effect), new, old[k])
        store_tiles(state_ptrs[k] + at, new, live, TILES, VECTOR)


@triton.jit
def update_narrow(
    start, stop, row, integers, reals, rounding, kind, effect, seed, grad_scale,
    RULE: tl.constexpr, STATES: tl.constexpr, FACTORS: tl.constexpr,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, STATE_DTYPE: tl.constexpr, KINDS: tl.constexpr,
    OWN: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = arithmetic(PARAM_DTYPE)
    VALUES: tl.constexpr = rounded_values(STATES, STATE_DTYPE)
    if rounding is not None:
        random_key = rounding_key(rounding, seed)
    factors, grad_factor, std = numbers(reals, kind, effect, grad_scale, FACTORS, dtype)
    window, block, key = mask_numbers(integers, seed)
    # from here on everything is counted from the chunk's part of the tensor, in 32 bits
    count, index = (stop - start).to(tl.int32), tl.load(row + OFFSET) + start
    p_ptr, g_ptr = pointer(row + PARAM, PARAM_DTYPE) + start, pointer(row + GRAD, GRAD_DTYPE) + start
    state_ptrs = ()
    for k in tl.static_range(STATES):
        state_ptrs = state_ptrs + (pointer(row + STATE + k, STATE_DTYPE) + start,)
    packed = pointer(row + PACKED_WORDS, tl.int32) + start // 32
    grad_count = tl.where(has_grad(row, kind, effect), count, 0)
    into_tile = (index % TILE).to(tl.int32)
    origin = block_origin(index, block)
    if OWN:
        table = block_table(row, kind, effect, origin[0], block, dtype)

    for base in range(-into_tile, count, NARROW * TILE):
        offset = base + tl.arange(0, NARROW)[:, None] * TILE + tl.arange(0, 32)[None, :]
        inside = (
            in_range(offset, count),
            in_range(offset + 32, count),
            in_range(offset + 64, count),
            in_range(offset + 96, count),
        )
        kept = narrow_kept(kind, offset, inside, index + base, packed, origin, window, key, KINDS, NARROW)
        if GAUSSIAN_BIT & KINDS:
            noise = narrow_noise(index + base, key, NARROW)
        if rounding is not None:
            drawn = narrow_words(index + base, random_key, VALUES, NARROW)
        for w in tl.static_range(4):
            factor = grad_factor
            if GAUSSIAN_BIT & KINDS:
                factor = (1 + std * noise[w]) * grad_factor
            random = ()
            if rounding is not None:
                random = narrow_random(drawn, w, VALUES)
            if OWN:
                mine = block_factors(table, blocks_on(offset + 32 * w, origin), inside[w] & kept[w], factors, FACTORS)
            else:
                mine = factors
            update_at(
                p_ptr + offset, g_ptr + offset, state_ptrs, offset, 32 * w, inside[w],
                in_range(offset + 32 * w, grad_count), kept[w], effect, factor, mine, random, RULE, STATES, dtype,
            )  # fmt: skip


@triton.jit
def update_strided(
    start, stop, row, integers, reals, rounding, kind, effect, seed, grad_scale,
    RULE: tl.constexpr, STATES: tl.constexpr, FACTORS: tl.constexpr,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, STATE_DTYPE: tl.constexpr, KINDS: tl.constexpr,
    OWN: tl.constexpr, DIMS: tl.constexpr, WIDE: tl.constexpr, STRIDED: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = arithmetic(PARAM_DTYPE)
    VALUES: tl.constexpr = rounded_values(STATES, STATE_DTYPE)
    if rounding is not None:
        random_key = rounding_key(rounding, seed)
    factors, grad_factor, std = numbers(reals, kind, effect, grad_scale, FACTORS, dtype)
    window, block, key = mask_numbers(integers, seed)
    offset = tl.load(row + OFFSET)
    p_ptr, g_ptr = pointer(row + PARAM, PARAM_DTYPE), pointer(row + GRAD, GRAD_DTYPE)
    state_ptrs = ()
    for k in tl.static_range(STATES):
        state_ptrs = state_ptrs + (pointer(row + STATE + k, STATE_DTYPE),)
    packed = pointer(row + PACKED_WORDS, tl.int32)
    number: tl.constexpr = tl.int64 if WIDE else tl.int32
    dims = dimensions(row, number, DIMS)
    if OWN:
        table = block_table(row, kind, effect, offset // block, block, dtype)

    start, stop = start.to(number), stop.to(number)
    grad_stop = tl.where(has_grad(row, kind, effect), stop, start)
    for base in range(start, stop, STRIDED):
        position = base + tl.arange(0, STRIDED)
        inside = position < stop
        p_at, g_at, steps, local = locate(position, dims, DIMS)
        index = offset + steps
        kept = strided_kept(kind, local, inside, index, packed, block, window, key, KINDS)
        factor = grad_factor
        if GAUSSIAN_BIT & KINDS:
            factor = (1 + std * strided_noise(index, key)) * grad_factor
        random = ()
        if rounding is not None:
            random = strided_random(index, random_key, VALUES)
        if OWN:
            mine = block_factors(table, index // block - offset // block, inside & kept, factors, FACTORS)
        else:
            mine = factors
        update_at(
            p_ptr + p_at, g_ptr + g_at, state_ptrs, p_at, 0, inside, position < grad_stop, kept, effect,
            factor, mine, random, RULE, STATES, dtype,
        )  # fmt: skip


@triton.jit
def update_at(
    p_ptr, g_ptr, state_ptrs, offset, SHIFT: tl.constexpr, inside, has_grad, kept, effect, grad_factor, factors,
    random, RULE: tl.constexpr, STATES: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """An element for each pointer of ``p_ptr`` and ``g_ptr``, SHIFT elements on; the states' is at ``offset``.

    ``has_grad``: ``inside``, or False where gradients are not read: one comparison says both.
    """
    live = inside & writes_state(kept, effect)
    p = tl.load(p_ptr + SHIFT, mask=live).to(dtype)
    g = tl.load(g_ptr + SHIFT, mask=has_grad & takes_grad(kept, effect), other=0).to(dtype)
    states = ()
    for k in tl.static_range(STATES):
        states = states + (tl.load(state_ptrs[k] + offset + SHIFT, mask=live).to(dtype),)
    p, states = RULE(p, g * grad_factor, states, factors)
    p = stored(p, p_ptr.dtype.element_ty, random, 0)
    tl.store(p_ptr + SHIFT, p, mask=inside & writes_param(kept, effect))
    for k in tl.static_range(STATES):
        new = stored(states[k], state_ptrs[k].dtype.element_ty, random, 1 + k)
        tl.store(state_ptrs[k] + offset + SHIFT, new, mask=live)


@triton.jit
def whole_passes(start, stop, TILES: tl.constexpr):
    """As many elements as whole wide passes take."""
    return (stop - start) // (TILES * TILE) * (TILES * TILE)


@triton.jit
def fits_wide(row, integers, kind, STATES: tl.constexpr, KINDS: tl.constexpr):
    """Are addresses aligned to 16 bytes, and shard and blocks to tiles?"""
    pointers = tl.load(row + PARAM) | tl.load(row + GRAD) | tl.load(row + PACKED_WORDS)
    for k in tl.static_range(STATES):
        pointers |= tl.load(row + STATE + k)
    fits = (pointers % 16 == 0) & (tl.load(row + OFFSET) % TILE == 0)
    if BLOCK_BIT & KINDS:
        fits &= (kind != BLOCK) | (tl.load(integers + BLOCK_SIZE) % TILE == 0)
    return fits


@triton.constexpr_function
def arithmetic(param_dtype):
    return tl.float64 if param_dtype == tl.float64 else tl.float32


@triton.jit
def numbers(reals, kind, effect, grad_scale, FACTORS: tl.constexpr, dtype: tl.constexpr):
    """A tensor's row of Batch.reals -> (the rule's factors, the gradient's, the noise's deviation), rounded once."""
    factors = ()
    for k in tl.static_range(FACTORS):
        factors = factors + (tl.load(reals + FACTOR + k).to(dtype),)
    grad_factor = tl.load(reals + GRAD_FACTOR)
    if grad_scale is not None:
        grad_factor = grad_factor / tl.load(grad_scale).to(tl.float64)
    std = tl.where((kind == GAUSSIAN) & (effect != UPDATE), tl.load(reals + NOISE_STD), 0.0)
    return factors, grad_factor.to(dtype), std.to(dtype)


@triton.jit
def block_table(row, kind, effect, number, block, dtype: tl.constexpr):
    """(has the tensor factors of its blocks' own?, a pointer to those of block ``number``)"""
    own = (tl.load(row + BLOCK_FACTORS) != 0) & (kind == BLOCK) & (effect == FREEZE)
    return own, pointer(row + BLOCK_FACTORS, dtype) + (number - tl.load(row + OFFSET) // block) * MAX_FACTORS


@triton.jit
def block_factors(table, on, live, factors, FACTORS: tl.constexpr):
    """Factors of the blocks ``on`` behind that of ``table``: their own, or ``factors`` where there are none."""
    own, first = table
    found = ()
    for k in tl.static_range(FACTORS):
        found = found + (tl.load(first + on * MAX_FACTORS + k, mask=tl.where(own, live, False), other=factors[k]),)
    return found


@triton.jit
def has_grad(row, kind, effect):
    """A gradient that is absent, or dropped as a whole, is not read."""
    return (tl.load(row + GRAD) != 0) & ((kind != DROP) | (effect == UPDATE))


@triton.jit
def in_range(offset, count):
    """0 <= offset < count (int32), in one comparison."""
    return offset.to(tl.uint32, bitcast=True) < count.to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["seed"])
def pack_kernel(
    chunks,
    layout,
    integers,
    seed: tl.uint64,
    KINDS: tl.constexpr,
    DIMS: tl.constexpr,
    WIDE: tl.constexpr,
    TILES: tl.constexpr,
    STRIDED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Arguments as :func:`update_kernel`'s; the layout's dimensions are in row-major order."""
    tensor, row, start, stop = chunk_at(chunks, layout, CHUNK)
    integers += tensor * INTEGERS
    seed = seed.to(tl.uint64)
    kind = resolve_kind(tl.load(integers + MASK_KIND), integers, seed, KINDS)
    window, block, key = mask_numbers(integers, seed)
    offset = tl.load(row + OFFSET)

    fast = is_linear(row) & (offset % TILE == 0) & (tl.load(row + PACKED_WORDS) % 16 == 0)
    if BLOCK_BIT & KINDS:
        fast &= (kind != BLOCK) | (block % TILE == 0)
    middle = start + tl.where(fast, (stop - start) // (TILES * TILE) * (TILES * TILE), 0)
    packed = aligned(row + PACKED_WORDS, tl.int32)
    origin = block_origin((offset + start) // TILE, tl.maximum(block // TILE, 1))
    for first in range(start, middle, TILES * TILE):
        first = tl.multiple_of(first, TILE)
        whole = whole_tiles_kept(kind, (first - start) // TILE, origin, window, key, KINDS, TILES)
        words = tiles_words(kind, whole, offset + first, window, key, KINDS, TILES)
        at = first // 32 + tl.arange(0, TILES)[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(packed + at, words)

    WORDS: tl.constexpr = STRIDED // 32
    packed = pointer(row + PACKED_WORDS, tl.int32)  # not aligned here
    number: tl.constexpr = tl.int64 if WIDE else tl.int32
    dims = dimensions(row, number, DIMS)
    for base in range(middle, stop, STRIDED):
        position = base + (tl.arange(0, WORDS)[:, None] * 32 + tl.arange(0, 32)[None, :]).to(tl.int64)
        inside = position < stop
        steps = position
        if DIMS > 0:
            _, _, located, _ = locate(position.to(number), dims, DIMS)
            steps = tl.where(is_linear(row), position, located)  # a linear tensor may reach beyond `number`
        index = offset + steps
        kept = inside & strided_kept(kind, position, inside, index, packed, block, window, key, KINDS)
        words = tl.sum(kept.to(tl.int32) << tl.arange(0, 32)[None, :], 1)
        first_bits = base + (tl.arange(0, WORDS) * 32).to(tl.int64)
        tl.store(packed + first_bits // 32, words, mask=first_bits < stop)
