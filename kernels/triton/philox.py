"""Philox4x32-10 on loaded values: counter words and key words in, four random words out.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import triton
import triton.language as tl


@triton.jit
def philox4x32(c0, c1, c2, c3, seed):
    """Counter words ``c0`` to ``c3`` (uint32 tensors or scalars) and a 64-bit ``seed`` -> four uint32 words."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        # one widening multiply gives both halves: half the multiplies of umulhi and mul
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product2 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product2 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product2.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)  # wraps by design
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def words_at(index, purpose: tl.constexpr, key):
    """The four words of the mask stream at 40-bit counter indices ``index`` (int64). ``key``: of draw.mask_numbers."""
    draw, id_low, id_high, seed = key
    c1 = (index >> 32).to(tl.uint32) | (id_high | purpose << 8)
    return philox4x32(index.to(tl.uint32), c1, draw, id_low, seed)


@triton.jit
def select(two_bits, four):
    """four[two_bits]; other bits of ``two_bits`` (uint32) are not looked at."""
    odd = two_bits & 1 != 0
    return tl.where(two_bits & 2 != 0, tl.where(odd, four[3], four[2]), tl.where(odd, four[1], four[0]))
