"""Statistics of the masks, at fixed seeds.

Every test states its null hypothesis by a z-score and fails beyond Z = 5: with a correct generator a given seed
does so with probability 5.7e-7 per score, under 3e-4 for all scores of this file together. What is exact by
construction (partitions, shares that add up) is asserted exactly.
"""

import math

import pytest
import torch

from graddrop_fused import mask_stream

Z = 5.0
N = 200_000
AT = {"seed": 20240607, "draw": 3, "stream_id": 11}


def mask(p, numel=N, block=1, window=None, **at):
    return mask_stream.keep_mask((numel,), p, block=block, window=window, **{**AT, **at})


def z_of_share(bits, q):
    return (bits.double().sum().item() - bits.numel() * q) / math.sqrt(bits.numel() * q * (1 - q))


def z_of_agreement(a, b, q):
    """Of how often two independent masks that keep with probability q agree."""
    return z_of_share(a == b, q * q + (1 - q) * (1 - q))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_kept_share(p, seed):
    assert abs(z_of_share(mask(p, seed=seed), 1 - p)) < Z


def test_numbers_are_uniform():
    """Chi-square over 256 equal cells of the upper byte and of the lower byte; its normal approximation."""
    random = mask_stream.element_random(torch.arange(N), **AT)
    for byte in (random >> 8, random & 0xFF):
        counts = torch.bincount(byte, minlength=256).double()
        chi2 = ((counts - N / 256) ** 2 / (N / 256)).sum().item()
        assert abs(chi2 - 255) / math.sqrt(2 * 255) < Z


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    "other",
    [
        {"draw": 4},
        {"draw": 3 + 2**31},
        {"stream_id": 12},
        {"stream_id": 11 + 2**32},
        {"stream_id": 11 + 2**51},
        {"seed": 20240608},
        {"seed": 20240607 + 2**32},
    ],
    ids=str,
)
def test_masks_of_other_steps_parameters_and_seeds_are_independent(p, other):
    assert abs(z_of_agreement(mask(p), mask(p, **other), 1 - p)) < Z


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("distance", [1, 2, 3, 31, 32, 33, 64, 96, 127, 128, 129, 256])
def test_elements_are_independent(p, distance):
    """Neighbours; the same lane of the words of a tile (32, 64, 96); the same place of neighbouring tiles (128)."""
    bits = mask(p)
    assert abs(z_of_agreement(bits[:-distance], bits[distance:], 1 - p)) < Z


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_two_halves_of_a_word_are_independent(p):
    """Of masks, and of the numbers themselves: their correlation, and a chi-square over 16 x 16 cells."""
    bits = mask(p)
    assert abs(z_of_agreement(bits[0::2], bits[1::2], 1 - p)) < Z
    low, high = mask_stream.element_random(torch.arange(N), **AT).double().view(-1, 2).unbind(1)
    products = (low / 2**16 - 0.5) * (high / 2**16 - 0.5)  # variance 1 / 144
    assert abs(products.mean().item()) < Z / 12 / math.sqrt(N / 2)
    cells = torch.bincount((low // 4096 * 16 + high // 4096).long(), minlength=256).double()
    chi2 = ((cells - N / 512) ** 2 / (N / 512)).sum().item()
    assert abs(chi2 - 255) / math.sqrt(2 * 255) < Z


def test_every_place_in_a_tile_keeps_its_share():
    bits = mask(0.3, 128 * 3000).reshape(-1, 128).double()
    z = (bits.sum(0) - 3000 * 0.7) / math.sqrt(3000 * 0.7 * 0.3)
    assert z.abs().max() < Z


def test_purposes_are_independent():
    """The same seed, draw and stream id give unrelated numbers for elements, blocks and each kind of rounding."""
    index = torch.arange(20_000)
    drawn = {purpose: mask_stream.element_random(index, **AT, purpose=purpose) for purpose in (0, 4, 5, 6)}
    drawn["blocks"] = mask_stream.block_random(index * 128, 128, **AT)
    names = list(drawn)
    for i, first in enumerate(names):
        for second in names[:i]:
            assert abs(z_of_agreement(drawn[first] < 2**15, drawn[second] < 2**15, 0.5)) < Z


def test_layer_draws():
    """24 layers over 2,000 steps: each layer's share, agreement of neighbouring layers and of neighbouring steps."""
    lo, span = mask_stream.bernoulli_window(0.3)
    at = [[{"seed": 5, "draw": d, "stream_id": layer} for layer in range(24)] for d in range(1, 2001)]
    kept = torch.tensor([[mask_stream.decide(mask_stream.layer_random(**a), lo, span) for a in step] for step in at])
    for layer in range(24):
        assert abs(z_of_share(kept[:, layer], 0.7)) < Z
    assert abs(z_of_agreement(kept[:, 1:], kept[:, :-1], 0.7)) < Z
    assert abs(z_of_agreement(kept[1:], kept[:-1], 0.7)) < Z


@pytest.mark.parametrize("block", [2, 23, 128, 384])
def test_block_masks(block):
    blocks = 6000
    bits = mask(0.4, blocks * block - block // 2, block=block)  # the last block is short
    whole = bits[: (blocks - 1) * block].reshape(-1, block)
    assert torch.equal(whole.all(1), whole.any(1))  # one decision for a block
    assert bits[(blocks - 1) * block :].unique().numel() == 1
    assert abs(z_of_share(whole[:, 0], 0.6)) < Z
    for distance in (1, 2, 3, 4, 7, 8):
        assert abs(z_of_agreement(whole[:-distance, 0], whole[distance:, 0], 0.6)) < Z
    assert not torch.equal(bits, mask(0.4, bits.numel(), block=block, draw=4))


def test_gaussian_moments():
    """Mean, variance, third and fourth moment, and the products of the four normals that share a counter."""
    normals = mask_stream.gaussian(torch.arange(N // 128 * 128), **AT)
    n = normals.numel()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((normals**power).mean().item() - mean) < Z * math.sqrt(variance / n)
    words = normals.reshape(-1, 4, 32)
    for a in range(4):
        for b in range(a):
            product = words[:, a] * words[:, b]
            assert abs(product.mean().item()) < Z / math.sqrt(product.numel())
            squares = (words[:, a] ** 2 - 1) * (words[:, b] ** 2 - 1)  # variance 4
            assert abs(squares.mean().item()) < Z * 2 / math.sqrt(squares.numel())
    neighbours = normals[1:] * normals[:-1]
    assert abs(neighbours.mean().item()) < Z / math.sqrt(n - 1)
    assert abs(z_of_share(normals.abs() > 1.959963985, 0.05)) < Z


@pytest.mark.parametrize("block", [1, 23, 128])
@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 0.7, 0.9])
def test_toggle_activates_every_element_exactly_once_in_a_cycle(p, block):
    bounds = mask_stream.epoch_bounds(p)
    numel = 20_000 * (1 if block == 1 else 20)
    epochs = [mask(p, numel, block, window=(lo, hi - 1 - lo)) for lo, hi in zip(bounds[:-1], bounds[1:], strict=True)]
    assert torch.equal(torch.stack(epochs).sum(0), torch.ones(numel, dtype=torch.int64))
    for lo, hi, bits in zip(bounds[:-1], bounds[1:], epochs, strict=True):
        q = (hi - lo) / 2**16
        if q < 1:
            assert abs(z_of_share(bits[::block], q)) < Z


@pytest.mark.parametrize("p", [0.25, 0.7, 0.9])
def test_accumulate_only_ever_adds_elements(p):
    bounds = mask_stream.epoch_bounds(p)
    before = torch.zeros(N, dtype=torch.bool)
    for hi in bounds[1:]:
        now = mask(p, window=(0, hi - 1))
        assert (now | ~before).all()
        if hi < 2**16:
            assert abs(z_of_share(now, hi / 2**16)) < Z
            assert abs(z_of_share(now & ~before, 1 - p)) < Z
        before = now
    assert before.all()


def test_the_next_cycle_is_another_partition():
    bounds = mask_stream.epoch_bounds(0.75)
    first = [mask(0.75, window=(lo, hi - 1 - lo)) for lo, hi in zip(bounds[:-1], bounds[1:], strict=True)]
    again = [mask(0.75, window=(lo, hi - 1 - lo), draw=4) for lo, hi in zip(bounds[:-1], bounds[1:], strict=True)]
    same = torch.stack(first).int().argmax(0) == torch.stack(again).int().argmax(0)
    assert abs(z_of_share(same, 0.25)) < Z
