"""The mask stream against the stored known answers and against a second implementation in Python integers."""

import json
import math

import independent
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import AWKWARD, KNOWN_ANSWERS

from graddrop_fused import mask_stream, names

WORD = st.integers(0, 2**32 - 1)
HALF = st.integers(0, 2**16 - 1)
SEED = st.integers(0, 2**64 - 1)
STREAM_ID = st.integers(0, 2**52 - 1)
ELEMENTS = st.lists(st.integers(0, 300) | st.integers(0, 2**42 - 1), min_size=1, max_size=8)


def point_of(row):
    return {key: row[key] for key in ("seed", "draw", "stream_id")}


@pytest.mark.parametrize("row", KNOWN_ANSWERS["philox"], ids=("zeros", "ones", "pi"))
def test_published_philox_vectors(row):
    assert mask_stream.philox4x32(torch.tensor(row["counter"]), torch.tensor(row["key"])).tolist() == row["output"]
    assert independent.philox(row["counter"], row["key"]) == row["output"]


def test_stored_answers_are_those_of_the_independent_implementation():
    assert json.loads(json.dumps(independent.known_answers())) == KNOWN_ANSWERS


@pytest.mark.parametrize("row", KNOWN_ANSWERS["names"], ids=lambda row: row["name"] or "empty")
def test_known_stream_ids(row):
    assert names.stream_id(row["name"]) == row["stream_id"]
    assert names.stream_id(f"module._orig_mod.{row['name']}") == row["stream_id"] or row["name"] == ""


@pytest.mark.parametrize("row", KNOWN_ANSWERS["element_random"], ids=lambda row: hex(row["seed"]))
def test_known_element_numbers(row):
    assert mask_stream.element_random(torch.tensor(row["elements"]), **point_of(row)).tolist() == row["random"]


@pytest.mark.parametrize("row", KNOWN_ANSWERS["rounding"], ids=lambda row: f"purpose-{row['purpose']}")
def test_known_rounding_numbers(row):
    purpose = mask_stream.Purpose(row["purpose"])
    drawn = mask_stream.element_random(torch.tensor(row["elements"]), **point_of(row), purpose=purpose)
    assert drawn.tolist() == row["random"]


@pytest.mark.parametrize("row", KNOWN_ANSWERS["layer_random"], ids=lambda row: hex(row["seed"]))
def test_known_layer_numbers(row):
    assert mask_stream.layer_random(**point_of(row)) == row["random"]


@pytest.mark.parametrize("block", [1, 23, 128, 384])
@pytest.mark.parametrize("row", KNOWN_ANSWERS["block_random"], ids=lambda row: hex(row["seed"]))
def test_known_block_numbers(row, block):
    for within in (0, block - 1):
        elements = torch.tensor(row["blocks"]) * block + within
        assert mask_stream.block_random(elements, block, **point_of(row)).tolist() == row["random"]


@pytest.mark.parametrize("row", KNOWN_ANSWERS["normals"], ids=lambda row: hex(row["seed"]))
def test_known_normals(row):
    values = mask_stream.gaussian(torch.tensor(row["elements"]), **point_of(row))
    torch.testing.assert_close(values, torch.tensor(row["values"], dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("row", KNOWN_ANSWERS["bernoulli"], ids=lambda row: str(row["p"]))
def test_known_bernoulli_windows(row):
    lo, span = mask_stream.bernoulli_window(row["p"])
    assert (lo, span) == (row["lo"], row["span"])
    assert mask_stream.rescale(span) == 2**16 / (2**16 - lo)


@pytest.mark.parametrize("row", KNOWN_ANSWERS["epoch_bounds"], ids=lambda row: str(row["p"]))
def test_known_epoch_bounds(row):
    assert mask_stream.epoch_bounds(row["p"]) == row["bounds"]


@pytest.mark.parametrize("row", KNOWN_ANSWERS["masks"], ids=lambda row: f"{row['shape']}-{row['block']}-{row['lo']}")
def test_known_masks(row):
    window = row["lo"], row["span"]
    mask = mask_stream.keep_mask(row["shape"], 0.5, window=window, block=row["block"], **point_of(row))
    assert mask.shape == torch.Size(row["shape"])
    assert mask_stream.pack_mask(mask).tolist() == row["packed"]


@given(counter=st.tuples(WORD, WORD, WORD, WORD), key=st.tuples(WORD, WORD))
def test_philox(counter, key):
    assert mask_stream.philox4x32(torch.tensor(counter), torch.tensor(key)).tolist() == independent.philox(counter, key)


def test_philox_broadcasts_counters_and_keys():
    counters = torch.randint(2**32, (5, 1, 4), generator=torch.Generator().manual_seed(0))
    keys = torch.randint(2**32, (3, 2), generator=torch.Generator().manual_seed(1))
    words = mask_stream.philox4x32(counters, keys)
    assert words.shape == (5, 3, 4)
    for i in range(5):
        for j in range(3):
            assert words[i, j].tolist() == independent.philox(counters[i, 0].tolist(), keys[j].tolist())


@given(seed=SEED, draw=WORD, stream_id=STREAM_ID, elements=ELEMENTS, block=st.integers(1, 2000))
def test_random_numbers(seed, draw, stream_id, elements, block):
    at = {"seed": seed, "draw": draw, "stream_id": stream_id}
    e = torch.tensor(elements)
    for purpose in (0, 4, 5, 6):
        expected = [independent.element_random(i, **at, purpose=purpose) for i in elements]
        assert mask_stream.element_random(e, **at, purpose=mask_stream.Purpose(purpose)).tolist() == expected
    assert mask_stream.layer_random(**at) == independent.layer_random(**at)
    expected = [independent.block_random(i // block, **at) for i in elements]
    assert mask_stream.block_random(e, block, **at).tolist() == expected
    normals = torch.tensor([independent.normal(i, **at) for i in elements], dtype=torch.float64)
    torch.testing.assert_close(mask_stream.gaussian(e, **at), normals, rtol=1e-9, atol=1e-9)


@given(random=HALF, lo=HALF, span=HALF)
def test_decision(random, lo, span):
    nearby = [r % 2**16 for near in (random, lo, lo + span) for r in (near - 1, near, near + 1)]
    expected = [independent.kept(r, lo, span) for r in nearby]
    assert mask_stream.decide(torch.tensor(nearby), lo, span).tolist() == expected
    assert [mask_stream.decide(r, lo, span) for r in nearby] == expected


@given(p=st.floats(0.0, 0.999) | st.integers(0, 2**17 - 2).map(lambda k: k / 2**17))
def test_bernoulli_window(p):
    assert mask_stream.bernoulli_window(p) == independent.bernoulli(p)


@given(p=st.floats(0.0, 0.999) | st.integers(0, 2**16 - 1).map(lambda k: k / 2**16))
def test_epoch_bounds(p):
    bounds = mask_stream.epoch_bounds(p)
    assert bounds == independent.epoch_bounds(p)
    assert bounds[0] == 0 and bounds[-1] == 2**16
    assert all(a < b for a, b in zip(bounds, bounds[1:], strict=False))


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.9, 0.97])
def test_numpy_s_p_is_python_s(kind, p):
    numpy = pytest.importorskip("numpy", reason="numpy is not installed: torch works without it")
    p = getattr(numpy, kind)(p)
    for function in (mask_stream.bernoulli_window, mask_stream.epoch_bounds):
        assert function(p) == function(float(p))


def test_no_two_of_200000_expert_names_collide():
    """Ids of 32 bits gave three pairs on a model of 60 layers x 384 experts x 3 matrices."""
    called = [
        f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight"
        for layer in range(174)
        for expert in range(384)
        for matrix in ("gate_proj", "up_proj", "down_proj")
    ]
    assert len(called) > 200_000
    names.check_distinct("parameters", ((name, names.stream_id(name)) for name in called))


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan, math.inf, 1 - 2.0**-18])
def test_p_out_of_range(p):
    for function in (mask_stream.bernoulli_window, mask_stream.epoch_bounds):
        with pytest.raises(ValueError, match=r"p must be in \[0, 1\)"):
            function(p)


def test_an_epoch_whose_window_would_be_empty_is_refused():
    with pytest.raises(ValueError, match=r"p must leave a keep probability of at least 2\*\*-16"):
        mask_stream.epoch_bounds(1 - 0.9 * 2.0**-16)


@pytest.mark.parametrize(
    "wrong",
    [{"seed": -1}, {"seed": 2**64}, {"draw": 2**32}, {"stream_id": -1}, {"stream_id": 2**52}, {"block": 0}],
    ids=str,
)
def test_keep_mask_names_what_is_out_of_range(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be .*, got {wrong[name]}"):
        mask_stream.keep_mask((3,), 0.5, **wrong)


def test_philox_refuses_other_words():
    words, key = torch.zeros(4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match="counter must be an int64 tensor .*, got torch.int32"):
        mask_stream.philox4x32(words.int(), key)
    with pytest.raises(ValueError, match=r"key must have shape \(..., 2\), got \(3,\)"):
        mask_stream.philox4x32(words, key[[0, 0, 0]])
    for value in (-1, 2**32):
        with pytest.raises(ValueError, match=r"counter must hold values in \[0, 2\*\*32\)"):
            mask_stream.philox4x32(words + value, key)


@pytest.mark.parametrize("numel", AWKWARD)
def test_packing(numel):
    bits = torch.rand(numel, generator=torch.Generator().manual_seed(numel)) < 0.5
    words = mask_stream.pack_mask(bits)
    assert words.dtype == torch.int32 and words.tolist() == independent.pack(bits.tolist())
    assert torch.equal(mask_stream.unpack_mask(words, (numel,)), bits)


def test_packing_is_row_major_whatever_the_strides():
    bits = torch.rand(23, 17, generator=torch.Generator().manual_seed(0)) < 0.5
    words = mask_stream.pack_mask(bits.t())
    assert words.tolist() == independent.pack(bits.t().contiguous().view(-1).tolist())
    assert torch.equal(mask_stream.unpack_mask(words, (17, 23)), bits.t())


def test_packing_refuses_what_it_cannot_pack():
    with pytest.raises(TypeError, match="mask must be a bool tensor, got torch.float32"):
        mask_stream.pack_mask(torch.ones(3))
    with pytest.raises(TypeError, match="words must be an int32 tensor, got torch.int64"):
        mask_stream.unpack_mask(torch.ones(1, dtype=torch.int64), (3,))
    with pytest.raises(ValueError, match=r"words must have shape \(2,\)"):
        mask_stream.unpack_mask(torch.ones(1, dtype=torch.int32), (33,))


def test_a_mask_does_not_depend_on_how_it_is_cut(monkeypatch):
    whole = mask_stream.keep_mask((17, 123), 0.3, seed=5, draw=2, stream_id=9)
    monkeypatch.setattr(mask_stream, "_CHUNK", 100)
    assert torch.equal(whole, mask_stream.keep_mask((17, 123), 0.3, seed=5, draw=2, stream_id=9))
    assert torch.equal(whole.view(-1), mask_stream.keep_mask((17 * 123,), 0.3, seed=5, draw=2, stream_id=9))
