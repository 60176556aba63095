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


def z_of_cells(values, cells):
    """Of how evenly integers fill 0 to cells - 1."""
    expected = values.numel() / cells
    chi2 = ((torch.bincount(values, minlength=cells).double() - expected) ** 2 / expected).sum().item()
    return (chi2 - (cells - 1)) / math.sqrt(2 * (cells - 1))


def z_of_agreement(a, b, q):
    """Of how often two independent masks that keep with probability q agree."""
    return z_of_share(a == b, q * q + (1 - q) * (1 - q))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_kept_share(p, seed):
    assert abs(z_of_share(mask(p, seed=seed), 1 - p)) < Z


def test_random_numbers_are_uniform():
    """Chi-square over 256 equal cells of the upper byte and of the lower byte; its normal approximation."""
    random = mask_stream.element_random(torch.arange(N), **AT)
    for byte in (random >> 8, random & 0xFF):
        assert abs(z_of_cells(byte, 256)) < Z


def test_the_halves_of_a_word_are_independent():
    """Of a word's two numbers, all pairs of their upper four bits, and of their lower four, are equally frequent."""
    lower, upper = mask_stream.element_random(torch.arange(N), **AT).reshape(-1, 2).unbind(1)
    for shift in (12, 0):
        pairs = (lower >> shift & 15) * 16 + (upper >> shift & 15)
        assert abs(z_of_cells(pairs, 256)) < Z


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
@pytest.mark.parametrize("distance", [1, 2, 31, 32, 33, 64, 96, 127, 128, 129, 256])
def test_elements_are_independent(p, distance):
    """The halves of one word or of its neighbour (1), neighbouring counters (2), the words of one counter (32, 64, 96),
    the same place of neighbouring tiles (128)."""
    bits = mask(p)
    assert abs(z_of_agreement(bits[:-distance], bits[distance:], 1 - p)) < Z


def test_every_place_in_a_tile_keeps_its_share():
    bits = mask(0.3, 128 * 3000).reshape(-1, 128).double()
    z = (bits.sum(0) - 3000 * 0.7) / math.sqrt(3000 * 0.7 * 0.3)
    assert z.abs().max() < Z


def test_purposes_give_unrelated_numbers():
    """The same seed, draw and id, for elements, for blocks, for a layer, for rounding."""
    count = 40_000
    elements = mask_stream.element_random(torch.arange(count), **AT)
    blocks = mask_stream.block_random(torch.arange(0, 128 * count, 128), 128, **AT)
    rounding = [
        mask_stream.element_random(torch.arange(count), **AT, purpose=purpose)
        for purpose in mask_stream.Purpose
        if purpose.name.startswith("ROUND")
    ]
    assert len(rounding) == 3
    bits = [random < 2**15 for random in (elements, blocks, *rounding)]
    for i, a in enumerate(bits):
        for b in bits[:i]:
            assert abs(z_of_agreement(a, b, 0.5)) < Z
    # one number each of many draws
    draws = [{**AT, "draw": draw} for draw in range(2000)]
    layer = torch.tensor([mask_stream.layer_random(**at) for at in draws])
    first = torch.cat([mask_stream.element_random(torch.zeros(1, dtype=torch.int64), **at) for at in draws])
    assert abs(z_of_agreement(layer < 2**15, first < 2**15, 0.5)) < Z


def test_layer_draws():
    """24 layers over 2,000 steps: each layer's share, agreement of neighbouring layers and of neighbouring steps."""
    lo, span = mask_stream.bernoulli_window(0.3)
    at = [[{"seed": 5, "draw": d, "stream_id": layer} for layer in range(24)] for d in range(1, 2001)]
    kept = torch.tensor([[mask_stream.decide(mask_stream.layer_random(**a), lo, span) for a in step] for step in at])
    for layer in range(24):
        assert abs(z_of_share(kept[:, layer], 0.7)) < Z
    assert abs(z_of_agreement(kept[:, 1:], kept[:, :-1], 0.7)) < Z
    assert abs(z_of_agreement(kept[1:], kept[:-1], 0.7)) < Z


@pytest.mark.parametrize("block", [2, 7, 128, 384])
def test_block_masks(block):
    blocks = 6000
    bits = mask(0.4, blocks * block - block // 2, block=block)  # the last block is short
    whole = bits[: (blocks - 1) * block].reshape(-1, block)
    assert torch.equal(whole.all(1), whole.any(1))  # one decision for a block
    assert bits[(blocks - 1) * block :].unique().numel() == 1
    assert abs(z_of_share(whole[:, 0], 0.6)) < Z
    for distance in (1, 2, 4, 6, 8):
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
